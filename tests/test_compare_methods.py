# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
import importlib
import json

import pytest
import torch
from conftest import ROOT, load_script, make_tiny_pipeline
from diffusers import DiTPipeline
from diffusers.pipelines import ImagePipelineOutput
from tiny_pipelines import make_dit

import rdm_trl.demo
from rdm_trl.demo import CLASSES
from rdm_trl.models.pipelines.class_conditional import DiTFamily


pytest.importorskip("matplotlib").use("Agg")

SMALL = "per_device_train_batch_size=8 fake_updates=1 teacher_num_steps=2 max_steps=2 use_cpu=true disable_tqdm=true"
SMALL += " sample_guidance_scale=1.0"


@pytest.fixture
def tiny_teacher(tmp_path):
    """For what does not hang on how well a teacher draws."""
    make_tiny_pipeline().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("budget", "changes", "updates"),
    [
        ("updates", "num_iterations=2", 2),
        ("rollouts", "num_iterations=2", 4),
        ("teacher_evaluations", "sample_guidance_scale=2.0", 1),
    ],
)
def test_methods_get_equal_budgets(tmp_path, monkeypatch, budget, changes, updates):
    """What the trainer itself counted is equal, whatever an update costs; and a second call trains nothing again."""
    script = load_script("examples/compare_methods.py")
    command = f"compare --methods gndm gndm,{changes} --seeds 0 --num_images 8 --eval_steps 1 --budget {budget}"
    command = [*command.split(), "--output_dir", str(tmp_path), "--measure", "jpeg_compressibility"]
    monkeypatch.setattr("sys.argv", [*command, "--set", *SMALL.split()])
    script.main()
    results = json.loads((tmp_path / "embedded" / "results.json").read_text())
    one, other = (results[f"{method}-0"]["curve"][-1] for method in ("gndm", f"gndm,{changes}"))
    assert (one["step"], other["step"]) == (2, updates)
    if budget != "updates":
        assert one[budget] == other[budget] == 16
    # The teacher's other images are as much its own as the first ones, which the base's are not.
    distances = [results["gndm-0"][who].get("fid_teacher") for who in ("teacher", "again", "base")]
    assert distances[0] is None and 0.01 < distances[1] < distances[2]
    # Measured, and no part of what they train by.
    assert one["reward/jpeg_compressibility"] < 0 and one["weights"] == [1.0]
    monkeypatch.setattr(script, "run", None)
    closed = []
    monkeypatch.setattr(script.plt, "close", closed.append)
    script.main()
    (panel,) = closed[-1].axes
    seed, means, floor = (line.get_ydata() for line in panel.lines)
    assert list(seed) == list(means) == [one["fid_teacher"], other["fid_teacher"]] and set(floor) == {distances[1]}
    assert panel.get_title() == "embedded" and (tmp_path / "pairs.png").exists()
    assert f"gndm,{changes} − gndm" in (tmp_path / "embedded" / "table.md").read_text()


