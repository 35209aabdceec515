# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The colour teacher's script on six images of one colour each, which are no emoji."""

import io
import json
import sys
import tarfile
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load_script
from diffusers import DiffusionPipeline
from PIL import Image

from rdm_trl.evaluation import PretrainedFeatures


pytest.importorskip("matplotlib").use("Agg")

COLOURS = {
    "1f34e": ("🍎", ":red_apple:", "red"),
    "0023-fe0f-20e3": ("#️⃣", ":keycap_#:", "grey"),
    "1f1e8-1f1ee": ("🇨🇮", ":Côte_d’Ivoire:", "orange"),
    "1f535": ("🔵", ":blue_circle:", "blue"),
    "1f44b": ("👋", ":waving_hand:", "yellow"),
    "1f44b-1f3fd": ("👋🏽", ":waving_hand_medium_skin_tone:", "brown"),
}
SMALL = "per_device_train_batch_size=8 fake_updates=1 teacher_num_steps=2 max_steps=1 use_cpu=true disable_tqdm=true"
SMALL += " sample_guidance_scale=1.0"


@pytest.fixture
def script(monkeypatch):
    names = {text: {"en": name} for text, name, _ in COLOURS.values()}
    monkeypatch.setitem(sys.modules, "emoji", SimpleNamespace(EMOJI_DATA=names))
    monkeypatch.syspath_prepend(ROOT / "examples")
    return load_script("examples/train_emoji_teacher.py")


@pytest.fixture
def archive(tmp_path):
    """Images whose edges are transparent, packed as npm does."""
    path = tmp_path / "emoji.tgz"
    with tarfile.open(path, "w:gz") as file:
        for name, (_, _, colour) in [*COLOURS.items(), ("1f3f4-e0067_e0062", (None, None, "red"))]:
            image = Image.new("RGBA", (32, 32))
            image.paste(Image.new("RGBA", (16, 16), colour), (8, 8))
            buffer = io.BytesIO()
            image.save(buffer, "webp", lossless=True)
            member = tarfile.TarInfo(f"package/assets/{name}.webp")
            member.size = buffer.tell()
            buffer.seek(0)
            file.addfile(member, buffer)
    return path


def test_images_have_captions_and_stand_on_white(script, archive, tmp_path):
    images = script.load_images(archive)
    assert set(images) == {
        "red apple",
        "keycap #",
        "flag of Cote d'Ivoire",
        "blue circle",
        "waving hand",
        "waving hand medium skin tone",
    }
    apple = images["red apple"]
    assert apple.shape == (3, 32, 32)
    assert (apple[:, 0, 0] == 1).all() and apple[:, 16, 16].tolist() == [1, -1, -1]
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "folder", filter="data")
    unpacked = script.load_images(tmp_path / "folder")
    assert list(unpacked) == list(images) and torch.equal(unpacked["red apple"], apple)


def test_an_interrupted_training_ends_where_an_unbroken_one_does(script, tmp_path):
    def run(interrupt_at=None):
        torch.manual_seed(0)
        network, calls = torch.nn.Linear(3, 1), []

        def loss_fn():
            if len(calls) == interrupt_at:
                raise KeyboardInterrupt
            calls.append(1)
            return network(torch.randn(5, 3)).square().mean()

        script.train("a line", [network], loss_fn, 12, 1e-2, tmp_path / "line.ckpt", 5)
        return network.weight, len(calls)

    whole, _ = run()
    with pytest.raises(KeyboardInterrupt):
        run(interrupt_at=7)
    resumed, calls = run()
    assert calls == 7 and torch.equal(resumed, whole)
    assert not list(tmp_path.iterdir())


def test_the_teacher_and_its_judge_are_made_and_go_on_the_bench(script, archive, tmp_path, monkeypatch):
    folder = tmp_path / "teacher"
    command = ["train", "--images", str(archive), "--output_dir", str(folder), "--num_images", "7"]
    command += ["--judge_steps", "1", "--autoencoder_steps", "1", "--denoiser_steps", "2", "--save_steps", "1"]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr(script, "NUM_STEPS", 2)
    script.main()
    assert not list(folder.glob("*.ckpt"))
    figures = json.loads((folder / "figures.json").read_text())
    assert (figures["images"], figures["toned_images"]) == (5, 1)
    assert set(figures["guidance_4.0"]) == {"fid", "class_accuracy"}

    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert pipeline.scheduler.alphas_cumprod[-1] == 0 and pipeline.scheduler.config.prediction_type == "v_prediction"
    arguments = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt"}
    image = pipeline("red apple", **arguments).images
    assert image.shape == (1, 3, 32, 32) and image.isfinite().all()
    judge = script.load_judge(folder)
    prompts = (folder / "prompts.txt").read_text().splitlines()
    assert judge.classes == {prompt: i for i, prompt in enumerate(prompts)}
    assert torch.equal(PretrainedFeatures(str(folder / "judge"))(image)[0], judge.features_of(image)[0])
    # The latents are around zero.
    pixels = torch.stack(list(script.load_images(archive).values()))
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
    assert latents.mean().abs() < 0.1 and latents.std() == pytest.approx(1, abs=0.1)

    bench = load_script("examples/compare_methods.py")
    command = f"compare --methods gndm --seeds 0 --num_images 10 --eval_steps 1 --teachers {folder}".split()
    monkeypatch.setattr("sys.argv", [*command, "--output_dir", str(tmp_path), "--set", *SMALL.split()])
    bench.main()
    results = json.loads((tmp_path / "teacher" / "results.json").read_text())["gndm-0"]
    assert set(results["curve"][-1]) >= {"fid", "fid_teacher", "class_accuracy", "diversity"}
    assert results["teacher"]["class_accuracy"] * 10 == pytest.approx(round(results["teacher"]["class_accuracy"] * 10))
