# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
r"""
The noise process behind a diffusers scheduler, and the student's few-step grid.

Everything is written for \\(x_t = a_t x_0 + b_t \epsilon\\). A variance-preserving scheduler has
\\(a = \sqrt{\bar\alpha}\\) and \\(b = \sqrt{1-\bar\alpha}\\); flow matching has \\(a = 1-\sigma\\) and
\\(b = \sigma\\). Times are the scheduler's own `timesteps`, the numbers its denoiser is called with.
"""

import inspect

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SchedulerMixin,
)


FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
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
        ValueError: the scheduler has no such process, an unknown prediction type, or predicts epsilon from pure noise.
    """

    def __init__(self, scheduler: SchedulerMixin):
        self.num_train_timesteps = scheduler.config.num_train_timesteps
        if isinstance(scheduler, FLOW_SCHEDULERS):
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
        if self.prediction_type == "epsilon" and scheduler.config.get("rescale_betas_zero_snr"):
            raise ValueError(
                "A scheduler with `rescale_betas_zero_snr` starts at pure noise, from which an epsilon prediction "
                "says nothing of the image: use a pipeline that predicts v, or a scheduler without it."
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

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Draw from the forward process: `a x0 + b noise`."""
        a, b = self.coefficients(timesteps, x0)
        return a * x0 + b * noise

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


def make_student_scheduler(scheduler: SchedulerMixin, num_steps: int) -> SchedulerMixin:
    """
    The scheduler that the student is trained on, saved with and sampled with.

    Each step predicts x0 and noises it again to the next time. Variance-preserving pipelines get an `LCMScheduler`
    whose default grid is even from the last timestep down, `[999, 749, 499, 249]` for four steps (DMD2's); flow
    matching ones a `FlowMatchLCMScheduler` on their own shifted grid. Plain diffusers runs it by
    `num_inference_steps=num_steps`.
    """
    if isinstance(scheduler, FLOW_SCHEDULERS):
        student = FlowMatchLCMScheduler.from_config(scheduler.config)
    else:
        # Only what both know, or the saved file would warn of every other option.
        known = inspect.signature(LCMScheduler).parameters
        student = LCMScheduler.from_config(
            {name: value for name, value in scheduler.config.items() if name in known},
            original_inference_steps=scheduler.config.num_train_timesteps,
            clip_sample=False,
            thresholding=False,
        )
    student.set_timesteps(num_steps)
    return student
