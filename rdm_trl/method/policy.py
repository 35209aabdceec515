# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
r"""
The few-step student as a Gaussian policy.

A state is a noisy latent \\(x_{t_k}\\) with its prompt; the student predicts \\(G = \hat x_0(x_{t_k})\\). The action
is the next, less noisy latent, drawn from \\(\mathcal N(a_{t_{k+1}} G,\, b_{t_{k+1}}^2 I)\\). The last step is
deterministic: it returns G.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .diffusion import NoiseProcess


@dataclass
class Rollout:
    """
    Trajectories of B images over a grid of K timesteps.

    Args:
        timesteps (K,): the grid, noisiest first.
        latents (B, K + 1, ...): `latents[:, k]` is the state at `timesteps[k]`, `latents[:, K]` the final image.
            Images that stopped at their exit step are zero behind it.
        exit_steps (B,): the step k at which each image is trained.
        x0 (B, ...): the student's prediction at its exit step; `None` until the update that trains it has made it.
        mirrored (`bool`): whether each two neighbours were drawn from noise and its negative, see `draw_noise`.
    """

    timesteps: torch.Tensor
    latents: torch.Tensor
    exit_steps: torch.Tensor
    x0: torch.Tensor | None = None
    mirrored: bool = False

    @property
    def exit_latents(self) -> torch.Tensor:
        """States (B, ...) at the exit steps."""
        return self.latents[torch.arange(len(self.latents), device=self.latents.device), self.exit_steps]

    @property
    def exit_timesteps(self) -> torch.Tensor:
        return self.timesteps[self.exit_steps]

    def figures(self, num_generations: int) -> dict[str, torch.Tensor]:
        """What is logged of the exit steps' images: mean, spread, and the spread between images of one prompt."""
        figures = {"x0/mean": self.x0.mean(), "x0/std": self.x0.std()}
        if num_generations > 1:
            figures["x0/diversity"] = self.x0.view(-1, num_generations, self.x0[0].numel()).std(1).mean()
        return figures

    def transition_scale(self, process: NoiseProcess) -> torch.Tensor:
        """`a / b` (B,) of the transition behind the exit step; 0 behind the last step, which is deterministic."""
        a, b = process.coefficients(self.timesteps, self.timesteps)
        return torch.cat([(a / b)[1:], a.new_zeros(1)])[self.exit_steps]


