# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""GRPO's advantages by hand, and what each mixing promises, on pushes of known size."""

import pytest
import torch
from closed_forms import PROCESS

from rdm_trl.method import matching
from rdm_trl.method.advantages import Mixer, group_advantages, normalize_rewards


REWARDS = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 0.0], [4.0, 1.0], [4.0, 1.0], [4.0, 1.0]])


def test_sum_then_normalize_is_grpos():
    rewards, weights = REWARDS.clone(), torch.tensor([1.0, 10.0])
    group = torch.tensor([1.0, 2.0, 6.0])
    expected = torch.cat([(group - 3) / (group.std() + 1e-4), torch.zeros(3)])

    def ours(scale):
        return group_advantages(rewards, weights, 3, scale, "sum_then_normalize")

    torch.testing.assert_close(ours("group"), expected)
    total = rewards @ weights
    torch.testing.assert_close(ours("batch"), torch.cat([group - 3, torch.zeros(3)]) / (total.std() + 1e-4))
    torch.testing.assert_close(ours("none"), torch.cat([group - 3, torch.zeros(3)]))
    rewards[1] = torch.nan  # not scored: neither in the mean nor pushed
    expected = torch.tensor([-2.5, 0.0, 2.5]) / (torch.tensor([1.0, 6.0]).std() + 1e-4)
    torch.testing.assert_close(ours("group")[:3], expected)


def test_normalize_then_sum_ignores_the_scale_of_a_reward():
    torch.manual_seed(0)
    first, second = torch.randn(2, 24).unbind()
    rewards, weights = torch.stack([first, second], 1), torch.tensor([1.0, 0.5])

    def z(values):
        groups = values.view(-1, 4)
        return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()

    total = z(first) + 0.5 * z(second)
    expected = (total - total.mean()) / (total.std() + 1e-4)
    ours = group_advantages(rewards, weights, 4, "none", "normalize_then_sum")
    torch.testing.assert_close(ours, expected)
    scaled = rewards * torch.tensor([1.0, 1000.0])
    torch.testing.assert_close(
        group_advantages(scaled, weights, 4, "none", "normalize_then_sum"), expected, atol=1e-3, rtol=1e-3
    )
    summed = group_advantages(scaled, weights, 4, "group", "sum_then_normalize")
    assert torch.corrcoef(torch.stack([summed, z(second)]))[0, 1] > 0.99  # the larger reward wins there


def test_a_constant_reward_has_no_advantage():
    assert normalize_rewards(torch.ones(8, 1), 4, "group").abs().max() == 0


def make_pushes(seed=0, size=(8, 50)):
    generator = torch.Generator().manual_seed(seed)
    dm = torch.randn(size, generator=generator)
    field = 1000 * torch.randn(size, generator=generator)
    advantage = torch.randn(size[0], generator=generator)
    return dm, field, advantage


def test_the_sum_is_a_sum():
    dm, field, advantage = make_pushes()
    mixer = Mixer("sum", torch.tensor([0.5, 2.0]), 3.0, 2)
    steps = torch.tensor([0, 1] * 4)
    feedback = mixer(dm, [advantage, field], torch.ones(8), steps, torch.zeros(8))
    torch.testing.assert_close(feedback.direction, 3 * dm + 2 * field)
    torch.testing.assert_close(feedback.advantage, 0.5 * advantage)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_adaptive_weights_are_shares_whatever_the_rewards_units(scale):
    """Each exit step's pushes are `weight` times as large as distribution matching's there, in root mean square."""
    mixer = Mixer("adaptive", torch.tensor([0.5, 0.25]), 1.0, 2)
    steps = torch.tensor([0] * 400 + [1] * 400)
    ratio = torch.where(steps == 0, 0.3, 2.0)  # a / b behind the step
    size = torch.where(steps == 0, 5.0, 0.1)[:, None]
    for seed in range(3):
        dm, field, advantage = make_pushes(seed, (800, 50))
        dm, field, advantage = dm * size, field * scale, advantage * scale
        feedback = mixer(dm, [advantage, field], ratio, steps, torch.zeros(800))
    z = torch.randn(dm.shape, generator=torch.Generator().manual_seed(9))
    policy_push = (feedback.advantage * ratio)[:, None] * z
    for step in (0, 1):
        chosen = steps == step

        def rms(push, chosen=chosen):
            return push[chosen].square().mean().sqrt().item()

        assert rms(feedback.direction - dm) / rms(dm) == pytest.approx(0.25, rel=0.05)
        assert rms(policy_push) / rms(dm) == pytest.approx(0.5, rel=0.1)


