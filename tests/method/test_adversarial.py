# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The discriminator on a mixture of Gaussians, on features of networks, and in whole runs."""

import pytest
import torch
from conftest import logs_of, make_tiny_pipeline, make_trainer, redness
from datasets import Dataset, DatasetDict
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny_pipelines import CASES, make, make_family_trainer
from torch import nn

from rdm_trl import real_images
from rdm_trl.guardrails import drift_warnings
from rdm_trl.method import adversarial, losses, matching
from rdm_trl.method.advantages import Mixer
from rdm_trl.method.diffusion import NoiseProcess
from rdm_trl.models.pipelines import family_of


# ------------------------------------------------------------------------------------------------------ pure functions


class TinyDenoiser(nn.Module):
    """Of points (B, 2), with a middle whose features the head sees."""

    def __init__(self):
        super().__init__()
        self.mid_block = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.last = nn.Linear(64, 2)

    def forward(self, x_t, timesteps):
        return self.last(self.mid_block(torch.cat([x_t, timesteps[:, None] / 1000], 1)))


CENTRE, STD = torch.tensor([1.0, 0.0]), 0.4


def left_share(weight: float, updates: int = 400, number: int = 96) -> float:
    """Share of a one-step student's points at x < 0; its teacher knows the mode at +1, the data also one at -1."""
    torch.manual_seed(0)
    process = NoiseProcess(FlowMatchEulerDiscreteScheduler())
    fake, head = TinyDenoiser(), adversarial.Head([64])
    student = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizers = [torch.optim.Adam(m.parameters(), lr=lr) for m, lr in ((student, 1e-3), (fake, 3e-3), (head, 3e-3))]
    mixer = Mixer("adaptive", torch.tensor([weight] if weight else []), 1.0, 1)
    no_steps = torch.zeros(number, dtype=torch.long)

    def teacher(x_t, timesteps):
        a, b = process.coefficients(timesteps, x_t)
        return CENTRE + a * STD**2 / (a**2 * STD**2 + b**2) * (x_t - a * CENTRE)

    def features(x_t, timesteps) -> list[torch.Tensor]:
        with adversarial.capture(adversarial.feature_blocks(fake)) as found:
            fake(x_t, timesteps)
        return found

    def draws() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(number, 2), process.timesteps_at(0.02 + 0.96 * torch.rand(number))

    def step(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def push(x0, noise, t):
        return adversarial.log_odds_gradient(lambda x: head(features(process.add_noise(x, noise, t), t)), x0)

    for update in range(updates):
        x0, (noise, t) = student(2.5 * torch.randn(number, 2)), draws()
        probe = matching.probe(teacher, fake, process, x0.detach(), noise, t)
        dm = matching.normalize(probe, "batch", 1)
        pushes = [push(x0, noise, t)] if weight else []
        feedback = mixer(dm, pushes, torch.zeros(number), no_steps, probe.reward)
        if update >= 60:  # fake score and head first
            step(optimizers[0], losses.student_loss(x0, feedback.direction))
        x0, (noise, t) = x0.detach(), draws()
        step(optimizers[1], losses.denoising_loss(fake(process.add_noise(x0, noise, t), t), x0))
        if weight:
            real = torch.randn(number, 1).sign() * CENTRE + STD * torch.randn(number, 2)
            sides = [real, real + adversarial.R1_STEP * torch.randn_like(real), x0]
            with torch.no_grad():
                found = features(process.add_noise(torch.cat(sides), noise.repeat(3, 1), t.repeat(3)), t.repeat(3))
            real, moved, drawn = head(found).chunk(3)
            step(optimizers[2], adversarial.discriminator_loss(real, drawn, moved))
    with torch.no_grad():
        return (student(2.5 * torch.randn(4000, 2))[:, 0] < 0).float().mean().item()


def test_real_data_show_the_student_a_mode_that_its_teacher_misses():
    assert left_share(0.0) < 0.1
    assert 0.3 < left_share(3.0) < 0.7


def test_the_gradient_is_that_of_the_log_odds_and_reaches_no_parameter():
    """Of the head's own formula, at any noise; the head's update leaves the network alone in turn."""
    torch.manual_seed(0)
    network, head = TinyDenoiser(), adversarial.Head([64])
    nn.init.normal_(head.outputs[0].weight)
    t, x0 = torch.full((4,), 300.0), torch.randn(4, 2)

    def log_odds(x):
        with adversarial.capture([network.mid_block]) as features:
            network(x, t)
        return head(features)

    push, step = adversarial.log_odds_gradient(log_odds, x0), 1e-3
    for d in range(2):
        shift = step * torch.eye(2)[d]
        with torch.no_grad():
            difference = (log_odds(x0 + shift) - log_odds(x0 - shift)) / (2 * step)
        torch.testing.assert_close(push[:, d], 2 * difference, rtol=1e-2, atol=1e-3)
    assert all(p.grad is None for p in (*network.parameters(), *head.parameters()))


def test_the_loss_at_known_log_odds():
    zero, one = torch.zeros(3), torch.ones(3)
    assert adversarial.discriminator_loss(zero, zero, zero).item() == pytest.approx(2 * 0.6931, abs=1e-3)
    assert adversarial.discriminator_loss(one, -one, one) < adversarial.discriminator_loss(-one, one, -one) - 1
    moved = torch.full((3,), adversarial.R1_STEP)  # a slope of 1
    steep = adversarial.discriminator_loss(zero, zero, moved) - adversarial.discriminator_loss(zero, zero, zero)
    assert steep.item() == pytest.approx(adversarial.R1_WEIGHT, rel=1e-4)
    seen = adversarial.figures(torch.tensor([1.0, -1.0]), torch.tensor([-2.0, -2.0]))
    assert seen["adversarial/accuracy"] == 0.75 and seen["adversarial/fake"] == -2


def test_a_network_is_left_behind_the_last_block_that_is_looked_at():
    network, x_t, t = TinyDenoiser(), torch.randn(4, 2), torch.zeros(4)
    with adversarial.capture([network.mid_block]) as whole:
        network(x_t, t)
    calls = []
    network.last.register_forward_hook(lambda *_: calls.append(1))
    with adversarial.capture([network.mid_block], stop=True) as found:
        network(x_t, t)
    assert not calls and torch.equal(found[0], whole[0])
    network(x_t, t)  # no hook is left
    assert calls


def test_features_of_any_form():
    head = adversarial.Head([6, 5, 4])
    assert head([torch.randn(2, 6, 3, 3), torch.randn(2, 7, 5), torch.randn(2, 4)]).shape == (2,)
    assert [len(adversarial.spread(list(range(n)))) for n in (1, 2, 3, 24)] == [1, 2, 3, 3]
    assert adversarial.spread(list(range(24))) == [6, 12, 17]
    with pytest.raises(ValueError, match="Linear has neither a `mid_block` nor a list"):
        adversarial.feature_blocks(nn.Linear(1, 1))


def test_blocks_that_do_not_see_the_image_are_not_looked_at():
    """One that refines the prompt alone has a graph too, where an adapter in it is trained."""
    prompt, image, unused = nn.Linear(3, 5), nn.Linear(2, 4), nn.Linear(2, 2)
    blocks, widths = adversarial.blocks_that_see(
        [prompt, image, unused], lambda x_t: image(x_t) * prompt(torch.ones(1, 3)).sum(), torch.randn(1, 2)
    )
    assert blocks == [image] and widths == [4]
    with pytest.raises(ValueError, match="no block of it sees the image"):
        adversarial.blocks_that_see([prompt], lambda x_t: prompt(torch.ones(1, 3)), torch.randn(1, 2))


# ---------------------------------------------------------------------------------------------------------- whole runs


def save_images(folder, number: int = 10, captions=("a photo of a bag", "a dress"), **columns):
    """A data set of coloured images that are not square, on disk."""
    images = [Image.new("RGB", (12, 9), (20 * i, 255 - 20 * i, 90)) for i in range(number)]
    rows = {"image": images, **columns}
    if captions is not None:
        rows["prompt"] = [captions[i % len(captions)] for i in range(number)]
    Dataset.from_dict(rows).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def real(tmp_path):
    return dict(adversarial_weight=0.5, image_dataset=save_images(tmp_path / "real"))


def weights_of(trainer) -> dict[str, torch.Tensor]:
    adapters = {f"{n}.{k}": v for n in trainer.model.adapters for k, v in trainer.model.adapter_state(n).items()}
    return {**adapters, **{f"head.{k}": v.clone() for k, v in trainer.adversary.head.state_dict().items()}}


# Real videos are not read.
IMAGES = [name for name in CASES if name not in ("wan", "ltx")]


@pytest.mark.parametrize("name", IMAGES)
def test_every_family(name, tmp_path, real):
    """Real images are encoded, some blocks see the image, and student and head learn from each other."""
    case = CASES[name]
    pipeline = make(case)
    captions = ("",) if name in ("ddpm", "ddim") else case.prompts
    real["image_dataset"] = save_images(tmp_path / "captioned", captions=captions)
    trainer = make_family_trainer(case, tmp_path, pipeline, rewards=(), max_steps=2, **real, **case.size)
    before = weights_of(trainer)
    trainer.train()
    changed = {key for key, value in weights_of(trainer).items() if not torch.equal(value, before[key])}
    assert {key.split(".")[0] for key in changed} == {"student", "fake", "ema", "head"}
    logs = logs_of(trainer)
    assert logs["reward_weight/adversarial"] > 0 and 0 <= logs["adversarial/accuracy"] <= 1
    assert trainer.adversary.images.latents.shape == (10, *trainer.family.latent_shape)


@pytest.mark.parametrize("name", IMAGES)
def test_encoding_undoes_decoding(name, monkeypatch):
    """But for the autoencoder itself: what it decodes is what it had encoded."""
    family = family_of(make(CASES[name]), *CASES[name].size.values())
    torch.manual_seed(0)
    if name in ("ddpm", "ddim"):
        images = torch.rand(2, 1, family.height, family.width).expand(-1, 3, -1, -1)
        torch.testing.assert_close(family.decode(family.encode_images(images)), images)
        return
    vae, seen = family.pipeline.vae, []
    images = torch.rand(2, 3, family.height, family.width)
    encode = vae.encode

    def record(pixels, return_dict):
        encoded = encode(pixels, return_dict=return_dict)[0]
        seen.append(encoded if isinstance(encoded, torch.Tensor) else encoded.mode())
        assert pixels.min() < -0.5
        return (encoded,)

    def compare(latents, return_dict):
        seen.append(latents)
        return (torch.zeros(2, 3, *latents.shape[2:]),)

    monkeypatch.setattr(vae, "encode", record)
    monkeypatch.setattr(vae, "decode", compare)
    with torch.no_grad():
        latents = family.encode_images(images)
        family.decode(latents)
    assert latents.shape[1:] == family.latent_shape
    torch.testing.assert_close(seen[1], seen[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"activation_checkpointing": True}, {"peft_config": False}])
