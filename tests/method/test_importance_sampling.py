# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""One rollout, several updates: what the importance ratio corrects, and how the trainer uses a rollout again."""

import pytest
import torch
from conftest import make_config, make_trainer, redness
from diffusers import DDIMScheduler
from peft import LoraConfig
from torch.distributions import Normal

from rdm_trl.method import losses, matching, policy
from rdm_trl.method.diffusion import NoiseProcess


LEVELS = ("element", "step", "sequence", "none")


# ------------------------------------------------------------------------------------------- against closed forms


@pytest.mark.parametrize("level", LEVELS)
def test_off_policy_gradient_of_gaussians(level):
    """
    Images of an old student N(old, 1.5^2) in 6 dimensions serve the gradient of a new one, N(new, 1.5^2): with exact
    scores and unclipped ratios the gradient is that of the KL divergence, without ratios it is far from it.
    """
    torch.manual_seed(0)
    process, dims, number = NoiseProcess(DDIMScheduler()), 6, 400_000
    t = torch.tensor([400])
    a, b = (c.item() for c in process.coefficients(t, torch.zeros(1)))
    old, spread, teacher_mean, teacher_spread = 0.0, 1.5, 0.5, 0.1
    new = torch.tensor(0.3, requires_grad=True)
    state = spread * torch.randn(number, dims)
    noise, timesteps = torch.randn(number, dims), t.expand(number)

    def denoiser(mean, std):
        gain = a * std**2 / (a**2 * std**2 + b**2)
        return lambda x_t, t: mean + gain * (x_t - a * mean)

    x0 = new + state
    probe = matching.probe(
        denoiser(teacher_mean, teacher_spread), denoiser(new.item(), spread), process, old + state, noise, timesteps
    )
    action = process.add_noise(old + state, noise, timesteps)
    log_ratio = policy.log_ratio(action, x0.detach(), old + state, timesteps, process)
    ratio = policy.importance_ratio(log_ratio, level)
    weight = losses.clip_ratio(ratio, 1.0, 1e9)
    losses.student_loss(x0, weight * probe.direction).backward()

    def direction(mean):  # E[mu_teacher - mu_fake] over noised images of N(mean, spread^2): both are linear
        x_t = a * mean
        return (denoiser(teacher_mean, teacher_spread)(x_t, None) - denoiser(new.item(), spread)(x_t, None)).item()

    right, wrong = -direction(torch.tensor(0.3)), -direction(torch.tensor(old))
    assert abs(right - wrong) > 0.1 * abs(right)
    error = abs(new.grad.item() - right) / abs(right - wrong)
    assert (error < 0.03) if level in ("element", "sequence") else (error > 0.6)


def test_ratios_are_those_of_the_densities():
    torch.manual_seed(0)
    process = NoiseProcess(DDIMScheduler())
    old, new, action = torch.randn(3, 5, 2, 3).unbind()
    new = old + 0.1 * new
    t = torch.tensor([50, 200, 400, 600, 900])
    a, b = process.coefficients(t, old)
    log_ratio = Normal(a * new, b).log_prob(action) - Normal(a * old, b).log_prob(action)
    found = policy.log_ratio(action, new, old, t, process)
    torch.testing.assert_close(found, log_ratio, atol=1e-4, rtol=1e-4)
    total, mean = log_ratio.sum((1, 2)), log_ratio.mean((1, 2))
    for level, expected in (("element", log_ratio.exp()), ("step", mean.exp()), ("sequence", total.exp())):
        ratio = policy.importance_ratio(found, level)
        torch.testing.assert_close(ratio.flatten(), expected.flatten(), atol=1e-3, rtol=1e-3)
    assert (policy.importance_ratio(found, "none") == 1).all()
    # The divergence is the expectation of the log ratio under the new policy, of either order since b is the same.
    kl = torch.distributions.kl_divergence(Normal(a * new, b), Normal(a * old, b)).mean((1, 2))
    torch.testing.assert_close(policy.action_kl(new, old, t, process), kl)
    ratio = torch.tensor([0.5, 1.0, 1.0, 1.5])
    figures = policy.ratio_figures(ratio, losses.clip_ratio(ratio, 0.2, 0.6))
    assert [round(value.item(), 4) for value in figures.values()] == [1.0, 0.25, round(16 / 4.5 / 4, 4)]


