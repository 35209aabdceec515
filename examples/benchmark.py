# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
# /// script
# dependencies = ["rdm_trl"]
# ///
"""
Where the time of an update goes, and what it costs beside a straightforward DMD2 loop: three full networks, and a new
rollout for every update of the fake score. Each measurement is a process of its own; the tables end in benchmark.md.

python examples/benchmark.py
python examples/benchmark.py --teachers demo --updates 40
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import Dataset
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, TrainerCallback

from rdm_trl import RdmDistillConfig, RdmDistillTrainer, evaluation
from rdm_trl.demo import DEMO_PIPELINE, DEMO_PROMPTS, load_demo_pipeline
from rdm_trl.method import losses, matching, policy
from rdm_trl.method.diffusion import NoiseProcess
from rdm_trl.models.pipelines import family_of


WARMUP = 2
SETTINGS = dict(num_generations=4, fake_updates=5, sample_num_steps=4, sample_guidance_scale=1.75, learning_rate=1e-5)
WAYS = {
    "dmd2": "DMD2 loop, three full networks",
    "ours": "rdm_trl",
    "ours_is": "rdm_trl, num_iterations=4",
    "ours_compiled": "rdm_trl, torch_compile",
}


def make_sd3() -> DiffusionPipeline:
    """A random Stable Diffusion 3 pipeline with a transformer of 100 million parameters, 16x16 latents."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_PIPELINE, subfolder="tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    text.update(dict(projection_dim=64, bos_token_id=0, eos_token_id=tokenizer.eos_token_id))
    transformer = SD3Transformer2DModel(
        sample_size=16,
        num_layers=5,
        attention_head_dim=64,
        num_attention_heads=12,
        joint_attention_dim=768,
        caption_projection_dim=768,
        pooled_projection_dim=128,
        pos_embed_max_size=32,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        latent_channels=16,
        shift_factor=0.1,
    )
    return StableDiffusion3Pipeline(
        transformer.eval(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae,
        *(CLIPTextModelWithProjection(text).eval(), tokenizer) * 2,
        text_encoder_3=None,
        tokenizer_3=None,
    )


# Pipeline and images an update.
TEACHERS = {"demo": (load_demo_pipeline, 32), "sd3": (make_sd3, 4)}


class Stopwatch:
    """Adds up, by name, the seconds of wrapped calls; `networks` are the denoiser's passes in both directions."""

    def __init__(self):
        self.seconds = defaultdict(float)

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, function: Callable, part: str) -> Callable:
        @wraps(function)
        def call(*args, **kwargs):
            start = self.now()
            result = function(*args, **kwargs)
            self.seconds[part] += self.now() - start
            return result

        return call

    def wrap(self, owner, name: str, part: str):
        setattr(owner, name, self.timed(getattr(owner, name), part))

    @contextmanager
    def backward_passes(self):
        """Inside the block all backward passes count as the networks'."""
        with patch.object(torch.Tensor, "backward", self.timed(torch.Tensor.backward, "networks")):
            yield


class DmdLoop:
    """DMD2 without its GAN: teacher, student and fake score are whole networks; every update draws its own images."""

    def __init__(self, pipeline: DiffusionPipeline, batch_size: int):
        self.family = family_of(pipeline)
        self.process = NoiseProcess(pipeline.scheduler)
        self.timesteps = self.family.make_student_scheduler(SETTINGS["sample_num_steps"]).timesteps
        self.teacher = self.family.denoiser
        self.student = copy.deepcopy(self.teacher).requires_grad_(True)
        self.fake = copy.deepcopy(self.teacher).requires_grad_(True)
        rate = SETTINGS["learning_rate"]
        self.student_optimizer = torch.optim.AdamW(self.student.parameters(), lr=rate)
        self.fake_optimizer = torch.optim.AdamW(self.fake.parameters(), lr=rate)
        self.condition = self.family.encode_prompts([DEMO_PROMPTS[i % len(DEMO_PROMPTS)] for i in range(batch_size)])
        self.negative = self.family.encode_prompts([""] * batch_size)

    def x0(self, network, x_t, timesteps, condition):
        output = self.family.denoise(lambda *a, **k: network(*a, **k, return_dict=False)[0], x_t, timesteps, condition)
        return self.process.to_x0(output, x_t, timesteps)

    def draw(self) -> policy.Rollout:
        batch_size, num_steps = len(next(iter(self.condition.values()))), len(self.timesteps)
        noise = torch.randn(batch_size, num_steps, *self.family.latent_shape)
        exit_steps = torch.randint(num_steps, (1,)).expand(batch_size)

        def predict(x_t, timesteps, rows):
            return self.x0(self.student, x_t, timesteps, {k: v[rows] for k, v in self.condition.items()})

        return policy.rollout(predict, self.process, self.timesteps, noise, exit_steps)

    def update(self):
        rollout = self.draw()
        x0 = self.x0(self.student, rollout.exit_latents, rollout.exit_timesteps, self.condition)
        timesteps = self.process.timesteps_at(0.02 + 0.96 * torch.rand(len(x0)))
        guidance_scale = SETTINGS["sample_guidance_scale"]

        def teacher(x_t, t):
            unconditional = self.x0(self.teacher, x_t, t, self.negative)
            return unconditional + guidance_scale * (self.x0(self.teacher, x_t, t, self.condition) - unconditional)

        def fake(x_t, t):
            return self.x0(self.fake, x_t, t, self.condition)

        probe = matching.probe(teacher, fake, self.process, x0.detach(), torch.randn_like(x0), timesteps)
        losses.student_loss(x0, matching.normalize(probe, "sample", 1)).backward()
        self.student_optimizer.step()
        self.student_optimizer.zero_grad()
        for _ in range(SETTINGS["fake_updates"]):
            rollout = self.draw()
            with torch.no_grad():
                x0 = self.x0(self.student, rollout.exit_latents, rollout.exit_timesteps, self.condition)
            timesteps, noise = self.process.timesteps_at(torch.rand(len(x0))), torch.randn_like(x0)
            x_t = self.process.add_noise(x0, noise, timesteps)
            predicted = self.x0(self.fake, x_t, timesteps, self.condition)
            F.mse_loss(predicted, x0).backward()
            self.fake_optimizer.step()
            self.fake_optimizer.zero_grad()


