# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The discriminator on a mixture of Gaussians, on features of networks, and in whole runs."""

import copy

import pytest
import torch
from conftest import load_script, logs_of, make_config, make_tiny_pipeline, make_trainer, redness
from datasets import Dataset, DatasetDict
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import CASES, make, make_family_trainer
from torch import nn

from rdm_trl import RdmDistillTrainer, real_images
from rdm_trl.guardrails import drift_warnings
from rdm_trl.method import adversarial, losses, matching
from rdm_trl.method.advantages import Mixer
from rdm_trl.method.diffusion import NoiseProcess
from rdm_trl.models.pipelines import family_of


# ------------------------------------------------------------------------------------------------------ pure functions


class TinyDenoiser(nn.Module):
    """Of points (B, 2), with a middle whose features the head sees."""

    def __init__(self):
        super().__init__()
        self.mid_block = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.last = nn.Linear(64, 2)

    def forward(self, x_t, timesteps):
        return self.last(self.mid_block(torch.cat([x_t, timesteps[:, None] / 1000], 1)))


CENTRE, STD = torch.tensor([2.0, 0.0]), 0.3


def share_of_the_missing_mode(weight: float, updates: int = 600, number: int = 128) -> float:
    """Where a one-step student draws whose teacher knows the mode at +2 alone, and the data one at -2 too."""
    torch.manual_seed(0)
    process = NoiseProcess(FlowMatchEulerDiscreteScheduler())
    fake, head = TinyDenoiser(), adversarial.Head([64])
    student = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizers = [torch.optim.Adam(m.parameters(), lr=lr) for m, lr in ((student, 1e-3), (fake, 3e-3), (head, 3e-3))]
    mixer = Mixer("adaptive", torch.tensor([weight] if weight else []), 1.0, 1)
    one, zero = torch.ones(number), torch.zeros(number, dtype=torch.long)

    def data(number: int) -> torch.Tensor:
        side = torch.where(torch.rand(number, 1) < 0.5, 1.0, -1.0)
        return side * CENTRE + STD * torch.randn(number, 2)

    def teacher(x_t, timesteps):
        a, b = process.coefficients(timesteps, x_t)
        return CENTRE + a * STD**2 / (a**2 * STD**2 + b**2) * (x_t - a * CENTRE)

    def log_odds(x_t, timesteps):
        with adversarial.capture(adversarial.feature_blocks(fake)) as features:
            fake(x_t, timesteps)
        return head(features)

    def times() -> torch.Tensor:
        return process.timesteps_at(0.02 + 0.96 * torch.rand(number))

    def step(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for update in range(updates):
        x0 = student(2.5 * torch.randn(number, 2))
        t, noise = times(), torch.randn(number, 2)
        probe = matching.probe(teacher, fake, process, x0.detach(), noise, t)
        pushes = []
        if weight:
            pushes = [
                adversarial.log_odds_gradient(lambda x, n=noise, t=t: log_odds(process.add_noise(x, n, t), t), x0)
            ]
        dm = matching.normalize(probe, "batch", 1)
        feedback = mixer(dm, pushes, torch.zeros(number), zero, probe.reward)
        if update >= 100:  # fake score and head first
            step(optimizers[0], losses.student_loss(x0, feedback.direction) * 2)
        x0, t, noise = x0.detach(), times(), torch.randn(number, 2)
        step(optimizers[1], losses.denoising_loss(fake(process.add_noise(x0, noise, t), t), x0))
        if weight:
            real = data(number)
            sides = [real, real + adversarial.R1_STEP * torch.randn_like(real), x0]
            with torch.no_grad(), adversarial.capture([fake.mid_block]) as features:
                fake(process.add_noise(torch.cat(sides), noise.repeat(3, 1), t.repeat(3)), t.repeat(3))
            real, moved, drawn = head(features).chunk(3)
            step(optimizers[2], adversarial.discriminator_loss(real, drawn, moved))
    with torch.no_grad():
        drawn = student(2.5 * torch.randn(4000, 2))
    near = [((drawn - side * CENTRE).norm(dim=1) < 4 * STD).float().mean().item() for side in (1, -1)]
    print(weight, near, drawn.mean(0), drawn.std(0))
    return near[1]