def test_gradients_reach_the_student_alone_and_the_head_alone(tmp_path, real, options):
    trainer = make_trainer(tmp_path, **real, **options)
    trainer.train()
    head, score = trainer.adversary.head, trainer.adversary.score
    head.zero_grad()
    trainer.model.zero_grad()
    inputs = trainer._prepare_inputs([{"prompt": "a dress"}] * 8)
    trainer.compute_loss(trainer.model, inputs).backward()
    assert all(p.grad is None for p in (*head.parameters(), *trainer.model.adapter_parameters("fake", "ema")))
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.model.adapter_parameters("student"))
    trainer.model.zero_grad()
    found, step = [], score.optimizer.step

    def look():
        found.extend(p.grad.abs().sum() for p in head.parameters())
        step()

    score.optimizer.step = look
    trainer.adversary.update(trainer._fake_batches)
    assert found and sum(found) > 0
    assert all(p.grad is None for p in trainer.model.parameters())


def test_the_push_is_that_of_the_head_of_now_in_every_use_of_a_rollout(tmp_path, real, monkeypatch):
    trainer = make_trainer(tmp_path, num_iterations=2, max_steps=4, learning_rate=0.01, **real)
    seen, push = [], trainer.adversary.push

    def record(x0, noise, timesteps, condition):
        seen.append((x0.clone(), noise.clone(), weights_of(trainer)["head.outputs.0.weight"]))
        return push(x0, noise, timesteps, condition)

    monkeypatch.setattr(trainer.adversary, "push", record)
    trainer.train()
    assert len(seen) == 4
    for first, second in (seen[:2], seen[2:]):
        assert torch.equal(first[1], second[1]) and not torch.equal(
            first[0], second[0]
        )  # a draw, and what is there now
        assert not torch.equal(first[2], second[2])


