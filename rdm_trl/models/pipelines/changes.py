# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What users do to a pipeline before they train it, and what a student of it could not be trained or drawn with."""

import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.models.attention import AttentionModuleMixin
from torch import nn


def check_unchanged(pipeline: DiffusionPipeline, denoiser_name: str):
    """
    Raises `ValueError` for a pipeline whose denoiser no adapter can be trained in, or draws otherwise than the one
    that is loaded from its files, for which the saved student is.
    """
    denoiser, name = pipeline.components[denoiser_name], type(pipeline).__name__
    if isinstance(denoiser, torch._dynamo.OptimizedModule) or any(m._compiled_call_impl for m in denoiser.modules()):
        raise ValueError(
            f"The {denoiser_name} of the {name} is compiled, for other layers than those with adapters. Give the "
            "pipeline as it was loaded; `torch_compile` compiles every role."
        )
    for component, module in pipeline.components.items():
        if isinstance(module, nn.Module) and any(is_offloaded(part) for part in module.modules()):
            raise ValueError(
                f"The {component} of the {name} is moved between devices by diffusers or accelerate (CPU offloading, "
                "`device_map`), which takes weights away that an update needs. Load the pipeline without it; "
                "`offload_encoders`, `bf16` and docs/performance.md say what else is smaller."
            )
    if any("_diffusers_hook" in vars(module) for module in denoiser.modules()):
        raise ValueError(
            f"The {denoiser_name} of the {name} has a hook of diffusers (a cache, layerwise casting, group "
            "offloading), with which it cannot be trained. Load the pipeline without it."
        )
    if any(is_fused(module) for module in denoiser.modules()):
        raise ValueError(
            f"The {denoiser_name} of the {name} has fused projections, which pass by the layers that a LoRA changes: "
            "`pipeline.unfuse_qkv_projections()` first."
        )
    if any(vars(module).get("b1") is not None for module in denoiser.modules()):
        raise ValueError(
            f"FreeU is on, and the student would be one of that: the saved LoRA is for the {denoiser_name} without "
            "it. `pipeline.disable_freeu()` first."
        )
    if isinstance(pipeline, LoraBaseMixin) and pipeline.num_fused_loras:
        raise ValueError(
            "The pipeline has a LoRA fused in, which the base that the saved student is loaded into would lack. Give "
            "it as `teacher_lora`, or save the pipeline (`pipeline.save_pretrained(folder)`) and give that folder."
        )
    if denoiser.dtype == torch.float16 and not getattr(denoiser, "is_quantized", False):
        raise ValueError(
            f"The {denoiser_name} of the {name} is in float16, where gradients under- and overflow. Load the pipeline "
            "in bfloat16 or float32; a variant of the files, as `fp16`, can be loaded in either."
        )


def is_fused(module: nn.Module) -> bool:
    """Whether an attention layer has one projection in use for several; of the older class a processor says so."""
    attributes = vars(module)
    is_new, processor = isinstance(module, AttentionModuleMixin), type(attributes.get("processor")).__name__
    return bool(attributes.get("fused_projections")) and (is_new or processor.startswith("Fused"))


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate moves a module's weights to and fro."""
    hook = vars(module).get("_hf_hook")
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return any(isinstance(h, CpuOffload) or (isinstance(h, AlignDevicesHook) and h.offload) for h in hooks)
