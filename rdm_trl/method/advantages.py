# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""From rewards to what the student is told: GRPO's group advantages, and the mixing with distribution matching."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .._trl import nanstd


@dataclass
class Feedback:
    """
    What one rollout says to the student.

    Args:
        direction (B, ...): where x0 of the exit step should go: distribution matching and differentiable rewards.
        advantage (B,): of the transition behind the exit step: all black-box rewards.
    """

    direction: torch.Tensor
    advantage: torch.Tensor


def group_advantages(
    rewards: torch.Tensor, weights: torch.Tensor, num_generations: int, scale: str, aggregation: str
) -> torch.Tensor:
    """
    GRPO's advantages (B,) of `rewards` (B, M) of all processes; NaN is "not scored" and does not count.

    Args:
        weights (M,): of the rewards.
        num_generations (`int`): images a prompt; the images of a prompt are neighbours.
        scale (`str`): `"group"` or `"batch"` divides by that standard deviation (plus 1e-4), `"none"` does not.
        aggregation (`str`): `"sum_then_normalize"` normalises the weighted sum; `"normalize_then_sum"` (GDPO, arXiv
            2601.05242) each reward by its group, then the weighted sum by its batch, whatever `scale` says.
    """
    if aggregation == "normalize_then_sum":
        total = (normalize_rewards(rewards, num_generations, "group") * weights).nansum(1)
        total[rewards.isnan().all(1)] = torch.nan
        return ((total - total.nanmean()) / (nanstd(total) + 1e-4)).nan_to_num()
    total = (rewards * weights).nansum(1)
    total[rewards.isnan().all(1)] = torch.nan
    return normalize_rewards(total[:, None], num_generations, scale).squeeze(1).nan_to_num()


def normalize_rewards(rewards: torch.Tensor, num_generations: int, scale: str) -> torch.Tensor:
    """Each column of `rewards` (B, M) less its group's mean, divided as `scale` says; NaN stays NaN."""
    groups = rewards.view(-1, num_generations, rewards.shape[1])
    centered = groups - groups.nanmean(1, keepdim=True)
    if scale == "group":
        centered = centered / (nanstd(groups, dim=1, keepdim=True) + 1e-4)
    elif scale == "batch":
        centered = centered / (nanstd(rewards, dim=0) + 1e-4)
    return centered.view_as(rewards)


