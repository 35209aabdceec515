# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What one rollout leaves behind for the updates that learn from it."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import losses, policy
from .diffusion import NoiseProcess
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
        teacher (B, ...): the teacher's denoised prediction there, with guidance; without what a learned target says,
            which is of each update.
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

    def __post_init__(self):
        self.prompts = [str(prompt) for prompt in self.prompts]  # without their images: a checkpoint keeps them

    def weight(
        self, x0: torch.Tensor, process: NoiseProcess, level: str, epsilon: float, epsilon_high: float | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        The truncated importance ratio (B, ...) of the action, where the student predicts `x0` (B, ...) now, and what
        is logged of it; `level` as in `policy.importance_ratio`, the epsilons as in `losses.clip_ratio`.
        """
        old_x0, timesteps = self.rollout.x0, self.timesteps
        action = process.add_noise(old_x0, self.noise, timesteps)
        ratio = policy.importance_ratio(policy.log_ratio(action, x0, old_x0, timesteps, process), level).detach()
        weight = losses.clip_ratio(ratio, epsilon, epsilon_high)
        kl = policy.action_kl(x0, old_x0, timesteps, process).mean()
        return weight, {**policy.ratio_figures(ratio, weight), "ratio/kl": kl}

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Experience":
        return cls(**{**state, "rollout": Rollout(**state["rollout"])})
