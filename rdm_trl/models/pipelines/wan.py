# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Wan 2.1 text-to-video."""

import torch
from diffusers import WanPipeline

from .base import ATTENTION_LAYERS
from .video import VideoFamily


class WanFamily(VideoFamily):
    """Conditions: `prompt_embeds` (B, 512, D), padded with zeros. Latents are (C, F', H', W')."""

    pipeline_class = WanPipeline
    lora_target_modules = [*ATTENTION_LAYERS, "ffn.net.0.proj", "ffn.net.2"]
    frame_rate = 16

    def check_conditions(self):
        super().check_conditions()
        config = self.pipeline.config
        if self.pipeline.transformer_2 is not None or config.boundary_ratio is not None:
            raise ValueError(
                "The WanPipeline has two experts (`transformer_2`, `boundary_ratio`: Wan 2.2 A14B), each for a part "
                "of the noise levels; a student here is one network: take a pipeline with one, as Wan 2.1 has."
            )
        if config.expand_timesteps:
            raise ValueError("The WanPipeline has `expand_timesteps` (Wan 2.2 TI2V 5B), which is not supported.")
        if self.denoiser.config.image_dim is not None:
            raise ValueError("The transformer has `image_dim`: an image-to-video model, which no prompt conditions.")

    def compression(self):
        return self.pipeline.vae_scale_factor_temporal, self.pipeline.vae_scale_factor_spatial

    def size_multiple(self):
        return self.multiple_of(16, self.denoiser.config.patch_size[1])

    def shape_of_latents(self):
        return self.denoiser.config.in_channels, *self.latent_size()

    @torch.no_grad()
    def encode_prompts(self, prompts):
        # The call's longest prompt is another than the method's.
        limit = {"max_sequence_length": 512, **self.prompt_limit}
        embeds, _ = self.pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, **limit)
        return {"prompt_embeds": embeds}

    def example_condition(self, batch_size):
        shape = batch_size, 512, self.denoiser.config.text_dim
        return {"prompt_embeds": torch.empty(shape, device="meta", dtype=self.dtype)}

    def denoise(self, denoiser, x_t, timesteps, condition):
        return denoiser(
            hidden_states=x_t.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=condition["prompt_embeds"].to(self.dtype),
        )

    def decode_latents(self, latents):
        vae = self.pipeline.vae
        latents = latents.to(vae.dtype)
        mean, std = (
            latents.new_tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
        )
        return vae.decode(latents * std + mean, return_dict=False)[0]
