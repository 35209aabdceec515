# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, reduce
from transformers.utils import logging

from .._trl import nanstd
from ..config import RdmDistillConfig
from ..method import matching, policy
from ..method.advantages import Feedback, Mixer, group_advantages, normalize_rewards
from ..method.diffusion import NoiseProcess
from ..method.experience import Experience
from ..method.policy import Rollout
from . import RewardFunction, Scorer, check_clips, is_differentiable, reward_gradient


logger = logging.get_logger(__name__)

# All differentiable rewards' together by default; with 1 and more there is no point of rest (docs/method.md).
GRADIENT_SHARE = 0.3


def over_processes(function: Callable, values: torch.Tensor) -> torch.Tensor:
    """`function` of the rows (B, ...) of all processes; this process's rows of its result."""
    start = PartialState().process_index * len(values)
    return function(gather(values))[start : start + len(values)]


def distribution_matching_push(
    probe: matching.Probe, experience: Experience, process: NoiseProcess, config: RdmDistillConfig
) -> torch.Tensor:
    """R_dm's push on x0 (B, ...): its normalised direction, or by the policy gradient of its scalar estimate."""
    if config.dm_estimator == "policy_gradient":

        def advantages(rewards):
            return normalize_rewards(rewards, config.num_generations, config.scale_rewards)

        advantage = over_processes(advantages, probe.reward[:, None]).squeeze(1)
        return policy.score_direction(advantage, experience.noise, experience.timesteps, process)
    if config.dm_centering == "group":
        probe = matching.center(probe, config.num_generations)
    if config.dm_normalization == "batch":
        probe = replace(probe, distance=reduce(probe.distance.mean(0, keepdim=True), "mean"))
    level = config.dm_normalization_level
    return matching.normalize(probe, config.dm_normalization, config.num_generations, level)