@pytest.mark.parametrize("level", LEVELS)
def test_all_levels_have_the_same_gradient_on_policy(level):
    torch.manual_seed(0)
    process, t = NoiseProcess(DDIMScheduler()), torch.tensor([300, 700])
    x0, action = torch.randn(2, 2, 3, 4).unbind()
    x0.requires_grad_(True)
    ratio = policy.importance_ratio(policy.log_ratio(action, x0, x0.detach(), t, process), level)
    assert (ratio == 1).all()
    advantages = torch.tensor([1.0, -2.0])
    losses.clipped_policy_loss(advantages, ratio, 0.2).backward()
    a, b = process.coefficients(t, x0)
    expected = -advantages.view(2, 1, 1) * a / b**2 * (action - a * x0.detach()) / 12 / 2
    torch.testing.assert_close(x0.grad, expected)


# -------------------------------------------------------------------------------------------------- in the trainer


def watch(monkeypatch, trainer) -> dict[str, list]:
    """What the trainer does, in order: experiences of its steps, images that the fake score learns, ratios."""
    seen = {"experiences": [], "fake": [], "ratios": []}
    prepare, update, ratio = trainer._prepare_inputs, trainer.update_fake, policy.importance_ratio

    def prepare_inputs(rows):
        inputs = prepare(rows)
        assert [row["prompt"] for row in rows] == inputs["experience"].prompts
        seen["experiences"].append(inputs["experience"])
        return inputs

    def update_fake():
        seen["fake"].append([x0 for x0, *_ in trainer._fake_batches])
        update()

    def importance_ratio(*args):
        seen["ratios"].append(ratio(*args).detach())
        return ratio(*args)

    monkeypatch.setattr(trainer, "_prepare_inputs", prepare_inputs)
    monkeypatch.setattr(trainer, "update_fake", update_fake)
    monkeypatch.setattr(policy, "importance_ratio", importance_ratio)
    return seen


def test_a_rollout_and_its_teacher_serve_several_updates(tmp_path, monkeypatch):
    prompts = [f"a {i}" for i in range(8)]
    options = dict(num_iterations=3, steps_per_generation=2, max_steps=12, num_generations=4, prompts=prompts)
    trainer = make_trainer(tmp_path, sample_guidance_scale=2.0, **options)
    seen = watch(monkeypatch, trainer)
    trainer.train()
    order = [id(experience) for experience in seen["experiences"]]
    one, two, three, four = dict.fromkeys(order)
    assert order == [one, two] * 3 + [three, four] * 3
    assert trainer.cost["rollouts"] == 4 * 8 and trainer.cost["teacher_evaluations"] == 4 * 8 * 2
    # The fake score learns after every update, what the student of that update draws.
    assert len(seen["fake"]) == 12
    assert len({batch[0].sum().item() for batch in seen["fake"]}) == 12


