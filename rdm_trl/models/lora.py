# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""LoRAs that a run begins with: the teacher's own, and the one that the student continues."""

import copy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import logging
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights

from .full import FullRoles
from .pipelines.base import PipelineFamily
from .roles import NetworkRoles, Roles, adapter_state


def make_roles(
    family: PipelineFamily,
    peft_config: LoraConfig | bool | None,
    teacher_lora: str | Path | None = None,
    student_lora: str | Path | None = None,
    target: bool = False,
) -> NetworkRoles:
    """
    The roles of a run; by default adapters of rank 32 on the family's layers, whole networks with `False`.
    With `target` there is a role for what absorbs the teacher's guidance.

    Raises:
        ValueError: one of the LoRAs is not for this pipeline, `peft_config` stands beside `student_lora`, the pipeline
            has a LoRA or a student already, whole copies of a quantized denoiser are asked for, or plain diffusers
            would not load what this `peft_config` saves.
        TypeError: `peft_config` is another kind of adapter.
    """
    if peft_config is not False and not isinstance(peft_config, LoraConfig | None):
        raise TypeError(f"`peft_config` is {peft_config!r}, but must be a `LoraConfig`, or `False` for no LoRA.")
    if "student" in getattr(family.denoiser, "peft_config", {}):
        raise ValueError("The pipeline already has a student, of another trainer: load it again for this one.")
    if any(isinstance(module, BaseTunerLayer) for module in family.denoiser.modules()):
        raise ValueError(
            "This pipeline has a LoRA loaded, which would be lost: give it as `teacher_lora`, or fuse it first "
            "(`pipeline.fuse_lora(); pipeline.unload_lora_weights()`)."
        )
    if peft_config is False:
        if teacher_lora is not None or student_lora is not None:
            raise ValueError(
                "`teacher_lora` and `student_lora` need LoRAs, and `peft_config=False` has none: fuse them into the "
                "pipeline first."
            )
        if getattr(family.denoiser, "is_quantized", False):  # diffusers sets it only where it is so
            raise ValueError("`peft_config=False` trains copies of the denoiser, which must not be quantized.")
        return FullRoles(family.denoiser, target)
    teacher = read_lora(family, teacher_lora, "teacher_lora") if teacher_lora is not None else None
    student = read_lora(family, student_lora, "student_lora") if student_lora is not None else None
    if student is not None:
        if peft_config is not None:
            raise ValueError("`student_lora` brings its own rank, alpha and layers: leave `peft_config` out.")
        peft_config = student[0]
    elif peft_config is None:
        peft_config = LoraConfig(r=32, lora_alpha=32, init_lora_weights="gaussian")
    if peft_config.target_modules is None:
        peft_config = replace(peft_config, target_modules=family.lora_target_modules)
    check_lora_config(peft_config)
    roles = Roles(family.denoiser, peft_config, teacher, student, target)
    check_saved_lora(family, roles)
    return roles


def check_lora_config(config: LoraConfig):
    """Raises `ValueError` for what cannot be a role of one shared base, or cannot be saved as a LoRA of diffusers."""
    for name in ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"):
        if getattr(config, name, None):  # older versions of peft have fewer of them
            raise ValueError(f"`peft_config` has `{name}`, which is no LoRA that diffusers loads: leave it out.")
    if config.bias != "none":
        raise ValueError(f"`peft_config` has `bias={config.bias!r}`: all roles share the base's biases. Use 'none'.")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"`peft_config` has `init_lora_weights={config.init_lora_weights!r}`, which begins with other weights of "
            "the base or needs data: the base is the teacher here. Use 'gaussian'."
        )


def check_saved_lora(family: PipelineFamily, roles: Roles):
    """
    Saves the student before its first update, and loads the folder as a user will, into a denoiser without weights.

    Raises:
        ValueError: it does not load, or not as what was saved; the message names `peft_config`.
    """
    with torch.device("meta"):
        bare = type(family.denoiser).from_config(family.denoiser.config)
    expected = {key: value.shape for key, value in roles.adapter_state("ema").items()}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # or each run begins with a warning that the text encoders have no LoRA
    try:
        with TemporaryDirectory() as folder:
            roles.save(family, Path(folder))
            if isinstance(family.pipeline, LoraBaseMixin):
                pipeline = copy.copy(family.pipeline)
                setattr(pipeline, family.denoiser_name, bare)
                pipeline.load_lora_weights(folder, adapter_name="default")
            else:
                PeftModel.from_pretrained(bare, folder, low_cpu_mem_usage=True)
        found = {key: value.shape for key, value in adapter_state(bare, "default").items()}
        scales = {m.scaling["default"] for m in bare.modules() if isinstance(m, BaseTunerLayer)}
        if found != expected or scales != {1.0}:
            differing = sorted(key for key in {**found, **expected} if found.get(key) != expected.get(key))
            raise ValueError(f"it is read as another one, at {', '.join(differing[:3]) or 'its alphas'}")
    except Exception as error:
        # As in `read_lora`: any type.
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"`peft_config` makes a LoRA that plain diffusers does not load: {said}") from error
    finally:
        logging.set_verbosity(verbosity)


def read_lora(family: PipelineFamily, path: str | Path, option: str) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """
    Config and weights, under peft's keys, of a LoRA for the family's denoiser; in any format that its pipeline loads.

    Raises:
        ValueError: it is none, or reaches beyond the denoiser; the message names `option`.
    """
    pipeline = family.pipeline
    try:
        if not isinstance(pipeline, LoraBaseMixin):
            config, state = PeftConfig.from_pretrained(str(path)), load_peft_weights(str(path), device="cpu")
            state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        else:
            # Before loading: some pairs of transformers and peft refuse a text encoder's layers, with another message.
            contents = pipeline.lora_state_dict(path)
            keys = contents[0] if isinstance(contents, tuple) else contents
            encoders = sorted({key.split(".")[0] for key in keys if key.startswith("text_encoder")})
            if encoders:
                found = ", ".join(encoders)
                raise ValueError(f"it must change the {family.denoiser_name} alone, but changes {found} too")
            try:
                pipeline.load_lora_weights(path, adapter_name="loaded")
                adapted = pipeline.get_list_adapters()
                config = family.denoiser.peft_config["loaded"] if family.denoiser_name in adapted else None
                state = adapter_state(family.denoiser, "loaded") if config else {}
            finally:
                pipeline.unload_lora_weights()
            if config is None:
                raise ValueError(f"it must change the {family.denoiser_name}, but changes nothing that it has")
    except Exception as error:
        # diffusers and peft answer a wrong file with almost any type, and often with a line for each layer.
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"`{option}`, {str(path)!r}, is not a LoRA for {type(pipeline).__name__} that can be used here: {said}"
        ) from error
    return replace(config, init_lora_weights="gaussian", inference_mode=False), state
