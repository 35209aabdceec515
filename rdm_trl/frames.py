# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""
Videos (B, 3, F, H, W) among images (B, 3, H, W): for what looks at frames alone, both are a batch of frames. Frames
of one video are neighbours, and an image is its own frame.
"""

import torch
import torch.nn.functional as F


# Of a contact sheet.
SHEET_FRAMES = 4


def num_frames(images: torch.Tensor) -> int:
    """F of videos, 1 of images."""
    return images.shape[2] if images.ndim == 5 else 1


def as_frames(images: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """All frames (B * F', 3, H, W), or every `stride`-th from the first; images (B, 3, H, W) as they are."""
    return images[:, :, ::stride].transpose(1, 2).flatten(0, 1) if images.ndim == 5 else images


def contact_sheets(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) with some frames of each video side by side, from first to last; images as they are."""
    if images.ndim == 4:
        return images
    last = images.shape[2] - 1
    chosen = sorted({round(last * i / (SHEET_FRAMES - 1)) for i in range(SHEET_FRAMES)})
    return torch.cat([images[:, :, i] for i in chosen], dim=-1)


def thumbnails(images: torch.Tensor, largest: int) -> torch.Tensor:
    """Videos (B, 3, F, H, W) whose longer side is at most `largest` pixels; images as they are."""
    if images.ndim == 4 or max(images.shape[3:]) <= largest:
        return images
    size = [max(round(side * largest / max(images.shape[3:])), 1) for side in images.shape[3:]]
    small = F.interpolate(as_frames(images), size, mode="bilinear", antialias=True)
    return small.unflatten(0, (len(images), -1)).transpose(1, 2)
