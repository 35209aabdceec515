# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Stable Diffusion 1.x and 2.x, and the embedded teacher."""

from pathlib import Path

import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline
from PIL import Image


class StableDiffusionFamily:
    """
    All that the trainer has to know about a pipeline of this family.

    Attributes:
        denoiser: the module that gets the adapters.
        lora_target_modules (`list[str]`): layers that a default LoRA covers (those of LCM-LoRA).
        latent_shape (`tuple[int]`): of one image's latents.

    Raises:
        ValueError: a component is missing, or the denoiser takes more than latents.
    """

    pipeline_class = StableDiffusionPipeline
    denoiser_name = "unet"
    lora_target_modules = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "proj_in",
        "proj_out",
        "ff.net.0.proj",
        "ff.net.2",
        "conv1",
        "conv2",
        "conv_shortcut",
        "downsamplers.0.conv",
        "upsamplers.0.conv",
        "time_emb_proj",
    ]

    def __init__(self, pipeline: StableDiffusionPipeline):
        missing = [name for name in ("unet", "vae", "text_encoder", "tokenizer") if getattr(pipeline, name) is None]
        if missing:
            raise ValueError(f"The pipeline has no {', '.join(missing)}: load it with all of its components.")
        self.pipeline = pipeline
        self.denoiser = pipeline.unet
        channels = [self.denoiser.config.in_channels, self.denoiser.config.out_channels]
        if channels != [pipeline.vae.config.latent_channels] * 2:
            raise ValueError(
                f"The pipeline's denoiser maps {channels[0]} channels to {channels[1]}, its VAE has "
                f"{pipeline.vae.config.latent_channels}: inpainting and editing models are not supported."
            )
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = (self.denoiser.config.in_channels, height, width)
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval()
        pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """What the denoiser is conditioned on: tensors whose first dimension is `len(prompts)`."""
        embeds, _ = self.pipeline.encode_prompt(
            prompts, self.pipeline._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds}

    def denoise(self, denoiser, x_t: torch.Tensor, timesteps: torch.Tensor, condition: dict[str, torch.Tensor]):
        """Raw output (B, C, H, W) of `denoiser` (a callable with the UNet's signature) at `x_t`, timesteps (B,)."""
        x_t = x_t.to(self.denoiser.dtype)
        return denoiser(x_t, timesteps, encoder_hidden_states=condition["prompt_embeds"])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1], float32, differentiable in `latents`."""
        vae = self.pipeline.vae
        images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def sample(
        self,
        scheduler: SchedulerMixin,
        prompts: list[str],
        num_steps: int,
        guidance_scale: float,
        negative_prompt: str,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] of the pipeline itself, in the denoiser's current role."""
        base_scheduler = self.pipeline.scheduler
        self.pipeline.scheduler = type(scheduler).from_config(scheduler.config)
        try:
            return self.pipeline(
                prompts,
                num_inference_steps=num_steps,
                guidance_scale=guidance_scale,
                negative_prompt=[negative_prompt] * len(prompts) if guidance_scale > 1 else None,
                generator=generator,
                output_type="pt",
            ).images.float()
        finally:
            self.pipeline.scheduler = base_scheduler

    def to_pil(self, images: torch.Tensor) -> list[Image.Image]:
        """PIL images of (B, 3, H, W) in [0, 1]."""
        return self.pipeline.image_processor.numpy_to_pil(self.pipeline.image_processor.pt_to_numpy(images))

    def save_lora(self, folder: str | Path, state: dict[str, torch.Tensor], metadata: dict):
        """Writes `pytorch_lora_weights.safetensors`, as `load_lora_weights` of plain diffusers reads it."""
        self.pipeline.save_lora_weights(
            folder,
            **{f"{self.denoiser_name}_lora_layers": state, f"{self.denoiser_name}_lora_adapter_metadata": metadata},
        )