def test_seconds_of_updates_are_measured_once(tmp_path, tiny_teacher, monkeypatch):
    script = load_script("examples/compare_methods.py")
    monkeypatch.setattr(script.seconds_of_update, "__defaults__", (4,))  # updates
    command = "compare --methods gndm gndm,fake_updates=12 --seeds 0 --num_images 8 --eval_steps 9 --budget seconds"
    command = [*command.split(), "--teachers", tiny_teacher, "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*command, "--set", *SMALL.split(), "max_steps=4"])
    script.main()
    costs = json.loads((tmp_path / "out" / "tiny" / "cost_of_update.json").read_text())
    assert costs["gndm,fake_updates=12"] > 1.5 * costs["gndm"]
    results = json.loads((tmp_path / "out" / "tiny" / "results.json").read_text())
    steps = [results[f"{method}-0"]["curve"][-1]["step"] for method in costs]
    assert steps == [4, max(1, round(4 * costs["gndm"] / costs["gndm,fake_updates=12"]))]
    monkeypatch.setattr(script, "seconds_of_update", None)
    script.main()
    # An update of a warm-up has no rewards to ask, and is not as long as one behind it.
    rewarded = ["--methods", "gndmr+jpeg_compressibility@1", "--output_dir", str(tmp_path / "other")]
    monkeypatch.setattr("sys.argv", [*command, *rewarded, "--set", "max_steps=4", "reward_warmup=2"])
    with pytest.raises(SystemExit, match="before `reward_warmup`"):
        script.main()


def test_runs_side_by_side_end_where_one_alone_does(tmp_path, tiny_teacher, monkeypatch):
    """In processes of their own, against this one."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    script = importlib.import_module("compare_methods")  # which the other processes find by its name
    command = f"compare --teachers {tiny_teacher} --methods gndm --num_images 8 --eval_steps 2 --set {SMALL}".split()
    for folder, rest in (("two", "--workers 2 --seeds 0 1"), ("one", "--seeds 1")):
        monkeypatch.setattr("sys.argv", [*command, "--output_dir", str(tmp_path / folder), *rest.split()])
        script.main()
    paths = [tmp_path / name / "tiny" / "results.json" for name in ("two", "one")]
    found = [json.loads(path.read_text())["gndm-1"] for path in paths]
    for point in (found[0]["curve"][0], found[1]["curve"][0]):
        point.pop("seconds")
    assert found[0]["curve"] == found[1]["curve"] and found[0]["teacher"] == found[1]["teacher"]


def test_methods_with_rewards_set_out_from_a_plain_run_of_their_own_options(tmp_path, tiny_teacher, monkeypatch):
    """They end where a run from the beginning does; and are compared though updates and warm-up are not the same."""
    script = load_script("examples/compare_methods.py")
    methods = [
        "gndmr,max_steps=3,reward_warmup=2,reward_gradient_steps=null+jpeg_compressibility@1",
        "dmdr,max_steps=2,reward_warmup=1,fake_updates=2+jpeg_compressibility@1",
    ]
    command = f"compare --teachers {tiny_teacher} --seeds 0 --num_images 8 --eval_steps 9 --output_dir {tmp_path}"
    monkeypatch.setattr("sys.argv", [*command.split(), "--methods", *methods, "--set", *SMALL.split()])
    script.main()
    results = json.loads((tmp_path / "tiny" / "results.json").read_text())
    plain = ["gndm,max_steps=3,reward_warmup=2", "dmd,max_steps=2,reward_warmup=1,fake_updates=2"]
    assert [results[f"{method}-0"]["curve"][-1]["step"] for method in [*methods, *plain]] == [3, 2, 3, 2]
    for method in methods:
        options = {**results["options"], **script.options_of(method), "seed": 0}
        measure = script.Measure(tiny_teacher, 8, ["jpeg_compressibility"])
        (point,) = script.run(measure, tiny_teacher, options, None, tmp_path / "straight", 9)["curve"]
        (found,) = results[f"{method}-0"]["curve"]
        for figures in (point, found):
            del figures["seconds"], figures["diversity"]  # of one image a prompt, which equals nothing
        assert point == found
    rows = [line for line in (tmp_path / "tiny" / "table.md").read_text().splitlines() if "| jpeg" in line]
    assert [row.split(" | ")[1:3] for row in rows] == [[methods[0].split("+")[0], methods[1]]]


class ReadsBrightness(torch.nn.Module):
    """A judge of images whose brightness in tenths is their class; its features are of no matter."""

    def forward(self, images):
        brightness = images.mean(dim=(1, 2, 3))
        return torch.randn(len(images), 64), -(brightness[:, None] * 10 - torch.arange(10)).abs()


def test_class_conditional_teachers_get_classes_and_are_judged_by_them(tmp_path, monkeypatch):
    """A teacher that numbers the classes the other way round, and draws each of them perfectly, is always right."""
    script = load_script("examples/compare_methods.py")
    pipeline = make_dit()
    pipeline.register_to_config(id2label={9 - i: name for i, name in enumerate(CLASSES)})
    pipeline.save_pretrained(tmp_path / "dit")
    drawn = []

    def draw(self, class_labels, **kwargs):
        drawn.extend(class_labels)
        brightness = (9 - torch.tensor(class_labels)) / 10
        return ImagePipelineOutput(brightness[:, None, None, None].expand(-1, 3, 8, 8))

    monkeypatch.setattr(DiTPipeline, "__call__", draw)
    monkeypatch.setattr(DiTFamily, "sample_latents", DiTFamily.sample)
    monkeypatch.setattr(DiTFamily, "decode", lambda self, images: images)
    monkeypatch.setattr(rdm_trl.demo, "DemoClassifier", ReadsBrightness)
    command = f"compare --methods gndm --seeds 0 --num_images 20 --eval_steps 1 --teachers {tmp_path / 'dit'}".split()
    monkeypatch.setattr("sys.argv", [*command, "--output_dir", str(tmp_path), "--set", *SMALL.split(), "max_steps=1"])
    script.main()
    results = json.loads((tmp_path / "dit" / "results.json").read_text())["gndm-0"]
    figures = (results["teacher"], results["base"], results["curve"][-1])
    assert [figure["class_accuracy"] for figure in figures] == [1.0, 1.0, 1.0]
    assert drawn[:20] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0] * 2
