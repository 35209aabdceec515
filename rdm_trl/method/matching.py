# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
r"""
Distribution matching as a reward:
\\(R_{dm}(x_\tau) = \log p_{teacher,\tau}(x_\tau) - \log p_{student,\tau}(x_\tau)\\).

Its gradient in \\(x_\tau\\) is \\(\frac{a}{b^2}(\mu_{teacher} - \mu_{fake})\\) with the denoised predictions \\(\mu\\)
of the teacher and of the fake score, which is trained on the student's images: the direction of DMD (arXiv 2311.18828,
2405.14867). The paper's equations (arXiv 2603.28460) are not public; what groups do here, `center` and `normalize`, is
ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .diffusion import NoiseProcess


@dataclass
class Probe:
    """
    R_dm at one noisy draw of each image.

    Args:
        direction (B, ...): `mu_teacher - mu_fake`, where R_dm pulls x0, in units of x0.
        distance (B, ...): absolute distance of x0 from the teacher's prediction, whose mean is DMD's normaliser.
        residual (B, ...): `mu_fake - x0`, whose mean over the student's images an exact fake score keeps at 0.
        reward (B,): scalar estimate of R_dm per element (see `reward_estimate`).
        mirrored (`bool`): whether each two neighbours come from noise and its negative (see `policy.draw_noise`).
    """

    direction: torch.Tensor
    distance: torch.Tensor
    residual: torch.Tensor
    reward: torch.Tensor
    mirrored: bool = False

    def independent_residuals(self, num_generations: int) -> torch.Tensor:
        """What is independent in each group, (groups, parts, ...): images, or the means of mirrored pairs."""
        size = 2 if self.mirrored else 1
        return self.residual.unflatten(0, (-1, num_generations // size, size)).mean(2)

    def figures(self, num_generations: int) -> dict[str, torch.Tensor]:
        """What is logged of it, where the images of a prompt are `num_generations` neighbours."""
        figures = {
            "rewards/distribution_matching/mean": self.reward.mean(),
            "rewards/distribution_matching/std": self.reward.std(),
            "dm/scale": self.distance.mean(),
            "dm/direction": self.direction.abs().mean(),
        }
        if num_generations > 1:
            scale = self.distance.flatten(1).mean(1).view(-1, num_generations)
            figures["dm/scale_spread"] = (scale.std(1) / scale.mean(1)).mean()
            figures["dm/fake_error"] = common_square(self.independent_residuals(num_generations))
            figures["dm/direction_square"] = self.direction.square().mean()
        return figures


def draw_fractions(num_groups: int, num_generations: int, sampling: str, low, high):
    """
    Noise levels (num_groups * num_generations,), as fractions of the training range.

    Args:
        sampling (`str`): `"uniform"`, an independent draw an image; `"stratified"`, one draw from each of
            `num_generations` equal strata a group, in random order; `"shared"`, one draw a group.
        low, high (`float` or (num_groups * num_generations,)): the smallest and largest fraction.
    """
    if sampling == "shared":
        draw = torch.rand(num_groups, 1).expand(-1, num_generations)
    else:
        draw = torch.rand(num_groups, num_generations)
        if sampling == "stratified":
            ranks = torch.rand(num_groups, num_generations).argsort(1)
            draw = (ranks + draw) / num_generations
    return low + (high - low) * draw.flatten()


@torch.no_grad()
def probe(
    predict_teacher: Callable,
    predict_fake: Callable,
    process: NoiseProcess,
    x0,
    noise,
    timesteps: torch.Tensor,
    new_x0=None,
    weight: torch.Tensor | float = 1.0,
    mirrored: bool = False,
) -> Probe:
    """
    Evaluates R_dm at `a x0 + b noise`.

    Args:
        predict_teacher, predict_fake (`Callable`): `(x_t, timesteps) -> x0 prediction`, the teacher's with guidance.
        x0, noise (B, ...): the student's images and one Gaussian draw for each.
        timesteps (B,): the noise levels.
        new_x0 (B, ...), weight (B, ...): where `x0` is what an older student made of the same states: what the
            student makes of them now, and the importance ratio of `a x0 + b noise`. Weighed by it, the expectations
            of direction and residual are those of new draws (see `docs/method.md`).
        mirrored (`bool`): whether each two neighbours come from noise and its negative.
    """
    x_t = process.add_noise(x0, noise, timesteps)
    teacher, fake = predict_teacher(x_t, timesteps), predict_fake(x_t, timesteps)
    return Probe(
        direction=weight * (teacher - fake),
        distance=(x0 - teacher).abs(),
        residual=weight * (fake - (x0 if new_x0 is None else new_x0)),
        reward=reward_estimate(teacher, fake, x0, timesteps, process),
        mirrored=mirrored,
    )


def group_mean(values: torch.Tensor, num_generations: int) -> torch.Tensor:
    """The mean over each group of `num_generations` neighbours among `values` (B, ...), for each of them (B, ...)."""
    return values.unflatten(0, (-1, num_generations)).mean(1).repeat_interleave(num_generations, 0)


def reward_estimate(teacher, fake, x0, timesteps: torch.Tensor, process: NoiseProcess) -> torch.Tensor:
    r"""
    Scalar R_dm (B,) per element: how much worse the fake score predicts the noise than the teacher does,
    \\(\frac1D(|\epsilon_{fake}-\epsilon|^2 - |\epsilon_{teacher}-\epsilon|^2)\\).

    Half its integral over log-SNR, times D, is \\(\log p_{teacher}(x_0) - \log p_{fake}(x_0)\\) for exact denoisers
    (arXiv 2302.03792); one draw of the time estimates that up to the weight of the times. Our reconstruction.
    """
    a, b = process.coefficients(timesteps, x0)
    difference = (x0 - fake).square() - (x0 - teacher).square()
    return ((a / b).square() * difference).flatten(1).mean(1)


def common_square(residuals: torch.Tensor) -> torch.Tensor:
    """
    Mean square of what a group's independent `residuals` (groups, parts, ...) have in common: the products of
    different ones, which no noise of their own biases. Its expectation is 0 for an exact fake score, so that single
    values may be negative.
    """
    number = residuals.shape[1]
    products = residuals.sum(1).square() - residuals.square().sum(1)
    return products.mean() / (number * (number - 1))


def center(probe: Probe, num_generations: int) -> Probe:
    r"""
    Takes the fake score's common error out of the direction:
    \(d_i = (\mu_{teacher} - \mu_{fake})_i + \frac{1}{G - 1} \sum_{j \ne i} (\mu_{fake} - x_0)_j\) over the images of a
    prompt, of one exit step and noise level.

    For the student's exact score the residuals have mean 0 at every noise level, so that the mean of the others
    estimates, without bias and independently of image i, the error that this level's predictions share, whatever made
    it: above all lag. With image i inside the mean its own -x0 would pull it to its denoised self. It is RLOO's
    leave-one-out baseline, on the student's half of R_dm. Its price is 1 / (G - 1) of the residual's variance.

    Of mirrored images the pair is left out, since image i says what the other was drawn from: the price is then
    (1 + r) / (G - 2), with the correlation r of a pair's residuals; less, where r is below -1 / (G - 1). Ours.
    """
    residuals = probe.independent_residuals(num_generations)
    number = residuals.shape[1]
    others = (residuals.sum(1, keepdim=True) - residuals) / (number - 1)
    others = others.flatten(0, 1).repeat_interleave(num_generations // number, 0)
    return replace(probe, direction=probe.direction + others)


def normalize(
    probe: Probe, normalization: str, num_generations: int, level: str = "image", eps: float = 1e-6
) -> torch.Tensor:
    """
    The advantage (B, ...) of the direction form: `direction / scale`, where the scale is a mean of `distance`.

    Args:
        normalization (`str`): over which images: `"sample"`, each image alone (DMD and DMD2); `"group"`, the images of
            its prompt (GNDM, our reconstruction), which keep their relative sizes; `"batch"`, all images; `"none"`
            divides by nothing.
        num_generations (`int`): images a prompt; the images of a prompt are neighbours.
        level (`str`): over which elements: `"image"`, all of an image, so that only the length of its direction
            changes (DMD); `"element"`, each latent element alone, which several images are needed to estimate: every
            element then moves in units of its own mean distance to the teacher.
    """
    if normalization == "none":
        return probe.direction
    scale = probe.distance
    if level == "image":
        scale = scale.mean(tuple(range(1, scale.ndim)), keepdim=True)
    elif level != "element":
        raise ValueError(f"Unknown level {level!r}: image or element.")
    if normalization == "group":
        scale = group_mean(scale, num_generations)
    elif normalization == "batch":
        scale = scale.mean(0, keepdim=True)
    elif normalization != "sample":
        raise ValueError(f"Unknown normalization {normalization!r}: one of group, sample, batch, none.")
    return probe.direction / (scale + eps)
