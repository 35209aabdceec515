# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""R_dm against Gaussian and mixture teachers, whose scores are known exactly."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from closed_forms import PROCESS, STUDENT, TEACHERS, exact_denoiser, mixture, noisy
from diffusers import DDIMScheduler
from torch.distributions import Normal

from rdm_trl.method.diffusion import NoiseProcess
from rdm_trl.method.losses import student_loss
from rdm_trl.method.matching import Probe, draw_fractions, normalize, probe, reward_estimate
from rdm_trl.rewards import panel


@pytest.mark.parametrize("name", TEACHERS)
def test_direction_is_the_gradient_of_the_log_density_ratio(name):
    torch.manual_seed(0)
    teacher, t = TEACHERS[name], torch.tensor([20, 300, 500, 800])
    x0, noise = torch.randn(2, 4, 3).double().unbind()
    found = probe(exact_denoiser(teacher), exact_denoiser(STUDENT), PROCESS, x0, noise, t)
    a, b = (c.double() for c in PROCESS.coefficients(t, x0))
    for i in range(len(t)):
        x_t = (a[i] * x0[i] + b[i] * noise[i]).requires_grad_(True)
        ratio = noisy(teacher, a[i], b[i]).log_prob(x_t) - noisy(STUDENT, a[i], b[i]).log_prob(x_t)
        (gradient,) = torch.autograd.grad(ratio.sum(), x_t)
        torch.testing.assert_close(a[i] / b[i] ** 2 * found.direction[i], gradient)
        mu = exact_denoiser(teacher)(x_t.detach()[None], t[i : i + 1])[0]
        torch.testing.assert_close(found.distance[i], (x0[i] - mu).abs())


def test_scalar_estimate_has_the_closed_form_expectation():
    """For Gaussians, E |x0 - mu|^2 over the noise is a quadratic in x0."""
    torch.manual_seed(0)
    n = 400_000
    t, x0 = torch.tensor([400]), torch.tensor([1.3]).double()
    a, b = (c.item() for c in PROCESS.coefficients(t, x0))
    noise = torch.randn(n, 1).double()
    found = probe(
        exact_denoiser(TEACHERS["gaussian"]),
        exact_denoiser(STUDENT),
        PROCESS,
        x0.expand(n, 1),
        noise,
        t.expand(n),
    ).reward

    def mean_square(mean, spread):
        gain = a * spread**2 / (a**2 * spread**2 + b**2)
        return ((1 - gain * a) * (1.3 - mean)) ** 2 + (gain * b) ** 2

    expected = (a / b) ** 2 * (mean_square(0.2, 0.9) - mean_square(0.7, 0.5))
    assert abs(found.mean().item() - expected) < 4 * found.std().item() / n**0.5


@pytest.mark.parametrize("name", TEACHERS)
def test_scalar_estimate_integrates_to_the_log_density_ratio(name):
    """Half the integral over log-SNR is log p_teacher(x0) - log p_fake(x0), here by quadrature."""
    teacher = TEACHERS[name]
    process = NoiseProcess(DDIMScheduler())
    log_snr = torch.linspace(16, -16, 1000).double()
    process.alphas_cumprod = log_snr.sigmoid()
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = torch.tensor(weights / weights.sum())
    noise = torch.tensor(nodes).repeat(1000)[:, None]
    t = torch.arange(1000).repeat_interleave(40)
    x0 = torch.full_like(noise, 0.4)
    a, b = process.coefficients(t, x0)
    x_t = a * x0 + b * noise

    def predict(distribution):
        components = distribution.component_distribution
        variance = a**2 * components.variance + b**2
        parts = Normal(a * components.mean, variance.sqrt()).log_prob(x_t) + distribution.mixture_distribution.logits
        means = components.mean + a * components.variance / variance * (x_t - a * components.mean)
        return (parts.softmax(-1) * means).sum(-1, keepdim=True)

    estimate = reward_estimate(predict(teacher), predict(STUDENT), x0, t, process).view(1000, 40) @ weights
    integral = -0.5 * torch.trapezoid(estimate, log_snr)
    expected = teacher.log_prob(x0[:1, 0]) - STUDENT.log_prob(x0[:1, 0])
    torch.testing.assert_close(integral, expected[0], atol=2e-3, rtol=2e-3)


