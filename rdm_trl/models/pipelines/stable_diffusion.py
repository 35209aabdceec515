# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Stable Diffusion 1.x and 2.x, the embedded teacher, and Stable Diffusion XL."""

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from .base import ATTENTION_LAYERS, FEED_FORWARD_LAYERS, PipelineFamily


# Those of LCM-LoRA.
UNET_LAYERS = [
    *ATTENTION_LAYERS,
    "proj_in",
    "proj_out",
    *FEED_FORWARD_LAYERS,
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
]


class StableDiffusionFamily(PipelineFamily):
    pipeline_class = StableDiffusionPipeline
    denoiser_name = "unet"
    lora_target_modules = UNET_LAYERS
    takes_timesteps = True

    def __init__(self, pipeline: DiffusionPipeline, height: int | None = None, width: int | None = None):
        super().__init__(pipeline, height, width)
        taken, given = self.denoiser.config.in_channels, self.denoiser.config.out_channels
        if not taken == given == pipeline.vae.config.latent_channels:
            raise ValueError(
                f"The pipeline's denoiser maps {taken} channels to {given}, its VAE has "
                f"{pipeline.vae.config.latent_channels}: inpainting and editing models are not supported."
            )

    def own_size(self):
        size, factor = self.denoiser.config.sample_size, self.pipeline.vae_scale_factor
        height, width = (size, size) if isinstance(size, int) else size
        return height * factor, width * factor

    def size_multiple(self):
        return 8  # what the pipeline's call asks for, whatever its VAE

    def check_size(self):
        if self.size:
            super().check_size()

    @torch.no_grad()
    def encode_prompts(self, prompts):
        embeds, _ = self.pipeline.encode_prompt(
            prompts, self.pipeline._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds}

    def denoise(self, denoiser, x_t, timesteps, condition):
        x_t = x_t.to(self.dtype)
        return denoiser(x_t, timesteps, encoder_hidden_states=condition["prompt_embeds"])


class StableDiffusionXLFamily(StableDiffusionFamily):
    """Conditions: `prompt_embeds` (B, L, D), `pooled_prompt_embeds` (B, D') and `time_ids` (B, 6)."""

    pipeline_class = StableDiffusionXLPipeline

    def own_size(self):
        return PipelineFamily.own_size(self)

    def time_ids(self, embeds: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        encoder = self.pipeline.text_encoder_2
        size = (self.height, self.width)
        time_ids = self.pipeline._get_add_time_ids(
            size,
            (0, 0),
            size,
            dtype=embeds.dtype,
            text_encoder_projection_dim=pooled.shape[-1] if encoder is None else encoder.config.projection_dim,
        )
        return time_ids.to(embeds.device).expand(len(embeds), -1)

    @torch.no_grad()
    def encode_prompts(self, prompts):
        embeds, _, pooled, _ = self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "time_ids": self.time_ids(embeds, pooled)}

    @torch.no_grad()
    def encode_negative_prompts(self, prompts):
        # Without a negative prompt the pipeline may guide away from zeros (`force_zeros_for_empty_prompt`).
        _, embeds, _, pooled = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=True, negative_prompt=prompts if any(prompts) else None
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "time_ids": self.time_ids(embeds, pooled)}

    def call_arguments(self, prompts, guidance_scale, negative_prompt=""):
        arguments = super().call_arguments(prompts, guidance_scale, negative_prompt)
        if not negative_prompt:
            arguments.pop("negative_prompt", None)
        return arguments

    def denoise(self, denoiser, x_t, timesteps, condition):
        return denoiser(
            x_t.to(self.dtype),
            timesteps,
            encoder_hidden_states=condition["prompt_embeds"],
            added_cond_kwargs={"text_embeds": condition["pooled_prompt_embeds"], "time_ids": condition["time_ids"]},
        )

    def decode(self, latents):
        config = self.pipeline.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return super().decode(latents)
        mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return super().decode(latents * std + mean * config.scaling_factor)
