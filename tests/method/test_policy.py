# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from conftest import make_tiny_pipeline
from diffusers import DDIMScheduler
from torch.distributions import Independent, Normal

from rdm_trl.method import policy
from rdm_trl.method.diffusion import NoiseProcess, make_student_scheduler
from rdm_trl.method.losses import clipped_policy_loss
from rdm_trl.models.pipelines import family_of


def test_log_prob_is_the_mean_of_the_gaussian_density():
    scheduler = DDIMScheduler()
    process = NoiseProcess(scheduler)
    torch.manual_seed(0)
    x0, following = torch.randn(2, 3, 4, 2, 2).unbind()
    t = torch.tensor([100, 500, 900])
    a, b = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
    density = Independent(Normal(a.view(-1, 1, 1, 1) * x0, b.view(-1, 1, 1, 1).expand_as(x0)), 3)
    torch.testing.assert_close(policy.log_prob(following, x0, t, process), density.log_prob(following) / 16)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_rollout_is_a_plain_diffusers_call(prediction_type):
    """Same noise, the saved scheduler, and nothing of ours: the pipeline's own latents."""
    pipeline = make_tiny_pipeline(prediction_type)
    family = family_of(pipeline)
    process = NoiseProcess(pipeline.scheduler)
    scheduler = make_student_scheduler(pipeline.scheduler, 4)
    prompts = ["a photo of a bag", "a dress", "a coat"]
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack([torch.randn(3, *family.latent_shape, generator=generator) for _ in range(4)], 1)
    condition = family.encode_prompts(prompts)

    def predict(x_t, t, rows):
        chosen = {key: value[rows] for key, value in condition.items()}
        return process.to_x0(family.denoise(lambda *a, **k: pipeline.unet(*a, **k).sample, x_t, t, chosen), x_t, t)

    found = policy.rollout(predict, process, scheduler.timesteps, noise, torch.tensor([3, 3, 3]), complete=True)
    pipeline.scheduler = scheduler
    expected = pipeline(
        prompts,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    torch.testing.assert_close(found.latents[:, -1], expected, atol=1e-4, rtol=1e-4)


def test_exit_steps_stop_the_rollout():
    process = NoiseProcess(DDIMScheduler())
    timesteps = torch.tensor([999, 749, 499, 249])
    noise = torch.randn(5, 4, 2, 3, 3)
    calls = []

    def predict(x_t, t, rows):
        calls.append(len(rows))
        return x_t * 0.5 + t.view(-1, 1, 1, 1) / 1000

    exits = torch.tensor([0, 0, 1, 2, 2])
    partial = policy.rollout(predict, process, timesteps, noise, exits)
    assert calls == [3, 2]  # nobody is evaluated at or behind its exit
    complete = policy.rollout(predict, process, timesteps, noise, exits, complete=True)
    assert calls == [3, 2, 5, 5, 5, 5]
    torch.testing.assert_close(partial.exit_latents, complete.exit_latents)
    torch.testing.assert_close(complete.exit_latents, complete.latents[torch.arange(5), exits])
    assert partial.exit_timesteps.tolist() == [999, 999, 749, 499, 499]


def test_exit_steps_are_spread_over_the_grid_and_shared_in_a_group():
    torch.manual_seed(0)
    exits = policy.draw_exit_steps(8, 3, 4).view(8, 3)
    assert (exits == exits[:, :1]).all()
    assert exits[:, 0].bincount().tolist() == [2, 2, 2, 2]
    first = torch.stack([policy.draw_exit_steps(1, 1, 4) for _ in range(400)])
    assert (first.bincount(minlength=4) if first.ndim == 1 else first.flatten().bincount(minlength=4)).min() > 60


def test_clipped_policy_loss():
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5])
    # max(-A r, -A clip(r)): a gain is capped, a loss is not.
    torch.testing.assert_close(clipped_policy_loss(advantages, ratio, 0.2), torch.tensor((-1.2 - 0.5 + 1.5 + 0.8) / 4))
