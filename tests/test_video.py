# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Videos: what rewards see of them, what they are judged by, and what a run leaves of them."""

import math

import pytest
import torch
from conftest import logs_of, redness
from PIL import Image
from tiny_pipelines import CASES, family_for, make, make_family_trainer
from torch import nn

from rdm_trl import plan
from rdm_trl.callbacks import ImageTracker
from rdm_trl.cli import main
from rdm_trl.demo.page import export_space
from rdm_trl.evaluation import Judge, diversity, feature_statistics, frechet_distance
from rdm_trl.frames import as_frames, contact_sheets, thumbnails
from rdm_trl.method import matching
from rdm_trl.rewards import Scorer, reward_gradient
from rdm_trl.saving.pictures import read_grid
from rdm_trl.saving.report import is_report_available


VIDEOS = torch.rand(2, 3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "bb"]


def motion(images, prompts, metadata):
    """Of the whole: how much one frame differs from the next."""
    return images.diff(dim=2).abs().mean((1, 2, 3, 4))


motion.whole_clip = True


def brightness(images, prompts, metadata):
    return images.square().mean((1, 2, 3))


brightness.differentiable = True


# ------------------------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize("stride, frames", [(None, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_frames_are_scored_and_their_mean_counts(stride, frames):
    asked = []

    def first(images, prompts, metadata):
        asked.append((images, prompts, metadata))
        return images[:, 0].mean((1, 2))

    async def late(images, prompts, size, **columns):
        return [float(value) for value in images[:, 1].mean((1, 2))]

    def seldom(images, prompts, metadata):
        return [None if i % len(frames) or prompts[i] == "a" else 3.0 for i in range(len(images))]

    rewards, _ = Scorer([first, late, motion, seldom], frame_stride=stride)(
        VIDEOS, PROMPTS, [{"size": 1}, {"size": 2}]
    )
    images, prompts, metadata = asked[0]
    assert torch.equal(images, torch.stack([video[:, i] for video in VIDEOS for i in frames]))
    assert prompts == [prompt for prompt in PROMPTS for _ in frames]
    assert [row["size"] for row in metadata] == [size for size in (1, 2) for _ in frames]
    torch.testing.assert_close(rewards[:, 0], VIDEOS[:, 0, frames].mean((1, 2, 3)))
    torch.testing.assert_close(rewards[:, 1], VIDEOS[:, 1, frames].mean((1, 2, 3)))
    torch.testing.assert_close(rewards[:, 2], VIDEOS.diff(dim=2).abs().mean((1, 2, 3, 4)))
    assert rewards[0, 3].isnan() and rewards[1, 3] == 3  # the mean of what was scored


def test_a_wrong_number_of_frames_is_named():
    def two(images, prompts, metadata):
        return [1.0, 2.0]

    with pytest.raises(ValueError, match="'two' returned 2 rewards for 5 frames each of 2 videos"):
        Scorer([two])(VIDEOS, PROMPTS, [{}, {}])


def test_gradients_through_frames():
    """For `decode(z) = z` and the mean square of the scored frames; D times its gradient, as for images."""
    found, push = reward_gradient(brightness, lambda z: z, VIDEOS, PROMPTS, [{}, {}], 2)
    torch.testing.assert_close(found, VIDEOS[:, :, ::2].square().mean((1, 2, 3, 4)))
    expected = torch.zeros_like(VIDEOS)
    expected[:, :, ::2] = 2 * VIDEOS[:, :, ::2] * 5 / 3
    torch.testing.assert_close(push, expected)

    def still(images, prompts, metadata):
        return -images.diff(dim=2).square().mean((1, 2, 3, 4))

    still.whole_clip = True
    found, push = reward_gradient(still, lambda z: z, VIDEOS, PROMPTS, [{}, {}], 2)
    leaf = VIDEOS.clone().requires_grad_(True)
    still(leaf, PROMPTS, None).sum().backward()
    torch.testing.assert_close(push, leaf.grad * VIDEOS[0].numel())


def test_a_reward_of_videos_is_no_reward_of_images(tmp_path):
    with pytest.raises(ValueError, match="'motion' judges videos .* draws images"):
        make_family_trainer(CASES["sd_epsilon"], tmp_path, make(CASES["sd_epsilon"]), rewards=[motion])


# -------------------------------------------------------------------------------------------------- method and figures


