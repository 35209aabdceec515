# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The target against Gaussians, whose denoisers are known, and so what it must be."""

import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from rdm_trl import guidance
from rdm_trl.method import target
from rdm_trl.method.diffusion import NoiseProcess
from rdm_trl.models.pipelines.base import PipelineFamily


SHAPE = (2, 4, 4)
PROCESSES = [DDIMScheduler(), DDIMScheduler(prediction_type="v_prediction"), FlowMatchEulerDiscreteScheduler()]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Guided:
    """
    A teacher that knows images of each prompt, N(mean of the prompt, 1), and of none, N(mean of all, 1); and what its
    guided sampler draws: images around the prompt's mean, moved away from that of all by `weight - 1` times their
    distance, `contrast` times as strong, `std` wide. `leak` of the noisy image is left in its predictions, and `noise`
    of what it invents.
    """

    def __init__(self, scheduler, weight=1.6, std=0.6, contrast=1.0, leak=0.0, noise=0.0):
        self.process, self.std, self.leak, self.noise = NoiseProcess(scheduler), std, leak, noise
        self.means, self.mean = (
            torch.randn(20, *SHAPE, generator=generator(1)),
            torch.randn(SHAPE, generator=generator(2)),
        )
        self.drawn = contrast * (self.means + (weight - 1) * (self.means - self.mean))

    def images(self, prompts, timesteps, seed: int):
        """One image of each prompt, the prediction of it, and guidance."""
        x0, noise, first, second = torch.randn(4, len(prompts), *SHAPE, generator=generator(seed))
        x0 = self.drawn[prompts] + self.std * x0
        x_t = self.process.add_noise(x0, noise, timesteps)
        a, b = self.process.coefficients(timesteps, x_t)
        conditional, unconditional = (
            mean + a / (a**2 + b**2) * (x_t - a * mean) + self.leak * x_t + self.noise * invented
            for mean, invented in ((self.means[prompts], first), (self.mean, second))
        )
        return x0, conditional, conditional - unconditional

    def pairs(self, number: int, seed: int = 3):
        fractions = target.draw_levels(number, generator(seed)) * 0.96 + 0.02
        timesteps, prompts = self.process.timesteps_at(fractions), torch.arange(number) % len(self.means)
        sides = [self.images(prompts, timesteps, seed + side) for side in (1, 2)]
        return *sides, self.process.fractions(timesteps)

    def fit(self, number: int, most: float = 3.0) -> torch.Tensor:
        return target.fit(target.moments(*self.pairs(number)), 0.0, most)

    def common_errors(self, weights: torch.Tensor, fraction: float) -> tuple[float, float]:
        """Mean squares over prompts of the mean of `prediction - x0` at a noise level: the target's, the base's."""
        prompts = torch.arange(len(self.means)).repeat_interleave(1000)
        timesteps = self.process.timesteps_at(torch.full((len(prompts),), fraction))
        x0, conditional, pull = self.images(prompts, timesteps, 7)
        found = target.predict(conditional, pull, self.process.fractions(timesteps), weights)
        errors = ((prediction - x0).unflatten(0, (-1, 1000)).mean(1) for prediction in (found, conditional))
        return tuple(error.square().mean().item() for error in errors)


def least_squares(guided: Guided, number: int) -> torch.Tensor:
    """Weights of least error of single predictions, each knot by the draws next to it."""
    (x0, conditional, pull), _, fractions = guided.pairs(number)
    f, residual = target.features(conditional, pull).flatten(2), (x0 - conditional).flatten(1)
    nearest = target.hats(fractions).argmax(1)
    columns = [
        torch.linalg.lstsq(f[nearest == k].mT.flatten(0, 1), residual[nearest == k].flatten()[:, None]).solution
        for k in range(target.KNOTS)
    ]
    return torch.cat(columns, 1)


@pytest.mark.parametrize("scheduler", PROCESSES)
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_weight_of_guidance_is_the_one_that_the_samples_have(scheduler, noise):
    """
    Exactly: with unit variances the mean residual is (weight - 1) times the mean guidance at every level, however wide
    the samples are and whatever the network invents. Least squares says something else.
    """
    guided = Guided(scheduler, noise=noise)
    found = guided.fit(6000)
    # At the least noise the two predictions are nearly one, and say nothing of it.
    torch.testing.assert_close(found[0, 1:], torch.full((target.KNOTS - 1,), 0.6), atol=0.05, rtol=0)
    torch.testing.assert_close(found[1], torch.zeros(target.KNOTS), atol=0.03, rtol=0)
    assert (least_squares(guided, 3000) - found)[:, 1:].abs().max() > 0.05


