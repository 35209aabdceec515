# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Distributions of images whose scores are known exactly, noised or not."""

import torch
from diffusers import DDIMScheduler
from torch.distributions import Categorical, MixtureSameFamily, Normal

from rdm_trl.method.diffusion import NoiseProcess


PROCESS = NoiseProcess(DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))


def noisy(distribution, a, b):
    """The density of `a x0 + b eps`: again a mixture of Gaussians."""
    parts = distribution.component_distribution
    spread = ((a * parts.stddev) ** 2 + b**2).sqrt()
    return MixtureSameFamily(distribution.mixture_distribution, Normal(a * parts.mean, spread))


def mixture(means, spreads, weights):
    return MixtureSameFamily(
        Categorical(torch.tensor(weights).double()),
        Normal(torch.tensor(means).double(), torch.tensor(spreads).double()),
    )


def exact_denoiser(distribution):
    """E[x0 | x_t] by Tweedie's formula, the score by automatic differentiation of the log-density."""

    def predict(x_t, timesteps):
        a, b = (c.double() for c in PROCESS.coefficients(timesteps, x_t))
        leaf = x_t.detach().double().requires_grad_(True)
        with torch.enable_grad():
            components = distribution.component_distribution
            spread = ((a[..., None] * components.stddev) ** 2 + b[..., None] ** 2).sqrt()
            logits = distribution.mixture_distribution.logits
            parts = Normal(a[..., None] * components.mean, spread).log_prob(leaf[..., None]) + logits
            (score,) = torch.autograd.grad(parts.logsumexp(-1).sum(), leaf)
        return (x_t + b**2 * score) / a

    return predict


TEACHERS = {
    "gaussian": mixture([0.7], [0.5], [1.0]),
    "mixture": mixture([-1.5, 1.0], [0.4, 0.6], [0.3, 0.7]),
}
STUDENT = mixture([0.2], [0.9], [1.0])
