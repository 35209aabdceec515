# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Lumina 2."""

import numpy as np
import torch
from diffusers import Lumina2Pipeline
from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift

from .base import ATTENTION_LAYERS, PipelineFamily, dynamic_shift, normalized_guidance


class Lumina2Family(PipelineFamily):
    """Conditions: `prompt_embeds` (B, L, D) and `prompt_attention_mask` (B, L)."""

    pipeline_class = Lumina2Pipeline
    lora_target_modules = [
        *ATTENTION_LAYERS,
        "feed_forward.linear_1",
        "feed_forward.linear_2",
        "feed_forward.linear_3",
        "norm1.linear",
    ]

    def size_multiple(self):
        return self.pipeline.vae_scale_factor * 2

    def grid(self, num_steps):
        # The pipeline takes the number of channels for the sequence's length; so must we.
        mu = dynamic_shift(calculate_shift, self.pipeline.scheduler, self.latent_shape[0])
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": mu}

    @torch.no_grad()
    def encode_prompts(self, prompts):
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, **self.prompt_limit
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    @torch.no_grad()
    def encode_negative_prompts(self, prompts):
        # Without the system prompt, which stands before the others.
        _, _, embeds, mask = self.pipeline.encode_prompt(prompts, negative_prompt=prompts, **self.prompt_limit)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def example_condition(self, batch_size):
        # Its lengths are read: the mask is a real tensor.
        embeds = torch.empty(batch_size, 256, self.denoiser.config.cap_feat_dim, device="meta", dtype=self.dtype)
        return {"prompt_embeds": embeds, "prompt_attention_mask": torch.ones(batch_size, 256, dtype=torch.bool)}

    def denoise(self, denoiser, x_t, timesteps, condition):
        # Its time runs from noise to image, and so does its velocity.
        return -denoiser(
            hidden_states=x_t.to(self.dtype),
            timestep=1 - timesteps / self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
        )

    def combine(self, conditional, unconditional, guidance_scale):
        return normalized_guidance(conditional, unconditional, guidance_scale)
