# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""One frozen denoiser that plays every role: teacher, student, fake score and EMA of the student."""

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from torch.utils.checkpoint import checkpoint

from .pipelines.base import PipelineFamily


TEACHER = "teacher"
ADAPTERS = ("student", "fake", "ema")


class NetworkRoles(nn.Module):
    """
    One denoiser that plays every role, whatever the roles are made of: the rooms that use them know no more than this.

    Calling it, `roles(role, *args, **kwargs)`, calls the denoiser in that role and returns its first output.

    Attributes:
        denoiser: the network that the pipeline holds.
        adapters (`tuple[str]`): all roles but the teacher's.
        role (`str`): what it plays now.
        kind (`str`): what is saved, for the model card.
        lora_config (`LoraConfig`, *optional*): of the student, where it is a LoRA.
        sharded (`bool`): whether the base is in shards, and each call is one of all processes.
    """

    kind: str
    sharded = False
    adapters: tuple[str, ...] = ADAPTERS
    lora_config: LoraConfig | None = None
    _run: Callable | None = None  # the compiled denoiser

    def compile_denoiser(self, backend: str, mode: str | None):
        """
        From now on a call runs `torch.compile`'s version of the denoiser: one for each role, with and without
        gradients. A pipeline that calls the denoiser itself, with other batches, is left as it is.
        """
        # Roles with and without gradients, in two batch sizes each where guidance doubles it, are more than its 8.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        denoiser = self.denoiser
        self._run = torch.compile(lambda *args, **kwargs: denoiser(*args, **kwargs), backend=backend, mode=mode)

    def _set(self, role: str):
        """Makes `denoiser` play `role`, and `role` say so."""
        raise NotImplementedError

    def network(self, role: str) -> nn.Module:
        """The module whose layers run in this role."""
        return self.denoiser

    def adapter_parameters(self, *names: str) -> list[nn.Parameter]:
        """Parameters of the named roles, in a fixed order."""
        raise NotImplementedError

    @contextmanager
    def use(self, role: str):
        """Everything that calls the denoiser inside the block, a pipeline for example, meets it in this role."""
        if role not in (TEACHER, *self.adapters):
            raise ValueError(f"Unknown role {role!r}: one of {', '.join((TEACHER, *self.adapters))}.")
        previous = self.role
        self._set(role)
        try:
            yield
        finally:
            self._set(previous)

    def train(self, mode: bool = True):
        """Dropout stays off in every role: the scores are compared with each other, and the ratio must start at 1."""
        return super().train(False)

    def forward(self, role: str, *args, **kwargs) -> torch.Tensor:
        with self.use(role):
            run = self._run or self.denoiser
            return run(*args, **kwargs, return_dict=False)[0]

    @torch.no_grad()
    def update_ema(self, decay: float):
        """`ema = decay * ema + (1 - decay) * student`."""
        torch._foreach_lerp_(self.adapter_parameters("ema"), self.adapter_parameters("student"), 1 - decay)


