# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The demo is a Space that runs by plain diffusers, and a click in a real browser draws."""

import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from conftest import DEMO_PROMPTS, MARKUP, make_trainer, save_style
from diffusers import DiffusionPipeline, LCMScheduler
from huggingface_hub import ModelCard
from tiny_pipelines import CASES, make, save_lora

from rdm_trl import cli
from rdm_trl.demo import DEMO_PIPELINE, page


pytest.importorskip("gradio", reason='needs gradio: pip install "rdm_trl[demo]"')


@pytest.fixture(scope="module")
def space(finished_run, tmp_path_factory):
    return page.export_space(finished_run, tmp_path_factory.mktemp("space"))


def load_app(folder, monkeypatch) -> dict:
    """`app.py` where our package is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "rdm_trl"]:
        monkeypatch.setitem(sys.modules, name, None)
    return runpy.run_path(str(folder / "app.py"), run_name="space")


def pixels(image, size: int = 32) -> np.ndarray:
    return np.asarray(image.resize((size, size), 0)).astype(float)


def test_the_folder_is_a_space(space):
    files = {file.name for file in space.iterdir()}
    assert files == {"app.py", "README.md", "requirements.txt", "demo.json", "student", "base"}
    card = ModelCard.load(space / "README.md")
    assert card.data.sdk == "gradio" and card.data.app_file == "app.py" and card.data.sdk_version
    assert "rdm_trl" not in (space / "app.py").read_text() and "rdm" not in (space / "requirements.txt").read_text()
    assert str(space) not in (space / "demo.json").read_text()


def test_it_draws_as_the_card_says(space, finished_run, monkeypatch):
    app = load_app(space, monkeypatch)
    pipe = DiffusionPipeline.from_pretrained(DEMO_PIPELINE, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def plain(**options):
        generator = torch.Generator().manual_seed(3)
        image = pipe(DEMO_PROMPTS[0], generator=generator, **options).images[0]
        return np.asarray(image.resize((256, 256), 1)).astype(float)

    def drawn(*arguments):
        return np.asarray(app["draw"](*arguments)[0]).astype(float)

    order = ("student", "teacher", "base", "student")  # whoever draws leaves nothing behind
    images = {}
    for who in order:
        image = drawn(who, DEMO_PROMPTS[0], 3)
        assert who not in images or (image == images[who]).all()
        images[who] = image
    assert np.abs(images["teacher"] - plain(num_inference_steps=3, **app["DEMO"]["teacher_arguments"])).max() <= 1
    assert np.abs(images["base"] - plain(num_inference_steps=4, guidance_scale=1.0)).max() <= 1
    pipe.scheduler = LCMScheduler.from_pretrained(finished_run, subfolder="scheduler")
    without = plain(num_inference_steps=4, guidance_scale=1.0)
    pipe.load_lora_weights(finished_run)
    assert np.abs(images["student"] - plain(num_inference_steps=4, guidance_scale=1.0)).max() <= 1
    assert np.abs(drawn("student", DEMO_PROMPTS[0], 3, 0.0) - without).max() <= 1
    assert np.abs(images["student"] - without).max() > 1


@pytest.mark.parametrize("kind", ["peft", "network"])
def test_other_kinds_of_students(kind, tmp_path, monkeypatch):
    pipeline = make(CASES["pixart_sigma" if kind == "peft" else "sd_epsilon"])
    pipeline.save_pretrained(tmp_path / "base")
    trainer = make_trainer(
        tmp_path, pipeline=str(tmp_path / "base"), peft_config=False if kind == "network" else None, learning_rate=0.1
    )
    trainer.train()
    trainer.save_model()
    app = load_app(page.export_space(tmp_path / "run", tmp_path / "space"), monkeypatch)
    assert app["DEMO"]["kind"] == kind and app["DEMO"]["prompts"]
    student, base = (pixels(app["draw"](who, "a bag", 0)[0]) for who in ("student", "base"))
    assert np.abs(student - base).max() > 0
    assert "upload it" in (tmp_path / "space" / "README.md").read_text()  # the base is a folder of this machine


@pytest.mark.parametrize("save", [save_style, save_lora])
def test_a_teacher_with_a_style_draws_in_it(tmp_path, monkeypatch, save):
    """Where the style reaches the text encoder, the base's own prompts are those without it."""
    make(CASES["sd_epsilon"]).save_pretrained(tmp_path / "base")
    style = save(tmp_path / "style")
    trainer = make_trainer(tmp_path, pipeline=str(tmp_path / "base"), teacher_lora=str(style))
    trainer.save_model()
    app = load_app(page.export_space(tmp_path / "run", tmp_path / "space"), monkeypatch)
    assert app["DEMO"]["teacher_lora"] == "teacher" and (tmp_path / "space" / "teacher").is_dir()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base", dtype=torch.float32)

    def plain():
        options = {**app["DEMO"]["teacher_arguments"], "num_inference_steps": 3}
        image = pipe("a bag", generator=torch.Generator().manual_seed(0), **options).images[0]
        return np.asarray(image.resize((256, 256), 1)).astype(float)

    without = plain()
    app["draw"]("student", "a bag", 0)
    app["set_lora"]("base", 0.0)
    prompt = "a bag", "cpu", 1, False
    assert torch.equal(app["pipe"].encode_prompt(*prompt)[0], pipe.encode_prompt(*prompt)[0])
    pipe.load_lora_weights(style)
    for _ in range(2):
        assert np.abs(np.asarray(app["draw"]("teacher", "a bag", 0)[0]) - plain()).max() <= 1
        app["draw"]("student", "a bag", 0)
    assert np.abs(plain() - without).max() > 1


