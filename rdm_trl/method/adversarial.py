# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
r"""
Real images as a reward: the log-odds of a discriminator on features of the fake score's denoiser.

The best discriminator of noised images has the log-odds \\(\log p_{real,\tau} - \log p_{student,\tau}\\): R_dm with
the data in the teacher's place, so that its gradient can correct what the teacher gets wrong. Both sides are noised to
the same level (diffusion GAN, arXiv 2206.02262), and the features are those of a denoiser that is there anyway (DMD2,
arXiv 2405.14867).
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn


# At most so many blocks of a transformer are looked at, evenly spread and none at its ends.
NUM_BLOCKS = 3
WIDTH = 128
# Of the finite differences, in standard deviations of x0: small, but well above what bfloat16 rounds off.
R1_STEP = 0.1
R1_WEIGHT = 0.1


class Head(nn.Module):
    """
    Log-odds (B,) of "real" from features: a small network for each, the same at every position, averaged over
    positions and features. It is all that is trained.

    Args:
        widths (`list[int]`): channels of the features.
    """

    def __init__(self, widths: list[int]):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
            for width in widths
        )
        self.outputs = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in widths)
        for output in self.outputs:  # undecided at first
            nn.init.zeros_(output.weight)
            nn.init.zeros_(output.bias)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """`features`: one for each width, (B, C, H, W), (B, L, C) or (B, C)."""
        odds = [
            output(branch(positions(feature).float()).mean(1)).squeeze(1)
            for feature, branch, output in zip(features, self.branches, self.outputs, strict=True)
        ]
        return torch.stack(odds).mean(0)


def positions(feature: torch.Tensor) -> torch.Tensor:
    """A feature (B, C, H, W), (B, L, C) or (B, C) as (B, L, C)."""
    if feature.ndim == 4:
        return feature.flatten(2).mT
    return feature[:, None] if feature.ndim == 2 else feature


def feature_blocks(network: nn.Module) -> list[nn.Module]:
    """
    The middle of a UNet, or the blocks of a transformer in their order: members of its lists, of the classes that
    diffusers names as its repeated ones where it names any.

    Raises:
        ValueError: it has neither.
    """
    if isinstance(getattr(network, "mid_block", None), nn.Module):
        return [network.mid_block]
    names = {name for kind in ("_repeated_blocks", "_no_split_modules") for name in getattr(network, kind, None) or ()}
    blocks = [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]
    blocks = [block for block in blocks if type(block).__name__ in names] or blocks
    if not blocks:
        raise ValueError(
            f"`adversarial_weight` needs features of the denoiser, but a {type(network).__name__} has neither a "
            "`mid_block` nor a list of blocks."
        )
    return blocks


def spread(blocks: list) -> list:
    """At most `NUM_BLOCKS` of them, evenly spread."""
    last = len(blocks) - 1
    return [blocks[i] for i in sorted({round(last * (k + 1) / (NUM_BLOCKS + 1)) for k in range(NUM_BLOCKS)})]


class Seen(Exception):
    """All that was looked for has been found."""


@contextmanager
def capture(blocks: list[nn.Module], stop: bool = False):
    """
    Inside the block, what the network's `blocks` put out is found in the list that it is given, in their order. With
    `stop` the network, and the block with it, ends behind the last of them: what follows is not asked for.
    """
    found = [None] * len(blocks)

    def keep(i: int) -> Callable:
        def hook(module, inputs, output):
            # Of several streams diffusers' blocks return the image's last.
            tensors = [output] if isinstance(output, torch.Tensor) else output
            found[i] = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)][-1]
            if stop and all(feature is not None for feature in found):
                raise Seen

        return hook

    handles = [block.register_forward_hook(keep(i)) for i, block in enumerate(blocks)]
    try:
        yield found
    except Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()


def reaches(output: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether a gradient of `output` would come to the leaf `x`. None is computed, which some networks could not."""
    leaf, met, ahead = torch.autograd.graph.get_gradient_edge(x).node, set(), [output.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is leaf:
            return True
        if node is not None and node not in met:
            met.add(node)
            ahead += [following for following, _ in node.next_functions]
    return False


def blocks_that_see(blocks: list[nn.Module], run: Callable, x_t: torch.Tensor) -> tuple[list[nn.Module], list[int]]:
    """
    Those of `blocks` whose output depends on `x_t` (B, ...), `NUM_BLOCKS` of them at most, and their channels: some
    refine the prompt alone. `run(x_t)` calls the network.

    Raises:
        ValueError: none does.
    """
    with torch.enable_grad(), capture(blocks) as outputs:
        x_t = x_t.detach().requires_grad_(True)
        run(x_t)

    found = [(b, out) for b, out in zip(blocks, outputs, strict=True) if out is not None and reaches(out, x_t)]
    if not found:
        raise ValueError("`adversarial_weight` needs features of the denoiser, but no block of it sees the image.")
    seeing = spread([(block, positions(output).shape[2]) for block, output in found])
    return [block for block, _ in seeing], [width for _, width in seeing]


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor, perturbed: torch.Tensor) -> torch.Tensor:
    r"""
    The logistic loss of log-odds (B,) of real images and of the student's, and R1 (arXiv 1801.04406) by finite
    differences (arXiv 2501.08316): `perturbed` (B,) are the log-odds of the same real images moved by `R1_STEP` times
    Gaussian noise, \((D(x + s n) - D(x))^2 / s^2 \approx |\nabla D|^2\), so that no second derivative is needed.
    """
    r1 = ((perturbed - real) / R1_STEP).square().mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean() + R1_WEIGHT * r1


def log_odds_gradient(log_odds: Callable, x0: torch.Tensor) -> torch.Tensor:
    r"""
    The push of a reward that is the log-odds (B,) = `log_odds(x0)` of `x0` (B, ...): \\(D \nabla\\) of it (B, ...)
    with D elements an image, as [`rewards.reward_gradient`]'s. No parameter gets a gradient.
    """
    with torch.enable_grad():
        x0 = x0.detach().float().requires_grad_(True)
        (gradient,) = torch.autograd.grad(log_odds(x0).sum(), x0)
    return gradient * gradient[0].numel()


def figures(real: torch.Tensor, fake: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is logged of log-odds (B,) of both sides."""
    right = torch.cat([real > 0, fake < 0]).float().mean()
    return {"adversarial/real": real.mean(), "adversarial/fake": fake.mean(), "adversarial/accuracy": right}
