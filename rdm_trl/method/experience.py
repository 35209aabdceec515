# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What one rollout leaves behind for the updates that learn from it."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .policy import Rollout


@dataclass
class Experience:
    """
    A rollout of B images, judged once and learned from `num_iterations` times.

    Args:
        prompts (`list[str]`): of the images.
        condition (`dict[str, torch.Tensor]`): the denoiser's conditions, (B, ...) each.
        rollout (`Rollout`): states, exit steps and images.
        seen (B,): smallest noise level that matters for the images, see `policy.seen_noise`.
        timesteps (B,), noise (B, ...): of the action at which R_dm is probed: `rollout.x0`, the prediction of the
            policy that acted, noised again.
        teacher (B, ...): the teacher's denoised prediction there, with guidance.
        pushes (`list`, *optional*): the rewards', as `Mixer` takes them; `None` before the rewards join.
    """

    prompts: list[str]
    condition: dict[str, torch.Tensor]
    rollout: Rollout
    seen: torch.Tensor
    timesteps: torch.Tensor
    noise: torch.Tensor
    teacher: torch.Tensor
    pushes: list[torch.Tensor] | None

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Experience":
        return cls(**{**state, "rollout": Rollout(**state["rollout"])})
