# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Pipelines without text: class-conditional DiT and unconditional UNets. Peft loads their LoRAs."""

from unittest.mock import patch

import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiTPipeline
from diffusers.models.autoencoders.vae import DecoderOutput

from .base import ATTENTION_LAYERS, FEED_FORWARD_LAYERS, PipelineFamily, refuse_negative_prompts


class DiTFamily(PipelineFamily):
    """
    A prompt is a class: a name out of `pipeline.labels`, or its number. The empty prompt is no class. Conditions:
    `class_labels` (B,).
    """

    pipeline_class = DiTPipeline
    lora_target_modules = [*ATTENTION_LAYERS, *FEED_FORWARD_LAYERS, "norm1.linear"]
    pipeline_tag = "unconditional-image-generation"

    def own_size(self):
        config = self.pipeline.vae.config
        size = self.denoiser.config.sample_size * 2 ** (len(config.block_out_channels) - 1)
        return size, size

    def check_size(self):
        check_fixed_size(self)

    def shape_of_latents(self):
        config = self.denoiser.config
        return config.in_channels, config.sample_size, config.sample_size

    def label_of(self, prompt: str) -> int:
        """The class that a prompt names. Raises `ValueError` if there is none."""
        number_of_classes = self.denoiser.config.num_embeds_ada_norm
        if prompt == "":
            return number_of_classes
        label = self.pipeline.labels.get(prompt, int(prompt) if prompt.isdecimal() else -1)
        if not 0 <= label < number_of_classes:
            raise ValueError(
                f"The prompt {prompt!r} is not a class of {type(self.pipeline).__name__}: give a name out of "
                f"`pipeline.labels`, or a number from 0 to {number_of_classes - 1}."
            )
        return label

    def encode_prompts(self, prompts):
        return {"class_labels": self.prompt_ids(prompts).to(self.denoiser.device)}

    def encode_negative_prompts(self, prompts):
        refuse_negative_prompts(self, prompts)
        return self.encode_prompts(prompts)

    def example_condition(self, batch_size):
        return self.encode_prompts(["0"] * batch_size)

    def prompt_ids(self, prompts):
        return torch.tensor([self.label_of(prompt) for prompt in prompts])

    def denoise(self, denoiser, x_t, timesteps, condition):
        output = denoiser(x_t.to(self.dtype), timestep=timesteps, class_labels=condition["class_labels"])
        return output[:, : x_t.shape[1]]  # without a learned variance

    def sample_latents(self, *arguments):
        # The call gives none: what it hands to its autoencoder, which has nothing to do then.
        decoded = []

        def decode(latents):
            decoded.append(latents.float() * self.pipeline.vae.config.scaling_factor)
            return DecoderOutput(latents)

        with patch.object(self.pipeline.vae, "decode", decode):
            self.sample(*arguments)
        return decoded[0]

    def call_arguments(self, prompts, guidance_scale, negative_prompt=""):
        return {"class_labels": self.prompt_ids(prompts).tolist(), "guidance_scale": guidance_scale}


class UnconditionalFamily(PipelineFamily):
    """Images of a `UNet2DModel`. Prompts and guidance scales are without effect."""

    pipeline_class = DDPMPipeline
    denoiser_name = "unet"
    lora_target_modules = [
        *ATTENTION_LAYERS,
        "conv1",
        "conv2",
        "conv_shortcut",
        "downsamplers.0.conv",
        "upsamplers.0.conv",
        "time_emb_proj",
    ]
    pipeline_tag = "unconditional-image-generation"
    card_class = "DDPMPipeline"

    def __init__(self, pipeline, height=None, width=None):
        # DDIM's call hands options of its own to the scheduler, and not every scheduler has them.
        super().__init__(DDPMPipeline(unet=pipeline.unet, scheduler=pipeline.scheduler), height, width)

    def has_guidance(self):
        return False

    def own_size(self):
        size = self.denoiser.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def check_size(self):
        check_fixed_size(self)

    def shape_of_latents(self):
        return self.denoiser.config.in_channels, self.height, self.width

    def encode_prompts(self, prompts):
        return {}

    def encode_negative_prompts(self, prompts):
        refuse_negative_prompts(self, prompts)
        return {}

    def prompt_ids(self, prompts):
        return torch.zeros(len(prompts), 0, dtype=torch.long)

    def denoise(self, denoiser, x_t, timesteps, condition):
        return denoiser(x_t.to(self.dtype), timesteps)

    def guide(self, denoise, x_t, timesteps, condition, negative, guidance_scale):
        return denoise(x_t, timesteps, condition)

    def decode(self, latents):
        images = (latents.float() / 2 + 0.5).clamp(0, 1)
        return images.expand(-1, 3, -1, -1)  # grey ones too

    def encode_images(self, images):
        grey = self.denoiser.config.in_channels == 1
        return 2 * (images.mean(1, keepdim=True) if grey else images) - 1

    def sample(self, *args, **kwargs):
        return super().sample(*args, **kwargs).expand(-1, 3, -1, -1)

    def sample_latents(self, *arguments):
        return 2 * super().sample(*arguments) - 1

    def call_arguments(self, prompts, guidance_scale, negative_prompt=""):
        return {"batch_size": len(prompts)}


class DDIMFamily(UnconditionalFamily):
    pipeline_class = DDIMPipeline


def check_fixed_size(family: PipelineFamily):
    """Raises `ValueError` for another size than the pipeline's own, the only one that its call can draw."""
    if (family.height, family.width) != family.own_size():
        height, width = family.own_size()
        raise ValueError(
            f"{type(family.pipeline).__name__} draws images of {height} x {width} pixels only: leave out "
            "`sample_height` and `sample_width`."
        )
