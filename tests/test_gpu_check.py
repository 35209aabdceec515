# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
import json
import sys
import weakref
from functools import partial

import pytest
import torch
from conftest import ROOT, load_script

from rdm_trl import RdmDistillTrainer


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    script = load_script("examples/gpu_check.py")
    # Encoders are of the real width, and few short prompts enough.
    monkeypatch.setattr(sys.modules["benchmark"], "DEMO_PROMPTS", ["a bag", "a coat"])
    monkeypatch.setattr(script, "time_updates", partial(script.time_updates, max_sequence_length=16))
    monkeypatch.setattr(script, "CASES", [script.Case("sd35_medium", 4), script.Case("flux", 4, checkpointing=True)])
    return script


def run(script, folder, *options) -> tuple[dict, str]:
    script.main(["--updates", "1", "--skip_main_job", "--output_dir", str(folder), *options])
    return json.loads((folder / "gpu_check.json").read_text()), (folder / "gpu_check.md").read_text()


def test_an_updates_parts_are_timed_by_the_trainer_itself(script, tmp_path):
    backward = torch.Tensor.backward
    found, table = run(script, tmp_path)
    for case in found["cases"]:
        parts = case["parts"]
        assert all(seconds > 0 for seconds in parts.values())
        inside = sum(seconds for name, seconds in parts.items() if name != "networks")
        assert 0.5 * case["seconds"] < inside < 1.01 * case["seconds"] and parts["networks"] < case["seconds"]
        # Forward passes and backward ones.
        assert parts["networks"] > parts["rollout"] / 2 + parts["student, backward"]
        assert case["images_per_second"] == pytest.approx(4 / case["seconds"])
        assert case["planned_gib"] > 0
    assert "| sd35_medium | 64 | 4 | plain |" in table and "| flux | 64 | 4 | checkpointing |" in table
    assert torch.Tensor.backward is backward


def test_the_other_two_families(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "time_updates", script.time_updates.func)  # theirs have one length
    monkeypatch.setattr(script, "CASES", [script.Case("sd15", 4), script.Case("sdxl", 4, checkpointing=True)])
    found, _ = run(script, tmp_path)
    assert [case["pixels"] for case in found["cases"]] == [64, 64] and all("seconds" in c for c in found["cases"])


def test_what_does_not_fit_costs_no_other_case(script, tmp_path, monkeypatch):
    """The memory ends in the middle of the second update; nothing of that pipeline is left for the next case."""
    make, update, denoisers, updates = script.make, RdmDistillTrainer.update_fake, [], []

    def make_and_watch(model, tiny, device, dtype):
        pipeline = make(model, tiny, device, dtype)
        if device == "cpu":
            assert all(denoiser() is None for denoiser in denoisers)
            denoisers.append(weakref.ref(pipeline.transformer))
        return pipeline

    def no_room(trainer):
        updates.append(trainer)
        if len(updates) == 2:
            updates.clear()
            monkeypatch.setattr(RdmDistillTrainer, "update_fake", update)
            raise torch.OutOfMemoryError("CUDA out of memory")
        update(trainer)

    monkeypatch.setattr(script, "make", make_and_watch)
    monkeypatch.setattr(RdmDistillTrainer, "update_fake", no_room)
    monkeypatch.setattr(script, "CASES", script.CASES[::-1])
    found, table = run(script, tmp_path)
    assert len(denoisers) == 2 and denoisers[1]() is None
    assert found["cases"][0]["failed"] == "does not fit" and "seconds" in found["cases"][1]
    planned = found["cases"][0]["planned_gib"]
    assert f"| flux | 64 | 4 | checkpointing | does not fit |  |  |  |  |  |  |  | {planned:.1f} |" in table


def test_the_clock_ends_it(script, tmp_path, monkeypatch):
    """Within a case behind an update, and without beginning another; what was measured stays."""
    now = [0.0]
    update = RdmDistillTrainer.update_fake

    def slow_update(trainer):
        now[0] += 100.0
        update(trainer)

    monkeypatch.setattr(script.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(RdmDistillTrainer, "update_fake", slow_update)
    found, table = run(script, tmp_path, "--minutes", "8", "--updates", "9")
    measured, other = found["cases"]
    assert now[0] == 500.0 and "seconds" in measured  # two updates before those that count
    assert other["failed"] == "out of time" and "| flux |  | 4 | checkpointing | out of time |" in table
    found, _ = run(script, tmp_path, "--minutes", "0.1")  # too short for a measured update
    assert [case["failed"] for case in found["cases"]] == ["out of time"] * 2 and now[0] == 600.0


def test_the_main_job_is_this_repositorys_and_ends_in_time(script, tmp_path):
    options = "--num_teacher_images 0 --max_steps 1 --num_eval_images 8 --teacher_num_steps 2 --log_images_steps 0"
    found = script.run_main_job(tmp_path, script.time.monotonic() + 300, "--use_cpu", "true", *options.split())
    assert found["seconds"] > found["training_seconds"] > 0 and found["fid"] > 0
    table = script.report([], found, "here")
    assert f"fid {found['fid']:.3f}" in table
    late = script.run_main_job(tmp_path, script.time.monotonic() - 1)
    assert late == {"failed": "out of time"} and "The main job: out of time." in script.report([], late, "here")


def test_the_sizes_are_the_public_ones(script):
    """Parameters in millions, as the models' makers give them."""
    for model, name, millions in (
        ("sd15", "unet", 860),
        ("sdxl", "unet", 2567),
        ("sd35_medium", "transformer", 2243),
        ("flux", "transformer", 11901),
    ):
        denoiser = script.make(model, False, "meta", torch.bfloat16).components[name]
        assert round(sum(p.numel() for p in denoiser.parameters()) / 1e6) == pytest.approx(millions, abs=4), model