@pytest.mark.parametrize("scheduler", PROCESSES)
@pytest.mark.parametrize(
    "change", [dict(), dict(contrast=1.3), dict(contrast=0.8, std=1.0), dict(leak=0.1, noise=0.3)]
)
def test_training_rests_where_the_guided_teacher_is(scheduler, change):
    """No prompt's samples are moved as a whole, at any noise level; by least squares they are, and by the base."""
    guided = Guided(scheduler, **change)
    weights, by_least_squares = guided.fit(6000), least_squares(guided, 3000)
    for fraction in (0.2, 0.5, 0.8, 0.95):
        found, of_base = guided.common_errors(weights, fraction)
        assert found < 0.02 * of_base + 1e-3  # of 1,000 images
        if guided.std < 1 and fraction == 0.5:  # else both can be the exact denoiser's
            assert found < 0.3 * guided.common_errors(by_least_squares, fraction)[0]


def test_a_few_hundred_images_are_enough():
    guided = Guided(DDIMScheduler(), noise=0.3)
    weights = guided.fit(150)
    for fraction in (0.2, 0.5, 0.8):
        found, of_base = guided.common_errors(weights, fraction)
        assert found < 0.1 * of_base


@pytest.mark.parametrize(("least", "most"), [(0.0, 0.3), (0.9, 2.0), (-1.0, 3.0)])
def test_no_more_guidance_than_the_samplers_and_no_less_than_none(least, most):
    """And the contrast that goes with it: the equations of that weight alone."""
    guided = Guided(DDIMScheduler(), contrast=1.2)
    moments = target.moments(*guided.pairs(6000))
    weights, free = target.fit(moments, least, most), target.fit(moments, -100.0, 100.0)
    torch.testing.assert_close(weights[0], free[0].clamp(least, most))
    assert torch.allclose(weights[1], free[1], atol=1e-3) == (most == 3.0)  # there nothing is cut off
    shares = target.hats(moments.fractions).double()
    scale = (shares.T @ moments.square / shares.sum(0)) @ shares.T
    w = shares @ weights.double().T
    left = moments.correlation - torch.einsum("bij,bj->bi", moments.gram, w)
    equations = torch.einsum("bk,b->k", shares, left[:, 1] / scale)
    ridge = target.RIDGE * torch.einsum("bk,b->k", shares.square(), moments.own[:, 1] / scale) * weights[1]
    torch.testing.assert_close(equations, ridge.double(), atol=1e-4 * equations.abs().max().item() + 1e-4, rtol=1e-3)


def test_the_moments_are_products_of_two_images():
    """Against the columns themselves, one image's as instruments of the other and the other way round."""
    first, second, fractions = Guided(FlowMatchEulerDiscreteScheduler()).pairs(5)
    found = target.moments(first, second, fractions)
    for i in range(5):
        f, g = (torch.stack([pull[i], c[i]]).flatten(1).double() for _, c, pull in (first, second))
        r, s = ((x0[i] - c[i]).flatten().double() for x0, c, _ in (first, second))
        torch.testing.assert_close(found.gram[i], f @ g.T + g @ f.T)
        torch.testing.assert_close(found.correlation[i], f @ s + g @ r)
        torch.testing.assert_close(found.own[i], (f * f + g * g).sum(1))
        torch.testing.assert_close(found.square[i], r @ r + s @ s)


def test_what_says_nothing_changes_nothing():
    """A network that hears no prompt has no guidance to fit, and what is left has a solution all the same."""
    guided = Guided(DDIMScheduler(), weight=1.0)
    sides = [(x0, c, 0 * c) for x0, c, _ in guided.pairs(2000)[:2]]
    weights = target.fit(target.moments(*sides, guided.pairs(2000)[2]), 0.0, 3.0)
    assert weights.isfinite().all() and (weights[0] == 0).all() and weights[1].abs().max() < 0.05


def test_few_pairs_that_have_nothing_in_common_say_nothing_wild():
    noise = torch.randn(2, 3, 2, *SHAPE, generator=generator())
    weights = target.fit(target.moments(*noise, torch.tensor([0.3, 0.7])), 0.0, 1.0)
    assert weights.isfinite().all() and (weights[0] >= 0).all() and (weights[0] <= 1).all()
    assert weights[1].abs().max() <= target.LARGEST_CONTRAST


def test_between_two_knots_weights_are_interpolated():
    fractions, ones = torch.tensor([0.0, 1 / 6, 1 / 3, 1.0]), torch.ones(4, *SHAPE)
    weights = torch.tensor([[1.0, 3.0, 0.0, 7.0], [0.0, 0.0, 0.0, 0.5]])
    found = target.predict(2 * ones, ones, fractions, weights).flatten(1).mean(1)
    torch.testing.assert_close(found, 2 + torch.tensor([1.0, 2.0, 3.0, 8.0]))
    torch.testing.assert_close(target.hats(torch.rand(50)).sum(1), torch.ones(50))


