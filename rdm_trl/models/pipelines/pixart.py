# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""PixArt-Sigma. Its LoRA is saved as peft saves one: the pipeline has no loader of its own."""

import torch
from diffusers import PixArtSigmaPipeline

from .base import PipelineFamily


class PixArtSigmaFamily(PipelineFamily):
    """Conditions: `prompt_embeds` (B, L, D) and `prompt_attention_mask` (B, L)."""

    pipeline_class = PixArtSigmaPipeline
    takes_timesteps = True

    def own_size(self):
        size = self.denoiser.config.sample_size * self.pipeline.vae_scale_factor
        return size, size

    def size_multiple(self):
        return max(8, self.pipeline.vae_scale_factor * self.denoiser.config.patch_size)

    @torch.no_grad()
    def encode_prompts(self, prompts):
        # The call cleans its prompts, `encode_prompt` by itself does not.
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, clean_caption=True, **self.prompt_limit
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def example_condition(self, batch_size):
        shape = batch_size, 300
        embeds = torch.empty(*shape, self.denoiser.config.caption_channels, device="meta", dtype=self.dtype)
        return {"prompt_embeds": embeds, "prompt_attention_mask": torch.ones(shape, device="meta")}

    def denoise(self, denoiser, x_t, timesteps, condition):
        output = denoiser(
            x_t.to(self.dtype),
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )
        return output[:, : x_t.shape[1]]  # without a learned variance

    def call_arguments(self, prompts, guidance_scale, negative_prompt=""):
        # Images of just this size, not resized from the nearest of a table.
        return {**super().call_arguments(prompts, guidance_scale, negative_prompt), "use_resolution_binning": False}
