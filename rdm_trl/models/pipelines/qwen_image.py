# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Qwen-Image, and Qwen-Image-Edit, which edits images."""

import numpy as np
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from ...prompts import PicturePrompt
from .base import ATTENTION_LAYERS, PipelineFamily, dynamic_shift, normalized_guidance, pad_prompts
from .editing import EditingFamily


class QwenImageFamily(PipelineFamily):
    """
    Latents are packed, (H/2 * W/2, 4 C). Conditions: `prompt_embeds` (B, 512, D), padded, and
    `prompt_attention_mask` (B, 512).
    """

    pipeline_class = QwenImagePipeline
    lora_target_modules = [
        *ATTENTION_LAYERS,
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
        "img_mod.1",
        "txt_mod.1",
    ]

    def size_multiple(self):
        return self.pipeline.vae_scale_factor * 2

    def shape_of_latents(self):
        multiple = self.size_multiple()
        return (self.height // multiple) * (self.width // multiple), self.denoiser.config.in_channels

    def grid(self, num_steps):
        mu = dynamic_shift(calculate_shift, self.pipeline.scheduler, self.latent_shape[0])
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": mu}

    def prompt_length(self) -> int:
        """Tokens that every prompt is padded to."""
        return 512

    def embed(self, prompts: list[str]) -> list[torch.Tensor]:
        """Each prompt's embedding (L, D), of its own length."""
        embeds, mask = self.pipeline.encode_prompt(prompts, **{"max_sequence_length": 512, **self.prompt_limit})
        lengths = [embeds.shape[1]] * len(prompts) if mask is None else mask.sum(1).tolist()
        return [row[:length] for row, length in zip(embeds, lengths, strict=True)]

    @torch.no_grad()
    def encode_prompts(self, prompts):
        return pad_prompts(self.embed(prompts), self.prompt_length())

    def example_condition(self, batch_size):
        # Its lengths are read: the mask is a real tensor, of prompts as long as they may be.
        shape = batch_size, self.prompt_length()
        embeds = torch.empty(*shape, self.denoiser.config.joint_attention_dim, device="meta", dtype=self.dtype)
        return {"prompt_embeds": embeds, "prompt_attention_mask": torch.ones(shape, dtype=torch.bool)}

    def image_shapes(self) -> list[tuple[int, int, int]]:
        """Frames, rows and columns of the tokens that the denoiser is given beside the prompt's."""
        multiple = self.size_multiple()
        return [(1, self.height // multiple, self.width // multiple)]

    def denoise(self, denoiser, x_t, timesteps, condition):
        mask, dtype = condition["prompt_attention_mask"], self.dtype
        longest = mask.sum(1).max()
        return denoiser(
            hidden_states=x_t.to(dtype),
            timestep=timesteps.to(dtype) / 1000,  # as the pipeline rounds it
            encoder_hidden_states_mask=mask[:, :longest].to(x_t.device),
            encoder_hidden_states=condition["prompt_embeds"][:, :longest],
            img_shapes=[self.image_shapes()] * len(x_t),
        )

    def combine(self, conditional, unconditional, guidance_scale):
        return normalized_guidance(conditional, unconditional, guidance_scale)

    def decode(self, latents):
        vae, factor = self.pipeline.vae, self.pipeline.vae_scale_factor
        latents = self.pipeline._unpack_latents(latents, self.height, self.width, factor).to(vae.dtype)
        mean, std = (
            latents.new_tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
        )
        images = vae.decode(latents * std + mean, return_dict=False)[0][:, :, 0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images):
        config = self.pipeline.vae.config
        latents = self.encode_pixels(images[:, :, None])
        mean, std = (latents.new_tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        latents = ((latents - mean) / std).transpose(1, 2)
        return self.pipeline._pack_latents(latents, len(latents), *latents.shape[2:])

    def call_arguments(self, prompts, guidance_scale, negative_prompt=""):
        arguments = super().call_arguments(prompts, guidance_scale, negative_prompt)
        return {"true_cfg_scale": arguments.pop("guidance_scale"), **arguments}


class QwenImageEditFamily(EditingFamily, QwenImageFamily):
    """
    Conditions: as above, the prompt's embeddings with those of the image in them, and `reference` (B, L', 4 C). The
    image is of about a million pixels, in the run's aspect. Negative prompts are encoded with each image too: with
    guidance a condition has `negative_prompt_embeds` and `negative_prompt_attention_mask` of its own.
    """

    pipeline_class = QwenImageEditPipeline
    dimensions = pipeline_qwenimage_edit  # the module whose rule for sizes the call follows

    def own_picture_size(self, area: int) -> tuple[int, int]:
        """Height and width that the pipeline gives an image of the run's aspect, and leaves such an image."""
        height, width = self.height, self.width
        for _ in range(4):  # it rounds, and so it may change the aspect once more
            width, height = self.dimensions.calculate_dimensions(area, width / height)[:2]
        return height, width

    def picture_size(self):
        return self.own_picture_size(1024 * 1024)

    def seen_size(self) -> tuple[int, int]:
        """Height and width of the image that is encoded with the prompt."""
        return self.picture_size()

    def limit_prompts(self, max_sequence_length):
        if max_sequence_length is not None:
            name = type(self.pipeline).__name__
            raise ValueError(f"`max_sequence_length` is without effect on {name}, which cuts no prompt.")

    def prompt_length(self):
        processor = self.pipeline.processor.image_processor
        patches = processor.get_number_of_image_patches(*self.seen_size(), {})
        return 512 + patches // processor.merge_size**2

    def embed(self, prompts):
        # One by one: each is more than a thousand tokens for a large encoder.
        found, pictures = [], self.pictures_of(prompts)
        for prompt, picture in zip(prompts, pictures, strict=True):
            seen = self.pipeline.image_processor.resize(picture, *self.seen_size())
            found.append(self.pipeline.encode_prompt(str(prompt), image=[seen])[0][0])
            if len(found[-1]) > self.prompt_length():
                raise ValueError(f"The prompt {str(prompt)!r} is longer than 512 tokens.")
        return found

    @torch.no_grad()
    def encode_own_negatives(self, prompts, negative_prompt):
        negative = [PicturePrompt(negative_prompt, prompt.image) for prompt in prompts]
        condition = pad_prompts(self.embed(negative), self.prompt_length())
        return {f"negative_{key}": value for key, value in condition.items()}

    def encode_negative_prompts(self, prompts):
        return {}  # they are in each condition

    def halves(self, denoise, x_t, timesteps, condition, negative):
        own = {key.removeprefix("negative_"): v for key, v in condition.items() if key.startswith("negative_")}
        condition = {key: value for key, value in condition.items() if not key.startswith("negative_")}
        return super().halves(denoise, x_t, timesteps, condition, {**condition, **own})

    def example_condition(self, batch_size):
        return {**super().example_condition(batch_size), "reference": self.example_reference(batch_size)}

    def pixels_of(self, picture):
        return super().pixels_of(picture)[:, :, None]

    def image_shapes(self):
        return [*super().image_shapes(), (1, *self.reference_size())]


class QwenImageEditPlusFamily(QwenImageEditFamily):
    """As above, with one image; the one that is encoded with the prompt is smaller."""

    pipeline_class = QwenImageEditPlusPipeline
    dimensions = pipeline_qwenimage_edit_plus
    takes_one_prompt = True

    def picture_size(self):
        return self.own_picture_size(pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE)

    def seen_size(self):
        height, width = self.picture_size()
        area = pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE
        width, height = pipeline_qwenimage_edit_plus.calculate_dimensions(area, width / height)
        return height, width
