# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What a checkpoint holds beside `Trainer`'s own files, for an exact resume. Nothing is unpickled from it."""

from pathlib import Path

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file

from .advantages import Mixer
from .experience import Experience
from .fake_score import FakeScore
from .roles import ADAPTERS, Roles


def begin(folder: Path, roles: Roles):
    """Prepares `folder` for what `Trainer` saves. Raises `FloatingPointError` for weights that are not finite."""
    for name in ADAPTERS:
        for key, value in roles.adapter_state(name).items():
            if not value.isfinite().all():
                raise FloatingPointError(
                    f"The run has diverged: the adapter {name!r} is not finite at {key}; nothing was saved. Lower "
                    "`learning_rate` and resume from the last checkpoint."
                )
    folder.mkdir(parents=True, exist_ok=True)


def save_training_state(folder: Path, roles: Roles, fake_score: FakeScore, mixer: Mixer):
    """All adapters, the fake score's optimizer and the mixing's running averages."""
    states = {name: roles.adapter_state(name) for name in ADAPTERS}
    adapters = {f"{name}.{key}": v.contiguous() for name, state in states.items() for key, v in state.items()}
    save_file(adapters, folder / "adapters.safetensors")
    torch.save(fake_score.state_dict(), folder / "fake_optimizer.pt")
    save_file(mixer.state, folder / "mixer.safetensors")


def load_adapters(folder: Path, roles: Roles):
    """Raises `ValueError` where the adapters are not those of `roles`."""
    state = load_file(folder / "adapters.safetensors")
    for name in ADAPTERS:
        roles.load_adapter(name, {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")})


def load_training_state(folder: Path, fake_score: FakeScore, mixer: Mixer):
    """Raises `ValueError` where other rewards were mixed."""
    fake_score.load_state_dict(torch.load(folder / "fake_optimizer.pt", map_location="cpu", weights_only=True))
    mixer.load_state(load_file(folder / "mixer.safetensors"))


def save_experiences(path: Path, experiences: list[Experience], trusted: bool):
    """The rollouts of one process that later updates use again; `trusted`, whether they still may."""
    torch.save({"experiences": [experience.state_dict() for experience in experiences], "trusted": trusted}, path)


def load_experiences(path: Path, device: torch.device) -> tuple[list[Experience], bool]:
    state = send_to_device(torch.load(path, map_location="cpu", weights_only=True), device)
    return [Experience.from_state_dict(kept) for kept in state["experiences"]], state["trusted"]
