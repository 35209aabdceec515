# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""FLUX.1 dev, whose guidance is an input of the network, schnell, which has none, and Kontext, which edits images."""

import numpy as np
import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from .base import ATTENTION_LAYERS, FEED_FORWARD_LAYERS, PipelineFamily, dynamic_shift, refuse_negative_prompts
from .editing import EditingFamily


class FluxFamily(PipelineFamily):
    """
    Latents are packed, (H/2 * W/2, 4 C). Conditions: `prompt_embeds` (B, L, D), `pooled_prompt_embeds` (B, D') and,
    with guidance embeddings, `guidance` (B,): `sample_guidance_scale` for the teacher, 3.5 for student and fake score.
    """

    pipeline_class = FluxPipeline
    lora_target_modules = [
        *ATTENTION_LAYERS,
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        *FEED_FORWARD_LAYERS,
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "proj_mlp",
        "norm1.linear",
        "norm1_context.linear",
        "norm.linear",
    ]
    embeds_guidance = True
    student_guidance_scale = 3.5  # the default of the pipeline's call

    def __init__(self, pipeline, height=None, width=None):
        super().__init__(pipeline, height, width)
        if self.denoiser.config.guidance_embeds:
            self.card_note = (
                "\nThe student knows no other `guidance_scale`: the base model takes it as an input, and the student "
                "was trained with this one.\n"
            )

    def has_guidance(self):
        return self.denoiser.config.guidance_embeds

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
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, **self.prompt_limit)
        condition = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if self.denoiser.config.guidance_embeds:
            condition["guidance"] = torch.full((len(prompts),), self.student_guidance_scale, device=embeds.device)
        return condition

    def encode_negative_prompts(self, prompts):
        refuse_negative_prompts(self, prompts)
        return {}

    def image_ids(self, device: torch.device) -> torch.Tensor:
        """Positions (L, 3) of the tokens that the denoiser is given beside the prompt's."""
        multiple = self.size_multiple()
        size = self.height // multiple, self.width // multiple
        return self.pipeline._prepare_latent_image_ids(1, *size, device, self.dtype)

    def denoise(self, denoiser, x_t, timesteps, condition):
        dtype, device, embeds = self.dtype, x_t.device, condition["prompt_embeds"]
        return denoiser(
            hidden_states=x_t.to(dtype),
            timestep=timesteps.to(dtype) / 1000,  # as the pipeline rounds it
            guidance=condition.get("guidance"),
            pooled_projections=condition["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device, dtype=dtype),
            img_ids=self.image_ids(device),
        )

    def guide(self, denoise, x_t, timesteps, condition, negative, guidance_scale):
        if "guidance" in condition:
            condition = {**condition, "guidance": torch.full_like(condition["guidance"], guidance_scale)}
        return denoise(x_t, timesteps, condition)

    def halves(self, denoise, x_t, timesteps, condition, negative):
        plain = {**condition, "guidance": torch.ones_like(condition["guidance"])}
        return super().halves(denoise, x_t, timesteps, condition, plain)

    def decode(self, latents):
        unpacked = self.pipeline._unpack_latents(latents, self.height, self.width, self.pipeline.vae_scale_factor)
        return super().decode(unpacked)

    def encode_images(self, images):
        latents = super().encode_images(images)
        return self.pipeline._pack_latents(latents, *latents.shape)

    def call_arguments(self, prompts, guidance_scale, negative_prompt=""):
        return {"prompt": prompts, "guidance_scale": guidance_scale, **self.size, **self.prompt_limit}


class FluxKontextFamily(EditingFamily, FluxFamily):
    """Conditions: as above, and `reference` (B, H/2 * W/2, 4 C), of an image of the run's own size."""

    pipeline_class = FluxKontextPipeline

    def example_condition(self, batch_size):
        words = FluxFamily.encode_prompts(self, ["a photo"] * batch_size)
        return {**words, "reference": self.example_reference(batch_size)}

    def image_ids(self, device):
        ids = super().image_ids(device)
        return torch.cat([ids, ids + ids.new_tensor([1, 0, 0])])  # the same places in another image

    def call_arguments(self, prompts, guidance_scale, negative_prompt=""):
        # By itself the call would draw, and resize the image to, about a million pixels.
        ours = {"max_area": self.height * self.width, "_auto_resize": False}
        return {**super().call_arguments(prompts, guidance_scale, negative_prompt), **ours}
