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


def clipped_policy_loss(advantages: torch.Tensor, ratio: torch.Tensor, epsilon: float) -> torch.Tensor:
    """PPO's clipped objective, negated: `advantages` and `ratio` (B,) of new to old probabilities."""
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - epsilon, 1 + epsilon)
    return torch.maximum(unclipped, clipped).mean()


def denoising_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean square error of a denoiser's `output` (B, ...) in its own parameterisation: the fake score's loss."""
    return F.mse_loss(output.float(), target.float())
