# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""From scalar rewards to advantages, with GRPO's formulas."""

import torch

from ._trl import nanstd


def group_advantages(rewards: torch.Tensor, weights: torch.Tensor, num_generations: int, scale: str) -> torch.Tensor:
    """
    Group-normalised advantages (B,) of the weighted sum of `rewards` (B, M); NaN is "not scored" and does not count.

    Args:
        weights (M,): of the rewards.
        num_generations (`int`): images a prompt; the images of a prompt are neighbours.
        scale (`str`): `"group"` or `"batch"` divides by that standard deviation (plus 1e-4), `"none"` does not.
    """
    total = (rewards * weights).nansum(1)
    total[rewards.isnan().all(1)] = torch.nan
    groups = total.view(-1, num_generations)
    advantages = groups - groups.nanmean(1, keepdim=True)
    if scale == "group":
        advantages = advantages / (nanstd(groups, dim=1, keepdim=True) + 1e-4)
    elif scale == "batch":
        advantages = advantages / (nanstd(total) + 1e-4)
    return advantages.flatten().nan_to_num()