@pytest.mark.parametrize("mixing", ["sum", "adaptive", "constrained"])
def test_it_is_mixed_like_any_other_reward(tmp_path, real, mixing):
    """Beside another reward and behind the warm-up; with the sum by the weight itself."""
    target = 0.1 if mixing == "constrained" else None
    options = dict(reward_mixing=mixing, target_dm=target, reward_warmup=2, max_steps=4)
    trainer = make_trainer(tmp_path, [redness], **real, **options)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert ["reward_weight/adversarial" in row for row in rows] == [False, False, True, True]
    assert all("adversarial/real" in row for row in rows)  # it learns meanwhile
    weight = rows[-1]["reward_weight/adversarial"]
    assert weight == 0.5 if mixing == "sum" else weight > 0
    assert trainer.rewards.push_names[-1] == "adversarial"


def test_without_captions_both_sides_are_looked_at_without_prompts(tmp_path, real, monkeypatch):
    real["image_dataset"] = save_images(tmp_path / "plain", captions=None)
    trainer = make_trainer(tmp_path, **real)
    conditions, features = [], trainer.adversary.features

    def record(x_t, timesteps, condition):
        conditions.append(condition["prompt_embeds"])
        return features(x_t, timesteps, condition)

    monkeypatch.setattr(trainer.adversary, "features", record)
    trainer.train()
    empty = trainer.encode([""])["prompt_embeds"]
    assert conditions and all(torch.equal(c, empty.expand_as(c)) for c in conditions)


