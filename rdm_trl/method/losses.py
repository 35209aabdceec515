# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Losses as pure functions of tensors; batches come first, everything is averaged."""

import torch
import torch.nn.functional as F


def student_loss(x0: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """
    Pulls the student's images `x0` (B, ...) along `advantage` (B, ...): the gradient with respect to `x0` is
    `-advantage / x0.numel()`, the value half the advantage's mean square (DMD2's form; a stop-gradient regression).
    """
    return 0.5 * F.mse_loss(x0.float(), (x0 + advantage).detach().float())


def clip_ratio(ratio: torch.Tensor, epsilon: float, epsilon_high: float | None = None) -> torch.Tensor:
    """`ratio` within `[1 - epsilon, 1 + epsilon_high]`, by default `epsilon` too: truncated importance weights."""
    return ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))


def clipped_policy_loss(
    advantages: torch.Tensor, ratio: torch.Tensor, epsilon: float, epsilon_high: float | None = None
) -> torch.Tensor:
    """PPO's clipped objective, negated: `advantages` (B,) and `ratio` (B, ...) of new to old probabilities."""
    advantages = advantages.view(-1, *(1,) * (ratio.ndim - 1))
    return torch.maximum(-advantages * ratio, -advantages * clip_ratio(ratio, epsilon, epsilon_high)).mean()


def denoising_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean square error of a denoiser's `output` (B, ...) in its own parameterisation: the fake score's loss."""
    return F.mse_loss(output.float(), target.float())
