# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The base in shards over two real CPU processes, against DDP."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two import launch


WAYS = ("ddp", "shards")


def differ(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference, in units of the largest weight."""
    assert first.keys() == second.keys()
    largest = max(value.abs().max() for value in first.values())
    return max((value - second[key]).abs().max() / largest for key, value in first.items())


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def check_pipeline(folder: Path, name: str):
    for rank in range(2):
        ddp, shards = (load_file(folder / way / f"{name}-{rank}.safetensors") for way in WAYS)
        for role in sorted({key.split(".")[0] for key in ddp}):
            assert differ(*({k: v for k, v in of.items() if k.startswith(f"{role}.")} for of in (ddp, shards))) < 1e-6
        assert equal(load_file(folder / "shards" / f"{name}-resumed-{rank}.safetensors"), shards)
        whole, half = (json.loads((folder / way / f"found-{rank}.json").read_text())[name] for way in WAYS)
        for part, all_of_it, planned in zip(half["bytes"], whole["bytes"], half["planned"], strict=True):
            assert part <= 0.55 * all_of_it
            assert part == planned if rank == 0 else part <= planned
        assert len(whole["adversary"]) == {"unet": 4, "sd3": 3, "kontext": 0}[name]
        for log, others in zip(half["adversary"], whole["adversary"], strict=True):
            assert log == pytest.approx(others, rel=1e-6, abs=1e-6)
        assert half["weights"] == whole["weights"]  # so that each finds the other's images of the teacher
        for who, figures in whole["figures"].items():
            found = half["figures"][who]
            assert found.pop("rewards") == pytest.approx(figures.pop("rewards"), rel=1e-6)
            assert found == pytest.approx(figures, rel=1e-5, abs=1e-9)
    calls = [json.loads((folder / "shards" / f"found-{rank}.json").read_text())[name]["drawn"] for rank in range(2)]
    assert calls[0] == calls[1]
    saved = (load_file(folder / way / name / "run" / "pytorch_lora_weights.safetensors") for way in WAYS)
    assert differ(*saved) < 1e-6


def test_shards_are_ddp_with_half_of_the_base(tmp_path):
    environment = {"FSDP_VERSION": "2", "HF_HOME": str(tmp_path / "cache")}
    ((failed, errors, end),) = launch(tmp_path, "shards", "all", **environment)
    assert (tmp_path / "begun").exists(), errors[-3000:]
    # An error on one process ends all.
    assert failed and "out of ink" in errors
    assert end - (tmp_path / "begun").stat().st_mtime < 60
    for name in ("unet", "sd3", "kontext"):
        check_pipeline(tmp_path, name)
    # A checkpoint of one way goes on in the other.
    whole = load_file(tmp_path / "ddp" / "kontext-0.safetensors")
    for way in WAYS:
        for rank in range(2):
            assert differ(load_file(tmp_path / way / f"crossed-{rank}.safetensors"), whole) < 1e-6
