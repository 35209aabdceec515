# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Qwen-Image."""

import numpy as np
import torch
from diffusers import QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from .base import ATTENTION_LAYERS, PipelineFamily, dynamic_shift, normalized_guidance, pad_prompts


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
    ]

    def size_multiple(self):
        return self.pipeline.vae_scale_factor * 2

    def shape_of_latents(self):
        multiple = self.size_multiple()
        return (self.height // multiple) * (self.width // multiple), self.denoiser.config.in_channels

    def grid(self, num_steps):
        mu = dynamic_shift(calculate_shift, self.pipeline.scheduler, self.latent_shape[0])
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": mu}

    @torch.no_grad()
    def encode_prompts(self, prompts):
        embeds, mask = self.pipeline.encode_prompt(prompts, **{"max_sequence_length": 512, **self.prompt_limit})
        lengths = [embeds.shape[1]] * len(prompts) if mask is None else mask.sum(1).tolist()
        return pad_prompts([row[:length] for row, length in zip(embeds, lengths, strict=True)])

    def example_condition(self, batch_size):
        # Its lengths are read: the mask is a real tensor, of prompts as long as they may be.
        embeds = torch.empty(
            batch_size, 512, self.denoiser.config.joint_attention_dim, device="meta", dtype=self.dtype
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": torch.ones(batch_size, 512, dtype=torch.bool)}

    def denoise(self, denoiser, x_t, timesteps, condition):
        mask, multiple, dtype = condition["prompt_attention_mask"], self.size_multiple(), self.dtype
        longest = mask.sum(1).max()
        return denoiser(
            hidden_states=x_t.to(dtype),
            timestep=timesteps.to(dtype) / 1000,  # as the pipeline rounds it
            encoder_hidden_states_mask=mask[:, :longest].to(x_t.device),
            encoder_hidden_states=condition["prompt_embeds"][:, :longest],
            img_shapes=[[(1, self.height // multiple, self.width // multiple)]] * len(x_t),
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