class Roles(NetworkRoles):
    """
    Wraps a diffusers denoiser with one LoRA adapter each for the student, the fake score and the student's EMA.

    The teacher is the denoiser itself, all adapters off, or with a frozen LoRA of its own. The other adapters then
    begin as a copy of that LoRA, followed by their own rank: each role is one adapter, and the student's alone is all
    that the base needs.

    Unlike peft's `set_adapter` a switch of role never touches `requires_grad`, so a graph built in one role keeps its
    gradients while other roles are evaluated, and activation checkpointing recomputes in the role of the forward pass.

    Args:
        denoiser (`ModelMixin`): a diffusers UNet or transformer; it is frozen in place.
        lora_config (`LoraConfig`): of all adapters, which start as the teacher.
        teacher (`tuple[LoraConfig, dict]`, *optional*): the teacher's own LoRA; rank is added to `lora_config`'s.
        student (`tuple[LoraConfig, dict]`, *optional*): a LoRA that the student begins as; the fake score does not.
        learn_target (`bool`): whether there is an adapter `target`, that begins as the fake score does.

    Raises:
        ValueError: the teacher's LoRA is none that another can begin as.
    """

    kind = "LoRA"

    def __init__(
        self,
        denoiser: nn.Module,
        lora_config: LoraConfig,
        teacher: tuple[LoraConfig, dict] | None = None,
        student: tuple[LoraConfig, dict] | None = None,
        learn_target: bool = False,
    ):
        super().__init__()
        self.denoiser = denoiser.requires_grad_(False).eval()
        self.lora_config = lora_config
        self.has_teacher_lora = teacher is not None
        joined = joined_config(lora_config, denoiser, teacher[1]) if teacher else lora_config
        of_student = student[0] if student else joined
        configs = {"student": of_student, "fake": joined, "ema": of_student}
        if learn_target:
            self.adapters, configs = (*ADAPTERS, "target"), configs | {"target": joined}
        configs |= {TEACHER: teacher[0]} if teacher else {}
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Already found a `peft_config`"
            )  # several adapters are the point
            for name, config in configs.items():
                add_adapter(denoiser, config, name)
        self.layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
        if teacher is not None:
            self.load_adapter(TEACHER, teacher[1])
            for name in self.adapters:
                if name != "ema":
                    self._begin_as_teacher(name)
        if student is not None:
            self.load_adapter("student", student[1])
        # Named once: a search through all layers would be felt in every update.
        self._parameters_of = {
            name: [p for path, p in denoiser.named_parameters() if f".{name}." in path] for name in configs
        }
        for parameter in self.adapter_parameters(*self.adapters):
            parameter.data = parameter.data.float()  # a half-precision base, full-precision training
        for name in configs:
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(name in ("student", "fake", "target"))
        with torch.no_grad():
            torch._foreach_copy_(self.adapter_parameters("ema"), self.adapter_parameters("student"))
            if learn_target:  # bit for bit, so that the two learn alike
                torch._foreach_copy_(self.adapter_parameters("target"), self.adapter_parameters("fake"))
        # DDP wraps this module for the student alone: the fake score is trained outside its forward pass.
        ignored = [f".{name}." for name in self.adapters if name != "student"]
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_parameters() if any(part in name for part in ignored)
        ]
        self._set(TEACHER)

    @torch.no_grad()
    def _begin_as_teacher(self, name: str):
        for layer in self.layers:
            if TEACHER in layer.lora_A and name in layer.lora_A:
                rank, scale = layer.r[TEACHER], layer.scaling[TEACHER] / layer.scaling[name]
                layer.lora_A[name].weight[:rank] = layer.lora_A[TEACHER].weight
                layer.lora_B[name].weight[:, :rank] = layer.lora_B[TEACHER].weight * scale
                layer.lora_B[name].weight[:, rank:] = 0

    def _set(self, role: str):
        self.role = role
        plain = role == TEACHER and not self.has_teacher_lora
        for layer in self.layers:
            # The flags behind peft's `enable_adapters` and `set_adapter`, which would change `requires_grad` too.
            layer._disable_adapters = plain
            if not plain:
                layer._active_adapter = [role]

    def adapter_parameters(self, *names: str) -> list[nn.Parameter]:
        """Parameters of the named adapters, in a fixed order."""
        return [parameter for name in names for parameter in self._parameters_of[name]]

    def lora_parameters(self) -> list[nn.Parameter]:
        """Parameters of all adapters, the teacher's own among them."""
        return self.adapter_parameters(*self._parameters_of)

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters of the base, without any adapter but the teacher's."""
        trained = {id(parameter) for parameter in self.adapter_parameters(*self.adapters)}
        return [parameter for parameter in self.denoiser.parameters() if id(parameter) not in trained]

    def adapter_config(self, name: str) -> dict[str, Any]:
        """What peft says of an adapter; nothing where there is none of that name."""
        config = self.denoiser.peft_config.get(name)
        return config.to_dict() if config is not None else {}

    def adapter_state(self, name: str) -> dict[str, torch.Tensor]:
        """Copy of an adapter's weights under peft's keys, which do not hold the adapter's name."""
        return adapter_state(self.denoiser, name)

    def plain_lora(self, name: str) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
        """
        An adapter as a LoRA of scale 1: alpha is the rank in every layer, and what `lora_alpha` says is in `lora_B`.
        Programs that read no alpha from a file, ComfyUI for one, get the same images as those that do.
        """
        return plain_lora(self.denoiser, name)

    def save(self, family: PipelineFamily, folder: Path):
        """The average, as a LoRA of scale 1."""
        config, state = self.plain_lora("ema")
        family.save_lora(folder, state, config.to_dict())

    def load_code(self, family: PipelineFamily, repo: str) -> tuple[str, str]:
        """As `PipelineFamily.load_code`."""
        return family.load_code(repo)

    def load_adapter(self, name: str, state: dict[str, torch.Tensor]):
        """Sets an adapter's weights. Raises `ValueError` where `state` does not fit it."""
        if state.keys() != self.adapter_state(name).keys():
            raise ValueError(f"These weights do not fit the adapter {name!r}: other layers or another kind of LoRA.")
        for key, value in self.adapter_state(name).items():
            if state[key].shape != value.shape:
                raise ValueError(
                    f"These weights do not fit the adapter {name!r}: {key} is {tuple(state[key].shape)}, but must be "
                    f"{tuple(value.shape)}. Use the same LoRA rank."
                )
        set_peft_model_state_dict(self.denoiser, state, adapter_name=name)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **kwargs):
        """What `transformers.Trainer` calls for `activation_checkpointing=True`."""

        def checkpoint_in_role(function, *args):
            role = self.role

            def recomputable(*args):
                with self.use(role):
                    return function(*args)

            return checkpoint(recomputable, *args, use_reentrant=False)

        self.denoiser.enable_gradient_checkpointing(checkpoint_in_role)


