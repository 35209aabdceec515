# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Full fine-tuning: the roles as whole networks."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .pipelines.base import PipelineFamily
from .roles import TEACHER, NetworkRoles


class FullRoles(NetworkRoles):
    """
    What [`roles.Roles`] is with adapters, with a copy of the denoiser, in float32, for each of student, fake score and
    average; the teacher is the denoiser itself. Memory: four networks, and gradients and optimizer states of two.

    Args:
        denoiser (`ModelMixin`): a diffusers UNet or transformer; it is frozen in place.
    """

    kind = "model"

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser.requires_grad_(False).eval()
        self.networks = nn.ModuleDict({name: copy.deepcopy(denoiser).float() for name in self.adapters})
        for parameter in self.adapter_parameters("student", "fake"):
            parameter.requires_grad_(True)
        # DDP wraps this module for the student alone: the fake score is trained outside its forward pass.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_parameters() if not name.startswith("networks.student.")
        ]
        self._set(TEACHER)

    def _set(self, role: str):
        self.role = role
        own = type(self.denoiser).forward.__get__(self.denoiser)
        self.denoiser.forward = own if role == TEACHER else self.networks[role].forward

    def network(self, role: str) -> nn.Module:
        """The copy of this role, or the teacher."""
        return self.networks[role] if role in self.adapters else self.denoiser

    def adapter_parameters(self, *names: str) -> list[nn.Parameter]:
        """Parameters of the named copies, in a fixed order."""
        return [parameter for name in names for parameter in self.networks[name].parameters()]

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters of the teacher."""
        return list(self.denoiser.parameters())

    def adapter_config(self, name: str) -> dict[str, Any]:
        """A whole network is no adapter."""
        return {}

    def adapter_state(self, name: str) -> dict[str, torch.Tensor]:
        """Copy of a copy's weights."""
        return {key: value.detach().clone() for key, value in self.networks[name].state_dict().items()}

    @torch.no_grad()
    def load_adapter(self, name: str, state: dict[str, torch.Tensor]):
        """Sets a copy's weights. Raises `ValueError` where `state` does not fit it."""
        try:
            self.networks[name].load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"These weights do not fit the network {name!r}: {error}") from error

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **kwargs):
        """What `transformers.Trainer` calls for `activation_checkpointing=True`."""
        for name in self.adapters:
            self.networks[name].enable_gradient_checkpointing()

    def save(self, family: PipelineFamily, folder: Path):
        """The average as a component of the pipeline, in diffusers' own format."""
        self.networks["ema"].save_pretrained(folder / family.denoiser_name)

    def load_code(self, family: PipelineFamily, repo: str) -> tuple[str, str]:
        """As `PipelineFamily.load_code`."""
        network, name = type(self.denoiser).__name__, family.denoiser_name
        load = f"{network}.from_pretrained({repo!r}, subfolder={name!r}, dtype=torch.float32)"
        return f"from diffusers import {network}\n", f"pipe.{name} = {load}"
