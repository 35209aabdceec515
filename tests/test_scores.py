# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What learns beside the student by denoising: the learned target against the fake score, and runs with it."""

from functools import partial

import pytest
import torch
from conftest import PROMPTS, redness
from safetensors.torch import load_file
from test_guidance import absorbing, check_equal
from tiny_pipelines import CASES, make, make_family_trainer
from transformers import TrainerCallback

from rdm_trl import guidance, scores
from rdm_trl.method import matching


def test_at_the_teacher_nothing_is_left_within_a_prompt(tmp_path):
    """
    Shown the same images learned target and fake score stay one network, however much of it they have learned: R_dm's
    direction is then the same for all images of a prompt, and it is not without.
    """
    trainer = absorbing(tmp_path, learn_target=True, fake_learning_rate=1e-2, max_steps=1)
    trainer.absorb_guidance()
    trainer.create_optimizer()
    learned = trainer.learned_target
    assert learned.latents.shape == (6, *trainer.family.latent_shape) and len(learned.prompts) == 6
    for step in range(5):
        prompts = [learned.prompts[i] for i in (0, 1, 2, 3, 4, 5, 0, 1)]
        torch.manual_seed(step)
        rows = learned.choose(prompts)  # which images a student at its teacher would have drawn
        batch = learned.latents[rows], trainer.encode(prompts), torch.full((8,), 0.25), prompts
        noisy = scores.add_noise_to(trainer, [batch])
        trainer.fake_score.update(scores.denoising_loss_of(trainer, "fake"), noisy)
        torch.manual_seed(step)
        elsewhere = [(torch.zeros_like(x0), *rest) for x0, *rest in noisy]
        learned.update([prompts], elsewhere)
    check = trainer.model.adapter_state
    for key, value in check("fake").items():
        torch.testing.assert_close(check("target")[key], value, atol=1e-6, rtol=1e-5)
    assert sum(value.abs().sum() for key, value in check("fake").items() if "lora_B" in key) > 0

    x_t, condition = torch.randn(8, *trainer.family.latent_shape), trainer.encode([PROMPTS[0]] * 4 + [PROMPTS[1]] * 4)
    timesteps = trainer.student_timesteps[2].expand(8)
    with torch.no_grad():
        fake = trainer.predict_x0(trainer.model, "fake", x_t, timesteps, condition)
        fitted = guidance.predict_target(trainer, x_t, timesteps, condition)
        found = learned.predict(fitted, x_t, timesteps, condition)
    direction, without = ((prediction - fake).view(2, 4, -1) for prediction in (found, fitted))
    torch.testing.assert_close(direction, without.mean(1, keepdim=True).expand_as(without), atol=1e-4, rtol=1e-4)
    assert without.std(1).mean() > 100 * direction.std(1).mean()


def test_it_learns_images_of_the_prompts_that_the_fake_score_learns(tmp_path):
    trainer = absorbing(tmp_path, learn_target=True)
    trainer.absorb_guidance()
    learned = trainer.learned_target
    chosen = [learned.choose([*learned.prompts, "of which there is none"]) for _ in range(40)]
    assert all([learned.prompts[row] for row in rows[:-1]] == learned.prompts for rows in chosen)
    assert {rows[-1] for rows in chosen} == set(range(6))
    # And of several images of a prompt each.
    same = {i for i, prompt in enumerate(learned.prompts) if prompt == learned.prompts[0]}
    assert len(same) > 1 and {rows[0] for rows in chosen} == same


def test_both_learn_the_same_prompts_levels_and_noise(tmp_path):
    """In a run, update for update; of images that are not the same."""
    trainer = absorbing(tmp_path, learn_target=True, fake_updates=2, gradient_accumulation_steps=2, max_steps=2)
    found = {"fake": [], "target": []}

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            for role, score in (("fake", trainer.fake_score), ("target", trainer.learned_target.score)):
                score.update = partial(watched, found[role], score.update)

    def watched(seen, update, loss, batches):
        seen.extend(batches)
        return update(loss, batches)

    trainer.add_callback(Watch())
    trainer.train()
    assert len(found["fake"]) == len(found["target"]) == 2 * 2 * 2
    drawn = {image.numpy().tobytes() for image in trainer.learned_target.latents}
    for (x0, condition, *rest), (own, own_condition, *own_rest) in zip(*found.values(), strict=True):
        assert all(torch.equal(*pair) for pair in zip(rest, own_rest, strict=True)) and len(rest) == 2
        assert all(torch.equal(condition[key], own_condition[key]) for key in condition)
        assert all(image.numpy().tobytes() in drawn for image in own) and not torch.equal(x0, own)
    # Each update has draws of its own.
    assert len({noise.numpy().tobytes() for *_, noise in found["fake"]}) == 2 * 2 * 2


