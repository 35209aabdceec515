# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""LoRAs that a run begins with: the teacher's own, and the one that the student continues."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import logging
from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import CLIPTextModel

from .full import FullRoles
from .pipelines.base import PipelineFamily
from .pipelines.changes import check_unchanged
from .roles import TEACHER, NetworkRoles, Roles, adapter_state, plain_lora


logger = logging.get_logger(__name__)


def make_roles(
    family: PipelineFamily,
    peft_config: LoraConfig | bool | None,
    teacher_lora: str | Path | None = None,
    student_lora: str | Path | None = None,
    learn_target: bool = False,
) -> NetworkRoles:
    """
    The roles of a run; by default adapters of rank 32 on the family's layers, whole networks with `False`.

    Raises:
        ValueError: one of the LoRAs is not for this pipeline, `peft_config` stands beside `student_lora`, the pipeline
            has a LoRA or a student already or was changed otherwise, whole copies of a quantized denoiser are asked
            for, or plain diffusers would not load what this `peft_config` saves.
        TypeError: `peft_config` is another kind of adapter.
    """
    if peft_config is not False and type(peft_config) not in (LoraConfig, type(None)):  # AdaLoRA's is one of its kind
        raise TypeError(f"`peft_config` is {peft_config!r}, but must be a `LoraConfig`, or `False` for no LoRA.")
    check_unchanged(family.pipeline, family.denoiser_name)
    if "student" in getattr(family.denoiser, "peft_config", {}):
        raise ValueError("The pipeline already has a student, of another trainer: load it again for this one.")
    networks = (family.denoiser, *family.encoders())
    if any(isinstance(module, BaseTunerLayer) for network in networks for module in network.modules()):
        raise ValueError(
            "This pipeline has a LoRA loaded, which would be lost: give it as `teacher_lora`, or fuse it and save the "
            "pipeline (`pipeline.fuse_lora(); pipeline.unload_lora_weights(); pipeline.save_pretrained(folder)`)."
        )
    if peft_config is False:
        if learn_target:
            raise ValueError("`learn_target` is an adapter, and `peft_config=False` has none.")
        if teacher_lora is not None or student_lora is not None:
            raise ValueError(
                "`teacher_lora` and `student_lora` need LoRAs, and `peft_config=False` has none: fuse them into the "
                "pipeline, save that, and give the folder."
            )
        if getattr(family.denoiser, "is_quantized", False):  # diffusers sets it only where it is so
            raise ValueError("`peft_config=False` trains copies of the denoiser, which must not be quantized.")
        return FullRoles(family.denoiser)
    teacher, of_teacher = read_lora(family, teacher_lora, "teacher_lora") if teacher_lora is not None else (None, {})
    student, of_student = read_lora(family, student_lora, "student_lora") if student_lora is not None else (None, {})
    encoder_loras = shared_encoder_loras(of_teacher, of_student, teacher is not None)
    if student is not None:
        if peft_config is not None:
            raise ValueError("`student_lora` brings its own rank, alpha and layers: leave `peft_config` out.")
        peft_config = student[0]
    elif peft_config is None:
        peft_config = LoraConfig(r=32, lora_alpha=32, init_lora_weights="gaussian")
    if peft_config.target_modules is None:
        peft_config = replace(peft_config, target_modules=family.lora_target_modules)
    check_lora_config(peft_config)
    use_encoder_loras(family, encoder_loras)
    roles = Roles(family.denoiser, peft_config, teacher, student, learn_target)
    check_scales(family.denoiser, peft_config)
    check_saved_lora(family, roles)
    return roles


def shared_encoder_loras(of_teacher: dict, of_student: dict, has_teacher: bool) -> dict:
    """
    What prompts are encoded with: once, for teacher and student.

    Raises:
        ValueError: the two LoRAs change the text encoders otherwise.
    """
    if of_student and not has_teacher:
        logger.warning(
            "`student_lora` changes the text encoders too: the teacher's prompts are encoded with that part as well. "
            "Give the LoRA that it was distilled with as `teacher_lora`, if there was one."
        )
        return of_student
    weights = [
        {(name, key): value for name, (_, state) in loras.items() for key, value in state.items()}
        for loras in (of_teacher, of_student)
    ]
    if of_student and (
        weights[0].keys() != weights[1].keys() or any(not weights[1][k].allclose(v) for k, v in weights[0].items())
    ):
        raise ValueError(
            "`student_lora` changes the text encoders, and not as `teacher_lora` does; but prompts are encoded once, "
            "for teacher and student. Leave one of the two out, or take a `student_lora` without that part."
        )
    return of_teacher


