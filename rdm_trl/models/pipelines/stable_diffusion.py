# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Stable Diffusion 1.x and 2.x, the embedded teacher, and Stable Diffusion XL."""

import inspect

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from .base import ATTENTION_LAYERS, FEED_FORWARD_LAYERS, PipelineFamily, refuse_negative_prompts


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
    """
    Conditions: `prompt_embeds` (B, L, D) and, for a UNet with an embedded guidance scale (`time_cond_proj_dim`, the
    LCM family), `timestep_cond` (B, D'): of the teacher's scale for the teacher, and of the default of the pipeline's
    call for student and fake score. Such a pipeline has no other guidance.
    """

    addition_embed_types = (None, "text")
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
        self.embeds_guidance = self.denoiser.config.time_cond_proj_dim is not None
        if self.embeds_guidance:
            self.student_guidance_scale = inspect.signature(pipeline.__call__).parameters["guidance_scale"].default
            self.card_note = (
                "\nThe student knows no other `guidance_scale`: the base model takes it as an input, and the student "
                "was trained with this one.\n"
            )

    def check_conditions(self):
        super().check_conditions()
        config = self.denoiser.config
        for name, taken in (
            ("class_embed_type", (None,)),
            ("num_class_embeds", (None,)),
            ("addition_embed_type", self.addition_embed_types),
            ("encoder_hid_dim_type", (None, "text_proj")),
        ):
            if config[name] not in taken:
                raise ValueError(
                    f"The UNet has `{name}={config[name]!r}`, a condition that {type(self.pipeline).__name__} is not "
                    "distilled with."
                )

    def embed_guidance(self, guidance_scale: float, number: int) -> dict[str, torch.Tensor]:
        """`timestep_cond` (number, D) as the pipeline computes it; nothing where the UNet has none."""
        if not self.embeds_guidance:
            return {}
        scales = torch.tensor(guidance_scale - 1).repeat(number)
        size = self.denoiser.config.time_cond_proj_dim
        embedding = self.pipeline.get_guidance_scale_embedding(scales, embedding_dim=size)
        return {"timestep_cond": embedding.to(self.denoiser.device, self.dtype)}

    def guide(self, denoise, x_t, timesteps, condition, negative, guidance_scale):
        if self.embeds_guidance:
            return denoise(x_t, timesteps, {**condition, **self.embed_guidance(guidance_scale, len(x_t))})
        return super().guide(denoise, x_t, timesteps, condition, negative, guidance_scale)

    def halves(self, denoise, x_t, timesteps, condition, negative):
        if self.embeds_guidance:
            negative = {**condition, **self.embed_guidance(1.0, len(x_t))}
        return super().halves(denoise, x_t, timesteps, condition, negative)

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
        return {"prompt_embeds": embeds, **self.embed_guidance(self.student_guidance_scale, len(prompts))}

    def encode_negative_prompts(self, prompts):
        if self.embeds_guidance:
            refuse_negative_prompts(self, prompts)
        return self.encode_prompts(prompts)

    def denoise(self, denoiser, x_t, timesteps, condition):
        return denoiser(
            x_t.to(self.dtype),
            timesteps,
            timestep_cond=condition.get("timestep_cond"),
            encoder_hidden_states=condition["prompt_embeds"],
        )


class StableDiffusionXLFamily(StableDiffusionFamily):
    """Conditions: as above, and `pooled_prompt_embeds` (B, D') and `time_ids` (B, 6)."""

    addition_embed_types = ("text_time",)
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
        return {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "time_ids": self.time_ids(embeds, pooled),
            **self.embed_guidance(self.student_guidance_scale, len(prompts)),
        }

    @torch.no_grad()
    def encode_negative_prompts(self, prompts):
        if self.embeds_guidance:
            return super().encode_negative_prompts(prompts)
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
            timestep_cond=condition.get("timestep_cond"),
            encoder_hidden_states=condition["prompt_embeds"],
            added_cond_kwargs={"text_embeds": condition["pooled_prompt_embeds"], "time_ids": condition["time_ids"]},
        )

    def decode(self, latents):
        config = self.pipeline.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return super().decode(latents)
        mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return super().decode(latents * std + mean * config.scaling_factor)

    def encode_images(self, images):
        config, latents = self.pipeline.vae.config, super().encode_images(images)
        if config.latents_mean is None or config.latents_std is None:
            return latents
        mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return (latents - mean * config.scaling_factor) / std
