# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UnCLIPScheduler,
    VQDiffusionScheduler,
)

from rdm_trl.method.diffusion import NoiseProcess, make_student_scheduler


def process_of(prediction_type: str) -> NoiseProcess:
    if prediction_type == "flow_prediction":
        return NoiseProcess(FlowMatchEulerDiscreteScheduler())
    return NoiseProcess(DDIMScheduler(prediction_type=prediction_type))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_every_prediction_type_gives_the_same_x0_and_score(prediction_type):
    process = process_of(prediction_type)
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 4, 4).unbind()
    t = torch.tensor([10, 300, 500, 700, 990])
    x_t = process.add_noise(x0, noise, t)
    if prediction_type == "flow_prediction":
        a, b = 1 - t / 1000, t / 1000
    else:
        alphas_cumprod = DDIMScheduler().alphas_cumprod[t]
        a, b = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    a, b = a.view(-1, 1, 1, 1), b.view(-1, 1, 1, 1)
    # Each network's output for this very image and noise, from the definition of its parameterisation.
    output = {
        "epsilon": noise,
        "v_prediction": a * noise - b * x0,
        "sample": x0,
        "flow_prediction": noise - x0,
    }[prediction_type]
    torch.testing.assert_close(x_t, a * x0 + b * noise)
    torch.testing.assert_close(process.target(x0, noise, t), output)
    torch.testing.assert_close(process.to_x0(output, x_t, t), x0, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(process.score(x0, x_t, t), -noise / b, atol=1e-3, rtol=1e-3)


def test_noise_process_agrees_with_the_scheduler():
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    x0, noise, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0, 100, 600, 900])
    torch.testing.assert_close(NoiseProcess(scheduler).add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t))


def test_a_step_back_is_ddpms():
    scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(10)
    x0, x_t = torch.randn(2, 1, 3, 4, 4).unbind()
    expected = scheduler.step(x0, 700, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([700]), torch.tensor([600])
    torch.testing.assert_close(NoiseProcess(scheduler).step_back(x_t, x0, *timesteps, noise), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_a_step_back_undoes_a_step_of_noise(prediction_type):
    """What is drawn has the mean, the variance and the covariance with `x_t` of the state that `x_t` came from."""
    process = process_of(prediction_type)
    timesteps, earlier = (torch.full((200_000,), t) for t in (800, 500))
    (a, b), (earlier_a, earlier_b) = (
        [v.flatten() for v in process.coefficients(t, timesteps)] for t in (timesteps, earlier)
    )
    x0, (first, second, third) = 1.3, torch.randn(3, len(timesteps), generator=torch.Generator().manual_seed(1))
    came_from = earlier_a * x0 + earlier_b * first
    x_t = a / earlier_a * came_from + (b.square() - (a / earlier_a * earlier_b).square()).sqrt() * second
    found = process.step_back(x_t, torch.full_like(x_t, x0), timesteps, earlier, third)
    torch.testing.assert_close(found.mean(), came_from.mean(), atol=0.01, rtol=0)
    both = [torch.stack([x_t, state]).cov() for state in (found, came_from)]
    torch.testing.assert_close(*both, atol=0.01, rtol=0)
    # At no signal at all nothing of the state is kept.
    end = torch.full((1,), 1000)
    if prediction_type == "flow_prediction":
        state = process.step_back(torch.ones(1), torch.zeros(1), end, end // 2, torch.full((1,), 3.0))
        torch.testing.assert_close(state, torch.tensor([1.5]))


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (VQDiffusionScheduler(num_vec_classes=4), "VQDiffusionScheduler is not a scheduler the student can use"),
        (UnCLIPScheduler(prediction_type="sample"), None),
        (DDIMScheduler(rescale_betas_zero_snr=True), "starts at pure noise"),
        (EulerDiscreteScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True), None),
    ],
)
def test_schedulers_the_student_cannot_use(scheduler, message):
    if message is None:
        NoiseProcess(scheduler)
    else:
        with pytest.raises(ValueError, match=message):
            NoiseProcess(scheduler)


@pytest.mark.parametrize("num_steps, expected", [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])])
def test_student_grid_is_even_and_plain_diffusers_finds_it_again(num_steps, expected, tmp_path):
    scheduler = make_student_scheduler(DDIMScheduler(timestep_spacing="leading", clip_sample=True), num_steps)
    assert scheduler.timesteps.tolist() == expected
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    loaded.set_timesteps(num_steps)
    assert loaded.timesteps.tolist() == expected
