# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Wan 2.1, and 2.2 with one network: text-to-video, and image-to-video, whose first frame is given."""

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from diffusers.utils import is_ftfy_available

from .base import ATTENTION_LAYERS
from .editing import EditingFamily
from .video import VideoFamily


class WanFamily(VideoFamily):
    """
    Conditions: `prompt_embeds` (B, 512, D), padded with zeros. Latents are (C, F', H', W'). Where the pipeline has
    `expand_timesteps` (Wan 2.2 TI2V 5B), each token has a time of its own.
    """

    pipeline_class = WanPipeline
    lora_target_modules = [*ATTENTION_LAYERS, "ffn.net.0.proj", "ffn.net.2"]
    frame_rate = 16

    def __init__(self, pipeline, height=None, width=None):
        super().__init__(pipeline, height, width)
        if pipeline.config.expand_timesteps:
            self.frame_rate = 24

    def check_conditions(self):
        super().check_conditions()
        config, name = self.pipeline.config, type(self.pipeline).__name__
        if self.pipeline.transformer_2 is not None or config.boundary_ratio is not None:
            raise ValueError(
                f"The {name} has two experts (`transformer_2`, `boundary_ratio`: Wan 2.2 A14B), each for a part of "
                "the noise levels; a student here is one network: take a pipeline with one (Wan 2.1, 2.2 TI2V 5B)."
            )
        if self.denoiser.config.image_dim is not None and not self.takes_image:
            raise ValueError(
                "The transformer has `image_dim`: an image-to-video model. Load it as a WanImageToVideoPipeline."
            )

    def compression(self):
        return self.pipeline.vae_scale_factor_temporal, self.pipeline.vae_scale_factor_spatial

    def size_multiple(self):
        return self.multiple_of(16, self.denoiser.config.patch_size[1])

    def shape_of_latents(self):
        return self.denoiser.config.out_channels, *self.latent_size()

    @torch.no_grad()
    def encode_prompts(self, prompts):
        # The call's longest prompt is another than the method's.
        limit = {"max_sequence_length": 512, **self.prompt_limit}
        embeds, _ = self.pipeline.encode_prompt([*map(str, prompts)], do_classifier_free_guidance=False, **limit)
        return {"prompt_embeds": embeds}

    def example_condition(self, batch_size):
        shape = batch_size, 512, self.denoiser.config.text_dim
        return {"prompt_embeds": torch.empty(shape, device="meta", dtype=self.dtype)}

    def token_times(self, timesteps: torch.Tensor) -> torch.Tensor:
        """`timesteps` (B,) as the denoiser takes them: with `expand_timesteps` (B, L), one for each token."""
        if not self.pipeline.config.expand_timesteps:
            return timesteps
        (frames, height, width), (_, rows, columns) = self.latent_size(), self.denoiser.config.patch_size
        return timesteps[:, None].expand(-1, frames * (height // rows) * (width // columns))

    def denoise(self, denoiser, x_t, timesteps, condition):
        return denoiser(
            hidden_states=x_t.to(self.dtype),
            timestep=self.token_times(timesteps),
            encoder_hidden_states=condition["prompt_embeds"].to(self.dtype),
        )

    def decode_latents(self, latents):
        vae = self.pipeline.vae
        latents = latents.to(vae.dtype)
        mean, std = (
            latents.new_tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
        )
        return vae.decode(latents * std + mean, return_dict=False)[0]


class WanImageToVideoFamily(EditingFamily, WanFamily):
    """
    Conditions: as above, and the first frame. `reference` (B, 4 + C, F', H', W'), the mask of the given frames and
    their latents, is what the denoiser sees beside the noisy latents, and `image_embeds` (B, L', D') are the image
    encoder's, where the model has one (2.1). With `expand_timesteps` `reference` (B, C, 1, H', W') is the first
    frame's latents, which stand in the place of the noisy ones, at time 0.
    """

    pipeline_class = WanImageToVideoPipeline
    takes_one_prompt = True
    processor_name = "video_processor"
    pipeline_tag = "image-to-video"
    show_import = "from diffusers.utils import export_to_video, load_image\n"

    def __init__(self, pipeline, height=None, width=None):
        super().__init__(pipeline, height, width)
        if self.denoiser.config.image_dim is not None:
            # Of the image encoder's part. A LoRA without them is given empty ones by diffusers where it is loaded.
            self.lora_target_modules = [*self.lora_target_modules, "add_k_proj", "add_v_proj"]

    def check_conditions(self):
        super().check_conditions()
        if not is_ftfy_available():
            raise ImportError(
                'diffusers\' WanImageToVideoPipeline cleans prompts by ftfy: `pip install "rdm_trl[video]"`.'
            )
        if self.denoiser.config.image_dim is not None and self.pipeline.image_encoder is None:
            raise ValueError(
                "The transformer has `image_dim`, and the pipeline no `image_encoder`: load it with both."
            )

    @property
    def processor(self):
        return self.pipeline.video_processor

    def encode_picture(self, picture):
        pipeline, device = self.pipeline, self.pipeline.vae.device
        size = self.height, self.width, self.num_frames
        noise = torch.empty(1, *self.latent_shape, device=device)  # left alone
        pixels = self.pixels_of(picture).to(device, torch.float32)
        _, reference, *_ = pipeline.prepare_latents(
            pixels, 1, self.latent_shape[0], *size, torch.float32, device, latents=noise
        )
        found = {"reference": reference}
        if self.denoiser.config.image_dim is not None:
            found["image_embeds"] = pipeline.encode_image(picture, device)
        return found

    def encode_negative_prompts(self, prompts):
        return WanFamily.encode_prompts(self, prompts)  # of words alone

    def halves(self, denoise, x_t, timesteps, condition, negative):
        return super().halves(denoise, x_t, timesteps, condition, {**condition, **negative})

    def example_condition(self, batch_size):
        config, (channels, frames, height, width) = self.denoiser.config, self.latent_shape
        expands = self.pipeline.config.expand_timesteps
        shape = (channels, 1, height, width) if expands else (config.in_channels - channels, frames, height, width)
        found = {"reference": torch.empty(batch_size, *shape, device="meta")}
        if config.image_dim is not None:
            seen = self.pipeline.image_encoder.config
            shape = batch_size, (seen.image_size // seen.patch_size) ** 2 + 1, config.image_dim
            found["image_embeds"] = torch.empty(shape, device="meta", dtype=self.dtype)
        return {**super().example_condition(batch_size), **found}

    def token_times(self, timesteps):
        times = super().token_times(timesteps)
        if times.ndim == 1:
            return times
        given = times.shape[1] // self.latent_shape[1]
        return torch.cat([torch.zeros_like(times[:, :given]), times[:, given:]], 1)

    def denoise(self, denoiser, x_t, timesteps, condition):
        reference, embeds = condition["reference"].to(x_t), condition.get("image_embeds")
        stands_in = self.pipeline.config.expand_timesteps
        joined = torch.cat([reference, x_t[:, :, 1:]], 2) if stands_in else torch.cat([x_t, reference], 1)
        output = denoiser(
            hidden_states=joined.to(self.dtype),
            timestep=self.token_times(timesteps),
            encoder_hidden_states=condition["prompt_embeds"].to(self.dtype),
            encoder_hidden_states_image=None if embeds is None else embeds.to(self.dtype),
        )
        if not stands_in:
            return output
        # The given frame ends as what it is: that is predicted of it, at every noise level.
        sigmas = (timesteps / self.pipeline.scheduler.config.num_train_timesteps).view(-1, 1, 1, 1, 1)
        return torch.cat([(x_t[:, :, :1] - reference) / sigmas, output[:, :, 1:].to(x_t)], 2)

    def call_arguments(self, prompts, guidance_scale, negative_prompt=""):
        arguments = super().call_arguments(prompts, guidance_scale, negative_prompt)
        return {**arguments, "image": arguments["image"][0]}
