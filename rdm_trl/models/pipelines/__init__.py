# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Which diffusers pipelines can be distilled: `docs/families.md` has the table, and says how to add one."""

from diffusers import DiffusionPipeline

from .base import PipelineFamily
from .class_conditional import DDIMFamily, DiTFamily, UnconditionalFamily
from .flux import FluxFamily, FluxKontextFamily
from .flux2 import Flux2KleinFamily
from .loading import Base, base_in, base_of, load_pipeline, read_pipeline  # noqa: F401
from .ltx import LTXFamily
from .lumina import Lumina2Family
from .pixart import PixArtSigmaFamily
from .qwen_image import QwenImageEditFamily, QwenImageEditPlusFamily, QwenImageFamily
from .sana import SanaFamily
from .stable_diffusion import StableDiffusionFamily, StableDiffusionXLFamily
from .stable_diffusion_3 import StableDiffusion3Family
from .wan import WanFamily, WanImageToVideoFamily
from .z_image import ZImageFamily


FAMILIES = (
    StableDiffusionFamily,
    StableDiffusionXLFamily,
    StableDiffusion3Family,
    FluxFamily,
    FluxKontextFamily,
    PixArtSigmaFamily,
    SanaFamily,
    Lumina2Family,
    ZImageFamily,
    QwenImageFamily,
    QwenImageEditFamily,
    QwenImageEditPlusFamily,
    Flux2KleinFamily,
    WanFamily,
    WanImageToVideoFamily,
    LTXFamily,
    DiTFamily,
    UnconditionalFamily,
    DDIMFamily,
)


def family_of(
    pipeline: DiffusionPipeline,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    max_sequence_length: int | None = None,
) -> PipelineFamily:
    """
    The family of `pipeline`, for images of `height` and `width` pixels, videos of so many frames, and prompts of so
    many tokens at most; all by default the pipeline's own.

    Raises:
        ValueError: the pipeline's class has no family, cannot draw that size or so many frames, or has no limit
            for prompts.
    """
    for family in FAMILIES:
        if isinstance(pipeline, family.pipeline_class):
            found = family(pipeline, height, width)
            found.set_num_frames(num_frames)
            found.limit_prompts(max_sequence_length)
            return found
    if hasattr(pipeline, "controlnet"):
        raise ValueError(
            f"{type(pipeline).__name__} is not supported: no prompt gives a ControlNet its image. Distil the pipeline "
            "of the same base without one; what loads a LoRA beside a ControlNet can load the student's."
        )
    supported = ", ".join(family.pipeline_class.__name__ for family in FAMILIES)
    raise ValueError(
        f"{type(pipeline).__name__} is not supported yet. Supported pipelines: {supported}. docs/families.md says how "
        "to add one."
    )
