# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""LTX-Video."""

import inspect

import numpy as np
import torch
from diffusers import LTXPipeline
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

from .base import ATTENTION_LAYERS, FEED_FORWARD_LAYERS, dynamic_shift
from .video import VideoFamily


class LTXFamily(VideoFamily):
    """
    Latents are packed, (F' * H' * W', C). Conditions: `prompt_embeds` (B, L, D) and `prompt_attention_mask` (B, L).
    Autoencoders that are told of a noise level are told 0, as in the pipeline's call by default.
    """

    pipeline_class = LTXPipeline
    lora_target_modules = [*ATTENTION_LAYERS, *FEED_FORWARD_LAYERS]
    frame_rate = 25  # the call's default, a condition of the network

    def check_conditions(self):
        super().check_conditions()
        if any(self.pipeline.vae.config.decoder_inject_noise):
            raise ValueError(
                "The LTXPipeline's autoencoder draws noise while it decodes (`decoder_inject_noise`), "
                "which is not supported: take another version's."
            )

    def compression(self):
        return self.pipeline.vae_temporal_compression_ratio, self.pipeline.vae_spatial_compression_ratio

    def size_multiple(self):
        return self.multiple_of(32, self.pipeline.transformer_spatial_patch_size)

    def patches(self) -> tuple[int, int]:
        """Of the latents: pixels and frames that are one token."""
        return self.pipeline.transformer_spatial_patch_size, self.pipeline.transformer_temporal_patch_size

    def shape_of_latents(self):
        frames, height, width = self.latent_size()
        spatial, temporal = self.patches()
        config = self.denoiser.config
        return (frames // temporal) * (height // spatial) * (width // spatial), config.in_channels

    def grid(self, num_steps):
        frames, height, width = self.latent_size()
        mu = dynamic_shift(calculate_shift, self.pipeline.scheduler, frames * height * width)
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": mu}

    @torch.no_grad()
    def encode_prompts(self, prompts):
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, **self.prompt_limit
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def example_condition(self, batch_size):
        length = inspect.signature(self.pipeline.__call__).parameters["max_sequence_length"].default
        width = self.pipeline.text_encoder.config.d_model
        return {
            "prompt_embeds": torch.empty(batch_size, length, width, device="meta", dtype=self.dtype),
            "prompt_attention_mask": torch.empty(batch_size, length, device="meta", dtype=torch.bool),
        }

    def denoise(self, denoiser, x_t, timesteps, condition):
        frames, height, width = self.latent_size()
        temporal, spatial = self.compression()
        return denoiser(
            hidden_states=x_t.to(self.dtype),
            encoder_hidden_states=condition["prompt_embeds"].to(self.dtype),
            timestep=timesteps,
            encoder_attention_mask=condition["prompt_attention_mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(temporal / self.frame_rate, spatial, spatial),
        )

    def decode_latents(self, latents):
        vae = self.pipeline.vae
        latents = self.pipeline._unpack_latents(latents, *self.latent_size(), *self.patches())
        latents = self.pipeline._denormalize_latents(
            latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )
        noise_level = latents.new_zeros(len(latents), dtype=vae.dtype) if vae.config.timestep_conditioning else None
        return vae.decode(latents.to(vae.dtype), noise_level, return_dict=False)[0]
