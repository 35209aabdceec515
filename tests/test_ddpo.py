# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The interface of TRL's former DDPO trainer."""

import pytest
import torch
from conftest import PROMPTS, make_config, make_tiny_pipeline, make_trainer, redness
from peft import LoraConfig

from rdm_trl import RdmDistillTrainer


def test_ddpo_loss(tmp_path):
    trainer = make_trainer(tmp_path)
    advantage = torch.tensor([-1.0])
    assert trainer.loss(advantage, 1e-4, torch.ones(1)).item() == 1.0
    assert trainer.loss(advantage, 0.2, torch.full((1,), 2.0)).item() == 2.0
    assert trainer.loss(-advantage, 0.2, torch.full((1,), 2.0)).item() == pytest.approx(-1.2)


def test_ddpo_generate_samples_and_calculate_loss(tmp_path):
    trainer = make_trainer(tmp_path)
    samples, pairs = trainer._generate_samples(iterations=2, batch_size=3)
    assert len(samples) == len(pairs) == 2
    sample = samples[0]
    assert sample["prompt_ids"].shape == (3, 16)
    assert sample["prompt_embeds"].shape == sample["negative_prompt_embeds"].shape == (3, 16, 16)
    assert sample["timesteps"].tolist() == [[999, 749, 499]] * 3
    assert sample["latents"].shape == sample["next_latents"].shape == (3, 3, 4, 4, 4)
    assert torch.equal(sample["latents"][:, 1:], sample["next_latents"][:, :-1])
    assert sample["log_probs"].shape == (3, 3)
    images, prompts, metadata = pairs[0]
    assert images.shape == (3, 3, 8, 8) and images.min() >= 0 and images.max() <= 1
    assert len(prompts) == len(metadata) == 3 and set(prompts) <= set(PROMPTS)

    advantages = torch.tensor([1.0, -2.0, 0.5])
    for k in range(3):
        loss, approx_kl, clipfrac = trainer.calculate_loss(
            sample["latents"][:, k],
            sample["timesteps"][:, k],
            sample["next_latents"][:, k],
            sample["log_probs"][:, k],
            advantages,
            sample["prompt_embeds"],
        )
        assert loss.item() == -advantages.mean().item()  # the ratio is exactly 1
        assert approx_kl.item() == 0.0 and clipfrac.item() == 0.0
    loss.backward()
    assert any(p.grad.abs().sum() > 0 for p in trainer.model.adapter_parameters("student"))
    _, approx_kl, clipfrac = trainer.calculate_loss(
        sample["latents"][:, 0],
        sample["timesteps"][:, 0],
        sample["next_latents"][:, 0],
        sample["log_probs"][:, 0] - 0.2,
        advantages,
        sample["prompt_embeds"],
    )
    assert approx_kl.item() == pytest.approx(0.02, rel=1e-3) and clipfrac.item() == 1.0
    with pytest.raises(ValueError, match="last denoising step is deterministic"):
        trainer.calculate_loss(sample["latents"][:, 0], torch.full((3,), 249), None, None, None, None)


@pytest.mark.parametrize("is_async", [False, True])
def test_ddpo_compute_rewards(tmp_path, is_async):
    def scored(images, prompts, metadata):
        return [len(prompt) for prompt in prompts], {"seen": metadata}

    def keywords(images, prompts, colour, **kwargs):
        return [None if c is None else float(c == "red") for c in colour]

    trainer = make_trainer(tmp_path, [scored, keywords])
    metadata = [{"colour": "red"}, {"colour": None}]
    pairs = [[torch.zeros(2, 3, 8, 8), ["a", "abc"], metadata]] * 2
    rewards, infos = trainer.compute_rewards(pairs, is_async=is_async)
    assert len(rewards) == len(infos) == 2
    for values, info in zip(rewards, infos, strict=True):
        torch.testing.assert_close(values, torch.tensor([[1.0, 1.0], [3.0, torch.nan]]), equal_nan=True)
        assert info["scored"] == {"seen": metadata}
    # With one reward function, as DDPO had, a number an image and what the function itself returned.
    (values, _), (info, _) = make_trainer(tmp_path, [scored]).compute_rewards(pairs, is_async=is_async)
    torch.testing.assert_close(values, torch.tensor([1.0, 3.0]))
    assert info == {"seen": metadata}


