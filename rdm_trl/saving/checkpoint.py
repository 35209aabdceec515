# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""
What a checkpoint holds beside `Trainer`'s own files, for an exact resume. Nothing is unpickled from it.

A checkpoint is complete once two files can be read: `checkpoint.json`, the sizes of all files that a resume needs,
written when every process has written its own, and `trainer_state.json`, which `Trainer` writes last and which is no
JSON unless it is whole. So a run that was killed, or ran out of disk, in the middle of a save is not resumed from it.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, send_to_device
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..method.experience import Experience
from ..models.roles import NetworkRoles


logger = logging.get_logger(__name__)

MANIFEST = "checkpoint.json"
STATE_FILES = (".json", ".pt", ".pth", ".safetensors")
# Settings that a resumed run may change: its updates do not depend on them.
FREE_SETTINGS = (
    "per_device_eval_batch_size",
    "logging_steps",
    "prompt_cache_dir",
    "teacher_cache_dir",
    "offload_encoders",
    "reward_timeout",
    "num_eval_images",
    "eval_feature_model",
    "log_images_steps",
    "num_log_images",
    "resume_with_changes",
)
# And these, where R_dm's teacher is not fitted to what they made.
TEACHER_SETTINGS = ("teacher_num_steps", "teacher_guidance_scale")


# ----------------------------------------------------------------------------------------------------- complete or not


def begin(folder: Path, roles: NetworkRoles):
    """Prepares `folder` for what `Trainer` saves. Raises `FloatingPointError` for weights that are not finite."""
    for name in roles.adapters:
        for key, value in roles.adapter_state(name).items():
            if not value.isfinite().all():
                raise FloatingPointError(
                    f"The run has diverged: the adapter {name!r} is not finite at {key}; nothing was saved. Lower "
                    "`learning_rate` and resume from the last checkpoint, with `resume_with_changes`."
                )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # of an earlier run, whose files are overwritten now


def seal(folder: Path, trainer):
    """All files but `trainer_state.json` are written. Called by all processes."""
    trainer.accelerator.wait_for_everyone()
    if not trainer.args.should_save:
        return
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.suffix in STATE_FILES}
    (folder / MANIFEST).write_text(json.dumps(sizes, indent=2) + "\n")
    if trainer.args.save_total_limit:
        # A torn checkpoint must not count, or a good one would be deleted for it.
        for other in checkpoints_of(folder.parent):
            if other.name != folder.name and what_is_missing(other):
                shutil.rmtree(other, ignore_errors=True)


def what_is_missing(folder: Path) -> str | None:
    """Why `folder` cannot be resumed from; `None` where it is a complete checkpoint."""
    if not folder.is_dir():
        return "there is no such folder"
    contents = {}
    for name in (MANIFEST, TRAINER_STATE_NAME):
        try:
            contents[name] = json.loads((folder / name).read_text())
        except (OSError, ValueError):
            contents[name] = None
        if not isinstance(contents[name], dict):
            return f"{name} is missing or torn: it was not saved to its end, or with `save_only_model`"
    for name, size in contents[MANIFEST].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found} bytes of {size}"
    return None


