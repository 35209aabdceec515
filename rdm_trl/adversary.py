# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The discriminator of a run: real images, a head on the fake score's features, and what trains it."""

from typing import Any

import torch

from .method import adversarial
from .models import sharding
from .optimizers import make_score
from .real_images import RealImages


# Learning rate of the head in units of the fake score's: that one begins as the teacher, the head knows nothing.
RATE = 4.0


class Adversary:
    """
    Learns, in the fake score's updates and on the same batches, to tell the student's images from real ones; and tells
    the student where its images look less real.

    Only the head is trained. The fake score keeps to denoising, unlike DMD2's: it is what R_dm is made of, and a
    gradient of another aim would make it the score of no distribution.

    Args:
        trainer (`RdmDistillTrainer`): on its device, with its model.

    Raises:
        ValueError: as [`real_images.load_images`], or the denoiser has no features that see the image.
    """

    def __init__(self, trainer):
        self.trainer, self.images = trainer, RealImages(trainer)
        self.blocks = adversarial.feature_blocks(trainer.model.network("fake"))
        family, device = trainer.family, trainer.accelerator.device
        prompt = "" if self.images.captions is None else self.images.captions[0]
        x_t, timesteps = torch.zeros(1, *family.latent_shape, device=device), trainer.student_timesteps[:1]
        self.blocks, widths = adversarial.blocks_that_see(
            self.blocks, lambda x_t: self.features(x_t, timesteps, trainer.encode([prompt])), x_t
        )
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(trainer.args.seed)  # equal on all processes
            self.head = adversarial.Head(widths)
        self.head.to(device)
        self.score = None

    @property
    def learning_rate(self) -> float:
        return RATE * self.trainer.args.fake_learning_rate

    def create_score(self):
        """The fake score's optimizer and schedule, at `RATE` times its learning rate."""
        self.score = make_score(self.trainer, list(self.head.parameters()), "discriminator", RATE)

    def features(self, x_t: torch.Tensor, timesteps: torch.Tensor, condition: dict[str, torch.Tensor]) -> list:
        """What the fake score's blocks make of `x_t` (B, ...), not by a compiled denoiser: hooks would break it."""
        trainer, denoiser = self.trainer, self.trainer.model.denoiser
        # A block that is to be computed again for its gradient has to come to its own end, and in shards the denoiser
        # to its: there the gathered weights are given back.
        again = trainer.args.activation_checkpointing and torch.is_grad_enabled()
        stop = not (again or trainer.model.sharded)
        look = adversarial.capture(self.blocks, stop)
        with trainer.model.use("fake"), trainer.accelerator.autocast(), look as found:
            trainer.family.denoise(
                lambda *args, **kwargs: denoiser(*args, **kwargs, return_dict=False)[0], x_t, timesteps, condition
            )
        return found

    def condition_of(self, condition: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
        """
        The prompts that the student's images are looked at with: their own, or none where the real ones have none,
        or the two sides would be told apart by them.
        """
        return condition if self.images.captions is not None else self.trainer.encode([""] * number)

    def update(self, batches: list[tuple]) -> dict[str, torch.Tensor]:
        """One update of the head on the student's `(x0, condition, seen, prompts)`; returns what is logged."""
        process, odds = self.trainer.process, []

        def loss(x0, condition, seen, _):
            number, device = len(x0), x0.device
            real, captions = self.images.draw(number)
            real, noise = real.to(device), torch.randn(2 * number, *x0.shape[1:], device=device)
            # One pass for all: real images, the same with the same noise a small step aside, the student's.
            moved = real + adversarial.R1_STEP * torch.randn_like(real)
            timesteps = process.timesteps_at(seen + (1 - seen) * torch.rand(number)).to(device).repeat(3)
            noise = torch.cat([noise[:number], noise])
            own, theirs = self.condition_of(condition, number), self.trainer.encode(captions or [""] * number)
            together = {key: torch.cat([theirs[key], theirs[key], value]) for key, value in own.items()}
            with torch.no_grad():
                x_t = process.add_noise(torch.cat([real, moved, x0]), noise, timesteps)
                features = self.features(x_t, timesteps, together)
            real, moved, fake = self.head(features).chunk(3)
            odds.append((real.detach(), fake.detach()))
            return adversarial.discriminator_loss(real, fake, moved)

        value = self.score.update(loss, batches)
        real, fake = (torch.cat(side) for side in zip(*odds, strict=True))
        return {"loss/discriminator": value, **adversarial.figures(real, fake)}

    def push(self, x0: torch.Tensor, noise, timesteps, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Where `x0` (B, ...) would look more real, as a push (B, ...), at the draw of R_dm's probe. Raises
        `FloatingPointError` where that is not finite.
        """
        process, roles, condition = self.trainer.process, self.trainer.model, self.condition_of(condition, len(x0))

        def log_odds(x0):
            features = self.features(process.add_noise(x0, noise, timesteps), timesteps, condition)
            if roles.sharded:
                sharding.gather_outer_weights(roles)
            return self.head(features)

        push = adversarial.log_odds_gradient(log_odds, x0)
        self.trainer._check_finite("discriminator's gradient", push.flatten(1).abs().sum(1))
        return push

    def state_dict(self) -> dict[str, Any]:
        return {"head": self.head.state_dict(), **self.score.state_dict()}

    def load_state_dict(self, state: dict[str, Any]):
        self.head.load_state_dict(state["head"])
        self.score.load_state_dict(state)
