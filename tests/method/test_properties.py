# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What holds for every input: shapes, group arithmetic, parameterisations, schedules; and inputs of any kind."""

import contextlib
import io
import math
import string

import numpy as np
import torch
import yaml
from conftest import make_config, make_trainer, redness
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rdm_trl import RdmDistillConfig
from rdm_trl._trl import make_parser
from rdm_trl.method import losses, matching, policy
from rdm_trl.method.advantages import Mixer, group_advantages, normalize_rewards
from rdm_trl.method.diffusion import NoiseProcess, make_student_scheduler
from rdm_trl.rewards import check_answer


def examples(number: int):
    """The same examples in every run, and no time limit on one."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=slow)


seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(1, 5), st.integers(2, 6))  # groups, images in each


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- group arithmetic

SCALES = st.sampled_from(["group", "batch", "none"])
AGGREGATIONS = st.sampled_from(["normalize_then_sum", "sum_then_normalize"])


@given(seeds, sizes, st.integers(1, 3), SCALES, AGGREGATIONS)
@examples(60)
def test_advantages_know_groups_not_their_order(seed, size, num_rewards, scale, aggregation):
    groups, generations = size
    rewards, weights = draw(seed, groups * generations, num_rewards), draw(seed + 1, num_rewards)
    rewards[draw(seed + 2, *rewards.shape) > 1.5] = torch.nan  # some were not scored

    def advantages(rewards):
        return group_advantages(rewards, weights, generations, scale, aggregation)

    found = advantages(rewards)
    assert found.shape == (groups * generations,) and found.isfinite().all()
    order = torch.randperm(groups, generator=torch.Generator().manual_seed(seed))
    permuted = rewards.view(groups, generations, -1)[order].flatten(0, 1)
    expected = found.view(groups, generations)[order].flatten()
    torch.testing.assert_close(advantages(permuted), expected, atol=1e-4, rtol=1e-4)
    within = torch.randperm(generations, generator=torch.Generator().manual_seed(seed))
    permuted = rewards.view(groups, generations, -1)[:, within].flatten(0, 1)
    expected = found.view(groups, generations)[:, within].flatten()
    torch.testing.assert_close(advantages(permuted), expected, atol=1e-4, rtol=1e-4)


@given(seeds, sizes, st.floats(-100, 100), st.floats(0.1, 1000))
@examples(60)
def test_a_rewards_units_do_not_matter(seed, size, shift, scale):
    groups, generations = size
    rewards = draw(seed, groups * generations, 2)
    spread = rewards.view(groups, generations, 2).std(1)
    assume(spread.min() > 0.2)  # far above the 1e-4 that is added to it
    found = normalize_rewards(rewards, generations, "group")
    torch.testing.assert_close(
        normalize_rewards(scale * rewards + shift, generations, "group"), found, atol=0.02, rtol=0
    )
    torch.testing.assert_close(found.view(groups, generations, 2).mean(1), torch.zeros(groups, 2), atol=1e-5, rtol=0)
    # Another group's level and spread say nothing about this one.
    other = rewards.clone()
    other[generations:] = 50 * other[generations:] - 7
    torch.testing.assert_close(normalize_rewards(other, generations, "group")[:generations], found[:generations])


@given(seeds, sizes, st.sampled_from(["group", "sample", "batch"]), st.sampled_from(["image", "element"]))
@examples(40)
def test_normalised_directions(seed, size, normalization, level):
    groups, generations = size
    direction, distance = (
        draw(seed, groups * generations, 2, 3),
        draw(seed + 1, groups * generations, 2, 3).abs() + 0.1,
    )
    found = matching.normalize(
        matching.Probe(direction, distance, distance, distance), normalization, generations, level
    )
    assert found.shape == direction.shape
    # A direction and its scale have one unit; at the level of elements each element has its own.
    factor = draw(seed + 2, *((2, 3) if level == "element" else (1, 1))).exp()
    larger = matching.Probe(factor * direction, factor * distance, distance, distance)
    again = matching.normalize(larger, normalization, generations, level)
    torch.testing.assert_close(again, found, atol=1e-3, rtol=1e-3)
    # Within a group all images are divided by the same, but for "sample"; within an image at the level of images.
    ratio = (direction / found).view(groups, generations, 6)
    if normalization != "sample":
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), atol=1e-3, rtol=1e-3)
    if level == "image":
        torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), atol=1e-3, rtol=1e-3)


@given(seeds, sizes, st.integers(1, 4), st.sampled_from(["sum", "adaptive", "constrained"]))
@examples(40)
def test_the_mixing_is_finite_and_of_one_shape(seed, size, num_steps, mixing):
    number = size[0] * size[1]
    mixer = Mixer(mixing, torch.tensor([1.0, 0.5, 0.0]), 1.0, num_steps, 0.1 if mixing == "constrained" else None)
    exit_steps = torch.randint(num_steps, (number,), generator=torch.Generator().manual_seed(seed))
    dm, field = draw(seed, number, 2, 3), draw(seed + 1, number, 2, 3)
    scale = draw(seed + 2, number).abs() * (exit_steps + 1 < num_steps)
    for _ in range(3):
        feedback = mixer(
            dm, [draw(seed + 3, number), torch.zeros(number), field], scale, exit_steps, draw(seed, number)
        )
    assert feedback.direction.shape == dm.shape and feedback.advantage.shape == (number,)
    assert feedback.direction.isfinite().all() and feedback.advantage.isfinite().all()
    assert mixer.kl >= 0 and 0.01 <= mixer.state["multiplier"] <= 100


# ------------------------------------------------------------------------------------- parameterisations and schedules


def scheduler_of(prediction_type: str, shift: float = 1.0):
    if prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    return DDIMScheduler(prediction_type=prediction_type, beta_schedule="scaled_linear")


PREDICTIONS = st.sampled_from(["epsilon", "v_prediction", "sample", "flow_prediction"])


@given(PREDICTIONS, seeds, st.lists(st.floats(0, 1), min_size=1, max_size=5))
@examples(100)
def test_what_the_denoiser_should_say_stands_for_the_image(prediction_type, seed, fractions):
    process = NoiseProcess(scheduler_of(prediction_type))
    timesteps = process.timesteps_at(torch.tensor(fractions))
    x0, noise = draw(seed, 2, len(fractions), 3, 2).unbind()
    x_t = process.add_noise(x0, noise, timesteps)
    output = process.target(x0, noise, timesteps)
    assert x_t.shape == output.shape == x0.shape
    torch.testing.assert_close(process.to_x0(output, x_t, timesteps), x0, atol=1e-3, rtol=1e-3)
    a, b = process.coefficients(timesteps, x0)
    assert (a >= 0).all() and (b >= 0).all() and (a <= 1).all() and (b <= 1).all()
    power = (a + b) if prediction_type == "flow_prediction" else (a.square() + b.square())
    torch.testing.assert_close(power, torch.ones_like(power))
    noisy = b.flatten() > 0.05
    torch.testing.assert_close(process.score(x0, x_t, timesteps)[noisy], (-noise / b)[noisy], atol=1e-2, rtol=1e-2)


@given(PREDICTIONS, st.integers(1, 50), st.floats(1, 5))
@examples(60)
def test_the_students_grid_falls_from_pure_noise(prediction_type, num_steps, shift):
    scheduler = make_student_scheduler(scheduler_of(prediction_type, shift), num_steps)
    grid = scheduler.timesteps
    assert grid.shape == (num_steps,) and (grid.diff() < 0).all()
    assert grid[0] >= 999 and grid[-1] >= 0
    exit_steps = torch.arange(num_steps)
    seen = policy.seen_noise(exit_steps, grid, 1000)
    assert (seen >= 0).all() and (seen < 1).all() and seen[-1] == 0 and (seen.diff() < 0).all()


@given(seeds, sizes, st.sampled_from(["uniform", "stratified", "shared"]), st.floats(0, 0.98), st.floats(0.01, 1))
@examples(60)
def test_noise_levels_are_in_their_range(seed, size, sampling, low, width):
    torch.manual_seed(seed)
    groups, generations = size
    high = min(low + width, 1.0)
    fractions = matching.draw_fractions(groups, generations, sampling, low, high)
    assert fractions.shape == (groups * generations,)
    assert (fractions >= low - 1e-6).all() and (fractions <= high + 1e-6).all()
    if sampling == "shared":
        assert (fractions.view(groups, generations).std(1) < 1e-6).all()
    if sampling == "stratified":
        strata = ((fractions - low) / (high - low) * generations - 1e-4).clamp(0, generations - 1e-3)
        found = strata.view(groups, generations).sort(1).values
        assert (found - torch.arange(generations) > -1e-2).all()
        assert (found - torch.arange(generations) < 1.01).all()


@given(seeds, sizes, st.integers(1, 8))
@examples(40)
def test_exit_steps_belong_to_groups_and_are_spread(seed, size, num_steps):
    torch.manual_seed(seed)
    groups, generations = size
    exit_steps = policy.draw_exit_steps(groups, generations, num_steps).view(groups, generations)
    assert (exit_steps == exit_steps[:, :1]).all() and exit_steps.min() >= 0 and exit_steps.max() < num_steps
    counts = exit_steps[:, 0].bincount(minlength=num_steps)
    assert counts.max() - counts.min() <= 1


@given(seeds, st.integers(1, 4), st.integers(1, 5), st.booleans())
@examples(40)
def test_rollouts(seed, number, num_steps, complete):
    process = NoiseProcess(DDIMScheduler())
    grid = make_student_scheduler(DDIMScheduler(), num_steps).timesteps
    noise = draw(seed, number, num_steps, 2, 3)
    exit_steps = torch.randint(num_steps, (number,), generator=torch.Generator().manual_seed(seed))
    rollout = policy.rollout(lambda x_t, t, rows: 0.5 * x_t, process, grid, noise, exit_steps, complete)
    assert rollout.latents.shape == (number, num_steps + 1, 2, 3) and rollout.x0 is None
    assert torch.equal(rollout.latents[:, 0], noise[:, 0])
    for i, k in enumerate(exit_steps):
        behind = rollout.latents[i, k + 1 :]
        assert (behind != 0).any() or behind.numel() == 0 if complete else (behind == 0).all()


@given(seeds, st.sampled_from(["element", "step", "sequence", "none"]), st.floats(0.01, 0.9), st.floats(0.01, 2))
@examples(40)
def test_ratios_and_their_clipping(seed, level, epsilon, epsilon_high):
    log_ratio = 0.1 * draw(seed, 4, 2, 3)
    ratio = policy.importance_ratio(log_ratio, level)
    assert ratio.shape == ((4, 2, 3) if level == "element" else (4, 1, 1)) and (ratio > 0).all()
    assert (policy.importance_ratio(torch.zeros(4, 2, 3), level) == 1).all()
    clipped = losses.clip_ratio(ratio, epsilon, epsilon_high)
    assert (clipped >= 1 - epsilon - 1e-6).all() and (clipped <= 1 + epsilon_high + 1e-6).all()
    inside = (ratio > 1 - epsilon) & (ratio < 1 + epsilon_high)
    assert torch.equal(clipped[inside], ratio[inside])
    # A clipped objective never promises more than the unclipped one.
    advantages = draw(seed + 1, 4)
    loss = losses.clipped_policy_loss(advantages, ratio, epsilon, epsilon_high)
    assert loss >= -(advantages.view(4, 1, 1) * ratio).mean() - 1e-6


# ------------------------------------------------------------------------------------------------- inputs of any kind

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(string.printable, max_size=6))
answers = st.one_of(
    scalars,
    st.lists(scalars, max_size=4),
    st.lists(st.floats(width=32), min_size=3, max_size=3),
    st.lists(st.one_of(st.none(), st.floats(-10, 10)), min_size=3, max_size=3),
    st.tuples(st.lists(scalars, max_size=4), scalars),
    st.tuples(scalars, scalars, scalars),
    st.dictionaries(st.integers(0, 5), st.floats(), min_size=3, max_size=3),
    st.sets(st.integers(), min_size=3, max_size=3),
    st.binary(max_size=4),
    st.lists(st.lists(st.floats(), min_size=1, max_size=2), min_size=3, max_size=3),
    st.builds(lambda shape: torch.zeros(shape), st.lists(st.integers(0, 4), max_size=3)),
    st.builds(lambda shape: np.ones(shape), st.lists(st.integers(0, 4), max_size=3)),
    st.builds(
        lambda values, dtype: torch.tensor(values, dtype=dtype),
        st.lists(st.integers(-5, 5), min_size=3, max_size=3),
        st.sampled_from([torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]),
    ),
    st.builds(lambda values: np.array(values, dtype=object), st.lists(scalars, max_size=4)),
)


@given(answers)
@examples(600)
def test_an_answer_is_rewards_or_an_error_that_names_the_reward(answer):
    images = torch.zeros(3, 3, 8, 8)
    try:
        rewards, _ = check_answer("my_reward", answer, images, ["a", "b", "c"])
    except (ValueError, TypeError) as error:
        assert "'my_reward' returned" in str(error)
        return
    assert isinstance(rewards, torch.Tensor) and rewards.shape == (3,) and rewards.dtype == torch.float32
    given_rewards = answer[0] if isinstance(answer, tuple) else answer
    for reward, value in zip(rewards.tolist(), given_rewards, strict=True):
        assert math.isnan(reward) if value is None else math.isclose(reward, value, rel_tol=1e-3, abs_tol=1e-6)


OPTIONS = [
    name
    for name in RdmDistillConfig.__annotations__
    if name not in ("reward_funcs", "eval_feature_model", "report_to")
]


@given(st.dictionaries(st.sampled_from(OPTIONS), st.one_of(scalars, st.lists(scalars, max_size=3)), max_size=3))
@examples(200)
def test_a_config_file_is_read_or_refused(tmp_path_factory, options):
    """No error but a `ValueError` or `TypeError` that names an option; argparse exits with its own message."""
    folder = tmp_path_factory.getbasetemp() / "yaml"
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    parser = make_parser(RdmDistillConfig)
    arguments = ["--config", str(folder / "config.yaml"), "--output_dir", str(folder / "run"), "--use_cpu", "True"]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            (config,) = parser.parse_args_and_config(arguments)
    except SystemExit as error:
        assert error.code == 2
    except (ValueError, TypeError) as error:
        assert any(name in str(error) for name in [*options, "YAML", "SchedulerType"]), str(error)
    else:
        assert config.num_generations >= 1 and 0 < config.prompts_per_generation


CHOICES = {
    name: entry.metadata["choices"]
    for name, entry in RdmDistillConfig.__dataclass_fields__.items()
    if "choices" in entry.metadata and name in RdmDistillConfig.__annotations__
}
plausible = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.sampled_from(choices) for name, choices in CHOICES.items()},
        "num_generations": st.sampled_from([1, 2, 4]),
        "sample_num_steps": st.integers(1, 5),
        "num_iterations": st.integers(1, 3),
        "gradient_accumulation_steps": st.integers(1, 2),
        "steps_per_generation": st.integers(1, 4),
        "fake_updates": st.integers(1, 2),
        "epsilon_high": st.floats(0.1, 1),
        "target_kl": st.one_of(st.none(), st.floats(1e-6, 1)),
        "dm_weight": st.floats(0, 3),
        "dm_timestep_range": st.lists(st.floats(0, 1), min_size=2, max_size=2),
        "dm_subintervals": st.booleans(),
        "target_dm": st.floats(0.01, 1),
        "reward_warmup": st.integers(0, 2),
        "reward_gradients": st.booleans(),
        "reward_gradient_steps": st.integers(1, 6),
        "ema_decay": st.floats(0, 0.99),
        "learning_rate": st.floats(0, 0.01),
        "sample_guidance_scale": st.floats(1, 5),
        "max_grad_norm": st.floats(0, 2),
        "fake_lr_scheduler_type": st.sampled_from(["linear", "cosine", "inverse_sqrt"]),
    },
)


@given(plausible, st.booleans())
@examples(25)
def test_a_config_that_is_accepted_trains(tmp_path_factory, options, direct):
    def reddish(images, prompts, metadata):
        return redness(images, prompts, metadata)

    reddish.differentiable = direct
    folder = tmp_path_factory.getbasetemp() / "accepted"
    try:
        trainer = make_trainer(folder, [redness, reddish], config=make_config(folder, max_steps=2, **options))
    except ValueError as error:
        assert any(name in str(error) for name in [*options, "num_generations"]), str(error)
        return
    trainer.train()
    assert trainer.state.global_step == 2
    for parameter in trainer.model.adapter_parameters("student", "fake", "ema"):
        assert parameter.isfinite().all()
