# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The fake score centred by its group, against teachers and students whose scores are known exactly."""

from dataclasses import replace

import pytest
import torch
from closed_forms import PROCESS, TEACHERS, exact_denoiser, mixture

from rdm_trl.method import policy
from rdm_trl.method.matching import center, common_square, probe


GROUP, NUMBER = 4, 100_000  # images a prompt, prompts
STUDENTS = {"gaussian": mixture([0.2], [0.9], [1.0]), "mixture": mixture([-1.0, 0.6], [0.5, 0.3], [0.5, 0.5])}
T = 400


def draw(student, predict_fake, predict_teacher, number=NUMBER):
    """R_dm at noised draws (number * GROUP, 1) of the student, and the direction with the student's exact score."""
    torch.manual_seed(0)
    x0 = student.sample((number * GROUP, 1))
    timesteps, noise = torch.full((len(x0),), T), torch.randn_like(x0)
    found = probe(predict_teacher, predict_fake, PROCESS, x0, noise, timesteps)
    x_t = PROCESS.add_noise(x0, noise, timesteps)
    exact = predict_teacher(x_t, timesteps) - exact_denoiser(student)(x_t, timesteps)
    return x0, found, exact


def is_zero(values: torch.Tensor) -> bool:
    """Whether the mean of independent draws is 0 to Monte-Carlo accuracy."""
    return bool(values.mean().abs() < 4 * values.std() / len(values) ** 0.5)


def with_itself(found, num_generations):
    """The obvious wrong way: image i inside its own mean."""
    groups = found.residual.unflatten(0, (-1, num_generations))
    mean = groups.mean(1, keepdim=True).expand_as(groups)
    return replace(found, direction=found.direction + mean.flatten(0, 1))


@pytest.mark.parametrize("kind", ["offset", "scale", "lag"])
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_the_error_that_a_group_shares_is_taken_out(name, kind):
    student = STUDENTS[name]
    right = exact_denoiser(student)
    parts = student.component_distribution
    behind = mixture((parts.mean - 0.3).tolist(), parts.stddev.tolist(), student.mixture_distribution.probs.tolist())
    fake = {
        "offset": lambda x_t, t: right(x_t, t) + 0.2,
        "scale": lambda x_t, t: 1.5 * right(x_t, t) + 0.2,
        "lag": exact_denoiser(behind),  # of the student before it moved by 0.3
    }[kind]
    x0, found, exact = draw(student, fake, exact_denoiser(TEACHERS[name]))
    dmd, ours = found.direction - exact, center(found, GROUP).direction - exact
    groups = ours.view(-1, GROUP)
    assert is_zero(groups.mean(1))
    assert not is_zero(dmd.view(-1, GROUP).mean(1)) and dmd.mean().abs() > 0.05
    if kind == "offset":  # right for each image, not only on average: no part of the error depends on it
        assert is_zero((groups * x0.view(-1, GROUP)).mean(1))
        wrong = with_itself(found, GROUP).direction - exact
        assert not is_zero((wrong * x0).view(-1, GROUP).mean(1))


@pytest.mark.parametrize("group", [2, 4, 8])
def test_with_an_exact_fake_score_it_costs_variance_alone(group):
    student = STUDENTS["mixture"]
    x0, found, exact = draw(student, exact_denoiser(student), exact_denoiser(TEACHERS["mixture"]))
    added = center(found, group).direction - found.direction
    torch.testing.assert_close(found.direction, exact)
    assert is_zero(added.view(-1, group).mean(1))
    assert is_zero((added * x0).view(-1, group).mean(1))
    expected = found.residual.var() / (group - 1)
    torch.testing.assert_close(added.var(), expected, rtol=0.03, atol=0)


@pytest.mark.parametrize("offset", [0.0, 0.2])
def test_the_common_error_is_measured_without_bias(offset):
    student = STUDENTS["mixture"]
    right = exact_denoiser(student)
    x0, found, _ = draw(student, lambda x_t, t: right(x_t, t) + offset, exact_denoiser(TEACHERS["mixture"]))
    values = torch.stack([common_square(part.view(-1, GROUP, 1)) for part in found.residual.chunk(1000)])
    assert is_zero(values - offset**2)
    assert found.residual.mean(0).square().item() < values.mean() + 1e-3  # not the square of a mean of few
    biased = found.residual.view(-1, GROUP).mean(1).square().mean()
    assert not is_zero(values - biased)
    figures = found.figures(GROUP)
    torch.testing.assert_close(figures["dm/fake_error"], values.mean())


# The student's image of its noise (B, 2): one number says which component, the other where in it. "even" has the
# mixture's components in another order, by which a mirrored image is of the same one.
INNER = 0.6744898  # half of all normal numbers are smaller in size


def of_components(first, noise):
    return torch.where(first, -1.0 + 0.5 * noise, 0.6 + 0.3 * noise)


DRAWN = {
    "gaussian": lambda noise: 0.2 + 0.9 * noise[:, 1:],
    "mixture": lambda noise: of_components(noise[:, :1] < 0, noise[:, 1:]),
    "even": lambda noise: of_components(noise[:, :1].abs() < INNER, noise[:, 1:]),
}


