# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What families share whose pipelines are given an image with the prompt: they edit it, or let it move."""

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ...prompts import PicturePrompt
from .base import PipelineFamily


class EditingFamily(PipelineFamily):
    """
    Stands before the family of the same denoiser without images. Prompts are `PicturePrompt`s, and conditions have one
    key more: `reference` (B, ...), the image's latents, which the denoiser sees behind the noisy ones; packed,
    (B, L', 4 C), of pipelines that edit images.

    All images of a run are of one size, since their latents are joined in batches: the pipeline resizes them to it as
    it always does, whatever their aspect.
    """

    takes_image = True
    takes_one_prompt = False  # whether the pipeline's call has one image, and so one prompt
    processor_name = "image_processor"  # of `processor`, for the card's code
    pipeline_tag = "image-to-image"
    show_import = "from diffusers.utils import load_image\n"
    card_names = {"image": "picture"}

    def __init__(self, pipeline, height=None, width=None):
        super().__init__(pipeline, height, width)
        # By itself the call would draw an image of another size.
        self.size = {"height": self.height, "width": self.width}

    def picture_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the pipeline is given, which it leaves at that."""
        return self.height, self.width

    def condition_modules(self):
        return [*super().condition_modules(), self.pipeline.vae]

    def fit(self, image: Image.Image) -> Image.Image:
        """`image` in RGB, resized as the pipeline does it."""
        height, width = self.picture_size()
        image = image.convert("RGB")
        return image if image.size == (width, height) else self.processor.resize(image, height, width)

    @property
    def processor(self) -> VaeImageProcessor:
        """The part of the pipeline that resizes images."""
        return self.pipeline.image_processor

    def pictures_of(self, prompts: list[str]) -> list[Image.Image]:
        """The prompts' images. Raises `ValueError` for a prompt that has none."""
        for prompt in prompts:
            if not isinstance(prompt, PicturePrompt):
                raise ValueError(
                    f"{type(self.pipeline).__name__} is given images, and the prompt {str(prompt)!r} has none: give "
                    "`rdm_trl.prompts.PicturePrompt(prompt, image)`."
                )
        return [self.fit(prompt.image) for prompt in prompts]

    def reference_size(self) -> tuple[int, int]:
        """Rows and columns of an image's packed latents."""
        multiple = self.size_multiple()
        height, width = self.picture_size()
        return height // multiple, width // multiple

    def pixels_of(self, picture: Image.Image) -> torch.Tensor:
        """What the pipeline's autoencoder is given of an image (1, 3, ...), in [-1, 1]."""
        return self.processor.preprocess(picture, *self.picture_size())

    def encode_picture(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        """What the denoiser is given of an image, one row of each key."""
        vae = self.pipeline.vae
        latents = self.pipeline._encode_vae_image(self.pixels_of(picture).to(vae.device, vae.dtype), None)
        return {"reference": self.pipeline._pack_latents(latents, 1, latents.shape[1], *latents.shape[-2:])}

    @torch.no_grad()
    def encode_prompts(self, prompts):
        # One by one: an autoencoder's activations are large.
        rows = [self.encode_picture(picture) for picture in self.pictures_of(prompts)]
        pictures = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
        return {**super().encode_prompts(prompts), **pictures}

    def example_reference(self, batch_size: int) -> torch.Tensor:
        """The reference of `example_condition`."""
        height, width = self.reference_size()
        shape = batch_size, height * width, self.latent_shape[1]
        return torch.zeros(shape, device=self.denoiser.device, dtype=self.dtype)

    def denoise(self, denoiser, x_t, timesteps, condition):
        joined = torch.cat([x_t.to(self.dtype), condition["reference"].to(self.dtype)], 1)
        return super().denoise(denoiser, joined, timesteps, condition)[:, : x_t.shape[1]]

    def call_arguments(self, prompts, guidance_scale, negative_prompt=""):
        arguments = super().call_arguments([str(p) for p in prompts], guidance_scale, negative_prompt)
        return {"image": self.pictures_of(prompts), **arguments}

    def sample(self, scheduler, prompts, *arguments, output_type="pt"):
        if not self.takes_one_prompt:
            return super().sample(scheduler, prompts, *arguments, output_type=output_type)
        # Each image has a generator of its own: the scheduler's noise is by its seed.
        *rest, generator = arguments
        if not isinstance(generator, list):
            seeds = torch.randint(2**31, (len(prompts),), generator=generator).tolist()
            generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        draw = super().sample
        return torch.cat(
            [
                draw(scheduler, [prompt], *rest, [own], output_type=output_type)
                for prompt, own in zip(prompts, generator, strict=True)
            ]
        )

    def show_code(self, call):
        height, width = self.picture_size()
        picture = f'picture = pipe.{self.processor_name}.resize(load_image("picture.png"), {height}, {width})'
        return f"{picture}\n{super().show_code(call)}"