def test_a_used_rollout_meets_the_target_of_now(tmp_path, monkeypatch):
    """It is judged against the fake score of now: what the two have unlearned has to be of as many updates."""
    trainer = absorbing(tmp_path, learn_target=True, num_iterations=2, target_kl=None, max_steps=4)
    seen, predict, judged, probe = [], trainer.learned_target.predict, [], matching.probe

    def watched_probe(*args):
        judged.append((args[3], probe(*args)))
        return judged[-1][-1]

    def watched(found, x_t, *rest):
        seen.append((found, x_t, predict(found, x_t, *rest)))
        return seen[-1][-1]

    trainer.learned_target.predict = watched
    monkeypatch.setattr(matching, "probe", watched_probe)
    trainer.train()
    assert len(seen) == len(judged) == 4
    # It is what the student's images are held against.
    for (*_, predicted), (x0, found) in zip(seen, judged, strict=True):
        assert torch.equal(found.distance, (x0 - predicted).abs())
    for (found, x_t, first), (kept, again, second) in (seen[:2], seen[2:]):
        assert torch.equal(found, kept) and torch.equal(x_t, again) and not torch.equal(first, second)
    assert not torch.equal(seen[0][1], seen[2][1])


def test_a_run_goes_on_exactly(tmp_path):
    options = dict(learn_target=True, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2)
    whole = absorbing(tmp_path / "whole", [redness], max_steps=4, **options)
    whole.train()
    absorbing(tmp_path, [redness], max_steps=2, **options).train()
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "adapters.safetensors")
    assert any(key.startswith("target.") for key in saved)
    resumed = absorbing(tmp_path, [redness], max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    check_equal(resumed, whole, whole.model.adapters)
    assert "target" in whole.model.adapters and not torch.equal(*map(b_of, (whole, whole), ("target", "fake")))
    # The saved student is it alone; the card says how it was made.
    whole.save_model()
    assert not any("target" in key for key in load_file(tmp_path / "whole/run/pytorch_lora_weights.safetensors"))
    assert "an adapter learned how those of one prompt differ" in (tmp_path / "whole/run/README.md").read_text()


def b_of(trainer, role):
    return next(value for key, value in trainer.model.adapter_state(role).items() if "lora_B" in key)


def test_without_it_checkpoints_are_those_of_before(tmp_path):
    trainer = absorbing(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    assert "learn_target" not in trainer.settings()
    other = absorbing(tmp_path, learn_target=True, max_steps=2)
    with pytest.raises(ValueError, match="`learn_target` was None, is True"):
        other.train(resume_from_checkpoint=True)
    changed = absorbing(tmp_path, learn_target=True, max_steps=2, resume_with_changes=True)
    changed.train(resume_from_checkpoint=True)
    assert changed.state.global_step == 2


@pytest.mark.parametrize("name", ["sd3", "flux_dev", "dit", "wan"])
def test_families(name, tmp_path):
    """A group's mean is the fitted target's, and how its images differ is the adapter's."""
    case = CASES[name]
    options = dict(num_teacher_images=2, teacher_guidance_scale=3.0, teacher_cache_dir=str(tmp_path / "cache"))
    trainer = make_family_trainer(case, tmp_path, make(case), (), learn_target=True, **options, **case.size)
    trainer.train()
    assert b_of(trainer, "target").abs().sum() > 0
    group = trainer.args.num_generations
    x_t, condition = torch.randn(group, *trainer.family.latent_shape), trainer.encode([case.prompts[0]] * group)
    timesteps = trainer.student_timesteps[1].expand(group)
    with torch.no_grad():
        fitted = guidance.predict_target(trainer, x_t, timesteps, condition)
        learned = trainer.predict_x0(trainer.model, "target", x_t, timesteps, condition)
        found = trainer.learned_target.predict(fitted, x_t, timesteps, condition)
    torch.testing.assert_close(found.mean(0), fitted.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0] - found[1], learned[0] - learned[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, fitted, atol=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_teacher_images=0), "this run has none"),
        (dict(num_teacher_images=0, teacher_guidance_scale=1.0), "this run has none"),
        (dict(dm_centering="none", dm_timestep_sampling="uniform"), "which is 'uniform'"),
        (dict(peft_config=False), "`learn_target` is an adapter"),
    ],
)
def test_what_it_needs(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        absorbing(tmp_path, learn_target=True, **options)


def test_a_pipeline_without_guidance(tmp_path):
    with pytest.raises(ValueError, match="this run has none"):
        make_family_trainer(CASES["ddpm"], tmp_path, make(CASES["ddpm"]), (), learn_target=True)