def draw_mirrored(name, predict_fake, number=NUMBER):
    """R_dm as in `draw`, at images (number * GROUP, 1) of mirrored noise."""
    torch.manual_seed(0)
    state = policy.draw_noise((number * GROUP, 2), "cpu", mirrored=True).double()
    x0, timesteps = DRAWN[name](state), torch.full((len(state),), T)
    noise = policy.draw_noise(x0.shape, "cpu", mirrored=True).double()
    teacher = exact_denoiser(TEACHERS["gaussian" if name == "gaussian" else "mixture"])
    return x0, probe(teacher, predict_fake, PROCESS, x0, noise, timesteps, mirrored=True)


def test_of_mirrored_images_the_pair_is_left_out():
    """The offset leaves each direction, whatever its image's noise was; not so if image i alone is left out."""
    right = exact_denoiser(STUDENTS["mixture"])
    x0, found = draw_mirrored("mixture", lambda x_t, t: right(x_t, t) + 0.2)
    pairs, images = (
        center(which, GROUP).direction - found.direction - 0.2 for which in (found, replace(found, mirrored=False))
    )
    assert is_zero(pairs.view(-1, GROUP).mean(1))
    assert is_zero((pairs * x0).view(-1, GROUP).mean(1))
    assert not is_zero((images * x0).view(-1, GROUP).mean(1))


@pytest.mark.parametrize("offset", [0.0, 0.2])
@pytest.mark.parametrize("group", [4, 6, 8])
@pytest.mark.parametrize("name", ["mixture", "even"])
def test_the_variance_of_centring_by_mirrored_images(name, group, offset):
    """By the correlation of a pair: less than by independent images where it is negative enough, else more."""
    right = exact_denoiser(STUDENTS["mixture"])
    _, found = draw_mirrored(name, lambda x_t, t: right(x_t, t) + offset, NUMBER + 2)
    added = center(found, group).direction - found.direction

    def correlation(residual):
        first, second = (residual - residual.mean()).view(-1, 2).unbind(1)
        return (first * second).mean() / residual.var()

    r, teacher = correlation(found.residual), found.residual + found.direction
    assert r < -0.5 if name == "mixture" else r > -0.1
    expected = found.residual.var() / (group - 2)
    torch.testing.assert_close(added.var(), (1 + r) * expected, rtol=0.03, atol=0.01 * expected.item())
    summed = center(found, group).direction.view(-1, group).sum(1).var()  # the teacher's residuals alone
    torch.testing.assert_close(summed, group * (1 + correlation(teacher)) * teacher.var(), rtol=0.03, atol=0)
    # What is logged as the fake score's error has no bias either, and would, were a pair taken for two images.
    values, wrong = (
        torch.stack([common_square(part) for part in which.independent_residuals(group).chunk(500)])
        for which in (found, replace(found, mirrored=False))
    )
    assert is_zero(values - offset**2) and (name == "even" or not is_zero(wrong - offset**2))
    torch.testing.assert_close(found.figures(group)["dm/fake_error"], values.mean(), rtol=0.01, atol=5e-4)


def test_mirrored_images_of_a_gaussian_centre_without_noise():
    """Where prediction and image are linear in the noise, a pair's residuals cancel: what is left is the error."""
    right = exact_denoiser(STUDENTS["gaussian"])
    _, found = draw_mirrored("gaussian", lambda x_t, t: right(x_t, t) + 0.2, 100)
    added = center(found, GROUP).direction - found.direction
    torch.testing.assert_close(added, torch.full_like(added, 0.2), rtol=0, atol=1e-5)


def test_a_groups_mean_is_of_its_own_prompt():
    """Whatever stands in other groups, and however they are spread over processes."""
    torch.manual_seed(0)
    x0, found, _ = draw(STUDENTS["gaussian"], lambda x_t, t: 0.5 * x_t, exact_denoiser(TEACHERS["gaussian"]), 6)
    whole = center(found, GROUP).direction
    halves = [
        center(replace(found, direction=d, residual=r), GROUP).direction
        for d, r in zip(found.direction.chunk(2), found.residual.chunk(2), strict=True)
    ]
    assert torch.equal(torch.cat(halves), whole)
    one = found.residual[1:4].mean(0)
    torch.testing.assert_close(whole[0], found.direction[0] + one)


@pytest.mark.parametrize(("weighed", "renewed"), [(True, True), (True, False), (False, True)])
def test_a_used_rollout_is_centred_by_ratios_and_new_predictions(weighed, renewed):
    """
    States of a Gaussian student that has moved by 0.3 since it acted, and its exact score but for an offset: weighed,
    and against what the student makes of the same states now, the mean direction is that of new draws.
    """
    torch.manual_seed(0)
    old, new, spread, offset = 0.0, 0.3, 0.9, 0.2
    student = mixture([new], [spread], [1.0])
    right, teacher = exact_denoiser(student), exact_denoiser(TEACHERS["gaussian"])
    state = spread * torch.randn(NUMBER * GROUP, 1).double()
    timesteps, noise = torch.full((len(state),), T), torch.randn_like(state)
    action = PROCESS.add_noise(old + state, noise, timesteps)
    weight = policy.log_ratio(action, new + state, old + state, timesteps, PROCESS).double().exp()
    reused = (new if renewed else old) + state, (weight if weighed else 1.0)
    found = probe(teacher, lambda x_t, t: right(x_t, t) + offset, PROCESS, old + state, noise, timesteps, *reused)
    fresh = PROCESS.add_noise(new + state, torch.randn_like(noise), timesteps)
    expected = teacher(fresh, timesteps) - right(fresh, timesteps)
    ours = center(found, GROUP).direction - expected
    assert is_zero(ours.view(-1, GROUP).mean(1)) == (weighed and renewed)
