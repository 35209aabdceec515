# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
r"""
The target: R_dm's teacher where guidance is absorbed, fitted to what the guided teacher draws, in closed form.

A guided sampler feels \\((w - 1)(\mu_c - \mu_u)\\) for a few small steps. Distribution matching follows its teacher to
equilibrium at every noise level, and the equilibrium of the guided score is far sharper than what that sampler draws:
the guided score is not the score of the guided samples. The one that is, \\(E[x_0 | x_\tau]\\) over those samples, is
the least-squares prediction of them (denoising score matching, arXiv 1905.07088's theorem). Here it is sought among
\\(\mu_c + \sum_j w_j(\tau) f_j\\) with the features \\(f\\) of `features`: a few numbers a noise level, which a few
hundred images determine and nothing has to be trained for. Ours.
"""

from typing import NamedTuple

import torch


# Noise levels, evenly over the training range, between which the weights are interpolated linearly.
KNOTS = 8
# Added to the diagonal of the normal equations, relative to it: where the images say nothing, the weight is 0.
RIDGE = 1e-3


def draw_levels(number: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels (number,) in [0, 1), one from each of as many equal parts of the range, shuffled."""
    return (torch.randperm(number, generator=generator) + torch.rand(number, generator=generator)) / number


def features(conditional: torch.Tensor, unconditional: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """
    What the target is made of beside `conditional`, (B, 3, ...): guidance, the noisy image, of which networks leave
    some or take too much, and `conditional` itself, whose contrast a sampler's steps and guidance change.
    """
    return torch.stack([conditional - unconditional, x_t, conditional], 1)


def hats(fractions: torch.Tensor) -> torch.Tensor:
    """Shares (B, KNOTS) of the knots at `fractions` (B,) in [0, 1]: linear between two, and their sum is 1."""
    position = fractions.float().clamp(0, 1) * (KNOTS - 1)
    return (1 - (position[:, None] - torch.arange(KNOTS, device=position.device)).abs()).clamp(min=0)


class Moments(NamedTuple):
    """
    What the fit has to know of some noisy images: sums over an image's elements, by which it does not matter on which
    process they were taken.

    Args:
        fractions (B,): noise levels in [0, 1].
        gram (B, J, J): products of the features with each other.
        correlation (B, J): their products with `x0 - conditional`.
        square (B,): that residual's square.
    """

    fractions: torch.Tensor
    gram: torch.Tensor
    correlation: torch.Tensor
    square: torch.Tensor


def moments(x0, conditional, unconditional, x_t, fractions: torch.Tensor) -> Moments:
    """Of images `x0` (B, ...), noised to `x_t` at `fractions` (B,), and their two predictions."""
    f = features(conditional, unconditional, x_t).flatten(2).double()
    residual = (x0 - conditional).flatten(1).double()
    correlation = (f @ residual[:, :, None])[:, :, 0]
    return Moments(fractions, f @ f.transpose(1, 2), correlation, residual.square().sum(1))


def fit(moments: Moments) -> torch.Tensor:
    """
    Weights (J, KNOTS) of the features, by least squares over all images. A noise level counts by its draws, not by
    how badly images are predicted there: residuals are measured in units of their level's mean square.
    """
    shares = hats(moments.fractions).double()
    level = (shares.T @ moments.square) / shares.sum(0).clamp(min=1e-12)
    weight = 1 / (shares @ level).clamp(min=1e-12)
    gram = torch.einsum("bk,bl,bij,b->ikjl", shares, shares, moments.gram, weight).flatten(2).flatten(0, 1)
    right = torch.einsum("bk,bi,b->ik", shares, moments.correlation, weight).flatten()
    diagonal = gram.diagonal()
    gram = gram + torch.diag(RIDGE * diagonal + 1e-8 * diagonal.max())
    return torch.linalg.solve(gram, right).view(-1, KNOTS).float()


def predict(conditional, unconditional, x_t, fractions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The target's prediction (B, ...) with the fitted `weights` (J, KNOTS) at the noise levels `fractions` (B,)."""
    w = hats(fractions) @ weights.T
    f = features(conditional, unconditional, x_t)
    return conditional + (w.view(*w.shape, *(1,) * (x_t.ndim - 1)) * f).sum(1)
