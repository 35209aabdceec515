# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Checks of a config's values that are more than a comparison."""

import math
import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args, get_origin

import torch


def check_type(name: str, value: Any, kind: Any):
    """Raises `TypeError` or, for numbers that are not finite, `ValueError` where `value` is no `kind`."""
    if get_origin(kind) is list:
        if not isinstance(value, list | tuple):
            raise TypeError(f"`{name}` is {value!r}, but must be a list: [{value!r}].")
        for element in value:
            check_type(name, element, get_args(kind)[0])
        return
    if get_args(kind):  # a union
        kinds = [option for option in get_args(kind) if option is not type(None)]
        if not (value is None and len(kinds) < len(get_args(kind))):
            check_type(name, value, kinds[0])
        return
    article = {int: "an integer", float: "a number", bool: "True or False", str: "text"}[kind]
    allowed = {int: Integral, float: Real, bool: bool, str: str}[kind]
    if not isinstance(value, allowed) or (kind is not bool and isinstance(value, bool)):
        raise TypeError(f"`{name}` is {value!r}, but must be {article}.")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"`{name}` is {value}, but must be finite.")


def check_output_dir(output_dir: str):
    """Raises `ValueError` where no folder can be made or written there."""
    path = Path(output_dir).absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir():
        what = "a file" if existing == path else f"in a file, {existing}"
        raise ValueError(f"`output_dir` is {what}: {output_dir}. Give a folder.")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"`output_dir` is {output_dir}, but {existing} is not writable. Give another folder.")


def check_defaults():
    """Raises `ValueError` for a default type or device of PyTorch's that noise and statistics cannot have."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"PyTorch's default type is {dtype}, but noise and statistics need full precision: leave out "
            "`torch.set_default_dtype`, and load the pipeline with `dtype=...`."
        )
    if device.type != "cpu":
        raise ValueError(
            f"PyTorch's default device is {device}, but data sets and generators are on the CPU: leave out "
            "`torch.set_default_device`. The trainer moves the pipeline to the accelerator by itself."
        )


def check_adversarial(config):
    """Raises `ValueError` for a discriminator without real images, or real images without one."""
    if not config.adversarial_weight and config.image_dataset is not None:
        raise ValueError(
            f"`image_dataset` is {config.image_dataset!r}, but `adversarial_weight` is 0: real images act by the "
            "discriminator alone. Set `adversarial_weight`, or leave `image_dataset` out."
        )
    if config.adversarial_weight and config.image_dataset is None:
        raise ValueError(
            f"`adversarial_weight` is {config.adversarial_weight}, but there are no real images: give `image_dataset`."
        )


def check_guidance(config):
    """Raises `ValueError` for absorbed guidance that cannot be, or beside guidance inside R_dm."""
    if config.num_teacher_images == 0:
        return
    if config.num_teacher_images % 2:
        raise ValueError(
            f"`num_teacher_images` is {config.num_teacher_images}, but must be even: what two images of a prompt "
            "have in common is what the target is fitted to."
        )
    if config.teacher_guidance_scale <= 1:
        raise ValueError(
            f"`num_teacher_images` is {config.num_teacher_images}, but `teacher_guidance_scale` is "
            f"{config.teacher_guidance_scale}: there is no guidance to absorb. Set one of them."
        )
    if config.sample_guidance_scale > 1:
        raise ValueError(
            f"`sample_guidance_scale` is {config.sample_guidance_scale} beside `num_teacher_images="
            f"{config.num_teacher_images}`: guidance would act in R_dm twice. Leave out "
            "`sample_guidance_scale` to absorb it, or `num_teacher_images` to keep it in R_dm."
        )


def check_learned_target(config, absorbs: bool):
    """Raises `ValueError` for a learned target without images of a guided teacher, or without a group's level."""
    if config.learn_target and not absorbs:
        raise ValueError(
            "`learn_target` learns the guided teacher's images, and this run has none: it needs a pipeline with "
            "guidance, `teacher_guidance_scale` above 1 and `num_teacher_images`."
        )
    if config.learn_target and (config.dm_timestep_sampling != "shared" or config.num_generations < 2):
        raise ValueError(
            "`learn_target` is about how several images of a prompt differ at one noise level: it needs "
            f"`dm_timestep_sampling='shared'`, which is {config.dm_timestep_sampling!r}, and `num_generations` of at "
            f"least 2, which is {config.num_generations}."
        )


def check_grid(config):
    """Raises `ValueError` for sizes, numbers of tokens or noise levels that no pipeline can draw with."""
    if (config.sample_height is None) != (config.sample_width is None):
        raise ValueError("Give `sample_height` and `sample_width`, or neither.")
    if config.sample_num_frames is not None and config.sample_num_frames < 1:
        raise ValueError(f"`sample_num_frames` is {config.sample_num_frames}, but must be at least 1.")
    if config.max_sequence_length is not None and not 1 <= config.max_sequence_length <= 512:
        raise ValueError(f"`max_sequence_length` is {config.max_sequence_length}, but must be from 1 to 512.")
    for name, grid, largest in (
        ("sample_sigmas", config.sample_sigmas, 1.0),
        ("sample_timesteps", config.sample_timesteps, float("inf")),
    ):
        if grid is None:
            continue
        if len(grid) != config.sample_num_steps:
            raise ValueError(f"`{name}` has {len(grid)} values for `sample_num_steps={config.sample_num_steps}`.")
        falling = all(first > second for first, second in zip([float("inf"), *grid], grid, strict=False))
        if not falling or grid[0] > largest or grid[-1] <= 0:
            raise ValueError(f"`{name}` is {grid}, but must be falling numbers above 0, at most {largest:g}.")