def test_the_common_error_is_what_a_prompts_images_have_in_common():
    """Against the predictions themselves."""
    guided = Guided(DDIMScheduler())
    first, second, fractions = guided.pairs(2000)
    moments, weights = target.moments(first, second, fractions), guided.fit(2000)
    residuals = [
        [x0 - prediction for prediction in (c, target.predict(c, pull, fractions, weights))]
        for x0, c, pull in (first, second)
    ]
    rows = [target.common_error(moments, w) for w in (torch.zeros_like(weights), weights)]
    for k, (before, after) in enumerate(zip(*rows, strict=True)):
        draws = (fractions >= k / 4) & (fractions < (k + 1) / 4)
        square = sum(side[0][draws].square().sum() for side in residuals) / 2
        for i, error in enumerate((before, after)):
            expected = (residuals[0][i][draws] * residuals[1][i][draws]).sum() / square
            assert error == pytest.approx(100 * expected.item(), abs=1e-2)
        assert abs(after) < before


# ------------------------------------------------------------------------------------------------- what is ahead


class Family(PipelineFamily):
    """Whose network knows the exact predictions."""

    def __init__(self, trainer):
        self.trainer = trainer

    def halves(self, denoise, x_t, timesteps, condition, negative):
        process, predictions = self.trainer.process, self.trainer.halves(x_t, timesteps, condition)
        a, b = process.coefficients(timesteps, x_t)
        return [process.target(x0, (x_t - a * x0) / b, timesteps) for x0 in predictions]


class Sampled:
    """
    Prompts whose images are N(mean, width^2), both the prompt's own, and all together N(0, 1); and what a sampler of
    `steps` small guided steps makes of these scores: how far it takes a prompt, its width says. `guidance_scale` of 1
    draws the images themselves.

    In place of a trainer: what the fit and the target ask of one.
    """

    def __init__(self, scheduler, guidance_scale=3.0, number=40, width=None):
        self.process, self.model, self.family = NoiseProcess(scheduler), SimpleNamespace(sharded=False), Family(self)
        self.accelerator = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)
        self.args = SimpleNamespace(
            teacher_guidance_scale=guidance_scale,
            num_generations=4,
            dm_timestep_sampling="shared",
            negative_prompts="",
            mirrors_noise=True,
            process_index=0,
            world_size=1,
            per_device_eval_batch_size=10**6,
            disable_tqdm=True,
        )
        self.means = torch.randn(number, *SHAPE, generator=generator(1))
        self.widths = torch.linspace(0.2, 1.2, number) if width is None else torch.full((number,), width)

    def is_world_process_zero(self):
        return True

    def _check_finite(self, name, values):
        assert values.isfinite().all()

    def encode(self, prompts):
        return {"prompts": torch.as_tensor(prompts)}

    def encode_negative(self, prompts):
        return {}

    def denoise_as_teacher(self, x_t, timesteps, condition):
        return self.family.halves(None, x_t, timesteps, condition, {})[0]

    def halves(self, x_t, timesteps, condition):
        a, b = self.process.coefficients(timesteps, x_t)
        mean, width = self.means[condition["prompts"]], self.widths[condition["prompts"]].view(-1, 1, 1, 1)
        gain = a * width**2 / (a**2 * width**2 + b**2)
        return mean + gain * (x_t - a * mean), a / (a**2 + b**2) * x_t

    def draw(self, prompts, steps=50):
        """Images of the guided sampler, by DDIM's steps."""
        condition, scale = self.encode(prompts), self.args.teacher_guidance_scale
        levels = torch.linspace(0.999, 0, steps + 1)
        x_t = torch.randn(len(prompts), *SHAPE, generator=generator(5))
        for now, then in itertools.pairwise(levels):
            timesteps, later = (self.process.timesteps_at(level.expand(len(prompts))) for level in (now, then))
            conditional, unconditional = self.halves(x_t, timesteps, condition)
            x0 = unconditional + scale * (conditional - unconditional)
            a, b = self.process.coefficients(timesteps, x_t)
            x_t = self.process.add_noise(x0, (x_t - a * x0) / b, later)
        return x_t