class RewardPanel:
    """
    All rewards of a run: black boxes, which judge final images and act by the policy gradient, and differentiable
    ones, which judge the images of the exit step and act directly.

    Args:
        functions (`list`): the rewards.
        config (`RdmDistillConfig`): its reward options.
        differentiate (`bool`): whether those that declare themselves differentiable are differentiated.
        videos (`bool`): whether it is videos that are judged.

    Raises:
        ValueError: the number of weights is not that of rewards, two rewards have one name, a black box has no group
            to compare an image with, or images are to be judged as videos.
    """

    def __init__(
        self,
        functions: list[RewardFunction],
        config: RdmDistillConfig,
        differentiate: bool = True,
        videos: bool = False,
    ):
        self.functions, self.config, self.frame_stride = functions, config, config.reward_frame_stride or 1
        check_clips(functions, videos, config.reward_frame_stride)
        self.score = Scorer(functions, config.reward_timeout, self.frame_stride)
        self.names = self.score.names
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"Two rewards have the same name: {', '.join(self.names)}. Set their `__name__`.")
        differentiate = differentiate and config.reward_gradients
        direct = [differentiate and is_differentiable(function) for function in functions]
        # A gradient's push is all signal, a black box's for the most part noise.
        share = GRADIENT_SHARE / max(sum(direct), 1) if config.reward_mixing == "adaptive" else 1.0
        weights = [share if is_direct else 1.0 for is_direct in direct]
        self.weights = weights = config.reward_weights if config.reward_weights is not None else weights
        if len(weights) != len(functions):
            raise ValueError(f"`reward_weights` has {len(weights)} values for {len(functions)} reward functions.")
        shares = sum(abs(weight) for weight, is_direct in zip(weights, direct, strict=True) if is_direct)
        if config.reward_mixing == "adaptive" and shares >= config.dm_weight > 0:
            logger.warning_once(
                f"The shares of differentiable rewards add up to {shares:g}. From {config.dm_weight:g} on, what "
                "matches the teacher cannot push back as hard as they push: the student leaves it as long as it is "
                "trained. Lower `reward_weights`, train for less long, or take `reward_mixing='constrained'`."
            )
        self.differentiable = [i for i, is_direct in enumerate(direct) if is_direct]
        self.black_boxes = [i for i, is_direct in enumerate(direct) if not is_direct]
        black_boxes = [functions[i] for i in self.black_boxes]
        self.score_black_boxes = Scorer(black_boxes, config.reward_timeout, self.frame_stride)
        if self.black_boxes and config.num_generations < 2:
            raise ValueError(
                f"The reward {self.names[self.black_boxes[0]]!r} is compared between the images of a prompt: "
                "`num_generations` must be at least 2."
            )
        # The sum makes one advantage of all black boxes with GRPO's formulas, which leave it at unit spread whatever
        # the weights: it gets their total weight back. The other mixings weigh each reward.
        as_one = config.reward_mixing == "sum" and bool(self.black_boxes)
        separate = self.differentiable if as_one else [*self.black_boxes, *self.differentiable]
        self.push_names = ["black_boxes"] * as_one + [self.names[i] for i in separate]
        pushes = [sum(abs(weights[i]) for i in self.black_boxes)] * as_one + [weights[i] for i in separate]
        if config.adversarial_weight:  # the trainer's own, behind all that `ask` gives
            if "adversarial" in self.names:
                raise ValueError("A reward is named 'adversarial', as the discriminator's is. Set its `__name__`.")
            self.push_names, pushes = [*self.push_names, "adversarial"], [*pushes, config.adversarial_weight]
        self.mixer = Mixer(
            config.reward_mixing,
            torch.tensor(pushes),
            config.dm_weight,
            config.sample_num_steps,
            config.target_dm,
        )
        self.state_dict()  # what cannot be saved is named now

    def state_dict(self) -> dict[str, Any]:
        """
        State of this process's rewards that have a `state_dict` and a `load_state_dict`, by name.

        Raises:
            TypeError: such a state holds more than tensors and plain values; names the reward.
        """
        stateful = {n: f for n, f in zip(self.names, self.functions, strict=True) if hasattr(f, "load_state_dict")}
        states = {name: function.state_dict() for name, function in stateful.items()}
        for name, state in states.items():
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            try:
                torch.load(file, weights_only=True)
            except pickle.UnpicklingError as error:
                raise TypeError(
                    f"The `state_dict` of the reward {name!r} must hold tensors and plain values only: nothing else "
                    "is loaded from a checkpoint."
                ) from error
        return states

    def load_state_dict(self, states: dict[str, Any], strict: bool = True):
        """Goes on from `states`. Raises `ValueError` if `strict` and they are not of the same rewards."""
        stateful = self.state_dict().keys()
        if strict and stateful != states.keys():
            raise ValueError(
                f"The checkpoint holds the state of the rewards {sorted(states)}, but those with a state are "
                f"{sorted(stateful)}."
            )
        for name, function in zip(self.names, self.functions, strict=True):
            if name in stateful and name in states:
                function.load_state_dict(states[name])

    def ask(
        self, answers: Callable | None, x0: torch.Tensor, decode: Callable, prompts: list[str], metadata: list[Any]
    ) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, Any]]:
        """
        Args:
            answers (`Callable`): what `score_black_boxes.start` gave for the final images; `None` without black boxes.
            x0 (B, ...): latents of the exit steps, which the differentiable rewards see through `decode`.

        Returns:
            Rewards (B, M), NaN where not scored; the pushes that `Mixer` takes; the black boxes' metadata by name.
        """
        config, weights = self.config, torch.tensor(self.weights, device=x0.device)
        rewards = torch.full((len(prompts), len(self.functions)), torch.nan, device=x0.device)
        pushes, reward_metadata = [], {}
        if self.black_boxes:
            rewards[:, self.black_boxes], reward_metadata = answers()

            def advantages(rewards):
                if config.reward_mixing != "sum":
                    return normalize_rewards(rewards, config.num_generations, config.scale_rewards).nan_to_num()
                return group_advantages(
                    rewards,
                    weights[self.black_boxes],
                    config.num_generations,
                    config.scale_rewards,
                    config.multi_objective_aggregation,
                )[:, None]

            pushes += over_processes(advantages, rewards[:, self.black_boxes]).unbind(1)
        for i in self.differentiable:
            function, stride = self.functions[i], self.frame_stride
            rewards[:, i], push = reward_gradient(function, decode, x0, prompts, metadata, stride)
            pushes.append(push)
        return rewards, pushes, reward_metadata

    def mix(
        self,
        dm: torch.Tensor,
        pushes: list,
        rollout: Rollout,
        process: NoiseProcess,
        dm_reward,
        adversarial: torch.Tensor | None = None,
    ) -> Feedback:
        """
        Distribution matching's direction `dm` (B, ...), the rewards' pushes and the discriminator's as one feedback;
        see `Mixer`. The last acts at all steps, at the noise levels where R_dm matches their images.
        """
        if self.config.reward_gradient_steps is not None:
            late = rollout.exit_steps >= len(rollout.timesteps) - self.config.reward_gradient_steps
            late = late.view(-1, *(1,) * (dm.ndim - 1))
            pushes = [push if push.ndim == 1 else push * late for push in pushes]
        pushes = pushes if adversarial is None else [*pushes, adversarial]
        scale = rollout.transition_scale(process)
        return self.mixer(dm, pushes, scale, rollout.exit_steps, dm_reward, lambda sums: reduce(sums, "sum"))

    def figures(self, rewards: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is logged of the rewards (B, M) of all processes; warns where one says nothing."""
        figures, zero_std = {}, []
        for i, name in enumerate(self.names):
            figures[f"rewards/{name}/mean"] = rewards[:, i].nanmean()
            figures[f"rewards/{name}/std"] = nanstd(rewards[:, i])
            if i in self.black_boxes:
                spread = nanstd(rewards[:, i].view(-1, self.config.num_generations), dim=1).nan_to_num()
                zero_std.append((spread < 1e-8).float().mean())
                if zero_std[-1] == 1:
                    logger.warning_once(
                        f"The reward {name!r} does not tell the images of a prompt apart: where that is so, it has no "
                        "effect."
                    )
        if zero_std:
            figures["frac_reward_zero_std"] = torch.stack(zero_std).mean()
        total = (rewards * rewards.new_tensor(self.weights)).nansum(1)
        figures["reward"] = total.mean()
        if self.config.num_generations > 1:
            figures["reward_std"] = total.view(-1, self.config.num_generations).std(1).mean()
        return figures

    def mixing_figures(self) -> dict[str, torch.Tensor]:
        """What is logged of the mixing: distribution matching's weight and KL estimate, each reward's weight."""
        factors = self.mixer.factors().mean(1)
        weights = {f"reward_weight/{name}": w for name, w in zip(self.push_names, factors[1:], strict=True)}
        return {"dm/multiplier": factors[0], "dm/kl": self.mixer.kl, **weights}