class Mixer:
    r"""
    Mixes distribution matching with rewards into one [`Feedback`].

    A push is what moves x0: for distribution matching and differentiable rewards a field (B, ...); for a black-box
    reward with advantage A its policy gradient, \\(A \frac{a}{b} z\\) with the re-noising draw z (see `policy`), whose
    root mean square is known without z.

    - `"sum"` (DMDR, arXiv 2511.13649): `dm_weight * dm + sum_m weight_m * push_m`.
    - `"adaptive"` (GNDMR, our reconstruction): every push is first scaled to the root mean square of distribution
      matching's, both running averages for each exit step over all processes. A weight is then a share: 0.5 pushes
      half as hard as distribution matching, whatever the reward's units, the model or the noise level.
    - `"constrained"` (ours): as adaptive, but distribution matching's weight is a multiplier that rises while the
      running estimate of the KL divergence to the teacher, `-R_dm`, exceeds `target_dm`, and falls while it is below.

    Args:
        mixing (`str`): one of the three.
        weights (M,): of the pushes that are not distribution matching's.
        dm_weight (`float`): of distribution matching; in "constrained" times the sum of the weights, at first.
        num_steps (`int`): the student's.
        target_dm (`float`): the budget of "constrained", in the units of `rewards/distribution_matching/mean`.
        multiplier_rate (`float`): the log of the multiplier moves by it times the relative excess, an update.
    """

    DECAY = 0.95
    KL_DECAY = 0.9  # the multiplier needs a younger estimate than the scales
    MULTIPLIER_RANGE = (1e-2, 1e2)

    def __init__(
        self,
        mixing: str,
        weights: torch.Tensor,
        dm_weight: float,
        num_steps: int,
        target_dm: float | None = None,
        multiplier_rate: float = 0.1,
    ):
        self.mixing, self.weights, self.target_dm, self.multiplier_rate = mixing, weights, target_dm, multiplier_rate
        self.state = {
            "mean_squares": torch.zeros(1 + len(weights), num_steps),  # of distribution matching, then the rewards
            "mass": torch.zeros(1 + len(weights), num_steps),
            "kl": torch.zeros(()),
            "kl_mass": torch.zeros(()),
            "multiplier": torch.tensor(float(dm_weight)),
        }
        if mixing == "constrained" and len(weights):
            # Within the budget at first, or the rewards carry the student off before the multiplier has grown.
            self.state["multiplier"] *= weights.abs().sum().clamp(min=1.0)

    def __call__(
        self,
        dm: torch.Tensor,
        pushes: list[torch.Tensor],
        transition_scale: torch.Tensor,
        exit_steps: torch.Tensor,
        dm_reward: torch.Tensor,
        reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    ) -> Feedback:
        """
        Args:
            dm (B, ...): distribution matching's normalised direction.
            pushes (`list`): M fields (B, ...) of differentiable rewards or advantages (B,) of black boxes.
            transition_scale (B,): `a / b` of the transition behind the exit step, 0 behind the last.
            exit_steps (B,): in `0 ... num_steps - 1`.
            dm_reward (B,): the scalar estimate of R_dm.
            reduce (`Callable`): sums a tensor over the processes.
        """
        squares = [dm.square().flatten(1).mean(1)]
        for push in pushes:
            squares.append((push * transition_scale).square() if push.ndim == 1 else push.square().flatten(1).mean(1))
        self._observe(torch.stack(squares), exit_steps, dm_reward, reduce)
        factors = self.factors().to(dm)[:, exit_steps]  # (1 + M, B)
        direction = factors[0].view(-1, *(1,) * (dm.ndim - 1)) * dm
        advantage = torch.zeros(len(dm), device=dm.device)
        for push, factor in zip(pushes, factors[1:], strict=True):
            if push.ndim == 1:
                advantage = advantage + factor * push
            else:
                direction = direction + factor.view(-1, *(1,) * (dm.ndim - 1)) * push
        return Feedback(direction, advantage)

    def factors(self) -> torch.Tensor:
        """What distribution matching (first) and each push are multiplied by at each exit step: (1 + M, K)."""
        num_steps = self.state["mean_squares"].shape[1]
        weights = self.weights[:, None].expand(-1, num_steps)
        if self.mixing != "sum":
            rms = (self.state["mean_squares"] / self.state["mass"].clamp(min=1e-12)).sqrt()
            # Nothing to scale where a reward does not push: its groups have no spread, or no transition follows.
            weights = torch.where(rms[1:] > 1e-12, weights * rms[0] / rms[1:].clamp(min=1e-12), 0.0)
        return torch.cat([self.state["multiplier"].expand(1, num_steps), weights])

    def load_state(self, state: dict[str, torch.Tensor]):
        """
        Goes on from the `state` of a checkpoint.

        Raises:
            ValueError: it mixed another number of rewards or steps.
        """
        if state["mass"].shape != self.state["mass"].shape:
            (old, old_steps), (new, new_steps) = state["mass"].shape, self.state["mass"].shape
            raise ValueError(
                f"The checkpoint mixed {old - 1} rewards over {old_steps} steps, this run has {new - 1} rewards and "
                f"{new_steps} steps: resume with the checkpoint's own `reward_funcs` and `sample_num_steps`."
            )
        self.state = state

    @property
    def kl(self) -> float:
        """Running mean of -R_dm, never below 0."""
        return max((self.state["kl"] / self.state["kl_mass"].clamp(min=1e-12)).item(), 0.0)

    def _observe(self, squares: torch.Tensor, exit_steps: torch.Tensor, dm_reward: torch.Tensor, reduce: Callable):
        num_rows, num_steps = self.state["mean_squares"].shape
        sums = torch.zeros(num_rows + 1, num_steps, device=squares.device)
        rows = torch.cat([squares.float(), torch.ones_like(squares[:1])])
        sums = reduce(sums.index_add(1, exit_steps, rows)).cpu()
        counts = sums[-1]
        keep = torch.where(counts > 0, self.DECAY, 1.0)  # an exit step that was not drawn keeps its average
        means = sums[:-1] / counts.clamp(min=1)
        self.state["mean_squares"] = keep * self.state["mean_squares"] + (1 - keep) * means
        self.state["mass"] = keep * self.state["mass"] + (1 - keep)
        total = reduce(torch.stack([-dm_reward.sum(), dm_reward.new_tensor(len(dm_reward))])).cpu()
        self.state["kl"] = self.KL_DECAY * self.state["kl"] + (1 - self.KL_DECAY) * total[0] / total[1]
        self.state["kl_mass"] = self.KL_DECAY * self.state["kl_mass"] + (1 - self.KL_DECAY)
        if self.mixing == "constrained":
            excess = min(self.kl / self.target_dm - 1, 1.0)
            step = torch.tensor(self.multiplier_rate * excess).exp()
            self.state["multiplier"] = (self.state["multiplier"] * step).clamp(*self.MULTIPLIER_RANGE)