@pytest.mark.parametrize("normalization, level", [("sample", "image"), ("group", "image"), ("batch", "element")])
def test_a_videos_statistics_are_its_own(normalization, level):
    """R_dm's direction of five-dimensional latents is that of the same numbers in one row."""
    values = torch.rand(3, 4, 2, 3, 2, 2)
    probe = matching.Probe(values[0] - 0.5, values[1], values[2] - 0.5, torch.zeros(4))
    flat = matching.Probe(
        *(value.flatten(1) for value in (probe.direction, probe.distance, probe.residual)), probe.reward
    )
    found = matching.normalize(matching.center(probe, 2), normalization, 2, level)
    expected = matching.normalize(matching.center(flat, 2), normalization, 2, level)
    torch.testing.assert_close(found.flatten(1), expected)


class Means(nn.Module):
    """A frame's three means as features, and as logits of three classes."""

    def forward(self, images):
        assert images.ndim == 4
        return images.mean((2, 3)), images.mean((2, 3))


def test_figures_over_frames():
    judge = Judge(Means(), classes={"a": 0, "bb": 1})
    assert "fid_teacher" not in judge("teacher", VIDEOS, PROMPTS)
    videos = torch.rand(4, 3, 5, 4, 6, generator=torch.Generator().manual_seed(3))
    prompts = ["a", "a", "bb", "bb"]
    figures = judge("student", videos, prompts)
    frames = torch.stack([video[:, i].mean((1, 2)) for video in videos for i in range(5)])
    teachers = torch.stack([video[:, i].mean((1, 2)) for video in VIDEOS for i in range(5)])
    expected = frechet_distance(feature_statistics(frames), feature_statistics(teachers))
    assert figures["fid_teacher"] == pytest.approx(expected)
    assert figures["diversity"] == pytest.approx(diversity(videos.mean((2, 3, 4)), prompts), rel=1e-4)
    right = videos.mean((2, 3, 4)).argmax(1) == torch.tensor([0, 0, 1, 1])
    assert figures["class_accuracy"] == pytest.approx(right.double().mean().item())
    still = videos[:, :, :1].expand(-1, -1, 5, -1, -1)
    assert judge("student", still, prompts)["diversity"] == pytest.approx(
        diversity(still[:, :, 0].mean((2, 3)), prompts), rel=1e-4
    )


# ------------------------------------------------------------------------------------------------------------ pictures


def test_sheets_and_thumbnails():
    sheets = contact_sheets(VIDEOS)
    assert sheets.shape == (2, 3, 4, 4 * 6)
    assert torch.equal(sheets[:, :, :, :6], VIDEOS[:, :, 0]) and torch.equal(sheets[:, :, :, -6:], VIDEOS[:, :, 4])
    assert contact_sheets(VIDEOS[:, :, :1]).shape == (2, 3, 4, 6) and contact_sheets(VIDEOS[:, :, 0]).shape[-1] == 6
    assert thumbnails(VIDEOS, 3).shape == (2, 3, 5, 2, 3) and thumbnails(VIDEOS, 6) is VIDEOS
    torch.testing.assert_close(thumbnails(VIDEOS[:, :, 1:2], 3)[:, :, 0], thumbnails(VIDEOS, 3)[:, :, 1])
    assert torch.equal(as_frames(VIDEOS)[6], VIDEOS[1, :, 1])


