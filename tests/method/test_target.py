# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The target against a Gaussian whose score is known, and where its training ends."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from rdm_trl.method import losses, target
from rdm_trl.method.diffusion import NoiseProcess
from rdm_trl.method.fake_score import FakeScore


def score_of(parameters, learning_rate, optimizer=torch.optim.Adam) -> FakeScore:
    optimizer = optimizer(parameters, lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    return FakeScore(parameters, optimizer, scheduler, None, "target")


def denoised(x_t, a, b, mean, std):
    """E[x0 | x_t] of images from N(mean, std^2): the denoiser whose score is the noised Gaussian's."""
    gain = a * std**2 / (a**2 * std**2 + b**2)
    return mean + gain * (x_t - a * mean)


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler(), DDIMScheduler(prediction_type="v_prediction"), FlowMatchEulerDiscreteScheduler()]
)
def test_the_target_has_the_score_of_its_images_and_not_the_bases(scheduler):
    """A base of N(0, 1), whose guided sampler draws N(1.5, 0.4^2): its own equilibrium plays no part."""
    process, shape = NoiseProcess(scheduler), (3, 4)
    mean, log_std = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
    images = 1.5 + 0.4 * torch.randn(2000, *shape, generator=torch.Generator().manual_seed(1))

    def loss_at(draws):
        timesteps = process.timesteps_at(draws.fractions * 0.96 + 0.02)
        x0 = images[draws.rows]
        x_t = process.add_noise(x0, draws.noise, timesteps)
        a, b = process.coefficients(timesteps, x_t)
        prediction = denoised(x_t, a, b, mean, log_std.exp())
        # In the network's own form, as the trainer's loss: the noise that this x0 leaves is what it would output.
        output = process.target(prediction, (x_t - a * prediction) / b, timesteps)
        return losses.denoising_loss(output, process.target(x0, draws.noise, timesteps))

    torch.manual_seed(0)
    state = torch.get_rng_state()
    updates, history = target.train_target(score_of([mean, log_std], 0.05), loss_at, 2000, shape, 400, batch_size=48)
    assert torch.equal(torch.get_rng_state(), state)  # the run's noise is its own
    assert updates < 400 and min(history) < history[0]
    timesteps = process.timesteps_at(torch.tensor([0.1, 0.5, 0.9]))
    x_t = torch.randn(3, *shape)
    a, b = process.coefficients(timesteps, x_t)
    found = process.score(denoised(x_t, a, b, mean, log_std.exp()), x_t, timesteps)
    expected = process.score(denoised(x_t, a, b, 1.5, 0.4), x_t, timesteps)
    of_base = process.score(denoised(x_t, a, b, 0.0, 1.0), x_t, timesteps)
    assert (found - expected).abs().mean() < 0.1 * (of_base - expected).abs().mean()


def test_it_ends_at_its_best_on_held_out_images():
    """Training pulls the weight to 2, and held-out images are denoised best at 1."""
    weight = nn.Parameter(torch.zeros(1))

    def loss_at(draws):
        held_out = draws.rows >= 90
        assert held_out.all() or not held_out.any()
        return (weight - (1.0 if held_out.all() else 2.0)).square().mean()

    updates, history = target.train_target(score_of([weight], 0.01, torch.optim.SGD), loss_at, 100, (2,), 1000, 32)
    assert updates < 300 and not weight.requires_grad
    assert (weight - 1).square().item() == pytest.approx(min(history), abs=1e-6)
    assert min(history) < 0.1 and history[0] == 1.0


def test_an_interrupted_target_goes_on_from_its_last_look():
    """And until then the weights are what they were."""
    images = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    limit, saved = 0, []

    def run(state=None):
        weight, calls = nn.Parameter(torch.zeros(2)), []

        def loss_at(draws):
            calls.append(draws)
            if len(calls) == limit:
                raise KeyboardInterrupt
            return (images[draws.rows] * draws.fractions[:, None] + draws.noise - weight).square().mean()

        def save(state):
            saved.append(copy.deepcopy(state))

        try:
            return weight, target.train_target(score_of([weight], 0.02), loss_at, 50, (2,), 110, 128, state, save)
        except KeyboardInterrupt:
            return weight, None

    whole, (updates, history) = run()
    assert updates > 45 and len(saved) == len(history) - 1
    saved.clear()
    limit = 4 + 20 + 4 + 20 + 4 + 5  # looks of four parts, and updates
    interrupted, nothing = run()
    assert nothing is None and torch.equal(interrupted, torch.zeros(2)) and not interrupted.requires_grad
    assert [state["update"] for state in saved] == [20, 40]
    limit = 0
    resumed, (rest, looks) = run(saved[-1])
    assert rest == updates - 40 and looks == history and torch.equal(resumed, whole)


def test_the_processes_share_the_draws(monkeypatch):
    class State:
        process_index, num_processes = 0, 3

    monkeypatch.setattr(target, "PartialState", lambda: State)
    whole = target.draw(torch.arange(66), (2,), torch.Generator().manual_seed(0))
    assert torch.equal((whole.fractions * 66).long().sort().values, torch.arange(66))  # a level of each part
    rows = []
    for State.process_index in range(3):
        parts = whole.own(8)
        assert [len(part) for part in parts] == [8, 7, 7]
        for part in parts:
            assert torch.equal(part.noise, whole.noise[part.rows])
            rows += part.rows.tolist()
    assert sorted(rows) == list(range(66))


def test_settled():
    assert not target.is_settled([1.0, 0.9, 0.8])
    assert not target.is_settled([1.0, 0.5, 0.49, 0.48, 0.46])  # 0.04 of 0.54
    assert target.is_settled([1.0, 0.5, 0.49, 0.49, 0.48])  # 0.02 of 0.52
    assert target.is_settled([1.0, 1.1, 1.2, 1.3])  # nothing but memory
