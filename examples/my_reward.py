# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""A reward of one's own: `--reward_funcs my_reward:symmetry` from this folder."""

import torch


def symmetry(images: torch.Tensor, prompts: list[str], metadata: list) -> torch.Tensor:
    """Minus the mean difference between an image and its mirror image: 0 for a symmetric one. Images (B, 3, H, W)."""
    return -(images - images.flip(3)).abs().mean(dim=(1, 2, 3))


symmetry.differentiable = True  # gradients flow through it; without this line it is a black box
