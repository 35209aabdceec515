# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
r"""
The target: R_dm's teacher where guidance is absorbed, fitted to what the guided teacher draws, in closed form.

A guided sampler feels \\((w - 1)(\mu_c - \mu_u)\\) for a few small steps. Distribution matching follows its teacher to
equilibrium at every noise level, and the equilibrium of the guided score is far sharper than what that sampler draws:
the guided score is not the score of the guided samples. The target is \\(\mu_c + v_1(\tau)\,(\mu_c - \mu_u) +
v_2(\tau)\,\mu_c\\) with the weights by which training rests at those samples. With centring the sum of a prompt's
directions is that of \\(\text{target}(x_\tau) - x_0\\), so this residual's mean over a prompt's samples has to be 0.
Of two of them, each one's features are the *instruments* (Reiersol 1941) of the other's residual: their noise is
independent, what the prompt says in both is not. Least squares would make the error of single predictions small
instead and pay for it with the mean: it takes weight from a prediction because the image's own noise is in it.

A teacher that is far from its images without guidance has such weights right over all prompts and wrong for single
ones. Where its sampler goes for a prompt can be seen, though: with \\(\mu_a\\), its prediction a few guided steps
further down from \\(x_\tau\\), \\(\mu_a - \mu_c\\) takes the place of guidance, fitted alike. Only the mean of a group
is taken from it. Ours.
"""

from typing import NamedTuple

import torch


# Noise levels, evenly over the training range, between which the weights are interpolated linearly.
KNOTS = 4
# Added to the diagonal of the equations, relative to the features' own squares: where many pairs have nothing in
# common, the weight is 0.
RIDGE = 1e-2
# Where what the fitted target has wrong in common about a prompt is more than this, in % of the mean square in the
# noisier half of the levels, the target looks ahead: so many guided steps, above so much of the noise.
AHEAD_ABOVE = 10.0
STEPS_AHEAD = 3
AHEAD_FROM = 0.5
# Of the weight of contrast, which few pairs determine badly. On all teachers that were tried it is about 0.1 at most.
LARGEST_CONTRAST = 1.0


def draw_levels(number: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels (number,) in [0, 1), one from each of as many equal parts of the range, shuffled."""
    return (torch.randperm(number, generator=generator) + torch.rand(number, generator=generator)) / number


def features(conditional: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
    """
    What the target is made of beside `conditional`, (B, 2, ...): where guidance or the look ahead pull it, and
    `conditional` itself, whose contrast a sampler's steps and guidance change.
    """
    return torch.stack([pull, conditional], 1)


def hats(fractions: torch.Tensor) -> torch.Tensor:
    """Shares (B, KNOTS) of the knots at `fractions` (B,) in [0, 1]: linear between two, and their sum is 1."""
    position = fractions.float().clamp(0, 1) * (KNOTS - 1)
    return (1 - (position[:, None] - torch.arange(KNOTS, device=position.device)).abs()).clamp(min=0)


class Moments(NamedTuple):
    """
    What the fit has to know of pairs of noisy images: sums over an image's elements, by which it does not matter on
    which process they were taken.

    Args:
        fractions (B,): noise levels in [0, 1], one for both.
        gram (B, 2, 2): products of each image's features with the other's, both ways.
        correlation (B, 2): of each image's features with the other's `x0 - conditional`, both ways.
        own (B, 2): squares of the features, of both.
        square (B,): those residuals' squares, of both.
        common (B,): product of the two images' residuals.
    """

    fractions: torch.Tensor
    gram: torch.Tensor
    correlation: torch.Tensor
    own: torch.Tensor
    square: torch.Tensor
    common: torch.Tensor


def moments(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...], fractions: torch.Tensor) -> Moments:
    """
    Of two images each of B prompts, `(x0, conditional, pull)`, all (B, ...): clean, their prediction at the noise
    levels `fractions` (B,), each from noise of its own, and where it is pulled.
    """
    f, residual = zip(
        *((features(c, pull).flatten(2).double(), (x0 - c).flatten(1).double()) for x0, c, pull in (first, second)),
        strict=True,
    )
    across = f[0] @ f[1].mT
    correlation = f[0] @ residual[1][:, :, None] + f[1] @ residual[0][:, :, None]
    own, square = (sum(v.square().sum(-1) for v in values) for values in (f, residual))
    common = (residual[0] * residual[1]).sum(1)
    return Moments(fractions, across + across.mT, correlation[:, :, 0], own, square, common)


def fit(moments: Moments, least: float, most: float) -> torch.Tensor:
    """
    Weights (2, KNOTS) of the features, by instruments over all pairs. Products are measured in units of their level's
    mean square residual, or the levels where images are predicted badly would say all.

    Weights of the pull are cut off at `least` and `most`, those of none and of the sampler's own; those of contrast
    are the ones that go with them, cut off at `LARGEST_CONTRAST`.
    """
    shares = hats(moments.fractions).double()
    level = (shares.T @ moments.square) / shares.sum(0).clamp(min=1e-12)
    weight = 1 / (shares @ level).clamp(min=1e-12)
    gram = torch.einsum("bk,bl,bij,b->ikjl", shares, shares, moments.gram, weight).flatten(2).flatten(0, 1)
    right = torch.einsum("bk,bi,b->ik", shares, moments.correlation, weight).flatten()
    own = torch.einsum("bk,bi,b->ik", shares.square(), moments.own, weight).flatten()
    gram = gram + torch.diag(RIDGE * own + 1e-8 * own.max())
    pull = torch.linalg.solve(gram, right)[:KNOTS].clamp(least, most)
    rest = torch.linalg.solve(gram[KNOTS:, KNOTS:], right[KNOTS:] - gram[KNOTS:, :KNOTS] @ pull)
    return torch.stack([pull, rest.clamp(-LARGEST_CONTRAST, LARGEST_CONTRAST)]).float()


def common_error(moments: Moments, weights: torch.Tensor) -> list[float]:
    """
    What the errors of a prompt's two images have in common with `weights` (2, KNOTS), in % of the mean square residual
    of the teacher without them, in each quarter of the noise levels.
    """
    w = hats(moments.fractions).double() @ weights.double().T
    error = moments.common - (w * moments.correlation).sum(1) + torch.einsum("bi,bij,bj->b", w, moments.gram, w) / 2
    quarter = (moments.fractions * 4).long().clamp(max=3)
    return [(200 * error[quarter == k].sum() / moments.square[quarter == k].sum()).item() for k in range(4)]


def predict(conditional, pull, fractions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The target's prediction (B, ...) with the fitted `weights` (2, KNOTS) at the noise levels `fractions` (B,)."""
    w = hats(fractions) @ weights.T
    w = w.view(*w.shape, *(1,) * (conditional.ndim - 1))
    return conditional + (w * features(conditional, pull)).sum(1)


def share_ahead(fractions: torch.Tensor) -> torch.Tensor:
    """How much the look ahead counts at `fractions` (B,): none up to `AHEAD_FROM`, all half way from there to 1."""
    return (2 * (fractions - AHEAD_FROM) / (1 - AHEAD_FROM)).clamp(0, 1)
