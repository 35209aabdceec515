# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The target against Gaussians, whose denoisers are known."""

import pytest
import torch
from conftest import ROOT, load_script
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from rdm_trl.method import target
from rdm_trl.method.diffusion import NoiseProcess


SHAPE = (2, 4, 4)
PROCESSES = [DDIMScheduler(), DDIMScheduler(prediction_type="v_prediction"), FlowMatchEulerDiscreteScheduler()]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def denoised(x_t, a, b, mean, std):
    """E[x0 | x_t] of images from N(mean, std^2)."""
    return mean + a * std**2 / (a**2 * std**2 + b**2) * (x_t - a * mean)


class Guided:
    """
    A teacher that knows images of a prompt, N(means, 1), and of none, N(0, 1); and what its guided sampler draws:
    N(weight * means, std^2).
    """

    def __init__(self, scheduler, weight: float, std: float, leak: float = 0.0):
        self.process, self.weight, self.std, self.leak = NoiseProcess(scheduler), weight, std, leak
        self.means = torch.randn(SHAPE, generator=generator(1))

    def noised(self, number: int, seed: int):
        fractions = target.draw_levels(number, generator(seed)) * 0.96 + 0.02
        timesteps = self.process.timesteps_at(fractions)
        x0, noise = torch.randn(2, number, *SHAPE, generator=generator(seed + 1))
        x0 = self.weight * self.means + self.std * x0
        return x0, self.process.add_noise(x0, noise, timesteps), timesteps

    def halves(self, x_t, timesteps):
        a, b = self.process.coefficients(timesteps, x_t)
        return tuple(denoised(x_t, a, b, mean, 1.0) + self.leak * x_t for mean in (self.means, 0 * self.means))

    def fit(self, number: int) -> torch.Tensor:
        x0, x_t, timesteps = self.noised(number, 3)
        moments = target.moments(x0, *self.halves(x_t, timesteps), x_t, self.process.fractions(timesteps))
        return target.fit(moments)

    def errors(self, weights: torch.Tensor) -> tuple[float, float]:
        """Mean square distances from the exact denoiser of what the guided sampler draws: the target's, the base's."""
        _, x_t, timesteps = self.noised(4000, 7)
        a, b = self.process.coefficients(timesteps, x_t)
        exact = denoised(x_t, a, b, self.weight * self.means, self.std)
        halves = self.halves(x_t, timesteps)
        found = target.predict(*halves, x_t, self.process.fractions(timesteps), weights)
        return (found - exact).square().mean().item(), (halves[0] - exact).square().mean().item()


@pytest.mark.parametrize("scheduler", PROCESSES)
def test_guidance_is_found_where_the_guided_sampler_only_guides(scheduler):
    """Moved means and nothing else: guidance by the same weight at every level is exact, and it is not the base's."""
    guided = Guided(scheduler, weight=1.6, std=1.0)
    found, of_base = guided.errors(guided.fit(3000))
    assert found < 0.01 * of_base


@pytest.mark.parametrize("scheduler", PROCESSES)
def test_the_target_is_the_denoiser_of_what_is_drawn(scheduler):
    """Nor is its width the base's, which guidance alone cannot say."""
    guided = Guided(scheduler, weight=1.6, std=0.6)
    found, of_base = guided.errors(guided.fit(3000))
    assert found < 0.05 * of_base
    # What a guided sampler feels for a few steps, is no denoiser of anything that it draws.
    by_scale = torch.zeros(3, target.KNOTS)
    by_scale[0] = 0.6
    assert guided.errors(by_scale)[0] > 5 * found


@pytest.mark.parametrize("scheduler", PROCESSES)
def test_noise_that_the_network_leaves_is_taken_out(scheduler):
    guided = Guided(scheduler, weight=1.6, std=1.0, leak=0.1)
    found, of_base = guided.errors(guided.fit(3000))
    assert found < 0.02 * of_base


def test_a_few_hundred_images_are_enough():
    guided = Guided(DDIMScheduler(), weight=1.6, std=0.6)
    few, of_base = guided.errors(guided.fit(300))
    assert few < 0.1 * of_base


def test_the_fit_is_that_of_least_squares():
    """Against torch's own solver, on the features' columns themselves."""
    guided = Guided(FlowMatchEulerDiscreteScheduler(), weight=1.4, std=0.8)
    x0, x_t, timesteps = guided.noised(400, 5)
    halves, fractions = guided.halves(x_t, timesteps), guided.process.fractions(timesteps)
    moments = target.moments(x0, *halves, x_t, fractions)
    shares = target.hats(fractions).double()
    torch.testing.assert_close(shares.sum(1), torch.ones(400).double())
    levels = shares @ torch.linspace(0, 1, target.KNOTS).double()
    torch.testing.assert_close(levels, fractions.double(), atol=1e-6, rtol=0)
    level = (shares.T @ moments.square) / shares.sum(0)
    scale = (shares @ level).rsqrt()[:, None]
    f = target.features(*halves, x_t).flatten(2).double()
    columns = torch.einsum("bk,bjd->bdjk", shares, f).flatten(2) * scale[..., None]
    residual = (x0 - halves[0]).flatten(1).double() * scale
    expected = torch.linalg.lstsq(columns.flatten(0, 1), residual.flatten()[:, None]).solution.view(3, -1).float()

    def left(weights) -> float:
        found = target.predict(*halves, x_t, fractions, weights)
        return ((x0 - found).flatten(1).double() * scale).square().sum().item()

    assert left(expected) <= left(target.fit(moments)) < left(expected) * (1 + 2e-3)
    assert left(target.fit(moments)) < 0.9 * left(torch.zeros(3, target.KNOTS))


def test_the_study_counts_what_a_fit_takes_off(monkeypatch):
    """Against the predictions themselves, of one level, where a share of the error is one of its mean square."""
    pytest.importorskip("matplotlib").use("Agg")  # of what the script shares with the bench
    monkeypatch.syspath_prepend(ROOT / "examples")
    study = load_script("examples/target_study.py")
    guided = Guided(DDIMScheduler(), weight=1.6, std=0.6)
    monkeypatch.setattr(target, "draw_levels", lambda number, generator: torch.full((number,), 0.5))
    x0, x_t, timesteps = guided.noised(500, 5)
    halves, fractions = guided.halves(x_t, timesteps), guided.process.fractions(timesteps)
    moments = target.moments(x0, *halves, x_t, fractions)
    for features in study.SETS.values():
        weights = target.fit(study.chosen(moments, torch.arange(500) < 100, features))
        held_out = slice(100, None)
        whole = torch.zeros(3, target.KNOTS)
        whole[features] = weights
        found = target.predict(*halves, x_t, fractions, whole)
        before, after = ((x0 - p)[held_out].square().mean().item() for p in (halves[0], found))
        share = study.gain(study.chosen(moments, torch.arange(500) >= 100, features), weights)
        assert share == pytest.approx(1 - after / before, abs=1e-4)


def test_what_says_nothing_changes_nothing():
    """A network that hears no prompt has no guidance to fit, and what is left has a solution all the same."""
    guided = Guided(DDIMScheduler(), weight=1.0, std=1.0)
    x0, x_t, timesteps = guided.noised(500, 5)
    one, fractions = guided.halves(x_t, timesteps)[0], guided.process.fractions(timesteps)
    weights = target.fit(target.moments(x0, one, one, x_t, fractions))
    assert weights.isfinite().all() and (weights[0] == 0).all()
    change = target.predict(one, one, x_t, fractions, weights) - one
    assert change.abs().mean() < 0.05 * one.abs().mean()
