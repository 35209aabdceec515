# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""How a reward function is called and what it may return."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from .._trl import get_callable_name


def call_reward(
    reward_function: Callable, images: torch.Tensor, prompts: list[str], metadata: list[Any]
) -> tuple[torch.Tensor, Any]:
    """
    Calls a reward function and checks its answer.

    Args:
        reward_function (`Callable`):
            DDPO's style, `f(images, prompts, metadata)`, or GRPO's, any function that takes `**kwargs`:
            `f(images=..., prompts=..., **columns)`, where the columns come from metadata that are dictionaries. It
            returns one number an image (list, array or tensor; `None` is "not scored"), or that and a dictionary.
        images (B, 3, H, W): in [0, 1].

    Returns:
        Rewards (B,), float32, NaN where not scored, and the function's own metadata (`{}` if it gave none).

    Raises:
        ValueError: wrong length, or a value that is not a finite number; the message names the function and prompt.
    """
    name = get_callable_name(reward_function)
    parameters = inspect.signature(reward_function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        rows = [row if isinstance(row, dict) else {"metadata": row} for row in metadata]
        columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
        rewards = reward_function(images=images, prompts=prompts, **columns)
    else:
        rewards = reward_function(images, prompts, metadata)
    reward_metadata = {}
    if isinstance(rewards, tuple):
        rewards, reward_metadata = rewards
    if len(rewards) != len(images):
        raise ValueError(f"Reward function {name!r} returned {len(rewards)} rewards for {len(images)} images.")
    values = []
    for reward, prompt in zip(rewards, prompts, strict=True):
        value = math.nan if reward is None else float(reward)
        if reward is not None and not math.isfinite(value):
            raise ValueError(f"Reward function {name!r} returned {value} for the prompt {prompt!r}.")
        values.append(value)
    return torch.tensor(values, device=images.device), reward_metadata
