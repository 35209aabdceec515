# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""One frozen denoiser that plays every role: teacher (adapters off), student, fake score and EMA of the student."""

import warnings
from contextlib import contextmanager
from dataclasses import replace

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint


TEACHER = "teacher"
ADAPTERS = ("student", "fake", "ema")


def complete_lora_config(lora_config: LoraConfig | None, target_modules: list[str]) -> LoraConfig:
    """`lora_config`, by default one of rank 32, on `target_modules` where it names none. Raises `TypeError`."""
    if lora_config is None:
        lora_config = LoraConfig(r=32, lora_alpha=32, init_lora_weights="gaussian")
    if not isinstance(lora_config, LoraConfig):
        raise TypeError(f"`peft_config` is {lora_config!r}, but must be a `LoraConfig`.")
    return (
        lora_config if lora_config.target_modules is not None else replace(lora_config, target_modules=target_modules)
    )


class Roles(nn.Module):
    """
    Wraps a diffusers denoiser with one LoRA adapter each for the student, the fake score and the student's EMA.

    Calling it, `roles(role, *args, **kwargs)`, calls the denoiser in that role and returns its first output. Unlike
    peft's `set_adapter` a switch of role never touches `requires_grad`, so a graph built in one role keeps its
    gradients while other roles are evaluated, and activation checkpointing recomputes in the role of the forward pass.

    Args:
        denoiser (`ModelMixin`): a diffusers UNet or transformer; it is frozen in place.
        lora_config (`LoraConfig`): of all three adapters, which start equal (and the student equal to the teacher).

    Raises:
        ValueError: the denoiser has such adapters already, or no layer that `lora_config` targets.
    """

    def __init__(self, denoiser: nn.Module, lora_config: LoraConfig):
        super().__init__()
        if "student" in getattr(denoiser, "peft_config", {}):
            raise ValueError("The pipeline already has a student, of another trainer: load it again for this one.")
        self.denoiser = denoiser.requires_grad_(False).eval()
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Already found a `peft_config`"
            )  # several adapters are the point
            for name in ADAPTERS:
                denoiser.add_adapter(lora_config, adapter_name=name)
        self.layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
        for parameter in self.adapter_parameters(*ADAPTERS):
            parameter.data = parameter.data.float()  # a half-precision base, full-precision training
        for parameter in self.adapter_parameters("student", "fake"):
            parameter.requires_grad_(True)
        for parameter in self.adapter_parameters("ema"):
            parameter.requires_grad_(False)
        self.load_adapter("ema", self.adapter_state("student"))
        # DDP wraps this module for the student alone: the fake score is trained outside its forward pass.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_parameters() if ".fake." in name or ".ema." in name
        ]
        self._set(TEACHER)

    def _set(self, role: str):
        self.role = role
        for layer in self.layers:
            # The flags behind peft's `enable_adapters` and `set_adapter`, which would change `requires_grad` too.
            layer._disable_adapters = role == TEACHER
            if role != TEACHER:
                layer._active_adapter = [role]

    @contextmanager
    def use(self, role: str):
        """Everything that calls the denoiser inside the block, a pipeline for example, meets it in this role."""
        if role not in (TEACHER, *ADAPTERS):
            raise ValueError(f"Unknown role {role!r}: one of {', '.join((TEACHER, *ADAPTERS))}.")
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
            return self.denoiser(*args, **kwargs, return_dict=False)[0]

    def adapter_parameters(self, *names: str) -> list[nn.Parameter]:
        """Parameters of the named adapters, in a fixed order."""
        return [p for n, p in self.denoiser.named_parameters() if any(f".{name}." in n for name in names)]

    def adapter_state(self, name: str) -> dict[str, torch.Tensor]:
        """Copy of an adapter's weights under peft's keys, which do not hold the adapter's name."""
        state = get_peft_model_state_dict(self.denoiser, adapter_name=name)
        return {key: value.detach().clone() for key, value in state.items()}

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

    @torch.no_grad()
    def update_ema(self, decay: float):
        """`ema = decay * ema + (1 - decay) * student`."""
        torch._foreach_lerp_(self.adapter_parameters("ema"), self.adapter_parameters("student"), 1 - decay)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **kwargs):
        """What `transformers.Trainer` calls for `activation_checkpointing=True`."""

        def checkpoint_in_role(function, *args):
            role = self.role

            def recomputable(*args):
                with self.use(role):
                    return function(*args)

            return checkpoint(recomputable, *args, use_reentrant=False)

        self.denoiser.enable_gradient_checkpointing(checkpoint_in_role)