def checkpoints_of(output_dir: Path) -> list[Path]:
    """Its checkpoints, complete or not, by their steps."""
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match and path.is_dir())]


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint; warns of each newer one that is not complete."""
    for folder in reversed(checkpoints_of(Path(output_dir))):
        missing = what_is_missing(folder)
        if missing is None:
            return folder
        logger.warning(f"The checkpoint {folder} is skipped: {missing}.")
    return None


def find_checkpoint(resume_from: str | Path | bool | None, output_dir: str | Path) -> str | None:
    """
    The folder to resume from: the newest complete checkpoint of `output_dir` for `True`, or the one that is given.
    Called by all processes.

    Raises:
        ValueError: there is none, or the given one is not complete.
    """
    if resume_from is None or resume_from is False:
        return None
    folder, missing = None, None
    if PartialState().is_main_process:
        folder = last_complete_checkpoint(output_dir) if resume_from is True else Path(resume_from)
        missing = None if folder is None else what_is_missing(folder)
    # One process looks for all: the others may see its last save later.
    folder, missing = broadcast_object_list([folder, missing])
    if folder is None:
        raise ValueError(
            f"There is no complete checkpoint in {output_dir} to resume from. Leave `resume_from_checkpoint` out to "
            "start anew."
        )
    if missing is not None:
        raise ValueError(f"{str(resume_from)!r} cannot be resumed from: {missing}.")
    return str(folder)


def check_settings(folder: Path, settings: dict[str, Any], with_changes: bool):
    """
    Raises `ValueError` where `settings` would not continue the run of the checkpoint `folder` exactly, and names what
    differs; only warns `with_changes`. A checkpoint's settings are compared and never acted on.
    """
    saved, settings = read_metrics(folder)["settings"], json.loads(json.dumps(settings))
    free = [*FREE_SETTINGS] if settings["num_teacher_images"] else [*FREE_SETTINGS, *TEACHER_SETTINGS]
    schedules = (settings["lr_scheduler_type"], settings["fake_lr_scheduler_type"])
    if all(schedule in ("constant", "constant_with_warmup") for schedule in schedules):
        free.append("max_steps")
    changes = [
        f"`{name}` was {saved.get(name)!r}, is {settings.get(name)!r}"
        for name in {**saved, **settings}
        if name not in free and saved.get(name) != settings.get(name)
    ]
    if not changes:
        return
    if not with_changes:
        raise ValueError(
            f"The checkpoint {folder} is of a run with other settings: {'; '.join(changes)}. Resume with its own, or "
            "go on from it with these by `resume_with_changes`."
        )
    logger.warning(f"The run goes on from {folder} with other settings: {'; '.join(changes)}.")


def read_metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


# ----------------------------------------------------------------------------------------------------------- its state


def save_training_state(folder: Path, trainer):
    """All adapters, the target, the fake score's optimizer, the discriminator and the mixing's running averages."""
    states = {name: trainer.model.adapter_state(name) for name in trainer.model.adapters}
    adapters = {f"{name}.{key}": v.contiguous() for name, state in states.items() for key, v in state.items()}
    save_file(adapters, folder / "adapters.safetensors")
    if trainer.target is not None:
        save_file({"weights": trainer.target}, folder / "target.safetensors", metadata={"key": trainer.target_key})
    torch.save(trainer.fake_score.state_dict(), folder / "fake_optimizer.pt")
    if trainer.adversary is not None:
        torch.save(trainer.adversary.state_dict(), folder / "discriminator.pt")
    if trainer.learned_target is not None:
        torch.save(trainer.learned_target.score.state_dict(), folder / "target_optimizer.pt")
    save_file(trainer.rewards.mixer.state, folder / "mixer.safetensors")


def read_target(folder: Path) -> tuple[str | None, torch.Tensor | None]:
    """The name of all that the checkpoint's target depends on, and the target; neither where it has none."""
    file = folder / "target.safetensors"
    if not file.exists():
        return None, None
    with safe_open(file, "pt") as opened:
        return opened.metadata()["key"], opened.get_tensor("weights")