class StepTimes(TrainerCallback):
    """Seconds of each update behind the warm-up, from its first batch to its last bookkeeping; none behind `end`."""

    def __init__(self, watch: Stopwatch, end: float):
        self.watch, self.end, self.ends = watch, end, []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(self.watch.now())
        if state.global_step == WARMUP:
            self.watch.seconds.clear()
        if time.monotonic() > self.end:
            control.should_training_stop = True


def measure(way: str, teacher: str, updates: int) -> dict:
    """Seconds an update, peak memory in MiB beyond the imports' and, for the trainer, the parts of an update."""
    before = evaluation.peak_memory_mb()
    make_pipeline, batch_size = TEACHERS[teacher]
    pipeline = make_pipeline()
    if way == "dmd2":
        watch, loop = Stopwatch(), DmdLoop(pipeline, batch_size)
        for step in tqdm(range(WARMUP + updates), desc=f"{teacher}, {way}"):
            if step == WARMUP:
                start = watch.now()
            loop.update()
        seconds = (watch.now() - start) / updates
        return {"seconds": seconds, "memory": evaluation.peak_memory_mb() - before}

    options = dict(per_device_train_batch_size=batch_size, torch_compile=way == "ours_compiled", **SETTINGS)
    found = time_updates(pipeline, updates, 4 if way == "ours_is" else 1, **options)
    return {**found, "memory": evaluation.peak_memory_mb() - before}


def time_updates(
    pipeline: DiffusionPipeline, updates: int, cycle: int = 1, end: float = float("inf"), **options
) -> dict:
    """
    Seconds of one of the trainer's updates behind `WARMUP`, and of its parts.

    Args:
        updates (`int`): measured, in rollouts: each serves `cycle` updates.
        end (`float`): on the monotonic clock; no update begins behind it.
        **options: of `RdmDistillConfig`.

    Raises:
        TimeoutError: `end` came before one update was measured.
    """
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, watch.backward_passes():
        config = RdmDistillConfig(
            output_dir=folder,
            max_steps=WARMUP * cycle + updates * cycle,
            num_iterations=cycle,
            log_images_steps=0,
            save_strategy="no",
            logging_strategy="no",
            **options,
        )
        times = StepTimes(watch, end)
        prompts = Dataset.from_dict({"prompt": DEMO_PROMPTS})
        trainer = RdmDistillTrainer(config, sd_pipeline=pipeline, train_dataset=prompts, callbacks=[times])
        trainer.encode(DEMO_PROMPTS)  # once a run, which is longer
        # Compiled, from outside: a clock within would be compiled too.
        compiled = config.torch_compile
        watch.wrap(*(trainer.model, "_run") if compiled else (trainer.model.denoiser, "forward"), "networks")
        watch.wrap(trainer, "rollout", "rollout")
        watch.wrap(trainer, "predict_teacher", "teacher")
        watch.wrap(trainer, "_feedback", "fake score's judgement")
        watch.wrap(trainer, "_predict_exits", "student, forward")
        watch.wrap(trainer.accelerator, "backward", "student, backward")
        watch.wrap(trainer, "update_fake", "fake score's updates")
        trainer.train()
    ends = times.ends[WARMUP - 1 :]
    if len(ends) < 2:
        raise TimeoutError("out of time")
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    return {"seconds": seconds, "parts": {name: value / (len(ends) - 1) for name, value in watch.seconds.items()}}


def report(results: dict[str, dict[str, dict]]) -> str:
    lines = ["| teacher | way | seconds an update | | peak memory, MiB | |", "|---|---|---|---|---|---|"]
    for teacher, ways in results.items():
        base = ways["dmd2"]
        for way, found in ways.items():
            cells = [teacher, WAYS[way], f"{found['seconds']:.3f}", f"{found['seconds'] / base['seconds']:.2f} x"]
            cells += [f"{found['memory']:.0f}", f"{found['memory'] / base['memory']:.2f} x"]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| part of an update (rdm_trl) | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    found = [ways["ours"] for ways in results.values()]
    for part in (name for name in found[0]["parts"] if name != "networks"):
        lines.append(f"| {part} | " + " | ".join(f"{f['parts'][part] / f['seconds']:.1%}" for f in found) + " |")
    outside = [f"{1 - f['parts']['networks'] / f['seconds']:.1%}" for f in found]
    lines.append("| *outside the denoiser's passes* | " + " | ".join(outside) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=list(TEACHERS))
    parser.add_argument("--ways", nargs="+", default=["dmd2", "ours", "ours_is"], choices=list(WAYS))
    parser.add_argument("--updates", type=int, default=10, help="measured updates, behind the warm-up")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark.md"))
    parser.add_argument("--one", nargs=2, metavar=("WAY", "TEACHER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.updates)))
        return
    results = defaultdict(dict)
    for teacher in args.teachers:
        for way in args.ways:
            command = [sys.executable, __file__, "--one", way, teacher, "--updates", str(args.updates)]
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            results[teacher][way] = json.loads(output.splitlines()[-1])
    text = f"{report(results)}\n\n{args.updates} updates each, {evaluation.machine()}."
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text + "\n")
    print(f"\n{text}\n{args.output}")


if __name__ == "__main__":
    main()
