# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Real images for the discriminator: read, cropped, and encoded once for all runs of the same autoencoder."""

import os
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk
from diffusers.image_processor import VaeImageProcessor
from PIL import ImageOps
from tqdm import tqdm

from .guidance import cache_of, description, digest, make_folder
from .models.pipelines import PipelineFamily
from .prompts import check_captions, fingerprint


def load_images(name: str, column: str = "image") -> Dataset:
    """
    The split `train` of a data set on the Hub or in a folder, saved by `save_to_disk` or of image files (with captions
    as `prompt` in a `metadata.csv`).

    Raises:
        ValueError: it cannot be read, is empty, has no such column, one of no images, or a `prompt` that is no text;
            names the option.
    """
    try:
        saved = (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file()
        dataset = load_from_disk(name) if saved else load_dataset(name, split="train")
        dataset = dataset["train"] if isinstance(dataset, DatasetDict) else dataset
    except Exception as error:  # of many kinds
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"`image_dataset` {name!r} cannot be read, or is empty: {said}") from error
    if column not in dataset.column_names:
        raise ValueError(
            f"`image_dataset` {name!r} has no column {column!r}; it has {', '.join(dataset.column_names) or 'none'}. "
            "Set `image_column`."
        )
    if not isinstance(dataset.features[column], Image):
        kind = type(dataset.features[column]).__name__
        raise ValueError(f"`image_column` is {column!r}, but that column of {name!r} holds no images: it is a {kind}.")
    if "prompt" in dataset.column_names:
        check_captions(dataset["prompt"], "image_dataset")
    return dataset


def to_pixels(image, height: int, width: int) -> np.ndarray:
    """A PIL image as (height, width, 3) in [0, 1]: its middle in this aspect, resized."""
    return np.asarray(ImageOps.fit(image.convert("RGB"), (width, height)), dtype=np.float32) / 255


def check_draws_images(family: PipelineFamily):
    """Raises `ValueError` for a pipeline of videos, or one that takes images."""
    name = type(family.pipeline).__name__
    if family.takes_image:
        raise ValueError(
            f"`adversarial_weight` and `image_dataset` are for prompts alone, and {name} takes images: real ones are "
            "not made of those, and would be told from the student's by that."
        )
    if family.num_frames is not None:
        raise ValueError(f"`adversarial_weight` and `image_dataset` are for images, and {name} draws videos.")


class RealImages:
    """
    Latents of a data set's images in the form that the denoiser takes them, on disk, and their captions.

    They are encoded by the first process of each machine, and read a few at a time: memory does not grow with the
    data set.

    Args:
        trainer (`RdmDistillTrainer`): whose pipeline encodes them, and whose `teacher_cache_dir` keeps them.

    Attributes:
        captions (`list[str]`, *optional*): the column `prompt`, where there is one.

    Raises:
        ValueError: as [`load_images`], or the pipeline draws videos or takes images.
        OSError: the cache cannot be written.
    """

    def __init__(self, trainer):
        args, family = trainer.args, trainer.family
        check_draws_images(family)
        self.dataset, self.column = load_images(args.image_dataset, args.image_column), args.image_column
        self.captions = self.dataset["prompt"][:] if "prompt" in self.dataset.column_names else None
        vae = family.pipeline.components.get("vae")
        what = {
            "images": self.dataset._fingerprint,
            "number": len(self.dataset),
            "column": self.column,
            "size": [family.height, family.width],
            "latents": list(family.latent_shape),
            "pipeline": type(family.pipeline).__name__,
            "autoencoder": None if vae is None else [str(vae.dtype), fingerprint(vae.parameters())],
        }
        file = cache_of(args) / "real" / f"{digest(description(what))}.npy"
        with PartialState().local_main_process_first():
            if not file.exists():
                make_folder(file.parent)
                self.encode(family, file, args.per_device_eval_batch_size, args.disable_tqdm)
        self.latents = np.load(file, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.latents)

    @torch.no_grad()
    def encode(self, family, file: Path, batch_size: int, hidden: bool):
        """Writes the latents (N, ...) to `file`, under another name until they are complete."""
        unfinished = file.with_suffix(f".{os.getpid()}")
        shape = (len(self.dataset), *family.latent_shape)
        latents = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape)
        images = self.dataset.select_columns(self.column)
        for start in tqdm(range(0, len(images), batch_size), desc="encoding real images", disable=hidden):
            rows = images[start : start + batch_size][self.column]
            for i, image in enumerate(rows):
                if image is None:
                    raise ValueError(f"`image_dataset`: {self.column!r} of row {start + i} is no image.")
            pixels = np.stack([to_pixels(image, family.height, family.width) for image in rows])
            pixels = VaeImageProcessor.numpy_to_pt(pixels).to(family.denoiser.device)
            latents[start : start + len(rows)] = family.encode_images(pixels).cpu()
        latents.flush()
        del latents  # Windows moves no file that is open
        unfinished.replace(file)

    def draw(self, number: int) -> tuple[torch.Tensor, list[str] | None]:
        """Latents (number, ...) of images drawn with replacement by torch's generator, and their captions."""
        rows = torch.randint(len(self), (number,)).tolist()
        captions = None if self.captions is None else [self.captions[i] for i in rows]
        return torch.from_numpy(self.latents[rows]), captions
