# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
import json

import pytest
import torch
from conftest import ROOT, load_script


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    script = load_script("examples/gpu_check.py")
    monkeypatch.setattr(script, "CASES", [script.Case("sd35_medium", 4), script.Case("flux", 4, checkpointing=True)])
    return script


def run(script, folder, *options) -> tuple[dict, str]:
    script.main(["--updates", "1", "--skip_main_job", "--output_dir", str(folder), *options])
    return json.loads((folder / "gpu_check.json").read_text()), (folder / "gpu_check.md").read_text()


def test_an_updates_parts_are_timed_by_the_trainer_itself(script, tmp_path):
    found, table = run(script, tmp_path)
    for case in found["cases"]:
        parts = case["parts"]
        assert all(seconds > 0 for seconds in parts.values())
        inside = sum(seconds for name, seconds in parts.items() if name != "networks")
        assert 0.5 * case["seconds"] < inside < 1.01 * case["seconds"] and parts["networks"] < case["seconds"]
        assert case["images_per_second"] == pytest.approx(4 / case["seconds"])
    assert "| sd35_medium | 64 | 4 | plain |" in table and "| flux | 64 | 4 | checkpointing |" in table


def test_what_does_not_fit_costs_no_other_case(script, tmp_path, monkeypatch):
    measure = script.measure

    def no_room(case, *args):
        if case.model == "flux":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(case, *args)

    monkeypatch.setattr(script, "measure", no_room)
    monkeypatch.setattr(script, "CASES", script.CASES[::-1])
    found, table = run(script, tmp_path)
    assert found["cases"][0]["failed"] == "does not fit" and "seconds" in found["cases"][1]
    assert "| flux |  | 4 | checkpointing | does not fit |" in table


def test_the_clock_ends_it(script, tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 481.0])
    monkeypatch.setattr(script.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(script, "measure", lambda case, *args: pytest.fail("not in time") if case.images != 4 else {})
    monkeypatch.setattr(script, "report", lambda *args: "")
    found, _ = run(script, tmp_path, "--minutes", "8")
    assert len(found["cases"]) == 1


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
