# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
r"""
The noise process behind a diffusers scheduler, and the student's few-step grid.

Everything is written for \\(x_t = a_t x_0 + b_t \epsilon\\). A variance-preserving scheduler has
\\(a = \sqrt{\bar\alpha}\\) and \\(b = \sqrt{1-\bar\alpha}\\); flow matching has \\(a = 1-\sigma\\) and
\\(b = \sigma\\). Times are the scheduler's own `timesteps`, the numbers its denoiser is called with.
"""

import inspect
import math
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SchedulerMixin,
)


FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
# Of a flow-matching scheduler, what shifts its grid.
SHIFT_OPTIONS = (
    "num_train_timesteps",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


class NoiseProcess:
    """
    The forward process a denoiser was trained on, and what its outputs mean.

    Tensors are `(B, ...)`, timesteps `(B,)`. Computation is in float32, whatever the denoiser's precision.

    Args:
        scheduler (`SchedulerMixin`):
            Scheduler of the pipeline: variance preserving (one with `alphas_cumprod`) with epsilon, v or sample
            prediction, or one of diffusers' flow-matching schedulers.

    Raises:
        ValueError: the scheduler has no such process, an unknown prediction type, predicts epsilon from pure noise, or
            does something else than its configuration says.
    """

    def __init__(self, scheduler: SchedulerMixin):
        check_configured(scheduler)
        self.num_train_timesteps = scheduler.config.num_train_timesteps
        if is_flow(scheduler):
            self.prediction_type = "flow_prediction"
            self.alphas_cumprod = None
        elif hasattr(scheduler, "alphas_cumprod"):
            self.prediction_type = scheduler.config.prediction_type
            self.alphas_cumprod = scheduler.alphas_cumprod.float()
        else:
            raise ValueError(
                f"{type(scheduler).__name__} is not a scheduler the student can use: it needs `alphas_cumprod` "
                "(DDIM, DDPM, Euler, DPM-Solver, LCM, ...) or flow matching (FlowMatchEulerDiscreteScheduler, ...)."
            )
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"{type(scheduler).__name__} has prediction_type={self.prediction_type!r}; the student can use one of "
                f"{', '.join(PREDICTION_TYPES)}."
            )
        if self.prediction_type == "epsilon" and starts_at_pure_noise(scheduler):
            raise ValueError(
                "The scheduler starts at pure noise (`rescale_betas_zero_snr`, or such `trained_betas`), from which "
                "an epsilon prediction says nothing of the image: use a pipeline that predicts v, or a scheduler "
                "without it."
            )

    def coefficients(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`a` and `b` at `timesteps` (B,), float32, shaped to broadcast against `like` (B, ...)."""
        if self.alphas_cumprod is None:
            b = timesteps.float() / self.num_train_timesteps
            a = 1 - b
        else:
            self.alphas_cumprod = self.alphas_cumprod.to(timesteps.device)
            alphas_cumprod = self.alphas_cumprod[timesteps.long()]
            a, b = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        shape = (-1,) + (1,) * (like.ndim - 1)
        return a.view(shape), b.view(shape)

    def timesteps_at(self, fraction: torch.Tensor) -> torch.Tensor:
        """Timesteps for `fraction` (B,) in [0, 1] of the training range, 1 being the noisiest."""
        timesteps = fraction * self.num_train_timesteps
        if self.alphas_cumprod is None:
            return timesteps
        return timesteps.long().clamp(max=self.num_train_timesteps - 1)

    def fractions(self, timesteps: torch.Tensor) -> torch.Tensor:
        """What `timesteps` (B,) are of the training range, in [0, 1]."""
        return timesteps.float() / self.num_train_timesteps

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Draw from the forward process: `a x0 + b noise`."""
        a, b = self.coefficients(timesteps, x0)
        return a * x0 + b * noise

    def step_back(
        self, x_t: torch.Tensor, x0: torch.Tensor, timesteps: torch.Tensor, earlier: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        r"""
        The state at the `earlier` (B,) timesteps from which `x_t` came, where the image is `x0`, drawn by Gaussian
        `noise`: DDPM's \\(q(x_s | x_t, x_0)\\) (arXiv 2006.11239, equation 6) for any `a` and `b`.
        """
        a, b = self.coefficients(timesteps, x_t)
        earlier_a, earlier_b = self.coefficients(earlier, x_t)
        kept = (a / earlier_a) * (earlier_b / b)  # of the noise in x_t, what was there before
        fresh = (1 - kept.square()).clamp(min=0).sqrt()
        return earlier_a * x0 + earlier_b * (kept * (x_t - a * x0) / b + fresh * noise)

    def to_x0(self, output: torch.Tensor, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The denoised image that the denoiser's `output` at `x_t` stands for."""
        a, b = self.coefficients(timesteps, x_t)
        output, x_t = output.float(), x_t.float()
        if self.prediction_type == "epsilon":
            return (x_t - b * output) / a
        if self.prediction_type == "v_prediction":
            return a * x_t - b * output
        if self.prediction_type == "sample":
            return output
        return x_t - b * output  # flow: the velocity is noise - x0

    def target(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser should output for `a x0 + b noise`: the regression target of the denoising loss."""
        a, b = self.coefficients(timesteps, x0)
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return a * noise - b * x0
        if self.prediction_type == "sample":
            return x0
        return noise - x0

    def score(self, x0: torch.Tensor, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        r"""Score of the noisy marginal for a denoised prediction `x0`: \\((a x_0 - x_t) / b^2\\)."""
        a, b = self.coefficients(timesteps, x_t)
        return (a * x0 - x_t) / b.square()


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler's process is flow matching; DPM-Solver and UniPC know both."""
    return isinstance(scheduler, FLOW_SCHEDULERS) or bool(scheduler.config.get("use_flow_sigmas"))


def starts_at_pure_noise(scheduler: SchedulerMixin) -> bool:
    # With the option some schedulers keep a little of the image, so as not to divide by 0.
    return bool(scheduler.config.get("rescale_betas_zero_snr")) or bool(scheduler.alphas_cumprod.min() == 0)


def check_configured(scheduler: SchedulerMixin):
    """
    Raises `ValueError` for what a scheduler does without its configuration saying so, from which the teacher is drawn
    with and the student's is made and saved; and for flow matching that is not ours.
    """
    name, config = type(scheduler).__name__, scheduler.config
    shifts = isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchLCMScheduler)
    if shifts and scheduler.shift != config.shift:
        raise ValueError(
            f"The scheduler's shift was set to {scheduler.shift}, but its configuration, which is what is saved, says "
            f"{config.shift}. Give `pipe.scheduler = {name}.from_config(pipe.scheduler.config, "
            f"shift={scheduler.shift})`."
        )
    if hasattr(scheduler, "alphas_cumprod"):
        configured = type(scheduler).from_config(config).alphas_cumprod
        if not torch.allclose(scheduler.alphas_cumprod.cpu().float(), configured.float(), atol=1e-6):
            raise ValueError(
                f"The noise levels of the {name} are not those of its configuration, which is what is saved. Set them "
                "by its options: `rescale_betas_zero_snr=True`, or `trained_betas`."
            )
    if config.get("invert_sigmas"):
        raise ValueError(f"A {name} with `invert_sigmas` counts noise from the other end, which is not supported.")
    if config.get("use_flow_sigmas") and config.prediction_type != "flow_prediction":
        raise ValueError(
            f"The {name} has `use_flow_sigmas`, but prediction_type={config.prediction_type!r}, and would take the "
            "network's velocity for something else: give it `prediction_type='flow_prediction'` too."
        )


def make_student_scheduler(
    scheduler: SchedulerMixin,
    num_steps: int,
    grid: dict[str, Any] | None = None,
    sigmas: list[float] | None = None,
    timesteps: list[float] | None = None,
) -> SchedulerMixin:
    """
    The scheduler that the student is trained on, saved with and sampled with.

    Each step predicts x0 and noises it again to the next time. Variance-preserving pipelines get an `LCMScheduler`
    whose default grid is even from the last timestep down, `[999, 749, 499, 249]` for four steps (DMD2's); flow
    matching ones a `FlowMatchLCMScheduler` whose grid is even too, `[1, 0.75, 0.5, 0.25]`, before the pipeline's own
    static or dynamic shift. Plain diffusers runs both by `num_inference_steps=num_steps`.

    Args:
        scheduler (`SchedulerMixin`): the pipeline's.
        num_steps (`int`): K.
        grid (`dict`, *optional*): what the pipeline hands to `set_timesteps` beside the number of steps.
        sigmas (`list[float]`, *optional*): K falling noise levels in (0, 1] of a flow-matching grid of the user's own.
            A plain call reproduces it by `sigmas=sigmas`.
        timesteps (`list[float]`, *optional*): the same for a variance-preserving one, by `timesteps=timesteps`.

    Raises:
        ValueError: `sigmas` for a variance-preserving scheduler, or `timesteps` for flow matching.
    """
    if is_flow(scheduler):
        if timesteps is not None:
            raise ValueError("`sample_timesteps` is for variance-preserving schedulers: give `sample_sigmas`.")
        return _make_flow_scheduler(scheduler, num_steps, grid or {}, sigmas)
    if sigmas is not None:
        raise ValueError("`sample_sigmas` is for flow-matching schedulers: give `sample_timesteps`.")
    # Only what both know, or the saved file would warn of every other option.
    known = inspect.signature(LCMScheduler).parameters
    student = LCMScheduler.from_config(
        {name: value for name, value in scheduler.config.items() if name in known},
        original_inference_steps=scheduler.config.num_train_timesteps,
        clip_sample=False,
        thresholding=False,
    )
    if timesteps is not None:
        student.set_timesteps(timesteps=[int(timestep) for timestep in timesteps])
    else:
        student.set_timesteps(num_steps)
    return student


def _make_flow_scheduler(
    scheduler: SchedulerMixin, num_steps: int, grid: dict[str, Any], sigmas: list[float] | None
) -> FlowMatchLCMScheduler:
    num_train_timesteps = scheduler.config.num_train_timesteps
    if sigmas is not None:
        # Shifts act on the sigmas of a call as well: these are the noise levels themselves.
        student = FlowMatchLCMScheduler(num_train_timesteps)
        student.set_timesteps(sigmas=sigmas)
        return student
    known = {name: scheduler.config[name] for name in SHIFT_OPTIONS if name in scheduler.config}
    shift = scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0))
    if "sigmas" in grid:
        # Without the options that end the grid at a noise level that few steps are too dear for.
        student = FlowMatchLCMScheduler.from_config({**known, "shift": shift})
        student.set_timesteps(**grid)
        return student
    # The scheduler's own grid ends at its smallest noise level, where one of a few steps is lost.
    if known.get("use_dynamic_shifting"):
        linear = known.get("time_shift_type") == "linear"
        shift = grid["mu"] if linear else math.exp(grid["mu"])
    student = FlowMatchLCMScheduler(num_train_timesteps, **_even_grid(shift, num_steps, num_train_timesteps))
    student.set_timesteps(num_steps)
    return student


def _even_grid(shift: float, num_steps: int, num_train_timesteps: int) -> dict[str, float]:
    r"""
    `shift` and `shift_terminal` of a flow-matching scheduler whose own K-step grid is the even one,
    \\(s_k = 1 - k/K\\), under the wanted shift \\(\sigma = m s / (1 + (m - 1) s)\\).

    Such a scheduler spreads K points over \\([s_\min, 1]\\), shifts them by its own \\(m'\\) and then stretches them
    to end at `shift_terminal`. Both maps are fractional linear in \\(1 - s\\) and keep 0, so that equality asks only
    for \\((m' - 1) / m' \cdot (1 - s_\min) = (m - 1) / m \cdot (K - 1) / K\\), where \\(s_\min\\) itself is the
    training range's smallest level shifted by \\(m'\\): a quadratic equation.
    """
    if num_steps == 1:
        return {"shift": 1.0}
    q = (shift - 1) / shift * (num_steps - 1) / num_steps
    root = math.sqrt(max((1 - q) ** 2 - 4 * q / (num_train_timesteps - 1), 0.0))
    return {"shift": 2 / (1 - q + root), "shift_terminal": shift / (num_steps + shift - 1)}