def add_adapter(denoiser: nn.Module, config: LoraConfig, name: str):
    """Adds a LoRA to a denoiser of diffusers, whether or not its class has a method for that."""
    if isinstance(denoiser, PeftAdapterMixin):
        denoiser.add_adapter(config, adapter_name=name)
    else:
        inject_adapter_in_model(config, denoiser, name)


def adapter_state(denoiser: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """As `Roles.adapter_state`, of a network that has no roles."""
    state = get_peft_model_state_dict(denoiser, adapter_name=name)
    return {key: value.detach().clone() for key, value in state.items()}


def plain_lora(network: nn.Module, name: str) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """As `Roles.plain_lora`, of any network."""
    state, ranks = adapter_state(network, name), {}
    for path, layer in network.named_modules():
        if isinstance(layer, BaseTunerLayer) and name in layer.lora_A:
            ranks[path] = layer.r[name]
            for key in (f"{path}.lora_B.weight", f"{path}.lora_B.bias"):
                if key in state:
                    state[key] *= layer.scaling[name]
    most = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{path}": rank for path, rank in ranks.items() if rank != most}
    config = replace(
        network.peft_config[name],
        r=most,
        lora_alpha=most,
        rank_pattern=others,
        alpha_pattern=others,
        use_rslora=False,
    )
    return config, state


def joined_config(config: LoraConfig, denoiser: nn.Module, teacher_state: dict[str, torch.Tensor]) -> LoraConfig:
    """
    `config` with the rank of the teacher's LoRA added in each of that one's layers, at the scale of `config`.

    Raises:
        ValueError: one of the two is more than a plain LoRA (DoRA, biases).
    """
    if config.use_dora or config.lora_bias or any(not k.endswith(("_A.weight", "_B.weight")) for k in teacher_state):
        raise ValueError("`teacher_lora` and the student must be plain LoRAs: no DoRA, no biases.")
    end = ".lora_A.weight"
    ranks = {key.removesuffix(end): len(value) for key, value in teacher_state.items() if key.endswith(end)}
    alphas = {layer: float(rank) for layer, rank in ranks.items()}
    for layer, module in denoiser.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and check_target_module_exists(config, layer):
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, layer), config.lora_alpha)
            ranks[layer] = ranks.get(layer, 0) + rank
            alphas[layer] = alpha / (rank**0.5 if config.use_rslora else rank) * ranks[layer]
    return replace(
        config,
        target_modules=sorted(ranks),
        exclude_modules=None,  # which `ranks` follows; the teacher's layers must not fall under these
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={f"^{layer}": rank for layer, rank in ranks.items()},
        alpha_pattern={f"^{layer}": alpha for layer, alpha in alphas.items()},
        use_rslora=False,
    )
