# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Which diffusers pipelines can be distilled. A family is one class with the methods of `StableDiffusionFamily`."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from .stable_diffusion import StableDiffusionFamily


FAMILIES = {family.pipeline_class: family for family in (StableDiffusionFamily,)}


def load_pipeline(name_or_path: str | Path, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of a path or Hub id. Raises `OSError`, which names it, where there is none."""
    try:
        return DiffusionPipeline.from_pretrained(name_or_path, dtype=dtype)
    except Exception as error:
        raise OSError(
            f"`sd_pipeline` {str(name_or_path)!r} cannot be loaded; it must be a pipeline, a folder with a "
            f"`model_index.json` or an id of the Hub: {error}"
        ) from error


def family_of(pipeline: DiffusionPipeline) -> StableDiffusionFamily:
    """The family of `pipeline`. Raises `ValueError` for a pipeline class that has none."""
    for pipeline_class, family in FAMILIES.items():
        if isinstance(pipeline, pipeline_class):
            return family(pipeline)
    supported = ", ".join(pipeline_class.__name__ for pipeline_class in FAMILIES)
    raise ValueError(f"{type(pipeline).__name__} is not supported yet. Supported pipelines: {supported}.")