def test_a_run_of_videos(tmp_path):
    """Rewards of frames and of the whole join; the run leaves a contact sheet, a film and a card that shows both."""
    case, shown = CASES["wan"], []

    def hook(data, step, tracker):
        shown.append(data[0])
        tracker.log_images({"videos": data[0][0]}, step=step)

    make(case).save_pretrained(tmp_path / "base")
    options = dict(log_images_steps=2, num_eval_images=4, teacher_guidance_scale=3.0, reward_frame_stride=2)
    rewards = [redness, motion, brightness]
    trainer = make_family_trainer(case, tmp_path, str(tmp_path / "base"), rewards=rewards, **options, **case.size)
    trainer.image_samples_callback = hook
    trainer.judge = Judge(Means())
    trainer.train()
    logs = logs_of(trainer)
    for name in ("redness", "motion", "brightness"):
        assert math.isfinite(logs[f"rewards/{name}/mean"])
    images, prompts, *_, scores, _ = shown[0]
    assert images.shape == (4, 3, 5, 16, 32) and len(prompts) == 4
    torch.testing.assert_close(scores[:, 1], motion(images, None, None))

    figures = trainer.evaluate()
    assert figures["eval_fid_teacher"] >= 0 and "eval_teacher_motion" in figures
    trainer.save_model()
    samples, card = tmp_path / "run" / "samples", (tmp_path / "run" / "README.md").read_text()
    columns, rows = read_grid(samples / "grid.png")
    assert rows == list(case.prompts) and [len(images) for images in columns.values()] == [2, 2, 2]
    for name in ("grid.webp", "step-000002.webp"):
        with Image.open(samples / name) as film:
            assert film.n_frames == 5
    assert "(samples/grid.webp)" in card and "(samples/grid.png)" in card and "export_to_video" in card
    assert "draw a video in 3 unguided" in card and "pipeline_tag: text-to-video" in card
    with Image.open(samples / "videos-0.png") as picture:  # four videos of four frames
        assert picture.size == (4 * 4 * 32, 16)
    with pytest.raises(ValueError, match="WanPipeline draws videos, and the demo is one of images"):
        export_space(tmp_path / "run", tmp_path / "space")
    assert (tmp_path / "run" / "report.html").is_file() is is_report_available()
    frame = VIDEOS[0, :, 0]
    ImageTracker(trainer).log_images({"frame": frame}, step=1)
    assert (samples / "frame-1.png").is_file()


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_every_frame_of_a_video_is_of_its_noise(name):
    """More frames are more latents, and the number is in the card's call."""
    family = family_for(name)
    temporal, _ = family.compression()
    latents = torch.randn(1, *family.latent_shape)
    assert family.decode(latents).shape == (1, 3, 5, family.height, family.width)
    elements = latents.numel()
    family.set_num_frames(1 + 2 * temporal)
    latents = torch.randn(1, *family.latent_shape)
    assert latents.numel() == elements * 3 // 2
    assert family.decode(latents).shape == (1, 3, 1 + 2 * temporal, family.height, family.width)
    family.make_student_scheduler(4)
    assert f"num_frames={1 + 2 * temporal}" in family.call_code("a dress", 4)


def test_a_time_for_every_token():
    """Wan 2.2 TI2V 5B without an image: what its denoiser is called with, but for the shape, is that of 2.1."""
    pipeline, calls = make(CASES["wan"]), []
    pipeline.register_to_config(expand_timesteps=True)
    call = pipeline.transformer.forward
    pipeline.transformer.forward = lambda **inputs: calls.append(inputs) or call(**inputs)
    family = family_for("wan", pipeline)
    pipeline(**CASES["wan"].guided(PROMPTS, 1.0, ""), num_inference_steps=1, output_type="latent")
    t = calls[0]["timestep"][:, 0]
    family.denoise(
        pipeline.transformer, calls[0]["hidden_states"], t, {"prompt_embeds": calls[0]["encoder_hidden_states"]}
    )
    for name in ("hidden_states", "timestep", "encoder_hidden_states"):
        assert torch.equal(calls[0][name], calls[1][name]), name
    assert calls[0]["timestep"].ndim == 2


def test_plan_counts_frames(tmp_path, capsys):
    make(CASES["wan"]).save_pretrained(tmp_path)

    def kept(num_frames):
        pipeline = plan.load_without_weights(str(tmp_path))
        return plan.memory_of(pipeline, 4, False, height=32, width=64, num_frames=num_frames).activations

    assert kept(17) > 1.5 * kept(5)
    size = ["--height", "32", "--width", "64", "--num-frames", "5"]
    main(["plan", "--model", str(tmp_path), "--gpu-memory", "1", *size])
    assert "per_device_train_batch_size: 32" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`sample_num_frames` is 6"):
        main(["plan", "--model", str(tmp_path), "--gpu-memory", "1", "--num-frames", "6"])


def test_layers_that_stay_in_float32(tmp_path):
    """Wan's time embedding is not cast with the rest: inputs are of the other layers' precision."""
    make(CASES["wan"]).save_pretrained(tmp_path / "base")
    options = dict(rewards=(), bf16=True, max_steps=1, **CASES["wan"].size)
    trainer = make_family_trainer(CASES["wan"], tmp_path, str(tmp_path / "base"), **options)
    assert trainer.family.dtype == torch.bfloat16
    assert trainer.sd_pipeline.transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    trainer.train()
    assert trainer.sample("student", list(CASES["wan"].prompts)).isfinite().all()


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_checkpointing_changes_nothing(name, tmp_path):
    """Blocks that are computed again for their gradient are the student's; with a reward through all frames."""
    weights = []
    for checkpointing in (False, True):
        options = dict(activation_checkpointing=checkpointing, **CASES[name].size)
        trainer = make_family_trainer(CASES[name], tmp_path, make(CASES[name]), rewards=[brightness], **options)
        trainer.train()
        weights.append(trainer.model.adapter_state("student"))
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-5, rtol=1e-5)