def draw_noise(shape: tuple[int, ...], device: torch.device, mirrored: bool = False) -> torch.Tensor:
    """
    Gaussian noise of `shape` (B, ...); where it is `mirrored` each second image gets the negative of the one before it
    (antithetic variates, Hammersley and Morton 1956): normal by itself, and what is odd in it leaves a pair's sum.
    """
    if not mirrored:
        return torch.randn(shape, device=device)
    half = torch.randn((shape[0] // 2, *shape[1:]), device=device)
    return torch.stack([half, -half], 1).flatten(0, 1)


def draw_exit_steps(num_groups: int, num_generations: int, num_steps: int) -> torch.Tensor:
    """Exit steps (num_groups * num_generations,): one a group, spread evenly over the grid, in random order."""
    offset = torch.randint(num_steps, (1,))
    order = torch.randperm(num_groups)
    return ((order + offset) % num_steps).repeat_interleave(num_generations)


def seen_noise(exit_steps: torch.Tensor, timesteps: torch.Tensor, num_train_timesteps: int) -> torch.Tensor:
    """
    The smallest noise level (B,) that matters for images of these exit steps on the grid `timesteps` (K,), as a
    fraction: an image is noised again to the next step's time, and what that drowns is nothing the student has to get
    right yet.
    """
    following = torch.cat([timesteps[1:], timesteps.new_zeros(1)])
    return following[exit_steps] / num_train_timesteps


@torch.no_grad()
def rollout(
    predict_x0: Callable,
    process: NoiseProcess,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    exit_steps: torch.Tensor,
    complete: bool = False,
    mirrored: bool = False,
) -> Rollout:
    """
    Runs the student from pure noise.

    Args:
        predict_x0 (`Callable`): `(x_t, timesteps, rows) -> x0` for the batch's `rows` (a tensor of indices).
        timesteps (K,): the student's grid.
        noise (B, K, ...): `noise[:, 0]` starts each image, `noise[:, k]` re-noises it to `timesteps[k]`.
        exit_steps (B,): in `0 ... K - 1`; an image gets to the state at its exit step, where its update goes on,
        complete (`bool`): unless all K steps are wanted of all images.
        mirrored (`bool`): whether `noise` is (see `draw_noise`).
    """
    num_images, num_steps = noise.shape[:2]
    latents = noise.new_zeros((num_images, num_steps + 1, *noise.shape[2:]))
    latents[:, 0] = noise[:, 0]
    for k in range(num_steps):
        rows = torch.arange(num_images, device=noise.device) if complete else (exit_steps > k).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        x0 = predict_x0(latents[rows, k], timesteps[k].expand(len(rows)), rows)
        if k + 1 < num_steps:
            latents[rows, k + 1] = process.add_noise(x0, noise[rows, k + 1], timesteps[k + 1].expand(len(rows)))
        else:
            latents[rows, k + 1] = x0
    return Rollout(timesteps, latents, exit_steps, mirrored=mirrored)


def log_prob(next_latents: torch.Tensor, x0: torch.Tensor, next_timesteps: torch.Tensor, process: NoiseProcess):
    r"""
    Log-density (B,) of `next_latents` (B, ...) under the re-noising policy, in fp32 and averaged over the elements as
    DDPO and Flow-GRPO do: \\(-\frac{1}{2 b^2 D}|x' - a G|^2 - \frac12 \log 2\pi b^2\\).
    """
    a, b = process.coefficients(next_timesteps, x0)
    density = (
        -(next_latents.float() - a * x0.float()).square() / (2 * b.square()) - b.log() - 0.5 * math.log(2 * math.pi)
    )
    return density.flatten(1).mean(1)


def log_ratio(action, x0, old_x0, timesteps: torch.Tensor, process: NoiseProcess) -> torch.Tensor:
    r"""
    Log of the importance ratio of each element (B, ...) in fp32: how much likelier `action` is under the policy that
    predicts `x0` than under the one that predicted `old_x0`, \\(\frac{|u - a G_{old}|^2 - |u - a G|^2}{2 b^2}\\). The
    policy factorises over elements: their sum is the ratio of the densities. Exactly 0 where the two agree.

    Args:
        action, x0, old_x0 (B, ...): the action is an image noised to `timesteps` (B,).
    """
    a, b = process.coefficients(timesteps, x0)
    action, x0, old_x0 = action.float(), x0.float(), old_x0.float()
    return ((action - a * old_x0).square() - (action - a * x0).square()) / (2 * b.square())


def importance_ratio(log_ratio: torch.Tensor, level: str) -> torch.Tensor:
    """
    The ratio that weighs a sample, from the elements' `log_ratio` (B, ...).

    Args:
        level (`str`): `"element"`, each element its own (B, ...); `"step"`, one an image from the mean over elements
            (DDPO, Flow-GRPO), which hardly leaves 1; `"sequence"`, the ratio of the full densities, exact but of a
            variance that grows with the number of elements; `"none"`, 1. The last three are (B, 1, ...).

    The gradient is at all levels, where the ratio is 1, that of the mean log-probability: a level corrects the
    weight of a sample and does not change the learning rate.
    """
    if level == "element":
        return log_ratio.exp()
    dims = tuple(range(1, log_ratio.ndim))
    mean = log_ratio.mean(dims, keepdim=True)
    if level == "step":
        return mean.exp()
    weight = log_ratio.sum(dims, keepdim=True).exp() if level == "sequence" else torch.ones_like(mean)
    return weight.detach() * (mean - mean.detach()).exp()


def action_kl(x0, old_x0, timesteps: torch.Tensor, process: NoiseProcess) -> torch.Tensor:
    r"""KL divergence (B,) between new and old policy per element, exact: \\(\frac{a^2}{2 b^2 D}|G - G_{old}|^2\\)."""
    a, b = process.coefficients(timesteps, x0)
    return 0.5 * (a / b * (x0.float() - old_x0.float())).square().flatten(1).mean(1)


def ratio_figures(ratio: torch.Tensor, clipped: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is logged of importance ratios: mean, share that was `clipped`, effective sample size as a fraction."""
    return {
        "ratio/mean": ratio.mean(),
        "ratio/clipped": (clipped != ratio).float().mean(),
        "ratio/effective_samples": ratio.sum().square() / ratio.square().sum() / ratio.numel(),
    }


def score_direction(advantage: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, process: NoiseProcess):
    r"""
    The policy gradient of a scalar `advantage` (B,) as a direction (B, ...) of x0, where the action is x0 noised by
    `noise` to `timesteps` (B,): \\(A \nabla_G \log \pi = A \frac{a}{b} \epsilon\\).
    """
    a, b = process.coefficients(timesteps, noise)
    return advantage.view(-1, *(1,) * (noise.ndim - 1)) * (a / b) * noise
