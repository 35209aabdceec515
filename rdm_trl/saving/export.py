# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Distilled checkpoints for other programs: as a whole pipeline, or as a LoRA under the names of kohya and ComfyUI."""

import json
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import convert_state_dict_to_kohya
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ..demo import DEMO_PIPELINE
from ..models.pipelines import base_in, family_of, read_pipeline


FORMATS = ("diffusers", "kohya")
# Layers of pipelines whose model has other names in ComfyUI than in diffusers, by the latter. Under
# `diffusion_model.` ComfyUI looks for its own names; diffusers reads these files too.
COMFY_NAMES = {
    "WanPipeline": {
        ".attn1.to_out.0.": ".self_attn.o.",
        ".attn1.to_": ".self_attn.",
        ".attn2.to_out.0.": ".cross_attn.o.",
        ".attn2.to_": ".cross_attn.",
        ".ffn.net.0.proj.": ".ffn.0.",
        ".ffn.net.2.": ".ffn.2.",
    },
    "LTXPipeline": {},
}
WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


def export(
    checkpoint: str | Path,
    output_dir: str | Path,
    format: str,
    base: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """
    Writes a checkpoint of `RdmDistillTrainer` in another form; every form is right at LoRA scale 1.

    Args:
        checkpoint (`str` or `Path`): a folder of `save_model`, or a training checkpoint.
        format (`str`):
            `"diffusers"`, a pipeline folder with the LoRA fused into its weights and the student's scheduler;
            `"kohya"`, one file for ComfyUI and kohya's tools: `lora_unet_...` for UNets, `diffusion_model....` for
            Wan and LTX-Video, and for the other transformers, which they know by diffusers' names, these.
        base (`str`, *optional*): path or Hub id of the base pipeline; by default the one of the training.
        dtype (`torch.dtype`): of the written pipeline.

    Returns:
        The pipeline's folder, or the file.

    Raises:
        ValueError: `checkpoint` is none, or no LoRA where one is needed, or `output_dir` is the checkpoint itself.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    weights = next((checkpoint / name for name in WEIGHTS if (checkpoint / name).is_file()), None)
    whole = any((checkpoint / name / "config.json").is_file() for name in ("unet", "transformer"))
    if weights is None and not whole:
        raise ValueError(f"{checkpoint} is not a distilled checkpoint: there is no {' and no '.join(WEIGHTS)}.")
    if format not in FORMATS:
        raise ValueError(f"`format` is {format!r}, but must be one of {', '.join(FORMATS)}.")
    if format == "kohya" and weights is None:
        raise ValueError(f"{checkpoint} is a whole network, not a LoRA: export it as 'diffusers'.")
    if output_dir.resolve() == checkpoint.resolve():
        raise ValueError(f"{output_dir} is the checkpoint itself: name another `output_dir`.")
    output_dir.mkdir(parents=True, exist_ok=True)
    if format == "kohya":
        file, metrics = checkpoint / "metrics.json", {}
        if file.is_file():
            metrics = json.loads(file.read_text())
        return export_kohya(weights, output_dir / f"{checkpoint.resolve().name}.safetensors", metrics.get("pipeline"))
    loading = {"base_model": base}
    if base is None:
        loading = base_in(json.loads((checkpoint / "metrics.json").read_text())["settings"])
    if loading["base_model"] == "rdm_trl.demo":
        loading["base_model"] = DEMO_PIPELINE
    pipeline = read_pipeline(dtype=dtype, **loading)
    fuse(pipeline, checkpoint).save_pretrained(output_dir)
    return output_dir


def fuse(pipeline: DiffusionPipeline, checkpoint: Path) -> DiffusionPipeline:
    """The pipeline that the model card describes: with the checkpoint's network, or its LoRA in the weights."""
    family = family_of(pipeline)
    if (checkpoint / family.denoiser_name / "config.json").is_file():
        network = type(family.denoiser).from_pretrained(checkpoint, subfolder=family.denoiser_name, dtype=family.dtype)
        pipeline.register_modules(**{family.denoiser_name: network.to(family.denoiser.device)})
    elif isinstance(pipeline, LoraBaseMixin):
        pipeline.load_lora_weights(checkpoint, weight_name=WEIGHTS[0])
        pipeline.fuse_lora(components=list(pipeline.get_list_adapters()))
        pipeline.unload_lora_weights()
    else:
        fused = PeftModel.from_pretrained(family.denoiser, str(checkpoint)).merge_and_unload()
        pipeline.register_modules(**{family.denoiser_name: fused})
    name = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    scheduler = getattr(diffusers, name).from_pretrained(checkpoint, subfolder="scheduler")
    if family.card_class != "DiffusionPipeline":
        # Not the base's class: a `DDIMPipeline` makes a DDIM scheduler of any that it is given.
        return getattr(diffusers, family.card_class)(**{**pipeline.components, "scheduler": scheduler})
    pipeline.register_modules(scheduler=scheduler)
    return pipeline


def export_kohya(weights: Path, file: Path, pipeline: str | None = None) -> Path:
    """
    Writes a LoRA of the class `pipeline`, where that is known, under the names of other programs.

    The converter's alpha is the rank, which is right: so is that of every file that we save. Where no alpha stands, as
    under transformers' names, the readers take the rank too.
    """
    state = load_file(weights)
    if any(key.startswith("unet.") for key in state):
        state = convert_state_dict_to_kohya(state)
        state = {key: value.float() if key.endswith(".alpha") else value for key, value in state.items()}
        if not any(
            key.startswith("lora_te2_") for key in state
        ):  # Stable Diffusion 1 and 2 have one, without a number
            state = {key.replace("lora_te1_", "lora_te_"): value for key, value in state.items()}
    if pipeline in COMFY_NAMES:
        state = {comfy_name(key, COMFY_NAMES[pipeline]): value for key, value in state.items()}
    save_file(state, file)
    return file


def comfy_name(key: str, names: dict[str, str]) -> str:
    """The first of `names` that stands in a layer's name is replaced, and the prefix is ComfyUI's."""
    for ours, theirs in names.items():
        if ours in key:
            key = key.replace(ours, theirs)
            break
    return f"diffusion_model.{key.removeprefix('transformer.')}"
