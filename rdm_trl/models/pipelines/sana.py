# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Sana."""

import inspect

import torch
from diffusers import SanaPipeline

from .base import ATTENTION_LAYERS, PipelineFamily


class SanaFamily(PipelineFamily):
    """Conditions: `prompt_embeds` (B, L, D) and `prompt_attention_mask` (B, L)."""

    pipeline_class = SanaPipeline
    lora_target_modules = [*ATTENTION_LAYERS, "ff.conv_inverted", "ff.conv_point"]

    def own_size(self):
        return 1024, 1024

    def size_multiple(self):
        return 32  # what the pipeline's call asks for, whatever its VAE

    @torch.no_grad()
    def encode_prompts(self, prompts):
        # The call puts its default instruction before prompts, `encode_prompt` by itself does not.
        instruction = inspect.signature(self.pipeline.__call__).parameters["complex_human_instruction"].default
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, complex_human_instruction=instruction, **self.prompt_limit
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    @torch.no_grad()
    def encode_negative_prompts(self, prompts):
        # It puts none before negative prompts.
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, **self.prompt_limit
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def denoise(self, denoiser, x_t, timesteps, condition):
        dtype = self.dtype
        output = denoiser(
            x_t.to(dtype),
            encoder_hidden_states=condition["prompt_embeds"].to(dtype),
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=timesteps * self.denoiser.config.timestep_scale,
        )
        return output[:, : x_t.shape[1]]  # without a learned variance

    def call_arguments(self, prompts, guidance_scale, negative_prompt=""):
        # Images of just this size, not resized from the nearest of a table.
        return {**super().call_arguments(prompts, guidance_scale, negative_prompt), "use_resolution_binning": False}
