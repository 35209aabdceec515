# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Stable Diffusion 3 and 3.5."""

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from .base import ATTENTION_LAYERS, FEED_FORWARD_LAYERS, PipelineFamily, dynamic_shift


class StableDiffusion3Family(PipelineFamily):
    """Conditions: `prompt_embeds` (B, L, D) and `pooled_prompt_embeds` (B, D')."""

    pipeline_class = StableDiffusion3Pipeline
    lora_target_modules = [
        *ATTENTION_LAYERS,
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        *FEED_FORWARD_LAYERS,
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "norm1.linear",
        "norm1_context.linear",
    ]

    def size_multiple(self):
        return self.pipeline.vae_scale_factor * self.pipeline.patch_size

    def grid(self, num_steps):
        if not self.pipeline.scheduler.config.get("use_dynamic_shifting"):
            return {}
        patch_size, (_, height, width) = self.denoiser.config.patch_size, self.latent_shape
        sequence = (height // patch_size) * (width // patch_size)
        return {"mu": dynamic_shift(calculate_shift, self.pipeline.scheduler, sequence, max_shift=1.16)}

    @torch.no_grad()
    def encode_prompts(self, prompts):
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, **self.prompt_limit
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def denoise(self, denoiser, x_t, timesteps, condition):
        return denoiser(
            hidden_states=x_t.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=condition["prompt_embeds"],
            pooled_projections=condition["pooled_prompt_embeds"],
        )
