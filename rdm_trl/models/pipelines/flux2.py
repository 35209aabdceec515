# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""FLUX.2 klein."""

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from .base import ATTENTION_LAYERS, PipelineFamily, refuse_negative_prompts


class Flux2KleinFamily(PipelineFamily):
    """
    Latents are packed, (H/2 * W/2, 4 C). Conditions: `prompt_embeds` (B, L, D). The distilled variant
    (`is_distilled`) has no guidance.
    """

    pipeline_class = Flux2KleinPipeline
    lora_target_modules = [
        *ATTENTION_LAYERS,
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
        "to_qkv_mlp_proj",
    ]

    def has_guidance(self):
        return not self.pipeline.config.is_distilled

    def size_multiple(self):
        return self.pipeline.vae_scale_factor * 2

    def tokens(self) -> tuple[int, int]:
        """Rows and columns of packed latents."""
        return self.height // self.size_multiple(), self.width // self.size_multiple()

    def shape_of_latents(self):
        height, width = self.tokens()
        return height * width, self.denoiser.config.in_channels

    def grid(self, num_steps):
        mu = compute_empirical_mu(image_seq_len=self.latent_shape[0], num_steps=num_steps)
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": mu}

    @torch.no_grad()
    def encode_prompts(self, prompts):
        return {"prompt_embeds": self.pipeline.encode_prompt(prompts, **self.prompt_limit)[0]}

    def encode_negative_prompts(self, prompts):
        refuse_negative_prompts(self, prompts)
        return self.encode_prompts(prompts)

    def example_condition(self, batch_size):
        width = self.denoiser.config.joint_attention_dim
        return {"prompt_embeds": torch.empty(batch_size, 512, width, device="meta", dtype=self.dtype)}

    def image_ids(self, number: int, device: torch.device) -> torch.Tensor:
        return self.pipeline._prepare_latent_ids(torch.empty(number, 1, *self.tokens())).to(device)

    def denoise(self, denoiser, x_t, timesteps, condition):
        embeds, dtype = condition["prompt_embeds"], self.dtype
        return denoiser(
            hidden_states=x_t.to(dtype),
            timestep=timesteps.to(dtype) / 1000,  # as the pipeline rounds it
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=self.pipeline._prepare_text_ids(embeds).to(x_t.device),
            img_ids=self.image_ids(len(x_t), x_t.device),
        )

    def guide(self, denoise, x_t, timesteps, condition, negative, guidance_scale):
        guidance_scale = guidance_scale if self.has_guidance() else 1.0
        return super().guide(denoise, x_t, timesteps, condition, negative, guidance_scale)

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (1, C, 1, 1) that latents are normalised by."""
        bn, eps = self.pipeline.vae.bn, self.pipeline.vae.config.batch_norm_eps
        return bn.running_mean.view(1, -1, 1, 1), (bn.running_var + eps).sqrt().view(1, -1, 1, 1)

    def sample_latents(self, *arguments):
        # The pipeline's are for its autoencoder.
        mean, std = (value.float() for value in self.statistics())
        latents = self.pipeline._patchify_latents(super().sample_latents(*arguments))
        return self.pipeline._pack_latents((latents - mean) / std)

    def decode(self, latents):
        pipeline, vae = self.pipeline, self.pipeline.vae
        ids = self.image_ids(len(latents), latents.device)
        latents = pipeline._unpack_latents_with_ids(latents.to(vae.dtype), ids, *self.tokens())
        mean, std = self.statistics()
        latents = latents * std + mean
        images = vae.decode(pipeline._unpatchify_latents(latents), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images):
        mean, std = (value.float() for value in self.statistics())
        latents = self.pipeline._patchify_latents(self.encode_pixels(images))
        return self.pipeline._pack_latents((latents - mean) / std)

    def call_arguments(self, prompts, guidance_scale, negative_prompt=""):
        return {"prompt": prompts, "guidance_scale": guidance_scale, **self.size, **self.prompt_limit}
