# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What happens beside the updates: the student's average, warnings, sample grids, signals, DDPO's image tracker."""

import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw
from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)


class EmaCallback(TrainerCallback):
    """Averages the student's weights after each of its updates."""

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        model.update_ema(args.ema_decay)


class DriftWarningCallback(TrainerCallback):
    """
    Warns, once for each figure, when the student's images leave the range they began in: collapse and reward hacking
    show there before anyone looks at a picture. And once where the direction of R_dm is mostly the fake score's error.
    """

    # Of the direction's mean square, in three logs in a row behind the first: at the start directions are next to
    # nothing.
    FAKE_ERROR = 10.0
    # Relative to the run's first logged value.
    RANGES = {"x0/std": (0.67, 1.5), "x0/diversity": (0.5, 2.0), "x0/saturation": (0.5, 2.0)}

    def __init__(self):
        self.warned = set()

    def on_log(self, args, state, control, logs, **kwargs):
        for name, (low, high) in self.RANGES.items():
            first = next((row[name] for row in state.log_history if row.get(name)), None)
            if first is None or name not in logs or name in self.warned or low <= logs[name] / first <= high:
                continue
            self.warned.add(name)
            logger.warning(
                f"{name} is {logs[name]:.3g} at step {state.global_step}, {logs[name] / first:.2f} times its first "
                f"value ({first:.3g}). Look at the samples: lower the rewards' weights or `learning_rate`, or use "
                "`reward_mixing='constrained'`."
            )
        name = "dm/fake_error"
        known = [row[name] for row in state.log_history if name in row][1:]
        if name in logs and name not in self.warned and len(known) > 2 and min(known[-3:]) > self.FAKE_ERROR:
            self.warned.add(name)
            logger.warning(
                f"{name} is {logs[name]:.3g} at step {state.global_step}: the fake score's error is far larger than "
                "the direction that it is a part of, so that it does not keep pace with the student. Raise "
                "`fake_updates` or `fake_learning_rate`, lower `learning_rate`, or take it out with "
                "`dm_centering='group'`."
            )


class SampleGridCallback(TrainerCallback):
    """
    Saves a sample grid every `log_images_steps` updates and after the last, as `samples/step-N.png` and
    `samples/grid.png` of the output folder: the same prompts and initial noise for teacher, base and student.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.constant_columns = {}

    def on_step_end(self, args, state, control, **kwargs):
        every = args.log_images_steps
        last = state.global_step == state.max_steps
        if every and state.is_world_process_zero and (last or state.global_step % every == 0):
            self.save(args, state)

    def save(self, args, state):
        available = list(dict.fromkeys(self.trainer.eval_dataset["prompt"]))
        count = min(args.num_log_images, len(available))
        prompts = [available[i * len(available) // count] for i in range(count)]
        columns, few = {**self.constant_columns}, f"{args.sample_num_steps} step{'s' * (args.sample_num_steps > 1)}"
        for who, title in (
            ("teacher", f"teacher, {args.teacher_num_steps} steps, guidance {args.teacher_guidance_scale:g}"),
            ("base", f"base, {few}"),
            ("student", f"student, {few}"),
        ):
            if title not in columns:
                each = min(args.num_generations, 4)
                images = self.trainer.sample(who, [prompt for prompt in prompts for _ in range(each)])
                images = self.trainer.family.to_pil(images)
                columns[title] = [images[i : i + each] for i in range(0, len(images), each)]
                if who != "student":
                    self.constant_columns[title] = columns[title]
        folder = Path(args.output_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        picture = comparison_grid(columns, prompts)
        picture.save(folder / f"step-{state.global_step:06d}.png")
        picture.save(folder / "grid.png")


class StopOnSignalCallback(TrainerCallback):
    """
    SIGTERM (a scheduler that wants its machine back) and Ctrl-C end the training behind the update that is on, with a
    checkpoint, from which the run goes on as if it had never stopped. A second Ctrl-C ends it at once.
    """

    def __init__(self):
        self.received = 0

    @contextmanager
    def listening(self):
        """Inside the block a signal only asks for the end; behind it, it does what it does: ends the process."""
        self.received = 0
        if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
            yield
            return
        before = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received:
            raise SystemExit(128 + self.received)

    def receive(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # a signal may reach one process only, or another update of each
            self.received = int(gather(torch.tensor([self.received], device=args.device)).max())
        if self.received:
            control.should_save = control.should_training_stop = True
            logger.warning(
                f"Stopped at step {state.global_step} by {signal.Signals(self.received).name}. Go on with "
                "`resume_from_checkpoint=True`."
            )


class ImageTracker:
    """
    The tracker that `image_samples_hook` is given, with the two methods of accelerate's trackers that DDPO's hooks
    call: `log` goes to the trainer's logs, `log_images` to PNG files in `output_dir/samples`.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def log(self, values: dict[str, float], step: int | None = None, **kwargs):
        self.trainer.log(dict(values))

    def log_images(self, values: dict, step: int | None = None, **kwargs):
        """`values`: by name, images as PIL images or as a tensor (B, 3, H, W) or (3, H, W) in [0, 1]."""
        folder = Path(self.trainer.args.output_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        for name, images in values.items():
            if hasattr(images, "ndim"):
                images = self.trainer.family.to_pil(images if images.ndim == 4 else images[None])
            elif isinstance(images, Image.Image):
                images = [images]
            stem = "".join(c if c.isalnum() or c in " ._-" else "_" for c in name)[:80]
            make_image_grid(images, 1, len(images)).save(folder / f"{stem}-{step}.png")


def comparison_grid(columns: dict[str, list[list[Image.Image]]], prompts: list[str]) -> Image.Image:
    """
    A labelled picture with a block of columns for each model and a row for each prompt.

    Args:
        columns: by title, for each prompt the images (any number, the same everywhere).
    """
    sample = next(iter(columns.values()))[0]
    size = max(sample[0].width, 64)
    gap, header, margin = 12, 20, 8 + max(int(ImageDraw.Draw(sample[0]).textlength(prompt)) for prompt in prompts)
    block = len(sample) * size
    picture = Image.new("RGB", (margin + len(columns) * (block + gap), header + len(prompts) * size), "white")
    draw = ImageDraw.Draw(picture)
    for row, prompt in enumerate(prompts):
        draw.text((4, header + row * size + size // 2), prompt, fill="black", anchor="lm")
    for column, (title, rows) in enumerate(columns.items()):
        left = margin + column * (block + gap)
        draw.text((left + block // 2, header // 2), title, fill="black", anchor="mm")
        for row, images in enumerate(rows):
            for i, image in enumerate(images):
                picture.paste(
                    image.resize((size, size * image.height // image.width)), (left + i * size, header + row * size)
                )
    return picture
