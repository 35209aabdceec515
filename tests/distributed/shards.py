# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""One of the two processes of test_shards.py. Each run under DDP, and with the base in shards."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file


sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_config, make_tiny_pipeline, redness  # noqa: E402
from peft import LoraConfig  # noqa: E402
from tiny_editing import make_kontext, picture  # noqa: E402
from tiny_pipelines import make_sd3  # noqa: E402
from torch import nn  # noqa: E402

from rdm_trl import RdmDistillTrainer, evaluation, plan  # noqa: E402
from rdm_trl.models.pipelines import family_of  # noqa: E402


PIPELINES = {"unet": make_tiny_pipeline, "sd3": make_sd3, "kontext": make_kontext}
# One of them edits images; for the others these are a column for rewards.
ROWS = {"prompt": ["a photo", "a bag", "a coat"], "image": [picture(0), picture(1), picture(2)]}


class Pixels(nn.Module):
    """Features of an image that are it."""

    def forward(self, images):
        return images.mean((2, 3)), None


def make(way: str, name: str, folder: Path, rewards=(redness,), **options) -> RdmDistillTrainer:
    """As `accelerate launch` would have said it; the folder's other way has no part in this one's."""
    os.environ["ACCELERATE_USE_FSDP"] = str(way != "ddp").lower()
    os.environ["FSDP_OFFLOAD_PARAMS"] = str(way == "offload").lower()
    torch.manual_seed(0)
    pipeline = PIPELINES[name]()
    size = 8 if name == "unet" else 16
    options = (
        dict(
            max_steps=4,
            # Two groups for four exit steps: one process has fewer passes in a rollout than the other.
            num_generations=2,
            per_device_train_batch_size=2,
            teacher_num_steps=2,
            teacher_guidance_scale=2.0,
            num_eval_images=4,
            sample_height=size,
            sample_width=size,
            teacher_cache_dir=str(folder / "cache" / os.environ.get("RANK", "0")),
        )
        | options
    )
    config = make_config(folder, **options)
    trainer = RdmDistillTrainer(
        config,
        list(rewards),
        sd_pipeline=pipeline,
        train_dataset=Dataset.from_dict(ROWS),
        peft_config=LoraConfig(r=2, init_lora_weights="gaussian"),
    )
    trainer.judge = evaluation.Judge(Pixels())
    assert trainer.accelerator.num_processes == 2 and trainer.model.sharded == (way != "ddp")
    return trainer


def bytes_of_base(trainer) -> int:
    parameters = trainer.model.frozen_parameters()
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    return sum(p.numel() * p.element_size() for p in local)


def save(trainer, folder: Path, name: str):
    rank = trainer.accelerator.process_index
    adapters = {
        f"{role}.{key}": value
        for role in trainer.model.adapters
        for key, value in trainer.model.adapter_state(role).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapters, folder / f"{name}-{rank}.safetensors")


def equal(way: str, folder: Path):
    """Four updates of each pipeline, with all that draws; and the last of them from a checkpoint."""
    found = {}
    for name in PIPELINES:
        run, options = folder / name, dict(save_strategy="steps", save_steps=3)
        if name == "unet":
            # Guidance absorbed from an odd number of images, reuse of rollouts, and a grid.
            options |= dict(num_teacher_images=5, num_iterations=2, log_images_steps=3)
            # Convolutions round by where their weights lie in memory, and Adam would blow that up.
            options |= dict(optim="sgd", learning_rate=0.1, fake_learning_rate=0.1)
        elif name == "sd3":
            options |= dict(sample_guidance_scale=2.0, activation_checkpointing=True)
        trainer = make(way, name, run, **options)
        found[name] = {"bytes": bytes_of_base(trainer), "planned": planned_bytes(name)}
        trainer.train()
        save(trainer, folder, name)
        trainer.evaluate()
        trainer.save_model()
        found[name]["figures"] = {who: trainer.metrics[who] for who in ("teacher", "base", "student")}
        found[name]["weights"] = trainer.teacher_weights
        if way == "shards":
            again = make(way, name, run, **options)
            again.train(resume_from_checkpoint=str(run / "run" / "checkpoint-3"))
            save(again, folder, f"{name}-resumed")
        if trainer.is_world_process_zero() and name == "unet":
            assert (run / "run" / "samples" / "step-000004.png").exists()
    (folder / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))


def planned_bytes(name: str) -> int:
    """What `plan` says that the first process, whose part is the largest, holds of the base, in float32."""
    return plan.shard_size(family_of(PIPELINES[name]()).denoiser, 2)


def cross(way: str, folder: Path):
    """From the other way's checkpoint."""
    other = folder.with_name("ddp" if way == "shards" else "shards") / "kontext"
    trainer = make(way, "kontext", folder / "crossed", save_strategy="no")
    trainer.train(resume_from_checkpoint=str(other / "run" / "checkpoint-3"))
    save(trainer, folder, "crossed")


def offload(folder: Path):
    """Two updates with the shards in the computer's memory, where a CPU has them anyway."""
    trainer = make("offload", "sd3", folder, max_steps=1)
    trainer.train()
    assert trainer.family.denoiser.device == trainer.accelerator.device


def fail(folder: Path):
    def broken(images, prompts, metadata):
        if torch.distributed.get_rank() == 1 and trainer.state.global_step == 1:
            raise RuntimeError("out of ink")
        return redness(images, prompts, metadata)

    trainer = make("shards", "sd3", folder, [broken])
    (folder / "begun").touch()
    trainer.train()


def main(folder: Path, tasks: list[str]):
    torch.set_num_threads(1)
    for way in ("ddp", "shards"):
        equal(way, folder / way)
    for way in ("ddp", "shards"):
        cross(way, folder / way)
    offload(folder / "offload")
    fail(folder)  # which ends both