def test_normalisers_against_formulas():
    torch.manual_seed(0)
    direction = torch.randn(6, 2, 3)
    mean = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0])
    spread = torch.tensor([[0.5, 1.0, 1.5], [1.5, 1.0, 0.5]])  # over the elements of an image, of mean 1
    given = Probe(direction, mean[:, None, None] * spread, torch.zeros_like(direction), torch.zeros(6))
    for name, expected in {
        "sample": [1.0, 2.0, 3.0, 10.0, 20.0, 30.0],
        "group": [2.0, 2.0, 2.0, 20.0, 20.0, 20.0],
        "batch": [11.0] * 6,
        "none": [1.0] * 6,
    }.items():
        expected = direction / torch.tensor(expected)[:, None, None]
        torch.testing.assert_close(normalize(given, name, num_generations=3, eps=0.0), expected)
        finer = expected if name == "none" else expected / spread
        torch.testing.assert_close(normalize(given, name, 3, "element", eps=0.0), finer)
    with pytest.raises(ValueError, match="Unknown normalization 'x'"):
        normalize(given, "x", 3)
    with pytest.raises(ValueError, match="Unknown level 'x'"):
        normalize(given, "group", 3, "x")


def test_sample_normaliser_is_dmd():
    """DMD2's published loss: 0.5 * mse(x0, x0 - (p_real - p_fake) / mean |p_real|), with p = x0 - mu."""
    torch.manual_seed(0)
    x0, teacher, fake = torch.randn(3, 4, 2, 3, 3).unbind()
    leaf = x0.clone().requires_grad_(True)
    weight = (x0 - teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    gradient = ((x0 - teacher) - (x0 - fake)) / weight
    expected = 0.5 * torch.nn.functional.mse_loss(leaf, (leaf - gradient).detach())
    expected.backward()
    other = x0.clone().requires_grad_(True)
    given = Probe(teacher - fake, (x0 - teacher).abs(), fake - x0, torch.zeros(4))
    loss = student_loss(other, normalize(given, "sample", 2, eps=0.0))
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(other.grad, leaf.grad)


@pytest.mark.parametrize(
    ("normalization", "level"),
    [("group", "image"), ("group", "element"), ("sample", "image"), ("batch", "element"), ("none", "image")],
)
def test_a_two_parameter_student_converges_to_a_gaussian_teacher(normalization, level):
    """x0 = mean + spread * z, trained by the real update with exact scores, ends at the teacher's mean and spread."""
    torch.manual_seed(0)
    mean = torch.zeros(1, requires_grad=True)
    spread = torch.full((1,), 1.5, requires_grad=True)
    optimizer = torch.optim.Adam([mean, spread], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        x0 = mean + spread * torch.randn(64, 16)
        fake = mixture([mean.item()], [abs(spread.item())], [1.0])
        t = PROCESS.timesteps_at(draw_fractions(16, 4, "uniform", 0.02, 0.98))
        found = probe(
            exact_denoiser(TEACHERS["gaussian"]), exact_denoiser(fake), PROCESS, x0.detach(), torch.randn(64, 16), t
        )
        loss = student_loss(x0, normalize(found, normalization, 4, level).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert abs(mean.item() - 0.7) < 0.03
    assert abs(abs(spread.item()) - 0.5) < 0.03


def test_time_sampling():
    torch.manual_seed(0)
    uniform = draw_fractions(500, 4, "uniform", 0.1, 0.9).view(500, 4)
    stratified = draw_fractions(500, 4, "stratified", 0.1, 0.9).view(500, 4)
    shared = draw_fractions(500, 4, "shared", 0.1, 0.9).view(500, 4)
    for draw in (uniform, stratified, shared):
        assert draw.min() >= 0.1 and draw.max() <= 0.9 and abs(draw.mean() - 0.5) < 0.02
    assert (shared == shared[:, :1]).all()
    strata = ((stratified - 0.1) / 0.2).long().clamp(max=3)
    assert (strata.sort(1).values == torch.arange(4)).all()  # one draw a stratum
    assert (strata[:, 0] == 0).float().mean() < 0.35  # in random order
    assert not (((uniform - 0.1) / 0.2).long().sort(1).values == torch.arange(4)).all(1).all()


@pytest.mark.parametrize("level", ["image", "element"])
def test_the_batch_normaliser_is_over_all_processes(monkeypatch, level):
    torch.manual_seed(0)
    here, there, direction = torch.rand(3, 4, 2, 3).unbind()
    monkeypatch.setattr(panel, "reduce", lambda mean, how: (mean + there.mean(0, keepdim=True)) / 2)
    config = SimpleNamespace(
        dm_estimator="pathwise",
        dm_centering="none",
        dm_normalization="batch",
        dm_normalization_level=level,
        num_generations=2,
    )
    probe = Probe(direction, here, direction, torch.zeros(4))
    found = panel.distribution_matching_push(probe, None, PROCESS, config)
    everything = torch.cat([here, there])
    scale = everything.mean(0) if level == "element" else everything.mean()
    torch.testing.assert_close(found, direction / (scale + 1e-6))