@pytest.mark.parametrize("name", ["sd_epsilon", "sd3"])
def test_a_run_goes_on_to_the_bit(tmp_path, real, name):
    case = CASES[name]
    saving = dict(save_strategy="steps", save_steps=1, num_iterations=2)  # in the middle of a rollout's use

    def run(folder, steps, resume=None):
        trainer = make_family_trainer(case, folder, make(case), max_steps=steps, **real, **saving, **case.size)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "parts", 1)
    resumed = run(tmp_path / "parts", 3, True)
    ours, theirs = weights_of(resumed), weights_of(whole)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    assert any(key.startswith("head.") for key in theirs)
    for mine, other in zip(*(t.adversary.score.optimizer.state.values() for t in (resumed, whole)), strict=True):
        assert torch.equal(mine["exp_avg"], other["exp_avg"])


def test_images_are_encoded_once(tmp_path, real, monkeypatch):
    first = make_trainer(tmp_path, teacher_cache_dir=str(tmp_path / "cache"), **real)
    (file,) = (tmp_path / "cache" / "real").iterdir()
    monkeypatch.setattr(real_images, "to_pixels", None)
    again = make_trainer(tmp_path, teacher_cache_dir=str(tmp_path / "cache"), **real)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert (again.adversary.images.latents == first.adversary.images.latents).all()
    monkeypatch.undo()
    make_trainer(tmp_path, teacher_cache_dir=str(tmp_path / "cache"), pipeline=make_tiny_pipeline(seed=1), **real)
    assert len(list(file.parent.iterdir())) == 2  # another autoencoder