def use_encoder_loras(family: PipelineFamily, loras: dict[str, tuple[LoraConfig, dict[str, torch.Tensor]]]):
    """From now on the pipeline's text encoders have these LoRAs, which the family saves beside the student's."""
    for name, (config, state) in loras.items():
        encoder = family.pipeline.components[name]
        dtype = encoder.dtype
        inject_adapter_in_model(config, encoder, TEACHER)
        set_peft_model_state_dict(encoder, state, adapter_name=TEACHER)
        for path, parameter in encoder.requires_grad_(False).named_parameters():
            if f".{TEACHER}." in path:  # as plain diffusers has them
                parameter.data = parameter.data.to(encoder.device, dtype)
        # The names that other programs and older versions of transformers know; today's knows both.
        flat = isinstance(encoder, CLIPTextModel) and not hasattr(encoder, "text_model")
        saved = {f"text_model.{key}" if flat else key: value for key, value in state.items()}
        family.encoder_loras[name] = (config, saved)


def check_lora_config(config: LoraConfig):
    """Raises `ValueError` for what cannot be a role of one shared base, or cannot be saved as a LoRA of diffusers."""
    for name in ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"):
        if getattr(config, name, None):  # older versions of peft have fewer of them
            raise ValueError(f"`peft_config` has `{name}`, which is no LoRA that diffusers loads: leave it out.")
    if config.lora_dropout:
        raise ValueError(
            f"`peft_config` has `lora_dropout={config.lora_dropout}`, but dropout is off in every role: scores are "
            "compared, and the importance ratio must start at 1. Leave it out."
        )
    if config.bias != "none":
        raise ValueError(f"`peft_config` has `bias={config.bias!r}`: all roles share the base's biases. Use 'none'.")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"`peft_config` has `init_lora_weights={config.init_lora_weights!r}`, which begins with other weights of "
            "the base or needs data: the base is the teacher here. Use 'gaussian'."
        )


def check_scales(denoiser: nn.Module, config: LoraConfig):
    """Raises `ValueError` for layers of the student that never learn, and for patterns of `config` that fit none."""
    layers = {path: m for path, m in denoiser.named_modules() if isinstance(m, BaseTunerLayer) and "student" in m.r}
    for path, layer in layers.items():
        if layer.scaling["student"] == 0:
            raise ValueError(f"`peft_config` has an alpha of 0 at {path}, where the adapter would never learn.")
    for name, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(get_pattern_key([pattern], path) == pattern for path in layers):
                raise ValueError(f"`peft_config` has `{name}` for {pattern!r}, but no layer of the adapter fits it.")


def check_saved_lora(family: PipelineFamily, roles: Roles):
    """
    Saves the student before its first update, and loads the folder as a user will, into a denoiser without weights.

    Raises:
        ValueError: it does not load, or not as what was saved; the message names `peft_config`.
    """
    with torch.device("meta"):
        bare = type(family.denoiser).from_config(family.denoiser.config)
    networks = [(bare, family.denoiser, "ema")]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # or each run begins with a warning that the text encoders have no LoRA
    try:
        with TemporaryDirectory() as folder:
            roles.save(family, Path(folder))
            if isinstance(family.pipeline, LoraBaseMixin):
                pipeline = copy.copy(family.pipeline)
                setattr(pipeline, family.denoiser_name, bare)
                for name in family.encoder_loras:
                    with torch.device("meta"):
                        encoder = type(pipeline.components[name])(pipeline.components[name].config)
                    setattr(pipeline, name, encoder)
                    networks.append((encoder, family.pipeline.components[name], TEACHER))
                pipeline.load_lora_weights(folder, adapter_name="default")
            else:
                PeftModel.from_pretrained(bare, folder, low_cpu_mem_usage=True)
        for loaded, ours, name in networks:
            expected = {key: value.shape for key, value in adapter_state(ours, name).items()}
            found = {key: value.shape for key, value in adapter_state(loaded, "default").items()}
            scales = {m.scaling["default"] for m in loaded.modules() if isinstance(m, BaseTunerLayer)}
            if found != expected or scales != {1.0}:
                differing = sorted(key for key in {**found, **expected} if found.get(key) != expected.get(key))
                raise ValueError(f"it is read as another one, at {', '.join(differing[:3]) or 'its alphas'}")
    except Exception as error:
        # As in `read_lora`: any type.
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"`peft_config` makes a LoRA that plain diffusers does not load: {said}") from error
    finally:
        logging.set_verbosity(verbosity)


