# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""One of the processes of test_processes.py, each of its tasks in a folder of its own."""

import os
import signal
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerState


sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_trainer, redness  # noqa: E402

from rdm_trl.guidance import GuidedImages  # noqa: E402
from rdm_trl.method import target  # noqa: E402
from rdm_trl.scores import add_noise_to  # noqa: E402


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


brightness.differentiable = True


def draw_by_batch(trainer):
    """Random draws that depend on the update and the batch, not on the process that works on it."""
    args, counts = trainer.args, {"batches": 0, "fakes": 0}
    accumulation = args.gradient_accumulation_steps
    prepare, update = trainer._prepare_inputs, trainer.update_fake

    def seed(first: int, name: str):
        torch.manual_seed(first + counts[name] * args.world_size + args.process_index)
        counts[name] += 1

    def prepare_inputs(rows):
        seed(1_000, "batches")
        return prepare(rows)

    def with_seeds(fake_update):
        def seeded_update(loss_fn, batches):
            def seeded_loss(*batch):
                seed(10_000, "fakes")
                return loss_fn(*batch)

            return fake_update(seeded_loss, batches)

        return seeded_update

    def add_seeded_noise(trainer, batches):
        noisy = []
        for batch in batches:
            seed(10_000, "fakes")
            noisy += add_noise_to(trainer, [batch])
        return noisy

    def update_fake():
        score = trainer.adversary.score
        score.update = with_seeds(score.update)
        with patch("rdm_trl.trainer.add_noise_to", add_seeded_noise):
            update()
        del score.update

    trainer._prepare_inputs, trainer.update_fake = prepare_inputs, update_fake
    assert accumulation * args.world_size == 2


def save(trainer, folder: Path, name: str):
    rank, roles = trainer.accelerator.process_index, trainer.model.adapters
    adapters = {f"{role}.{key}": value for role in roles for key, value in trainer.model.adapter_state(role).items()}
    if trainer.adversary is not None:
        adapters |= {f"head.{key}": value for key, value in trainer.adversary.head.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapters, folder / f"{name}-{rank}-of-{trainer.accelerator.num_processes}.safetensors")


def same_samples(folder: Path):
    world = int(os.environ.get("WORLD_SIZE", 1))
    # Adam would blow up rounding errors where a gradient is almost zero.
    options = dict(optim="sgd", learning_rate=0.1, fake_learning_rate=0.1, num_iterations=2, max_steps=4)
    images = [Image.new("RGB", (8, 8), (25 * i, 250 - 25 * i, 90)) for i in range(10)]
    if int(os.environ.get("RANK", 0)) == 0:
        Dataset.from_dict({"image": images}).save_to_disk(folder / f"real-{world}")
    PartialState().wait_for_everyone()
    # Summed: a share of so small a push would blow up rounding errors too.
    real = str(folder / f"real-{world}")
    options |= dict(adversarial_weight=20.0, image_dataset=real, reward_mixing="sum")
    trainer = make_trainer(folder / f"{world}", gradient_accumulation_steps=2 // world, **options)
    draw_by_batch(trainer)
    save(trainer, folder, "start")
    trainer.train()
    save(trainer, folder, "same")
    assert trainer.accelerator.num_processes == world


def resume(folder: Path):
    prompts = [f"a {i}" for i in range(9)]
    options = dict(
        reward_mixing="constrained", target_dm=0.1, num_iterations=4, dm_normalization="batch", prompts=prompts
    )
    options |= dict(max_steps=5, save_strategy="steps", save_steps=3)
    options |= dict(num_teacher_images=6, teacher_guidance_scale=3.0, sample_guidance_scale=1.0, learn_target=True)
    options |= dict(teacher_cache_dir=str(folder / "cache"))
    rewards = [redness, brightness]
    whole = make_trainer(folder / "whole", rewards, **options)
    whole.train()
    save(whole, folder, "whole")
    resumed = make_trainer(folder / "rest", rewards, **options)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "run" / "checkpoint-3"))
    save(resumed, folder, "resumed")
    whole.evaluate()
    assert whole.metrics["student"]["rewards"].keys() == {"redness", "brightness"}


def stop(folder: Path):
    """A signal to the second process ends both; the first is still saving when the second looks for the checkpoint."""
    trainer = make_trainer(folder, max_steps=20)
    rank = trainer.accelerator.process_index
    save = TrainerState.save_to_json

    def slowly(*args):
        time.sleep(2)
        save(*args)

    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if rank == 1 and state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.add_callback(Signal())
    with patch.object(TrainerState, "save_to_json", slowly):
        try:
            trainer.train()
        except SystemExit as end:
            assert end.code == 128 + signal.SIGTERM
        resumed = make_trainer(folder, max_steps=4)
        resumed.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3 and resumed.state.global_step == 4
    (folder / f"stopped-{rank}").touch()


def guided(folder: Path):
    """
    The guided teacher's images and what is fitted to them, with a look ahead; and a later run, which finds both on one
    disk alone.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    options = dict(num_teacher_images=10, teacher_guidance_scale=3.0, sample_guidance_scale=1.0)
    options |= dict(per_device_eval_batch_size=2, per_device_train_batch_size=8)
    for time_ in ("first", "later"):
        trainer = make_trainer(folder, teacher_cache_dir=str(folder / f"{world}" / f"disk-{rank}"), **options)
        with patch.object(target, "AHEAD_ABOVE", -float("inf")):
            trainer.absorb_guidance()
        assert len(trainer.target) == 2
        save_file({"target": trainer.target}, folder / f"{time_}-{rank}-of-{world}.safetensors")
        assert trainer.cost["teacher_images"] == (10 if time_ == "first" else 0)
    assert (folder / f"{world}" / f"disk-{rank}").exists() == (rank == 0)
    images, drawn = GuidedImages(trainer)()
    assert drawn == 0
    save_file({"latents": images}, folder / f"images-{rank}-of-{world}.safetensors")


def fail(folder: Path):
    def broken(images, prompts, metadata):
        if torch.distributed.get_rank() == 1:
            raise RuntimeError("out of ink")
        return redness(images, prompts, metadata)

    trainer = make_trainer(folder, [broken])
    (folder / "begun").touch()
    trainer.train()


def kill(folder: Path):
    """The second process dies as one does that runs out of memory."""
    trainer = make_trainer(folder, max_steps=20, save_strategy="steps", save_steps=1)
    (folder / "begun").touch()

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if args.process_index == 1 and state.global_step == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    trainer.add_callback(Kill())
    trainer.train()


def main(folder: Path, tasks: list[str]):
    torch.set_num_threads(1)
    for task in (same_samples, guided, resume, stop, fail, kill):
        if task.__name__ in tasks:
            (folder / task.__name__).mkdir(exist_ok=True)
            task(folder / task.__name__)
