# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The moving teacher's script: what its videos show, how they are judged, and that its parts fit together."""

import json

import pytest
import torch
from conftest import ROOT, load_script

from rdm_trl.demo import load_judge
from rdm_trl.models.pipelines import family_of, read_pipeline


pytest.importorskip("matplotlib").use("Agg")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return load_script("examples/train_moving_teacher.py")


def test_motion_is_told_from_the_videos_alone(script):
    torch.manual_seed(0)
    places = torch.arange(80) % len(script.PROMPTS)
    prompts = [script.PROMPTS[i] for i in places]
    videos = script.make_videos(places) / 2 + 0.5
    assert videos.shape == (80, 3, 9, 32, 32) and videos.min() >= 0 and videos.max() <= 1
    assert script.motion(videos, prompts, None).tolist() == [1.0] * 80
    # Backwards and standing still nothing moves as it should; turned by a right angle neither.
    still, turned = videos[:, :, :1].expand_as(videos), videos.transpose(3, 4)
    for wrong in (videos.flip(2), still, turned, torch.zeros_like(videos)):
        assert script.motion(wrong, prompts, None).tolist() == [0.0] * 80
    moving = script.velocity(videos)
    torch.testing.assert_close(script.velocity(videos[:, :, ::2]), 2 * moving, atol=0.1, rtol=0.1)
    torch.testing.assert_close(script.velocity(turned), moving.flip(1), atol=1e-3, rtol=1e-3)


def test_muon_goes_down_all_directions_alike(script):
    torch.manual_seed(0)
    weight, vector = torch.nn.Parameter(torch.randn(6, 2, 3, 3)), torch.nn.Parameter(torch.randn(7))
    before = weight.detach().clone(), vector.detach().clone()
    slopes = torch.randn(6, 18) @ torch.diag(torch.logspace(0, -2, 18))
    ((weight.flatten(1) * slopes).sum() + vector.square().sum()).backward()
    script.Muon([weight, vector], lr=0.1).step()
    change, moved = (weight.detach() - before[0]).flatten(1), vector.detach() - before[1]
    values = torch.linalg.svdvals(change) / (0.1 * 0.2 * 18**0.5)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (change * slopes).sum() < 0
    # A vector has one direction.
    length = moved.norm() / (0.1 * 0.2 * 7**0.5)
    assert 0.6 < length < 1.3
    torch.testing.assert_close(moved / moved.norm(), -before[1] / before[1].norm())


def test_all_stages(script, tmp_path, monkeypatch):
    """A step of each; what is left is a pipeline and its judge, and a second call trains nothing again."""
    monkeypatch.setattr(script, "NUM_STEPS", 2)
    monkeypatch.setattr(script, "NUM_MEASURED", 160)
    command = "train --num_videos 40 --denoiser_steps 1 --autoencoder_steps 1 --judge_steps 1 --num_samples 4"
    monkeypatch.setattr("sys.argv", [*command.split(), "--output_dir", str(tmp_path)])
    script.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["real"]["motion"] == 1.0 and {"guidance_3.0", "4_steps"} <= figures.keys()
    assert (tmp_path / "samples_real.png").is_file()
    family = family_of(read_pipeline(tmp_path), 32, 32, 9)
    assert family.latent_shape == (16, 5, 8, 8)
    # The autoencoder's latents, as the denoiser is given them, have no mean and unit spread.
    videos = script.make_videos(torch.arange(40))
    config = family.pipeline.vae.config
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    latents = (script.encode(family.pipeline.vae, videos) - mean) / std
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(16), atol=0.3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(16), atol=0.3, rtol=0)
    judge = load_judge(tmp_path)
    assert judge.classes["a seven moving up"] == 7 and len(judge.classes) == 40
    assert (tmp_path / "prompts.txt").read_text().splitlines() == script.PROMPTS

    monkeypatch.setattr(script, "train", None)
    stages = ["--stages", "judge", "autoencoder", "denoiser"]
    monkeypatch.setattr("sys.argv", [*command.split(), "--output_dir", str(tmp_path), *stages])
    script.main()
