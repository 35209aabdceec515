# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Rewards in training: that they act under every mixing, and what is said when they do not."""

import asyncio
import json
import threading
from functools import cache

import pytest
import torch
from conftest import logs_of, make_config, make_tiny_pipeline, make_trainer, redness
from peft import LoraConfig
from transformers import TrainerState

from rdm_trl import callbacks
from rdm_trl.method import matching, policy
from rdm_trl.rewards import panel


# A short run in which a reward moves the tiny pipeline, with each of four seeds: a black box needs many images.
LEARNING = dict(
    max_steps=30,
    per_device_train_batch_size=128,
    num_generations=16,
    dm_centering="none",
    dm_timestep_sampling="uniform",
    learning_rate=1e-2,
    fake_updates=1,
    ema_decay=0.5,
    epsilon=0.2,
    num_eval_images=128,
    per_device_eval_batch_size=128,
    teacher_num_steps=2,
)


def learner(folder, reward, **options):
    """With attention everywhere, which a black box needs to get anywhere in so few updates."""
    layers = dict(mid_block_type="UNetMidBlock2DCrossAttn", up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    pipeline, lora = make_tiny_pipeline(**layers), LoraConfig(r=2)
    return make_trainer(folder, [reward], pipeline=pipeline, peft_config=lora, **options)


def mixed_by(mixing, weight):
    target = 10.0 if mixing == "constrained" else None
    return dict(reward_mixing=mixing, target_dm=target, reward_weights=[weight])


# Gradients of the reward need few updates.
DIRECT = {**LEARNING, "max_steps": 6, "per_device_train_batch_size": 32}


@pytest.fixture(scope="module")
def end_without(tmp_path_factory):
    """Where the reward's mean ends with a weight of zero, by the kind of reward and mixing."""

    @cache
    def end(direct, mixing):
        options = DIRECT if direct else LEARNING
        trainer = learner(tmp_path_factory.mktemp("without"), redness, **mixed_by(mixing, 0.0), **options)
        trainer.train()
        return trainer.evaluate()["eval_redness"]

    # Shares of nothing are as the sum of nothing: these two are one run, to the last bit.
    return lambda direct, mixing: end(direct, "constrained" if mixing == "constrained" else "sum")


@pytest.mark.parametrize("mixing", ["sum", "adaptive", "constrained"])
@pytest.mark.parametrize("direct", [False, True])
def test_every_kind_of_reward_works_with_every_mixing(tmp_path, mixing, direct, end_without):
    """A reward's mean on the same new noise ends higher than with a weight of zero."""

    def reddish(images, prompts, metadata):
        return redness(images, prompts, metadata)

    reddish.differentiable = direct
    trainer = learner(tmp_path, reddish, **mixed_by(mixing, 10.0), **DIRECT if direct else LEARNING)
    trainer.train()
    assert trainer.evaluate()["eval_reddish"] > end_without(direct, mixing) + (0.01 if direct else 0.003)
    logs = logs_of(trainer)
    name = "black_boxes" if mixing == "sum" and not direct else "reddish"
    for key in ("dm/kl", "dm/multiplier", f"reward_weight/{name}", "rewards/reddish/mean", "x0/diversity"):
        assert key in logs, key
    assert ("frac_reward_zero_std" in logs) == (not direct)


def test_r_dm_as_a_scalar_reward_goes_through_the_group_advantage(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, dm_estimator="policy_gradient", dm_centering="none", dm_normalization="none")
    seen = {}
    probe = matching.probe

    def spy(*args):
        seen.update(noise=args[4], t=args[5], probe=probe(*args))
        return seen["probe"]

    monkeypatch.setattr(matching, "probe", spy)
    inputs = trainer._prepare_inputs([{"prompt": "a"}] * 8)
    groups = seen["probe"].reward.view(2, 4)
    advantage = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    alphas = trainer.sd_pipeline.scheduler.alphas_cumprod[seen["t"]]
    ratio = (alphas / (1 - alphas)).sqrt()
    expected = (advantage.flatten() * ratio).view(-1, 1, 1, 1) * seen["noise"]
    torch.testing.assert_close(inputs["feedback"].direction, expected, rtol=1e-4, atol=1e-5)


def test_rewards_wait_for_their_warmup(tmp_path):
    calls = []

    def counted(images, prompts, metadata):
        calls.append(len(images))
        return redness(images, prompts, metadata)

    trainer = make_trainer(tmp_path, [counted], max_steps=2, reward_warmup=2)
    trainer.train()
    assert calls == [8]  # at the first step, so that a reward that fails does so before hours of warm-up
    warm = {key: value.clone() for key, value in trainer.model.adapter_state("student").items()}
    plain = make_trainer(tmp_path, max_steps=2)
    plain.train()
    for key, value in plain.model.adapter_state("student").items():
        assert torch.equal(value, warm[key]), key
    calls.clear()
    make_trainer(tmp_path, [counted], max_steps=4, reward_warmup=2).train()
    assert calls == [8] * 3


def test_async_rewards_work_while_the_teacher_does(tmp_path, monkeypatch):
    started, probe = threading.Event(), matching.probe

    async def far_away(images, prompts, metadata):
        started.set()
        await asyncio.sleep(0)
        return images.mean((1, 2, 3))

    def probe_that_waits(*args):
        assert started.wait(10), "the reward was not asked before the teacher was"
        return probe(*args)

    monkeypatch.setattr(matching, "probe", probe_that_waits)
    make_trainer(tmp_path, [far_away], max_steps=1).train()


def test_reward_gradients_act_at_the_last_steps_only(tmp_path, monkeypatch):
    def reddish(images, prompts, metadata):
        return redness(images, prompts, metadata)

    reddish.differentiable = True
    monkeypatch.setattr(policy, "draw_exit_steps", lambda *args: torch.tensor([0, 1]).repeat_interleave(4))
    directions = {}
    for weight, steps in ((0.0, None), (5.0, None), (5.0, 1)):
        trainer = make_trainer(
            tmp_path,
            [reddish],
            reward_mixing="sum",
            reward_weights=[weight],
            reward_gradient_steps=steps,
            sample_num_steps=2,
        )
        directions[weight, steps] = trainer._prepare_inputs([{"prompt": "a"}] * 8)["feedback"].direction
    plain, everywhere, late = directions.values()
    assert torch.equal(late[:4], plain[:4]) and torch.equal(late[4:], everywhere[4:])
    assert not torch.equal(plain[:4], everywhere[:4]) and not torch.equal(plain[4:], everywhere[4:])


def test_a_checkpoint_of_other_rewards_is_refused(tmp_path):
    make_trainer(tmp_path, [redness], max_steps=1, save_strategy="steps", save_steps=1).train()
    trainer = make_trainer(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=r"other settings: `reward_funcs` was \['redness'\], is \[\]"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_rewards_from_the_config(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_this_test.py").write_text(
        "def darkness(images, prompts, metadata):\n    return -images.mean((1, 2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    config = make_config(tmp_path, reward_funcs=["rewards_of_this_test:darkness", "jpeg_compressibility", redness])
    trainer = make_trainer(tmp_path, lambda images, prompts, metadata: [0.0] * len(images), config=config)
    trainer.train()
    assert trainer.rewards.names == ["<lambda>", "darkness", "jpeg_compressibility", "redness"]
    trainer.save_model()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["settings"]["reward_funcs"] == trainer.rewards.names
    card = (tmp_path / "run" / "README.md").read_text()
    assert (
        "with the rewards `<lambda>`, `darkness`, `jpeg_compressibility`, `redness` (`reward_mixing='adaptive'`)"
        in card
    )
    assert json.loads(config.to_json_string())["reward_funcs"][2] == "redness"


@pytest.mark.parametrize("mixing", ["sum", "adaptive"])
def test_a_constant_reward_has_no_effect(tmp_path, mixing):
    def constant(images, prompts, metadata):
        return [0.5] * len(images)

    trainer = make_trainer(tmp_path, [constant], reward_mixing=mixing)
    feedback = trainer._prepare_inputs([{"prompt": "a"}] * 8)["feedback"]
    assert (feedback.advantage == 0).all() and feedback.direction.abs().sum() > 0
    trainer.train()
    assert logs_of(trainer)["frac_reward_zero_std"] == 1.0


def test_a_warning_says_which_figure_left_its_range(monkeypatch):
    warnings = []
    monkeypatch.setattr(callbacks.logger, "warning", warnings.append)
    callback, state = callbacks.DriftWarningCallback(), TrainerState(global_step=40)
    for diversity in (0.5, 0.6, 0.26, 0.2, 0.1):
        logs = {"x0/diversity": diversity, "x0/std": 1.0, "step": 40}
        state.log_history.append(logs)
        callback.on_log(None, state, None, logs)
    assert len(warnings) == 1  # once, and the spread did not move
    assert warnings[0].startswith(
        "x0/diversity is 0.2 at step 40, 0.40 times its first value (0.5). Look at the samples"
    )


def test_a_warning_where_the_fake_score_is_left_behind(monkeypatch):
    warnings = []
    monkeypatch.setattr(callbacks.logger, "warning", warnings.append)
    callback, state = callbacks.DriftWarningCallback(), TrainerState(global_step=40)
    for error in (50.0, 20.0, 20.0, 9.0, 11.0, 30.0, 300.0, 300.0):  # the first is of next to no direction
        logs = {"dm/fake_error": error, "step": 40}
        state.log_history.append(logs)
        callback.on_log(None, state, None, logs)
    assert len(warnings) == 1 and warnings[0].startswith("dm/fake_error is 300 at step 40")


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [1.0, 0.3]),  # black boxes come first
        (dict(reward_gradients=False), [1.0, 1.0]),
        (dict(reward_mixing="sum"), [1.0, 1.0]),
        (dict(reward_mixing="constrained", target_dm=1.0), [1.0, 1.0]),
        (dict(reward_weights=[0.5, 2.0]), [2.0, 0.5]),
    ],
)
def test_weights_by_default(tmp_path, options, weights):
    def reddish(images, prompts, metadata):
        return redness(images, prompts, metadata)

    reddish.differentiable = True
    trainer = make_trainer(tmp_path, [reddish, redness], **options)
    assert trainer.rewards.mixer.weights.tolist() == pytest.approx(weights)
    if "reward_weights" not in options:
        weights = None if weights == [1.0, 1.0] else [0.3, 1.0]
        assert trainer.settings()["reward_weights"] == weights  # a run of before, of 1 each, is another


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        (dict(reward_weights=[0.5, 0.5, 0.0]), True),
        (dict(reward_weights=[-0.5, 0.5, 0.0]), True),
        (dict(reward_weights=[0.5, 0.4, 9.0]), False),  # a black box's push is mostly noise
        (dict(reward_weights=[0.5, 0.5, 0.0], dm_weight=2.0), False),
        (dict(reward_weights=[0.5, 0.5, 0.0], reward_mixing="sum"), False),
        ({}, False),  # 0.15 each
    ],
)
def test_shares_without_a_point_of_rest_are_warned_of(tmp_path, monkeypatch, options, warns):
    def reddish(images, prompts, metadata):
        return redness(images, prompts, metadata)

    def bright(images, prompts, metadata):
        return images.mean((1, 2, 3))

    reddish.differentiable = bright.differentiable = True
    warnings = []
    monkeypatch.setattr(panel.logger, "warning_once", warnings.append)
    make_trainer(tmp_path, [reddish, bright, redness], **options)
    assert ["add up to 1. From 1 on" in warning for warning in warnings] == [True] * warns