def test_what_cannot_be_shown(tmp_path, monkeypatch, capsys, finished_run):
    for arguments in (["demo", str(tmp_path)], ["demo", str(tmp_path), "--export", str(tmp_path / "space")]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
        assert "is not a finished run" in capsys.readouterr().err
    half = tmp_path / "half"
    shutil.copytree(finished_run, half)
    (half / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no student"):
        page.export_space(half, tmp_path / "space")
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", str(finished_run)])
    assert 'pip install "rdm_trl[demo]"' in capsys.readouterr().err
    assert page.export_space(finished_run, tmp_path / "space")  # needs no gradio itself


# ------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def served(finished_run, tmp_path_factory):
    """The address of `rdm-trl demo`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("served") / "log"
    command = [sys.executable, "-m", "rdm_trl.cli", "demo", str(finished_run), "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=1).close()
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


def test_a_click_draws(browser, served):
    """On a narrow screen, which then grows wide."""
    view = browser.new_context(viewport={"width": 390, "height": 900}).new_page()
    complaints = []
    view.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    view.on("pageerror", lambda error: complaints.append(str(error)))
    view.on("request", lambda request: complaints.append(request.url) if is_foreign(request.url, served) else None)
    view.goto(served)
    assert view.locator("#prompt textarea, #prompt input").first.input_value() == DEMO_PROMPTS[0]
    view.locator("#prompt textarea, #prompt input").first.fill(MARKUP)
    view.click("#draw")
    for who in ("student", "teacher", "base"):
        view.wait_for_selector(f"#{who} img", timeout=60_000)
    view.wait_for_function("document.querySelector('#student-below').textContent.includes('as fast')")
    for who in ("student", "teacher", "base"):
        assert re.search(r"\d m?s · \d+ steps", view.locator(f"#{who}-below").inner_text())
    view.click("#draw-strengths")
    view.wait_for_function("document.querySelectorAll('#strengths img').length === 6", timeout=60_000)
    loaded = "[...document.querySelectorAll('img')].every(image => image.complete && image.naturalWidth > 0)"
    view.wait_for_function(loaded)
    for width in (390, 1280):
        view.set_viewport_size({"width": width, "height": 900})
        assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints == []
    view.context.close()


def is_foreign(url: str, served: str) -> bool:
    return url.startswith("http") and not url.startswith(served)
