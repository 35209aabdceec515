# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What happens beside the updates: the student's average, warnings, sample grids, signals, DDPO's image tracker."""

import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather
from diffusers.utils import make_image_grid
from PIL import Image
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from .frames import thumbnails
from .guardrails import drift_warnings
from .noise import noise_apart
from .prompts import prompts_across
from .saving.hub import write_metrics
from .saving.pictures import comparison_grid, input_picture, save_animation, save_grid
from .saving.report import REPORT_NEEDS, is_report_available, write_report


logger = logging.get_logger(__name__)


class EmaCallback(TrainerCallback):
    """Averages the student's weights after each of its updates."""

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        model.update_ema(args.ema_decay)


class DriftWarningCallback(TrainerCallback):
    """Says what `drift_warnings` finds in the logs, once for each figure."""

    def on_log(self, args, state, control, logs, **kwargs):
        for row, warning in drift_warnings(state.log_history).values():
            if row is state.log_history[-1]:
                logger.warning(warning)


class ReportCallback(TrainerCallback):
    """
    Refreshes `report.html` of the output folder, and the logs that it is made of (`trainer_state.json`), at each
    evaluation and at the end. A page that cannot be written costs the run nothing but the page.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and not is_report_available():
            logger.warning(f"{REPORT_NEEDS} Until then there is no `report.html`; `rdm-trl report` makes it later.")

    def on_evaluate(self, args, state, control, **kwargs):
        self.write(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self.write(args, state)

    def write(self, args, state):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        try:
            write_metrics(self.trainer, folder)
            state.save_to_json(str(folder / TRAINER_STATE_NAME))
            if is_report_available():
                write_report([folder])
        except Exception as error:  # whatever it is, hours of training are worth more than a page
            logger.warning(f"`report.html` could not be written; the run is not touched by it: {error!r}")


class SampleGridCallback(TrainerCallback):
    """
    Saves a sample grid every `log_images_steps` updates and after the last, as `samples/step-N.png` and
    `samples/grid.png` of the output folder: the same prompts and initial noise for teacher, base and student. Of
    videos that is a contact sheet, small and with one video of a prompt, and all of their frames move in
    `samples/step-N.webp` and `samples/grid.webp`.
    """

    LARGEST = 256  # pixels of a video's longer side

    def __init__(self, trainer):
        self.trainer = trainer
        self.constant_columns = {}
        self.constant_clips = {}

    def on_step_end(self, args, state, control, **kwargs):
        every = args.log_images_steps
        last = state.global_step == state.max_steps
        draws = state.is_world_process_zero or self.trainer.model.sharded
        if every and draws and (last or state.global_step % every == 0):
            self.save(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        # The student that stays is not the last update's.
        if self.trainer.best_note and (state.is_world_process_zero or self.trainer.model.sharded):
            self.save(args, state)

    def save(self, args, state):
        family, columns, clips = self.trainer.family, {**self.constant_columns}, {**self.constant_clips}
        prompts = prompts_across(self.trainer.eval_dataset, family, args.num_log_images)
        few = f"{args.sample_num_steps} step{'s' * (args.sample_num_steps > 1)}"
        for who, title in (
            ("teacher", f"teacher, {args.teacher_num_steps} steps, guidance {args.teacher_guidance_scale:g}"),
            ("base", f"base, {few}"),
            ("student", f"student, {few}"),
        ):
            if title not in columns:
                each = min(args.num_generations, 4) if family.num_frames is None else 1
                images = self.trainer.sample(who, [prompt for prompt in prompts for _ in range(each)])
                images = thumbnails(images, self.LARGEST)
                if family.num_frames is not None:
                    clips[title] = [family.to_pil(frames) for frames in images.unbind(2)]
                images = family.to_pil(images)
                columns[title] = [images[i : i + each] for i in range(0, len(images), each)]
                if who != "student":
                    self.constant_columns[title] = columns[title]
                    self.constant_clips |= {title: clips[title]} if title in clips else {}
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        if family.takes_image:
            (first, *others), *_ = next(iter(columns.values()))
            width = first.height * family.width // family.height
            inputs = [[input_picture(prompt.image, first, width)] * (1 + len(others)) for prompt in prompts]
            columns = {"input": inputs, **columns}
            # The report tells rows by their words, which may be those of several images.
            words = [*map(str, prompts)]
            prompts = [w if words.count(w) == 1 else f"{w} ({words[:i].count(w) + 1})" for i, w in enumerate(words)]
        picture = comparison_grid(columns, prompts)
        save_grid(picture, folder / f"step-{state.global_step:06d}.png")
        save_grid(picture, folder / "grid.png")
        if clips:
            moments = [
                comparison_grid({title: [[image] for image in clip[i]] for title, clip in clips.items()}, prompts)
                for i in range(family.num_frames)
            ]
            for name in (f"step-{state.global_step:06d}.webp", "grid.webp"):
                save_animation(moments, folder / name, family.frame_rate)


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


def call_apart(handler: CallbackHandler, device: torch.device):
    """From now on `handler` calls its callbacks, the user's among them, with random numbers that no update sees."""
    call = handler.call_event

    def call_event(*args, **kwargs):
        with noise_apart(device):
            return call(*args, **kwargs)

    handler.call_event = call_event


def default_callbacks(trainer) -> list[TrainerCallback]:
    """What every run does beside its updates, in this order: the report shows the grid that was drawn before it."""
    return [EmaCallback(), DriftWarningCallback(), SampleGridCallback(trainer), ReportCallback(trainer)]


def mean_figures(records: dict[str, list[torch.Tensor]], accelerator) -> dict[str, float]:
    """What is logged of what the updates since the last log have recorded, over all processes."""
    device = accelerator.device
    means = torch.stack([torch.stack([v.to(device) for v in vs]).double().nanmean() for vs in records.values()])
    figures = dict(zip(records, accelerator.reduce(means, "mean").tolist(), strict=True))
    if "dm/fake_error" in figures:  # a ratio of means: single updates are noisy, and the first directions are 0
        figures["dm/fake_error"] /= figures.pop("dm/direction_square") + 1e-12
    return figures


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
        """
        `values`: by name, images as PIL images or as a tensor (B, 3, H, W) or (3, H, W) in [0, 1], or videos
        (B, 3, F, H, W), of which some frames are written.
        """
        folder = Path(self.trainer.args.output_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        for name, images in values.items():
            if hasattr(images, "ndim"):
                images = self.trainer.family.to_pil(images[None] if images.ndim == 3 else images)
            elif isinstance(images, Image.Image):
                images = [images]
            stem = "".join(c if c.isalnum() or c in " ._-" else "_" for c in name)[:80]
            make_image_grid(images, 1, len(images)).save(folder / f"{stem}-{step}.png")
