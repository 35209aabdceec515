# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Two real CPU processes, started as torchrun and `accelerate launch` start them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from rdm_trl.saving.checkpoint import last_complete_checkpoint


WORKER = str(Path(__file__).with_name("worker.py"))


def launch(task: str, folder: Path, processes: int = 2, check: bool = True) -> subprocess.CompletedProcess:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*(run if processes > 1 else [sys.executable]), WORKER, task, str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    if check:
        assert result.returncode == 0, result.stderr[-3000:]
    return result


def test_two_processes_are_one_with_accumulation(tmp_path):
    launch("same_samples", tmp_path)
    launch("same_samples", tmp_path, processes=1)
    first, second = (load_file(tmp_path / f"same-{rank}-of-2.safetensors") for rank in range(2))
    start, alone = (load_file(tmp_path / f"{name}-0-of-1.safetensors") for name in ("start", "same"))
    for key, value in first.items():
        assert torch.equal(second[key], value), key
        torch.testing.assert_close(alone[key], value, atol=1e-5, rtol=1e-5)
    for role in ("student", "fake", "ema", "head"):
        assert max((alone[key] - start[key]).abs().max() for key in start if key.startswith(role)) > 1e-4


def test_two_processes_absorb_what_one_does(tmp_path):
    launch("guided", tmp_path)
    launch("guided", tmp_path, processes=1)

    def read(name, rank, world):
        return load_file(tmp_path / f"{name}-{rank}-of-{world}.safetensors")

    for rank in range(2):
        assert torch.equal(read("images", rank, 2)["latents"], read("images", 0, 1)["latents"])
        for key, value in read("first", 0, 2).items():
            assert torch.equal(read("first", rank, 2)[key], value) and torch.equal(read("later", rank, 2)[key], value)
            torch.testing.assert_close(read("first", 0, 1)[key], value, atol=1e-5, rtol=1e-5)
    begun, alone = read("begun", 0, 1), read("first", 0, 1)
    assert max((alone[key] - value).abs().max() for key, value in begun.items()) > 1e-4


def test_two_processes_resume_between_two_uses_of_a_rollout(tmp_path):
    launch("resume", tmp_path)
    for rank in range(2):
        whole, resumed = (load_file(tmp_path / f"{name}-{rank}-of-2.safetensors") for name in ("whole", "resumed"))
        for key, value in whole.items():
            assert torch.equal(resumed[key], value), key
    other = load_file(tmp_path / "whole-1-of-2.safetensors")
    whole = load_file(tmp_path / "whole-0-of-2.safetensors")
    assert all(torch.equal(other[key], value) for key, value in whole.items())


def test_a_signal_to_one_process_ends_both_with_a_checkpoint(tmp_path):
    launch("stop", tmp_path)
    assert (tmp_path / "stopped-0").exists() and (tmp_path / "stopped-1").exists()


def test_a_reward_that_fails_on_one_process_ends_all(tmp_path):
    start = time.monotonic()
    result = launch("fail", tmp_path, check=False)
    assert result.returncode != 0 and time.monotonic() - start < 120
    assert "out of ink" in result.stderr and "broken" in result.stderr


def test_one_killed_process_ends_all_and_leaves_a_checkpoint(tmp_path):
    start = time.monotonic()
    result = launch("kill", tmp_path, check=False)
    assert result.returncode != 0 and time.monotonic() - start < 120
    assert "SIGKILL" in result.stderr or "exitcode: -9" in result.stderr
    assert last_complete_checkpoint(tmp_path / "run").name in ("checkpoint-1", "checkpoint-2")
