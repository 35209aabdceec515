# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""README and docs: their code runs as printed, and they name what there is, all of it and nothing else."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_script, logs_of, make_config, make_trainer, redness
from datasets import Dataset
from PIL import Image

from rdm_trl import RdmDistillConfig, RdmDistillTrainer, config, guidance


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A block that cannot run says why in a comment above it.
BLOCK = re.compile(r"(?:^<!-- not run: (.+?) -->\n)?^```python\n(.*?)^```", re.M | re.S)
# What the text around a page's code has named.
PRELUDES = {
    "families.md": "import torch\nfrom diffusers import StableDiffusionPipeline as MyPipeline\n"
    "from rdm_trl.models.pipelines.base import *\n"
}


def python_blocks(page: Path) -> list[tuple[str, str]]:
    """Why a block is not run, or nothing, and its code."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.fixture
def small_runs(tmp_path, monkeypatch):
    """Whatever a config asks for, two updates of two groups, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "NUM_TEACHER_IMAGES", 4)
    monkeypatch.setattr(guidance, "HF_HOME", str(tmp_path / "cache"))
    check = RdmDistillConfig.__post_init__
    most = {
        "max_steps": 2,
        "num_eval_images": 8,
        "teacher_num_steps": 2,
        "num_log_images": 2,
        "fake_updates": 1,
        "num_teacher_images": 4,
    }

    def shrink(options):
        for name, value in most.items():
            if getattr(options, name) is not None:  # then it is the default of the teacher's images
                setattr(options, name, min(getattr(options, name), value))
        options.per_device_train_batch_size = 2 * options.num_generations
        options.use_cpu = options.disable_tqdm = True
        check(options)

    monkeypatch.setattr(RdmDistillConfig, "__post_init__", shrink)


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_python_blocks_run(page, small_runs, tmp_path):
    namespace = {}
    exec(PRELUDES.get(page.name, ""), namespace)
    for reason, code in python_blocks(page):
        if not reason:
            exec(compile(code, page.name, "exec"), namespace)
    if page.name in ("README.md", "index.md"):
        assert isinstance(namespace["image"], Image.Image)
        assert (tmp_path / "my-4-step-model" / "README.md").is_file()


def test_the_notebook_runs_from_top_to_bottom(small_runs):
    pytest.importorskip("matplotlib").use("Agg")
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    namespace = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), namespace)
    assert isinstance(namespace["image"], Image.Image) and "eval_symmetry" in namespace["figures"]


def test_the_notebook_shows_what_it_drew():
    """Its outputs are kept by docs/notebook.py: small, and of no machine."""
    text = (ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum(any(kind.startswith("image/") for kind in output["data"]) for output in outputs) == 3
    assert len(text) < 400_000 and not any(output["output_type"] == "stream" for output in outputs)
    assert not re.search(r"/(tmp|home|root|usr|Users)/", text)


def test_blocks_that_do_not_run_are_few():
    pages = [page.name for page in PAGES for reason, _ in python_blocks(page) if reason]
    assert pages == ["ddpo.md", "performance.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_files(page):
    for target in re.findall(r"\]\((?!http)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ".mkdocs.yml", "-d", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "num_generations" in (tmp_path / "options.html").read_text()
    assert "arithmatex" in (tmp_path / "method.html").read_text()


def test_options_page_lists_every_option_and_its_default():
    hooks, script = load_script("docs/hooks.py"), load_script("examples/train_gndm.py")
    page, tables = (ROOT / "docs" / "options.md").read_text(), hooks.option_tables()
    listed = {}
    for names, default in re.findall(r"^\| (`.+?`) \| `.+?` \| (.+?) \|", tables, re.M):
        listed |= {name: default.strip("`") for name in re.findall(r"`(\w+)`", names)}
    fields = {**RdmDistillConfig.__dataclass_fields__, **script.ScriptArguments.__dataclass_fields__}
    own = [*RdmDistillConfig.__annotations__, *script.ScriptArguments.__annotations__]
    assert listed.keys() <= set(own)
    for name in own:
        field = fields[name]
        value = field.default_factory() if callable(field.default_factory) else field.default
        if name in listed:
            assert (None if listed[name] == "none" else ast.literal_eval(listed[name])) == value, name
        else:  # of `TrainingArguments`, with another default
            written = re.search(rf"`{name}=(.+?)`", page)
            assert written is not None and ast.literal_eval(written[1]) == value, name


def test_metrics_page_lists_every_key_that_is_logged_and_no_other(tmp_path):
    def brightness(images, prompts, metadata):
        return images.mean((1, 2, 3))

    brightness.differentiable = True
    rewards = [redness, brightness]
    images = [Image.new("RGB", (32, 32), (40 * i,) * 3) for i in range(4)]
    Dataset.from_dict({"image": images}).save_to_disk(tmp_path / "real")
    real = dict(adversarial_weight=0.1, image_dataset=str(tmp_path / "real"))
    trainer = RdmDistillTrainer(make_config(tmp_path, num_iterations=2, **real), rewards)  # embedded, all figures
    trainer.train()
    trainer.evaluate()
    learned = dict(num_teacher_images=2, teacher_guidance_scale=3.0, sample_guidance_scale=1.0, learn_target=True)
    learned["teacher_cache_dir"] = str(tmp_path / "cache")
    summed = make_trainer(tmp_path, rewards, reward_mixing="sum", **learned)
    summed.train()
    logged = {
        re.sub(r"^eval_(base|teacher)_", "eval_", re.sub("redness|brightness|(?<=weight/)adversarial", "NAME", key))
        for key in {**logs_of(trainer), **logs_of(summed)}
    }
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(.+?)` \|", page, re.M)) == logged
