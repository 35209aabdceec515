# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What learns beside the student by denoising: its fake score, and the learned part of R_dm's teacher."""

from collections import defaultdict
from collections.abc import Callable

import torch

from .method import losses, matching
from .optimizers import make_score


ROLE = "target"


def add_noise_to(trainer, batches: list[tuple]) -> list[tuple]:
    """`(x0, condition, timesteps, noise)` for each of the student's `(x0, condition, seen, prompts)`, above `seen`."""
    noisy = []
    for x0, condition, seen, _ in batches:
        groups = len(x0) // trainer.args.num_generations, trainer.args.num_generations
        fractions = matching.draw_fractions(*groups, "stratified", seen, 1.0)
        noisy.append((x0, condition, trainer.process.timesteps_at(fractions).to(x0.device), torch.randn_like(x0)))
    return noisy


def denoising_loss_of(trainer, role: str) -> Callable:
    """Loss of `role` at images `x0` (B, ...) with `noise` at `timesteps` (B,), in the network's parameterisation."""

    def loss(x0, condition, timesteps, noise):
        with trainer.accelerator.autocast():
            x_t = trainer.process.add_noise(x0, noise, timesteps)
            output = trainer.family.denoise(lambda *a, **k: trainer.model(role, *a, **k), x_t, timesteps, condition)
            return losses.denoising_loss(output, trainer.process.target(x0, noise, timesteps))

    return loss


class LearnedTarget:
    """
    An adapter that learns the guided teacher's images in step with the fake score, which learns the student's: as many
    updates, images of the same prompts, levels, noise, the same rate. Where the student is at its teacher both have
    learned the same, so that their difference is 0 however much that is; and what chance each update brings is mostly
    the same. The network by itself keeps what a fake score unlearns. Ours.

    Args:
        trainer (`RdmDistillTrainer`): with the role `target`.
    """

    def __init__(self, trainer):
        self.trainer, self.score, self.latents, self.prompts, self.rows = trainer, None, None, None, None

    def create_score(self):
        """The fake score's optimizer and schedule."""
        self.score = make_score(self.trainer, self.trainer.model.adapter_parameters(ROLE), "learned target")

    def begin(self, latents: torch.Tensor, prompts: list[str]):
        """From now on it learns `latents` (N, ...) of `prompts`."""
        self.latents, self.prompts, self.rows = latents, prompts, defaultdict(list)
        for row, prompt in enumerate(prompts):
            self.rows[prompt].append(row)

    def choose(self, prompts: list[str]) -> list[int]:
        """An image of each prompt, or of any where the teacher drew none of it."""
        found = [self.rows.get(prompt, range(len(self.prompts))) for prompt in prompts]
        return [rows[int(torch.randint(len(rows), ()))] for rows in found]

    def update(self, prompts: list[list[str]], noisy: list[tuple]) -> dict[str, torch.Tensor]:
        """One update on the teacher's images of `prompts`, with levels and noise of `noisy`, the fake score's own."""
        own = []
        for chosen, (x0, _, timesteps, noise) in zip(prompts, noisy, strict=True):
            rows = self.choose(chosen)
            condition = self.trainer.encode([self.prompts[row] for row in rows])
            own.append((self.latents[rows].to(x0), condition, timesteps, noise))
        return {"loss/target": self.score.update(denoising_loss_of(self.trainer, ROLE), own)}

    def predict(self, found: torch.Tensor, x_t: torch.Tensor, timesteps, condition) -> torch.Tensor:
        """The fitted target's prediction `found` (B, ...), what differs within a group in place of its own."""
        trainer = self.trainer
        learned = trainer.predict_x0(trainer.model, ROLE, x_t, timesteps, condition)
        return learned + matching.group_mean(found - learned, trainer.args.num_generations)
