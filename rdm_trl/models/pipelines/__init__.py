# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Which diffusers pipelines can be distilled: `docs/families.md` has the table, and says how to add one."""

from pathlib import Path

import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig

from .base import PipelineFamily
from .class_conditional import DDIMFamily, DiTFamily, UnconditionalFamily
from .flux import FluxFamily
from .flux2 import Flux2KleinFamily
from .lumina import Lumina2Family
from .pixart import PixArtSigmaFamily
from .qwen_image import QwenImageFamily
from .sana import SanaFamily
from .stable_diffusion import StableDiffusionFamily, StableDiffusionXLFamily
from .stable_diffusion_3 import StableDiffusion3Family
from .z_image import ZImageFamily


FAMILIES = (
    StableDiffusionFamily,
    StableDiffusionXLFamily,
    StableDiffusion3Family,
    FluxFamily,
    PixArtSigmaFamily,
    SanaFamily,
    Lumina2Family,
    ZImageFamily,
    QwenImageFamily,
    Flux2KleinFamily,
    DiTFamily,
    UnconditionalFamily,
    DDIMFamily,
)


def read_pipeline(name_or_path: str | Path, dtype: torch.dtype = torch.float32, **kwargs) -> DiffusionPipeline:
    """`DiffusionPipeline.from_pretrained`, told of what was saved without (Stable Diffusion 3 without T5)."""
    index = DiffusionPipeline.load_config(name_or_path)
    absent = {name: None for name, kind in index.items() if kind in ([None, None], (None, None))}
    return DiffusionPipeline.from_pretrained(name_or_path, dtype=dtype, **absent, **kwargs)


def load_pipeline(name_or_path: str | Path, dtype: torch.dtype, bits: int | None = None) -> DiffusionPipeline:
    """
    The pipeline of a path or Hub id.

    Args:
        bits (`int`, *optional*): 8 or 4, the denoiser's frozen weights by bitsandbytes in LLM.int8 or NF4.

    Raises:
        OSError: there is no such pipeline; the message names it.
        RuntimeError: bitsandbytes, or a device that it can use, is missing.
    """
    kwargs = {}
    try:
        if bits is not None:
            index = DiffusionPipeline.load_config(name_or_path)
            name = "transformer" if "transformer" in index else "unet"
            kwargs["quantization_config"] = PipelineQuantizationConfig(quant_mapping={name: bnb_config(bits, dtype)})
        return read_pipeline(name_or_path, dtype, **kwargs)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if bits is not None and isinstance(error, ImportError | RuntimeError):
            raise RuntimeError(
                f"The denoiser of {str(name_or_path)!r} cannot be loaded in {bits} bits: {error} This needs a GPU and "
                '`pip install "rdm_trl[quantization]"`; docs/performance.md says what else is smaller.'
            ) from error
        raise OSError(
            f"`sd_pipeline` {str(name_or_path)!r} cannot be loaded; it must be a pipeline, a folder with a "
            f"`model_index.json` or an id of the Hub: {error}"
        ) from error


def bnb_config(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What diffusers quantizes a denoiser by, computing in `dtype`."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def family_of(
    pipeline: DiffusionPipeline,
    height: int | None = None,
    width: int | None = None,
    max_sequence_length: int | None = None,
) -> PipelineFamily:
    """
    The family of `pipeline`, for images of `height` and `width` pixels and prompts of so many tokens at most; all by
    default the pipeline's own.

    Raises:
        ValueError: the pipeline's class has no family, cannot draw that size, or has no limit for prompts.
    """
    for family in FAMILIES:
        if isinstance(pipeline, family.pipeline_class):
            found = family(pipeline, height, width)
            found.limit_prompts(max_sequence_length)
            return found
    supported = ", ".join(family.pipeline_class.__name__ for family in FAMILIES)
    raise ValueError(
        f"{type(pipeline).__name__} is not supported yet. Supported pipelines: {supported}. docs/families.md says how "
        "to add one."
    )