def test_the_middle_is_kept_in_its_aspect(tmp_path):
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    pixels = real_images.to_pixels(image, 8, 8)
    assert pixels.shape == (8, 8, 3) and abs(pixels - [0, 0, 1]).max() < 0.1
    assert real_images.to_pixels(Image.new("L", (5, 5), 255), 4, 8).min() == 1


def test_a_folder_of_images_and_splits(tmp_path):
    (tmp_path / "folder").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "folder" / f"{i}.png")
    assert len(real_images.load_images(str(tmp_path / "folder"))) == 3
    one = Dataset.load_from_disk(save_images(tmp_path / "one", 4))
    DatasetDict(train=one).save_to_disk(tmp_path / "splits")
    assert len(real_images.load_images(str(tmp_path / "splits"))) == 4


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(adversarial_weight=0.5),
            "`adversarial_weight` is 0.5, but there are no real images: give `image_dataset`",
        ),
        (dict(image_dataset="x"), "`image_dataset` is 'x', but `adversarial_weight` is 0"),
        (dict(adversarial_weight=-1.0, image_dataset="x"), "`adversarial_weight` is -1.0, but must be at least 0"),
        (dict(adversarial_weight=1.0, image_dataset="/no/where"), "`image_dataset` '/no/where' cannot be read, or"),
        (dict(adversarial_weight=1.0, image_dataset="empty"), "`image_dataset` '.*empty' cannot be read, or is empty"),
        (
            dict(adversarial_weight=1.0, image_dataset="good", image_column="picture"),
            "has no column 'picture'; it has",
        ),
        (dict(adversarial_weight=1.0, image_dataset="good", image_column="prompt"), "`image_column` is 'prompt', but"),
        (dict(adversarial_weight=1.0, image_dataset="mute"), "`prompt` of row 1 of `image_dataset` is None"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path, options, message):
    save_images(tmp_path / "good")
    save_images(tmp_path / "mute", captions=("a", None))
    (tmp_path / "empty").mkdir()
    Dataset.from_dict({"image": []}).to_parquet(tmp_path / "empty" / "train.parquet")
    if options.get("image_dataset") in ("good", "mute", "empty"):
        options = {**options, "image_dataset": str(tmp_path / options["image_dataset"])}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def test_a_reward_of_the_same_name_is_refused(tmp_path, real):
    def adversarial(images, prompts, metadata):
        return images.mean((1, 2, 3))

    with pytest.raises(ValueError, match="named 'adversarial', as the discriminator's is"):
        make_trainer(tmp_path, [adversarial], **real)


def test_a_warning_where_the_discriminator_has_won_or_died():
    def rows(accuracy, gap, number):
        figures = {"adversarial/accuracy": accuracy, "adversarial/real": gap, "adversarial/fake": 0.0}
        return [{"step": i, **figures} for i in range(number)]

    def warning(history):
        return drift_warnings(history).get("adversarial/accuracy", (None, ""))[1]

    assert "has won" in warning(rows(0.995, 4.0, 5)) and "At step 4" in warning(rows(0.995, 4.0, 9))
    assert "has died" in warning(rows(0.5, 0.001, 5))
    assert not warning(rows(0.995, 4.0, 4) + rows(0.9, 3.0, 1)) and not warning(rows(0.6, 0.3, 20))


def test_the_same_run_without_it(tmp_path):
    """Off, nothing is drawn, made or saved for it."""
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    assert trainer.adversary is None and not (tmp_path / "run" / "checkpoint-2" / "discriminator.pt").exists()
    assert not any(key.startswith("adversarial") for key in logs_of(trainer))
