# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""One of the two processes of test_shards.py. Each run under DDP, and with the base in shards."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file


sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import FEW, make_config, make_tiny_pipeline, redness  # noqa: E402
from peft import LoraConfig  # noqa: E402
from tiny_editing import make_kontext, make_qwen_edit, picture, shrink_qwen  # noqa: E402
from tiny_pipelines import make_sd3, make_z_image  # noqa: E402
from torch import nn  # noqa: E402
from torch.testing import assert_close  # noqa: E402

from rdm_trl import RdmDistillTrainer, evaluation, plan  # noqa: E402
from rdm_trl.method import target  # noqa: E402
from rdm_trl.models import sharding  # noqa: E402
from rdm_trl.models.pipelines import family_of  # noqa: E402
from rdm_trl.models.roles import Roles  # noqa: E402
from rdm_trl.prompts import PicturePrompt, PromptCache  # noqa: E402


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
            max_steps=3,
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
        # Of the UNet, whose layers are the most, only some.
        peft_config=LoraConfig(r=2, init_lora_weights="gaussian", target_modules=FEW if name == "unet" else None),
    )
    trainer.judge = evaluation.Judge(Pixels())
    assert trainer.accelerator.num_processes == 2 and trainer.model.sharded == (way != "ddp")
    return trainer


def bytes_of(parameters) -> int:
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    return sum(p.numel() * p.element_size() for p in local)


def bytes_held(trainer) -> list[int]:
    """Of the base, and of the text encoders."""
    encoders = trainer.family.encoders()
    return [bytes_of(trainer.model.frozen_parameters()), bytes_of(p for e in encoders for p in e.parameters())]


def count_draws(trainer) -> list[int]:
    """The pipeline's calls from now on, by their number of prompts."""
    drawn, sample = [], trainer.family.sample_latents

    def sample_latents(scheduler, prompts, *rest):
        drawn.append(len(prompts))
        return sample(scheduler, prompts, *rest)

    trainer.family.sample_latents = sample_latents
    return drawn


def save(trainer, folder: Path, name: str):
    rank = trainer.accelerator.process_index
    adapters = {
        f"{role}.{key}": value
        for role in trainer.model.adapters
        for key, value in trainer.model.adapter_state(role).items()
    }
    if trainer.adversary is not None:
        adapters |= {f"head.{key}": value for key, value in trainer.adversary.head.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapters, folder / f"{name}-{rank}.safetensors")


def equal(way: str, folder: Path):
    """Some updates of each pipeline, with all that draws; and the last of them from a checkpoint."""
    found = {}
    # Summed: a share of so small a push would blow up rounding errors.
    real = dict(adversarial_weight=20.0, reward_mixing="sum")
    target.AHEAD_ABOVE = -float("inf")
    for name in PIPELINES:
        last = 4 if name == "unet" else 3  # of the UNet the second use of its second rollout
        run, options = folder / name, dict(max_steps=last, save_strategy="steps", save_steps=last - 1)
        if name == "unet":
            # Guidance absorbed from images that make no equal shares, a look ahead, a learned target, reuse of
            # rollouts, and a grid.
            options |= dict(num_teacher_images=6, learn_target=True, num_iterations=2, log_images_steps=3)
            # Convolutions round by where their weights lie in memory, and Adam would blow that up.
            options |= dict(optim="sgd", learning_rate=0.1, fake_learning_rate=0.1)
            options |= dict(image_dataset=str(folder.parent / "real"), **real)
        elif name == "sd3":
            options |= dict(sample_guidance_scale=2.0, activation_checkpointing=True)
            # Captions are encoded in batches, which the resumed run would meet in another order.
            options |= dict(image_dataset=str(folder.parent / "captioned"), prompt_cache_dir=str(run / "said"), **real)
        trainer = make(way, name, run, **options)
        found[name] = {"bytes": bytes_held(trainer), "planned": planned_bytes(name), "drawn": count_draws(trainer)}
        trainer.train()
        save(trainer, folder, name)
        trainer.evaluate()
        trainer.save_model()
        found[name]["figures"] = {who: trainer.metrics[who] for who in ("teacher", "base", "student")}
        found[name]["weights"] = trainer.teacher_weights
        logs = ({k: v for k, v in log.items() if "advers" in k or "discr" in k} for log in trainer.state.log_history)
        found[name]["adversary"] = [log for log in logs if log]
        if way == "shards":
            again = make(way, name, run, **options)
            again.train(resume_from_checkpoint=str(run / "run" / f"checkpoint-{last - 1}"))
            save(again, folder, f"{name}-resumed")
        if trainer.is_world_process_zero() and name == "unet":
            assert (run / "run" / "samples" / "step-000004.png").exists()
    (folder / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))


def planned_bytes(name: str) -> list[int]:
    """What `plan` says that the first process, whose part is the largest, holds of them, in float32."""
    family = family_of(PIPELINES[name]())
    return [plan.shard_size(family.denoiser, 2), plan.encoders_in_shards(family, 2)[0]]


def cross(way: str, folder: Path):
    """From the other way's checkpoint."""
    other = folder.with_name("ddp" if way == "shards" else "shards") / "kontext"
    trainer = make(way, "kontext", folder / "crossed", save_strategy="no")
    trainer.train(resume_from_checkpoint=str(other / "run" / "checkpoint-2"))
    save(trainer, folder, "crossed")


def offload(folder: Path):
    """Two updates with the shards in the computer's memory, where a CPU has them anyway."""
    trainer = make("offload", "sd3", folder, max_steps=1)
    trainer.train()
    assert trainer.family.denoiser.device == trainer.accelerator.device


def encode(make_pipeline):
    """Text encoders in shards, of other prompts on each process."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        shrink_qwen(patch)
        family = family_of(make_pipeline(), 16, 16)
        prompts = [PicturePrompt(*row) for row in zip(*ROWS.values(), strict=True)]
        whole = family.encode_prompts(prompts)
        roles = Roles(family.denoiser, LoraConfig(r=2, target_modules=family.lora_target_modules))
        sharding.shard(roles, family, torch.device("cpu"), with_encoders=True)
        own = prompts[: 1 + 2 * int(os.environ["RANK"])]
        found = PromptCache(family.encode_prompts, torch.device("cpu"), 2, together=True)(own)
        for key, value in found.items():
            assert_close(value, whole[key][: len(own)], atol=1e-6, rtol=1e-6)


def fail(folder: Path):
    def broken(images, prompts, metadata):
        if torch.distributed.get_rank() == 1 and trainer.state.global_step == 1:
            raise RuntimeError("out of ink")
        return redness(images, prompts, metadata)

    trainer = make("shards", "sd3", folder, [broken], offload_encoders=True)
    assert not trainer.family.sharded_encoders
    (folder / "begun").touch()
    trainer.train()


def main(folder: Path, tasks: list[str]):
    torch.set_num_threads(1)
    if os.environ["RANK"] == "0":
        Dataset.from_dict({"image": ROWS["image"]}).save_to_disk(folder / "real")
        Dataset.from_dict(ROWS).save_to_disk(folder / "captioned")
        (folder / "written").touch()
    while not (folder / "written").exists():
        time.sleep(0.1)
    for way in ("ddp", "shards"):
        equal(way, folder / way)
    for way in ("ddp", "shards"):
        cross(way, folder / way)
    encode(make_qwen_edit)  # several passes for several prompts
    encode(make_z_image)  # its encoder's outputs transformers finds by the name of its class
    offload(folder / "offload")
    fail(folder)  # which ends both
