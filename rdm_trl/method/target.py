# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
r"""
The target: a denoiser of the *guided* teacher's images, R_dm's teacher where guidance is absorbed.

A guided sampler feels \\((w - 1)(\mu_c - \mu_u)\\) for a few small steps. Distribution matching follows its teacher to
equilibrium at every noise level, and the equilibrium of the guided score is far sharper than what that sampler draws:
the guided score is not the score of the guided samples. Denoising score matching on the samples learns the one that
is (arXiv 1905.07088's theorem; to use it for this is ours).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import reduce

from .fake_score import FakeScore


# Draws of an update, over all processes: images at noise levels.
BATCH = 64
# Decay, per update, of the average of the weights, which is what is judged and kept.
DECAY = 0.98
# Updates between two looks at the held-out images. The end is where the last looks gained no more than a share of all
# that was gained: the rest of the way costs as much as the way.
EVERY = 20
PATIENCE = 3
SHARE = 0.05
# Draws of a look, at least: each held-out image at as many levels as that takes.
JUDGED = 512
SEED = 0


@dataclass
class Draws:
    """
    Images to denoise.

    Args:
        rows (B,): which images.
        fractions (B,): noise levels in [0, 1).
        noise (B, ...): one Gaussian draw for each.
    """

    rows: torch.Tensor
    fractions: torch.Tensor
    noise: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def own(self, size: int) -> list["Draws"]:
        """This process's share of the draws, in nearly equal parts of at most `size`, and as many as any other's."""
        state = PartialState()
        own = [value[state.process_index :: state.num_processes] for value in (self.rows, self.fractions, self.noise)]
        count = -(-len(self) // (state.num_processes * size))
        return [Draws(*parts) for parts in zip(*(value.tensor_split(count) for value in own), strict=True)]


def split_images(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that the target learns, and the last tenth, at least one, that it is judged by."""
    rows = torch.arange(number)
    held_out = max(1, number // 10)
    return rows[:-held_out], rows[-held_out:]


def draw(rows: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Draws:
    """One draw for each of `rows` (B,), whose levels are one from each of B equal parts of the range, shuffled."""
    number = len(rows)
    fractions = (torch.randperm(number, generator=generator) + torch.rand(number, generator=generator)) / number
    return Draws(rows, fractions, torch.randn(number, *shape, generator=generator))


def is_settled(losses: list[float]) -> bool:
    """Whether the last of these held-out losses, the first of which is the beginning's, gained next to nothing."""
    if len(losses) <= PATIENCE:
        return False
    return min(losses[:-PATIENCE]) - min(losses) <= SHARE * (losses[0] - min(losses))


def train_target(
    score: FakeScore,
    loss_at: Callable[[Draws], torch.Tensor],
    num_images: int,
    shape: tuple[int, ...],
    max_updates: int,
    batch_size: int,
    state: dict | None = None,
    save: Callable[[dict], None] = lambda state: None,
    progress: Callable[[int, float], None] = lambda update, loss: None,
) -> tuple[int, list[float]]:
    """
    Trains the target by denoising until the average of its weights denoises held-out images hardly better any more,
    and leaves it as that average was at its best. What is drawn depends on none of the global generators and, where
    64 can be divided by it, not on the number of processes.

    Args:
        score (`FakeScore`): with the target's parameters, which are trainable only here.
        loss_at (`Callable`): the denoising loss, averaged over some draws.
        num_images (`int`): of the teacher, at least 2.
        shape (`tuple[int]`): of one image's latents.
        max_updates (`int`): the most updates.
        batch_size (`int`): draws that a process denoises at once.
        state (`dict`, *optional*): what `save` was last given; the training goes on from there.
        save (`Callable`, *optional*): given all that a later call needs to go on, at each look.
        progress (`Callable`, *optional*): told at first and after each update of their number and the last held-out
            loss.

    Returns:
        The number of updates of this call, and the held-out loss before the first of all and at each look after that.
    """
    generator = torch.Generator().manual_seed(SEED)
    trained, held_out = split_images(num_images)
    judged = draw(held_out.repeat(-(-JUDGED // len(held_out))), shape, generator)
    per_update = -(-BATCH // PartialState().num_processes) * PartialState().num_processes

    parameters = score.parameters
    start, average, best = ([parameter.detach().clone() for parameter in parameters] for _ in range(3))

    @torch.no_grad()
    def look() -> float:
        live = [parameter.clone() for parameter in parameters]
        torch._foreach_copy_(parameters, average)
        total = torch.stack([loss_at(part) * len(part) for part in judged.own(batch_size)]).sum()
        torch._foreach_copy_(parameters, live)
        return reduce(total, "sum").item() / len(judged)

    for parameter in parameters:
        parameter.requires_grad_(True)
    left = start  # where this is interrupted
    try:
        if state is None:
            first, history = 0, [look()]
        else:
            first, history = state["update"], state["history"]
            for values, saved in zip((parameters, average, best), state["weights"], strict=True):
                with torch.no_grad():
                    torch._foreach_copy_(values, saved)
            score.load_state_dict(state["score"])
            generator.set_state(state["generator"])
        update = first
        progress(update, history[-1])
        while update < max_updates and not is_settled(history):
            update += 1
            chosen = trained[torch.randint(len(trained), (per_update,), generator=generator)]
            score.update(loss_at, [(part,) for part in draw(chosen, shape, generator).own(batch_size)])
            with torch.no_grad():  # what the weights began with is soon forgotten
                torch._foreach_lerp_(average, parameters, 1 - min(DECAY, (1 + update) / (10 + update)))
            if update % EVERY == 0 or update == max_updates:
                history.append(look())
                if history[-1] == min(history):
                    torch._foreach_copy_(best, average)
                weights = [[value.detach().cpu() for value in values] for values in (parameters, average, best)]
                state = {"update": update, "history": history, "weights": weights, "score": score.state_dict()}
                save({**state, "generator": generator.get_state()})
            progress(update, history[-1])
        left = best
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
        torch._foreach_copy_(parameters, left)
    return update - first, history
