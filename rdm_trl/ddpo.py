# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Rewards, rollouts and their loss in the form that subclasses of TRL's former `DDPOTrainer` work with."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .method import policy
from .method.experience import Experience
from .prompts import split_rows


def of_one(names: list[str], rewards: torch.Tensor, metadata: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """Rewards (B, M) and metadata by name as they are, or for one reward function, as in DDPO, (B,) and its own."""
    return (rewards[:, 0], metadata.get(names[0], {})) if len(names) == 1 else (rewards, metadata)


def compute_rewards(trainer, pairs: list, is_async: bool) -> Iterator[tuple]:
    """`RdmDistillTrainer.compute_rewards`, which see."""

    def score(pair):
        return of_one(trainer.rewards.names, *trainer.rewards.score(*pair))

    if is_async:
        with ThreadPoolExecutor() as executor:
            return zip(*executor.map(score, pairs), strict=True)
    return zip(*map(score, pairs), strict=True)


def scores_of(trainer, images: torch.Tensor, prompts: list[str], metadata: list[Any]) -> tuple[torch.Tensor, Any]:
    """
    Rewards (B, M) of a batch and their metadata, as `trainer.compute_rewards` has them, a subclass's own or not.

    Raises:
        ValueError: it does not return one row an image and one column a reward function, or what is not finite.
    """
    (rewards,), (details,) = trainer.compute_rewards([[images, [*map(str, prompts)], metadata]])
    rewards = torch.as_tensor(rewards, dtype=torch.float32, device=images.device)
    rewards = rewards[:, None] if rewards.ndim == 1 else rewards
    shape = len(prompts), len(trainer.rewards.functions)
    if rewards.shape != shape or rewards.isinf().any():
        raise ValueError(
            f"`compute_rewards` returned rewards of the shape {tuple(rewards.shape)}, or not finite: they must be "
            f"{shape}, one row an image and one column a reward function."
        )
    return rewards, details


def ask_black_boxes(trainer, images: torch.Tensor, prompts: list[str], metadata: list[Any]) -> Callable:
    """What has to be called for the black boxes' rewards (B, M) and metadata; async functions work until then."""
    if trainer.overrides_rewards:
        rewards, details = scores_of(trainer, images, prompts, metadata)
        names = trainer.rewards.names
        return lambda: (rewards, {names[0]: details} if len(names) == 1 else details)
    return trainer.rewards.score_black_boxes.start(images, prompts, metadata)


@torch.no_grad()
def generate_samples(trainer, iterations: int, batch_size: int) -> tuple[list[dict], list]:
    """`RdmDistillTrainer._generate_samples`, which see."""
    samples, pairs = [], []
    for _ in range(iterations):
        rows = [trainer.train_dataset[i] for i in torch.randint(len(trainer.train_dataset), (batch_size,)).tolist()]
        prompts, metadata = split_rows(rows, trainer.family)
        condition = trainer.encode(prompts)
        last = len(trainer.student_timesteps) - 1
        exit_steps = torch.full((batch_size,), last, device=trainer.accelerator.device)
        with trainer.accelerator.autocast():
            rollout = trainer.rollout(condition, exit_steps, complete=True)
            log_probs = []
            for k in range(last):
                t = trainer.student_timesteps[k].expand(batch_size)
                x0 = trainer.predict_x0(trainer.model, "student", rollout.latents[:, k], t, condition)
                next_t = trainer.student_timesteps[k + 1].expand(batch_size)
                log_probs.append(policy.log_prob(rollout.latents[:, k + 1], x0, next_t, trainer.process))
        negative = trainer.encode_negative([trainer.args.negative_prompts] * batch_size)
        samples.append(
            {
                "prompt_ids": trainer.family.prompt_ids(prompts),
                **condition,
                "timesteps": trainer.student_timesteps[:last].expand(batch_size, -1),
                "latents": rollout.latents[:, :last],
                "next_latents": rollout.latents[:, 1 : last + 1],
                "log_probs": torch.stack(log_probs, 1) if last else torch.zeros(batch_size, 0),
                **{f"negative_{key}": value for key, value in negative.items()},
            }
        )
        pairs.append([trainer.family.decode(rollout.latents[:, -1]), prompts, metadata])
    return samples, pairs


def policy_loss(trainer, latents, timesteps, next_latents, log_probs, advantages, embeds):
    """`RdmDistillTrainer.calculate_loss`, which see."""
    condition = embeds if isinstance(embeds, dict) else {"prompt_embeds": embeds}
    step = (timesteps[:, None] == trainer.student_timesteps).long().argmax(1)
    if (step + 1 >= len(trainer.student_timesteps)).any():
        raise ValueError("The last denoising step is deterministic: it has no log-probability.")
    with trainer.accelerator.autocast():
        x0 = trainer.predict_x0(trainer.model, "student", latents, timesteps, condition)
    log_prob = policy.log_prob(next_latents, x0, trainer.student_timesteps[step + 1], trainer.process)
    ratio, epsilon = torch.exp(log_prob - log_probs), trainer.args.epsilon
    loss = trainer.loss(advantages, epsilon, ratio)
    approx_kl = 0.5 * (log_prob - log_probs).square().mean()
    return loss, approx_kl, ((ratio - 1).abs() > epsilon).float().mean()


def transition_loss(trainer, x0: torch.Tensor, experience: Experience, advantages: torch.Tensor) -> torch.Tensor:
    """
    Policy gradient of the rewards, `advantages` (B,), at the student's `x0` (B, ...), over the images whose exit step
    has a stochastic transition behind it.
    """
    rollout = experience.rollout
    rows = (rollout.exit_steps + 1 < len(rollout.timesteps)).nonzero().squeeze(1)
    if len(rows) == 0:
        return x0.sum() * 0
    following = rollout.exit_steps[rows] + 1
    action, next_timesteps = rollout.latents[rows, following], rollout.timesteps[following]
    log_ratio = policy.log_ratio(action, x0[rows], rollout.x0[rows], next_timesteps, trainer.process)
    ratio = policy.importance_ratio(log_ratio, trainer.args.importance_sampling_level)
    # Counted over the whole batch, as the distribution-matching loss is.
    return trainer.loss(advantages[rows], trainer.args.epsilon, ratio) * len(rows) / len(x0)