def test_adaptive_does_not_blow_up_what_does_not_push():
    dm, _, _ = make_pushes()
    mixer = Mixer("adaptive", torch.tensor([1.0]), 1.0, 2)
    feedback = mixer(dm, [torch.zeros(8)], torch.ones(8), torch.tensor([0, 1] * 4), torch.zeros(8))
    assert (feedback.advantage == 0).all()
    torch.testing.assert_close(feedback.direction, dm)
    last_step = mixer(dm, [torch.ones(8)], torch.zeros(8), torch.zeros(8).long(), torch.zeros(8))
    assert last_step.advantage.isfinite().all()


def test_constrained_finds_the_multiplier_that_holds_the_budget():
    """A toy whose KL falls with the multiplier, KL = 1 / multiplier: a budget of 0.25 needs 4."""
    mixer = Mixer("constrained", torch.tensor([1.0]), 1.0, 1, target_dm=0.25)
    dm, field, _ = make_pushes()
    for _ in range(500):
        kl = 1 / mixer.state["multiplier"]
        feedback = mixer(dm, [field], torch.ones(8), torch.zeros(8).long(), -kl.expand(8))
    assert mixer.kl == pytest.approx(0.25, rel=0.05)
    assert mixer.state["multiplier"].item() == pytest.approx(4.0, rel=0.1)
    push = feedback.direction - mixer.state["multiplier"] * dm
    assert (push.square().mean() / dm.square().mean()).sqrt().item() == pytest.approx(1.0, rel=0.01)


def test_constrained_begins_with_the_rewards_as_strong_as_the_teacher():
    dm, field, _ = make_pushes()
    mixer = Mixer("constrained", torch.tensor([12.0, 4.0]), 1.0, 1, target_dm=0.25)
    assert mixer.state["multiplier"] == 16
    # Exactly on the budget the multiplier stays.
    feedback = mixer(dm, [field, field], torch.ones(8), torch.zeros(8).long(), torch.full((8,), -0.25))
    reward_push = feedback.direction - 16 * dm
    assert (reward_push.square().mean() / (16 * dm).square().mean()).sqrt().item() == pytest.approx(1.0, rel=0.01)


def test_a_mixers_state_is_all_it_remembers():
    dm, field, advantage = make_pushes()
    steps = torch.tensor([0, 1] * 4)
    first = Mixer("constrained", torch.tensor([1.0, 1.0]), 1.0, 2, target_dm=0.1)
    for _ in range(3):
        first(dm, [advantage, field], torch.ones(8), steps, -torch.rand(8))
    second = Mixer("constrained", torch.tensor([1.0, 1.0]), 1.0, 2, target_dm=0.1)
    second.state = {name: value.clone() for name, value in first.state.items()}
    one, other = (mixer(dm, [advantage, field], torch.ones(8), steps, -torch.ones(8)) for mixer in (first, second))
    assert torch.equal(one.direction, other.direction) and torch.equal(one.advantage, other.advantage)


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_a_share_below_one_comes_to_rest(share):
    """
    A Gaussian student, whose fake score is exact, under a reward that likes larger numbers: by hand it rests where
    distribution matching pulls it back with `share` of its own root mean square, noise included; and with 1 nowhere.
    """
    torch.manual_seed(0)
    spread, number, group = 0.5, 1024, 4
    timesteps = torch.full((number,), 500)
    a, b = (c.mean() for c in PROCESS.coefficients(timesteps, timesteps))
    pull, gain = b**2 / ((a * spread) ** 2 + b**2), a * spread**2 / ((a * spread) ** 2 + b**2)
    mixer, mean, means = Mixer("adaptive", torch.tensor([share]), 1.0, 1), torch.zeros(()), []
    for _ in range(300):
        x0, noise = mean + spread * torch.randn(number, 16), torch.randn(number, 16)

        def fake(x_t, timesteps, mean=mean):
            return mean + gain * (x_t - a * mean)

        probe = matching.probe(lambda x_t, t: gain * x_t, fake, PROCESS, x0, noise, timesteps)
        dm = matching.center(probe, group).direction
        steps = torch.zeros(number, dtype=torch.long)
        mixed = mixer(dm, [torch.full_like(dm, 1000.0)], torch.zeros(number), steps, torch.zeros(number))
        mean = mean + 0.3 * mixed.direction.mean()
        means.append(mean)
    if share < 1:
        rest = share / (1 - share**2) ** 0.5 / pull * (spread**2 * pull / (group - 1)) ** 0.5
        torch.testing.assert_close(torch.stack(means[-100:]).mean(), rest, rtol=0.02, atol=0)
    else:
        assert means[-1] > 1.5 * means[99]