class FromDDPO(RdmDistillTrainer):
    """Written for TRL's trainer: it changes what `super()` scored."""

    def compute_rewards(self, prompt_image_pairs, is_async=False):
        rewards, metadata = super().compute_rewards(prompt_image_pairs, is_async)
        self.asked = [images.shape for images, _, _ in prompt_image_pairs]
        return [-10 * values for values in rewards], [{"before": values} for values in rewards]


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_subclass_for_ddpo_changes_what_training_and_evaluation_see(tmp_path, monkeypatch, differentiable):
    def scored(images, prompts, metadata):
        return images.mean(dim=(1, 2, 3)), {}

    scored.differentiable = differentiable
    shown = []
    plain = make_trainer(tmp_path / "plain", [scored], reward_gradients=False)
    monkeypatch.setattr("conftest.RdmDistillTrainer", FromDDPO)
    ported = make_trainer(tmp_path / "ported", [scored])

    rows = [{"prompt": "a"}] * 8
    feedbacks = []
    for trainer in (plain, ported):
        trainer.image_samples_callback = lambda data, *_: shown.append(data[-1])
        torch.manual_seed(0)
        feedbacks.append(trainer._prepare_inputs(rows)["feedback"])
    (images, _, _, before, _), (_, _, _, after, details) = shown
    torch.testing.assert_close(after, -10 * before)
    torch.testing.assert_close(details["before"], before)
    assert ported.asked == [images.shape]
    # The normalised advantage of minus a reward is minus its own.
    assert feedbacks[0].advantage.abs().max() > 0
    torch.testing.assert_close(feedbacks[1].advantage, -feedbacks[0].advantage, rtol=1e-3, atol=1e-5)
    figures = plain.evaluate(), ported.evaluate()
    assert figures[1]["eval_teacher_scored"] == pytest.approx(-10 * figures[0]["eval_teacher_scored"], rel=1e-4)


def test_no_rewards_are_no_columns(tmp_path):
    shown = []
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.image_samples_callback = lambda data, *_: shown.append(data[-1])
    trainer.train()
    assert shown[0][3].shape == (8, 0)
    trainer.evaluate()
    assert trainer.metrics["student"]["rewards"] == {}


def test_a_subclass_for_ddpo_with_too_few_rewards(tmp_path, monkeypatch):
    monkeypatch.setattr("conftest.RdmDistillTrainer", FromDDPO)
    trainer = make_trainer(tmp_path, [redness])
    monkeypatch.setattr(RdmDistillTrainer, "compute_rewards", lambda *args: ([torch.zeros(3)], [{}]))
    with pytest.raises(ValueError, match=r"rewards of the shape \(3, 1\), .* must be \(8, 1\), one row an image"):
        trainer.train()


def test_ddpo_hook_and_prompt_function(tmp_path):
    calls = []

    def prompt_function():
        return "a bag", {"id": torch.randint(100, ()).item()}

    def hook(prompt_image_data, global_step, tracker):
        calls.append((prompt_image_data, global_step))
        images = prompt_image_data[-1][0]
        tracker.log_images({"a/b": images}, step=global_step)
        tracker.log_images({"one": trainer.family.to_pil(images)[0]}, step=global_step)

    trainer = RdmDistillTrainer(
        make_config(tmp_path), redness, prompt_function, make_tiny_pipeline(), hook, peft_config=LoraConfig(r=2)
    )
    trainer.train()
    assert [step for _, step in calls] == [0, 1]
    images, prompts, metadata, rewards, reward_metadata = calls[0][0][0]
    assert images.shape == (8, 3, 8, 8) and prompts == ["a bag"] * 8
    assert all(isinstance(row["id"], int) for row in metadata)
    torch.testing.assert_close(rewards, redness(images, prompts, metadata))
    assert reward_metadata == {}
    assert (tmp_path / "run" / "samples" / "a_b-0.png").is_file()