def read_lora(family: PipelineFamily, path: str | Path, option: str) -> tuple[tuple[LoraConfig, dict], dict]:
    """
    Config and weights, under peft's keys, of a LoRA for the family's denoiser, in any format that its pipeline loads;
    and of its part for each text encoder, by the encoder's name, as LoRAs of scale 1.

    Raises:
        ValueError: it is none, or diffusers reads only a part of it; the message names `option`.
    """
    pipeline, encoder_loras = family.pipeline, {}
    try:
        if not isinstance(pipeline, LoraBaseMixin):
            config, state = PeftConfig.from_pretrained(str(path)), load_peft_weights(str(path), device="cpu")
            state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        else:
            contents = pipeline.lora_state_dict(path)
            keys, alphas = contents[:2] if isinstance(contents, tuple) else (contents, None)
            encoders = sorted({key.split(".")[0] for key in keys if key.startswith("text_encoder")})
            try:
                pipeline.load_lora_weights(path, adapter_name="loaded")
                adapted = pipeline.get_list_adapters()
                config = family.denoiser.peft_config["loaded"] if family.denoiser_name in adapted else None
                state = adapter_state(family.denoiser, "loaded") if config else {}
                if config and alphas and use_own_alphas(family.denoiser, family.denoiser_name, alphas):
                    config, state = plain_lora(family.denoiser, "loaded")
                for name in encoders:
                    number = sum(key.startswith(f"{name}.") for key in keys)
                    encoder_loras[name] = encoder_lora(pipeline, name, number, alphas or {})
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
    return (replace(config, init_lora_weights="gaussian", inference_mode=False), state), encoder_loras


def encoder_lora(pipeline, name: str, number: int, alphas: dict[str, float]) -> tuple[LoraConfig, dict]:
    """
    The LoRA "loaded" of a text encoder, at scale 1.

    Args:
        number (`int`): of the file's tensors for this encoder.
        alphas (`dict`): as in `use_own_alphas`.

    Raises:
        ValueError: the pipeline has no such encoder, or diffusers did not read all of it.
    """
    encoder = pipeline.components.get(name)
    state = adapter_state(encoder, "loaded") if "loaded" in getattr(encoder, "peft_config", {}) else {}
    if len(state) != number or any(not key.endswith(("_A.weight", "_B.weight")) for key in state):
        raise ValueError(f"of its {number} tensors for the {name} diffusers reads {len(state)} as a plain LoRA's")
    use_own_alphas(encoder, name, alphas)
    config, state = plain_lora(encoder, "loaded")
    layers = sorted({key.split(".lora_")[0] for key in state})
    patterns = {path.removeprefix("^"): rank for path, rank in config.rank_pattern.items()}
    return replace(config, target_modules=layers, rank_pattern=patterns, alpha_pattern={**patterns}), state


def use_own_alphas(network: nn.Module, name: str, alphas: dict[str, float]) -> bool:
    """
    Scales the LoRA "loaded" by each layer's own alpha; diffusers 0.42 does not find those of an attention layer, and
    takes the commonest alpha for them. Says whether that changed anything.

    Args:
        alphas (`dict`): of kohya's format, under diffusers' names: `unet.mid_block...to_q_lora.down.weight.alpha`.
    """
    projection, out = (r".to_\1", ".to_out.0") if name == "unet" else (r".\1_proj", ".out_proj")
    own, changed = {}, False
    for key, alpha in alphas.items():
        path = key.removesuffix(".alpha").split(".down.")[0].replace(".processor.", ".").replace("text_model.", "")
        path = re.sub(r"\.to_([qkv])_lora$", projection, path.removesuffix(".lora_linear_layer"))
        own[re.sub(r"\.to_out_lora$", out, path)] = alpha
    for path, layer in network.named_modules():
        alpha = own.get(f"{name}.{path.removeprefix('text_model.')}")
        if alpha is not None and isinstance(layer, BaseTunerLayer):
            changed |= layer.scaling["loaded"] != alpha / layer.r["loaded"]
            layer.scaling["loaded"] = alpha / layer.r["loaded"]
    return changed
