# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Z-Image."""

import torch
from diffusers import ZImagePipeline
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas

from .base import ATTENTION_LAYERS, PipelineFamily, dynamic_shift, pad_prompts


class ZImageFamily(PipelineFamily):
    """Conditions: `prompt_embeds` (B, 512, D), padded, and `prompt_attention_mask` (B, 512)."""

    pipeline_class = ZImagePipeline
    lora_target_modules = [*ATTENTION_LAYERS, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]

    def __init__(self, pipeline, height=None, width=None):
        super().__init__(pipeline, height, width)
        # By whole names: the part of this name in the last layer is no linear layer.
        blocks = {"noise_refiner": self.denoiser.noise_refiner, "layers": self.denoiser.layers}
        modulation = [f"{name}.{i}.adaLN_modulation.0" for name, block in blocks.items() for i in range(len(block))]
        self.lora_target_modules = [*self.lora_target_modules, *modulation]

    def own_size(self):
        return 1024, 1024

    def size_multiple(self):
        return self.pipeline.vae_scale_factor * 2

    def grid(self, num_steps):
        _, height, width = self.latent_shape
        mu = dynamic_shift(calculate_shift, self.pipeline.scheduler, (height // 2) * (width // 2))
        return {"sigmas": get_default_z_image_sigmas(num_steps), "mu": mu}

    @torch.no_grad()
    def encode_prompts(self, prompts):
        # A copy: the pipeline writes its template into the list.
        embeds, _ = self.pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, **self.prompt_limit)
        return pad_prompts(embeds)

    def example_condition(self, batch_size):
        # Its lengths are read: the mask is a real tensor, of prompts as long as they may be.
        embeds = torch.empty(batch_size, 512, self.denoiser.config.cap_feat_dim, device="meta", dtype=self.dtype)
        return {"prompt_embeds": embeds, "prompt_attention_mask": torch.ones(batch_size, 512, dtype=torch.bool)}

    def denoise(self, denoiser, x_t, timesteps, condition):
        lengths = condition["prompt_attention_mask"].sum(1).tolist()
        embeds = [row[:length] for row, length in zip(condition["prompt_embeds"], lengths, strict=True)]
        images = list(x_t.to(self.dtype).unsqueeze(2).unbind())
        # Its time runs from noise to image, and so does its velocity.
        return -torch.stack(denoiser(images, (1000 - timesteps) / 1000, embeds)).squeeze(2)

    def call_arguments(self, prompts, guidance_scale, negative_prompt=""):
        # Its scale is what is added to the conditional output: 0 is none.
        arguments = super().call_arguments(prompts, guidance_scale, negative_prompt)
        return {**arguments, "guidance_scale": guidance_scale - 1.0}