@pytest.mark.parametrize("centering", ["group", "none"])
def test_an_update_with_a_used_rollout(tmp_path, centering):
    """Its gradient, from the cached teacher, the fake score of now and the densities, by a separate computation."""
    options = dict(num_iterations=2, epsilon=0.2, epsilon_high=0.1, dm_centering=centering)
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=2), **options)
    torch.manual_seed(6)  # a draw whose ratios leave the clip range both ways
    for name in ("student", "fake"):
        for parameter in trainer.model.adapter_parameters(name):
            torch.nn.init.normal_(parameter, std=0.1)
    trainer.create_optimizer()
    rows = [{"prompt": p} for p in ("a dress", "a coat") for _ in range(4)]
    inputs = trainer._prepare_inputs(rows)
    trainer.compute_loss(trainer.model, inputs)
    old_x0 = inputs["x0"].detach().clone()
    with torch.no_grad():
        for parameter in trainer.model.adapter_parameters("student", "fake"):
            parameter.add_(0.05 * torch.randn_like(parameter))
    trainer.state.global_step = 1
    inputs = trainer._prepare_inputs(rows)
    trainer.compute_loss(trainer.model, inputs).backward()
    found = [p.grad.clone() for p in trainer.model.adapter_parameters("student")]

    trainer.model.zero_grad()
    experience, process = inputs["experience"], trainer.process
    assert torch.equal(experience.rollout.x0, old_x0) and not torch.equal(inputs["x0"], old_x0)
    rollout, t = experience.rollout, experience.timesteps
    alphas = trainer.sd_pipeline.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    a, b = alphas.sqrt(), (1 - alphas).sqrt()
    action = a * rollout.x0 + b * experience.noise
    embeds = trainer.family.encode_prompts(experience.prompts)["prompt_embeds"]
    unet = trainer.model.denoiser
    with torch.no_grad(), trainer.model.use("fake"):
        fake = process.to_x0(unet(action, t, embeds).sample, action, t)
    with trainer.model.use("teacher"), torch.no_grad():
        conditional, unconditional = (
            process.to_x0(unet(action, t, e).sample, action, t)
            for e in (embeds, trainer.family.encode_prompts([""])["prompt_embeds"].expand_as(embeds))
        )
        teacher = unconditional + trainer.args.sample_guidance_scale * (conditional - unconditional)
    scale = (rollout.x0 - teacher).abs().mean((1, 2, 3)).view(2, 4).mean(1).repeat_interleave(4)
    with trainer.model.use("student"):
        output = unet(rollout.exit_latents, rollout.exit_timesteps, embeds).sample
    x0 = process.to_x0(output, rollout.exit_latents, rollout.exit_timesteps)
    new = x0.detach()
    ratio = (Normal(a * new, b).log_prob(action) - Normal(a * old_x0, b).log_prob(action)).exp()
    assert (ratio < 0.8).any() and (ratio > 1.1).any()
    weight = ratio.clamp(0.8, 1.1)
    direction = weight * (teacher - fake)
    if centering == "group":  # by the residuals of the other mirrored pair, of old actions and the student of now
        residual = weight * (fake - new)
        others = [[j for j in range(4 * (i // 4), 4 * (i // 4) + 4) if j // 2 != i // 2] for i in range(8)]
        direction = direction + torch.stack([residual[rows].mean(0) for rows in others])
    advantage = direction / scale.view(-1, 1, 1, 1)
    (-(advantage * x0).sum() / x0.numel()).backward()
    for one, parameter in zip(found, trainer.model.adapter_parameters("student"), strict=True):
        torch.testing.assert_close(one, parameter.grad, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(trainer._fake_batches[-1][0], new)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "options", [{}, dict(gradient_accumulation_steps=2, activation_checkpointing=True, num_iterations=2)]
)
def test_the_ratio_is_exactly_one_before_the_student_has_moved(tmp_path, monkeypatch, level, options):
    trainer = make_trainer(tmp_path, [redness], importance_sampling_level=level, max_steps=1, **options)
    seen = watch(monkeypatch, trainer)
    trainer.train()
    assert seen["ratios"] and all((ratio == 1).all() for ratio in seen["ratios"])


def test_a_reward_acts_in_every_use(tmp_path, monkeypatch):
    asked = []

    def counted(images, prompts, metadata):
        asked.append(len(images))
        return redness(images, prompts, metadata)

    trainer = make_trainer(tmp_path, [counted], num_iterations=2, max_steps=4, learning_rate=5e-3)
    seen = watch(monkeypatch, trainer)
    advantages = []
    loss = trainer.loss
    monkeypatch.setattr(trainer, "loss", lambda a, c, r: advantages.append((a.clone(), r.detach())) or loss(a, c, r))
    trainer.train()
    assert asked == [8, 8]
    assert len(advantages) == 4 and all(a.abs().sum() > 0 for a, _ in advantages)
    assert (advantages[0][1] == 1).all() and (advantages[1][1] != 1).any()
    assert len(seen["experiences"]) == 4


def test_a_student_that_moved_too_far_gets_its_own_rollouts(tmp_path):
    far = make_trainer(tmp_path / "far", num_iterations=4, max_steps=8, target_kl=1e-12)
    far.train()
    # On policy, then one use that finds the distance, then two new rollouts; twice.
    assert far.cost["rollouts"] == 2 * 3 * 8
    near = make_trainer(tmp_path / "near", num_iterations=4, max_steps=8, target_kl=1e6)
    near.train()
    assert near.cost["rollouts"] == 2 * 8
    logs = {key: value for row in near.state.log_history for key, value in row.items()}
    assert logs["ratio/kl"] > 0 and 0 < logs["ratio/effective_samples"] <= 1 and "ratio/clipped" in logs


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_iterations=0), "`num_iterations` is 0, but must be at least 1"),
        (dict(steps_per_generation=3, gradient_accumulation_steps=2), "must be a multiple of"),
        (dict(importance_sampling_level="token"), "must be one of element, step, sequence, none"),
        (dict(epsilon_high=0.0), "`epsilon_high` is 0.0, but must be positive"),
        (dict(target_kl=-1.0), "`target_kl` is -1.0, but must be positive"),
        (dict(dm_estimator="policy_gradient", dm_centering="none", num_iterations=2), "`num_iterations` must be 1"),
    ],
)
def test_mistakes(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)