@pytest.mark.parametrize("scheduler", PROCESSES)
@pytest.mark.parametrize("fraction", [0.6, 0.9])
def test_without_guidance_what_is_ahead_is_on_average_the_prediction(scheduler, fraction):
    """
    Of exact predictions that are linear in the state, as Gaussians' are, and whatever the state: their mean over what
    may come is the prediction of now. Steps without noise would follow the state farther, and make a student too wide.
    """
    trainer = Sampled(scheduler, guidance_scale=1.0, number=1, width=0.7)
    prompts, state = [0] * 20_000, torch.randn(1, *SHAPE, generator=generator(3)) * 1.5
    x_t, condition = state.expand(len(prompts), *SHAPE), trainer.encode(prompts)
    timesteps = trainer.process.timesteps_at(torch.full((len(prompts),), fraction))
    halves = trainer.halves(x_t, timesteps, condition)  # of which the first is the guided one
    noise = torch.randn(target.STEPS_AHEAD - 1, *x_t.shape, generator=generator(4))
    found = guidance.look_ahead(trainer, x_t, timesteps, condition, halves[:1], noise)
    spread = found.std(0).max() / len(prompts) ** 0.5
    torch.testing.assert_close(found.mean(0), halves[0][0], atol=5 * spread.item(), rtol=0)
    still = guidance.look_ahead(trainer, x_t, timesteps, condition, halves[:1], 0 * noise)
    assert found.std(0).min() > 0.05 and not torch.allclose(found, still)


@pytest.mark.parametrize("scheduler", PROCESSES)
def test_the_target_looks_ahead_where_the_weights_are_not_all_prompts(scheduler):
    """Then a prompt's images are moved as a whole by less than half of what the weights of guidance leave."""
    trainer = Sampled(scheduler)
    prompts = [i // 2 for i in range(80)] * 6
    latents = trainer.draw(prompts)
    weights = guidance.fit_target(trainer, latents, prompts)
    assert weights.shape == (2, 2, target.KNOTS)
    assert (weights[1, 0] >= 0).all() and (weights[1, 0] <= 1).all()
    trainer.target = weights
    groups = torch.arange(40).repeat_interleave(400)
    latents, condition = trainer.draw(groups), trainer.encode(groups)

    def common(fraction, weights):
        trainer.target, timesteps = weights, trainer.process.timesteps_at(torch.full((len(groups),), fraction))
        x_t = trainer.process.add_noise(latents, torch.randn(latents.shape, generator=generator(6)), timesteps)
        torch.manual_seed(0)
        residual = guidance.predict_target(trainer, x_t, timesteps, condition) - latents
        return residual.unflatten(0, (-1, 400)).mean(1).square().mean().item()

    for fraction in (0.8, 0.95):
        assert common(fraction, weights) < 0.5 * common(fraction, weights[:1])
    assert common(0.4, weights) == common(0.4, weights[:1])


def test_the_look_ahead_moves_a_group_as_a_whole():
    """Of images that share their noise level; of those that need not, each alone."""
    trainer, prompts = Sampled(DDIMScheduler()), torch.arange(3).repeat_interleave(4)
    trainer.target = torch.tensor([[[0.5] * 4, [0.0] * 4], [[0.9] * 4, [0.0] * 4]])
    x_t, fractions = torch.randn(12, *SHAPE), torch.tensor([0.3, 0.6, 0.95]).repeat_interleave(4)
    timesteps, condition = trainer.process.timesteps_at(fractions), trainer.encode(prompts)
    conditional, other = trainer.halves(x_t, timesteps, condition)
    plain = conditional + 0.5 * (conditional - other)
    for sampling, alone in (("shared", False), ("uniform", True)):
        trainer.args.dm_timestep_sampling, trainer.args.mirrors_noise = sampling, not alone
        moved = (guidance.predict_target(trainer, x_t, timesteps, condition) - plain).unflatten(0, (3, 4))
        assert moved[0].abs().max() < 1e-5 and moved[1].abs().mean() > 0.02 and moved[2].abs().mean() > 0.02
        assert torch.allclose(moved, moved[:, :1].expand_as(moved), atol=1e-3) != alone


def test_it_looks_ahead_in_the_noisier_half():
    found = target.share_ahead(torch.tensor([0.0, 0.5, 0.6, 0.75, 1.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 0.4, 1.0, 1.0]))


def test_a_teacher_whose_weights_are_right_looks_at_nothing_more(monkeypatch):
    trainer = Sampled(DDIMScheduler(), width=1.0)
    prompts = [i // 2 for i in range(80)] * 6
    monkeypatch.setattr(guidance, "look_ahead", None)
    trainer.target = guidance.fit_target(trainer, trainer.draw(prompts), prompts)
    assert trainer.target.shape == (1, 2, target.KNOTS)
    x_t, timesteps = torch.randn(4, *SHAPE), trainer.process.timesteps_at(torch.full((4,), 0.9))
    guidance.predict_target(trainer, x_t, timesteps, trainer.encode([0] * 4))