def test_a_reward_is_maximised(tmp_path):
    """A black-box reward alone (no distribution matching): its mean on new noise rises, and falls by its negative."""

    def end(weight):
        trainer = learner(tmp_path, redness, dm_weight=0.0, reward_weights=[weight], **LEARNING)
        trainer.train()
        return trainer.evaluate()["eval_redness"]

    assert end(1.0) > end(-1.0) + 0.01


@pytest.mark.parametrize("mixing", ["sum", "adaptive"])
def test_conflicting_rewards_act_by_their_weights(tmp_path, mixing):
    """Compressible against incompressible: 1:1 says nothing, 3:1 says what the first says alone, and how loudly."""
    names = ["jpeg_compressibility", "jpeg_incompressibility"]

    def advantage(rewards, weights):
        trainer = make_trainer(tmp_path, reward_funcs=rewards, reward_weights=weights, reward_mixing=mixing)
        return trainer._prepare_inputs([{"prompt": "a"}] * 8)["feedback"].advantage

    alone, even, uneven = advantage(names[:1], [1.0]), advantage(names, [1.0, 1.0]), advantage(names, [3.0, 1.0])
    assert alone.abs().max() > 1e-3
    assert even.abs().max() < 1e-4 * alone.abs().max()
    # "sum" gives the normalised sum of both the weight of both, 4; "adaptive" adds shares, 3 - 1.
    torch.testing.assert_close(uneven, alone * (4 if mixing == "sum" else 2), rtol=1e-2, atol=1e-5)