def load_adapters(folder: Path, roles: NetworkRoles):
    """Raises `ValueError` where the checkpoint's adapters are not those of `roles`."""
    state = load_file(folder / "adapters.safetensors")
    for name in roles.adapters:
        own = {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")}
        if own or name != "target":  # else it begins anew: another run's settings, as all say
            roles.load_adapter(name, own)


def load_best(trainer):
    """
    The student that `metric_for_best_model` found best, with its figures, in place of the run's last. The last stays
    where the checkpoint of it is gone, with a warning.
    """
    state, name = trainer.state, trainer.args.metric_for_best_model
    folder = Path(state.best_model_checkpoint)
    missing = what_is_missing(folder)
    if missing is not None:
        logger.warning(f"The best student, {folder}, cannot be loaded: {missing}. The run's last one stays.")
        return
    load_adapters(folder, trainer.model)
    figures = read_metrics(folder)
    trainer.best_note = f" The student is that of update {state.best_global_step}, the best of the run by `{name}`."
    trainer.metrics = {who: figures[who] for who in ("teacher", "base", "student")}
    trainer.metrics["note"] = figures["note"] + trainer.best_note


def load_training_state(folder: Path, trainer):
    """
    With `resume_with_changes` the learning rates are the config's, not the optimizers' saved ones, and the mixing of
    other rewards begins anew. Raises `ValueError` where other rewards were mixed without it.
    """
    state = torch.load(folder / "fake_optimizer.pt", map_location="cpu", weights_only=True)
    trainer.fake_score.load_state_dict(state)
    found = folder / "discriminator.pt"
    if trainer.adversary is not None and found.exists():  # else it begins anew: another run's settings, as all say
        trainer.adversary.load_state_dict(torch.load(found, map_location="cpu", weights_only=True))
    found = folder / "target_optimizer.pt"
    if trainer.learned_target is not None and found.exists():
        trainer.learned_target.score.load_state_dict(torch.load(found, map_location="cpu", weights_only=True))
    args, mixer, mixed = trainer.args, trainer.rewards.mixer, load_file(folder / "mixer.safetensors")
    if args.resume_with_changes:
        use_learning_rate(trainer.lr_scheduler, args.learning_rate)
        use_learning_rate(trainer.fake_score.scheduler, args.fake_learning_rate)
        if trainer.adversary is not None:
            use_learning_rate(trainer.adversary.score.scheduler, trainer.adversary.learning_rate)
        if trainer.learned_target is not None:
            use_learning_rate(trainer.learned_target.score.scheduler, args.fake_learning_rate)
    if not args.resume_with_changes or mixed["mass"].shape == mixer.state["mass"].shape:
        mixer.load_state(mixed)


def use_learning_rate(scheduler: torch.optim.lr_scheduler.LRScheduler, learning_rate: float):
    """Goes on along the schedule from another base."""
    scheduler.base_lrs = [learning_rate] * len(scheduler.base_lrs)
    for group in scheduler.optimizer.param_groups:
        if group["initial_lr"]:
            group["lr"] *= learning_rate / group["initial_lr"]
        group["initial_lr"] = learning_rate


def save_process_state(folder: Path, trainer):
    """What each process has of its own: the rollouts that later updates use again, and the rewards' state."""
    index = trainer.accelerator.process_index
    if trainer.args.num_iterations > 1:  # in the middle of its use, a rollout cannot be drawn again
        experiences = [experience.state_dict() for experience in trainer._experiences]
        torch.save({"experiences": experiences, "trusted": trainer._trusted}, folder / f"experience_{index}.pt")
    if states := trainer.rewards.state_dict():
        torch.save(states, folder / f"rewards_{index}.pt")
    seal(folder, trainer)


def load_process_state(folder: Path, trainer):
    """With `resume_with_changes` the rest of a loop draws rollouts of its own: another loop may have begun."""
    index, device = trainer.accelerator.process_index, trainer.accelerator.device
    if trainer.args.resume_with_changes:
        trainer._experiences, trainer._trusted = [], False
    elif trainer.args.num_iterations > 1:
        state = torch.load(folder / f"experience_{index}.pt", map_location="cpu", weights_only=True)
        state = send_to_device(state, device)
        trainer._experiences = [Experience.from_state_dict(kept) for kept in state["experiences"]]
        trainer._trusted = state["trusted"]
    path, states = folder / f"rewards_{index}.pt", {}
    if path.exists():
        states = torch.load(path, map_location="cpu", weights_only=True)
    trainer.rewards.load_state_dict(states, strict=not trainer.args.resume_with_changes)
