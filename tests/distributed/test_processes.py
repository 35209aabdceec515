# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Two real CPU processes, started by the agent of torchrun and `accelerate launch`."""

import pytest
import worker
from safetensors.torch import load_file
from torch.testing import assert_close
from two import launch

from rdm_trl.saving.checkpoint import last_complete_checkpoint


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """Two launches, in one what can be: the last task of each fails, which ends both processes."""
    folder = tmp_path_factory.mktemp("launched")
    together, kill = launch(folder, "worker", "same_samples,guided,resume,stop,fail", "kill")
    assert (folder / "fail" / "begun").exists(), together[1][-3000:]
    return folder, together, kill


def test_two_processes_are_one_with_accumulation(launches, tmp_path):
    worker.same_samples(tmp_path)
    folder = launches[0] / "same_samples"
    first, second = (load_file(folder / f"same-{rank}-of-2.safetensors") for rank in range(2))
    start, alone = (load_file(tmp_path / f"{name}-0-of-1.safetensors") for name in ("start", "same"))
    for key, value in first.items():
        assert second[key].equal(value), key
        assert_close(alone[key], value, atol=1e-5, rtol=1e-5)
    for role in ("student", "fake", "ema", "head"):
        assert max((alone[key] - start[key]).abs().max() for key in start if key.startswith(role)) > 1e-4


def test_two_processes_absorb_what_one_does(launches, tmp_path):
    worker.guided(tmp_path)

    def read(name, rank, world):
        folder = tmp_path if world == 1 else launches[0] / "guided"
        return load_file(folder / f"{name}-{rank}-of-{world}.safetensors")

    for rank in range(2):
        assert read("images", rank, 2)["latents"].equal(read("images", 0, 1)["latents"])
        for key, value in read("first", 0, 2).items():
            assert read("first", rank, 2)[key].equal(value) and read("later", rank, 2)[key].equal(value)
            assert_close(read("first", 0, 1)[key], value, atol=1e-5, rtol=1e-5)
    assert read("first", 0, 1)["target"].abs().max() > 1e-2


def test_two_processes_resume_between_two_uses_of_a_rollout(launches):
    folder = launches[0] / "resume"
    for rank in range(2):
        whole, resumed = (load_file(folder / f"{name}-{rank}-of-2.safetensors") for name in ("whole", "resumed"))
        for key, value in whole.items():
            assert resumed[key].equal(value), key
    assert any(key.startswith("target.") for key in whole)
    other = load_file(folder / "whole-1-of-2.safetensors")
    whole = load_file(folder / "whole-0-of-2.safetensors")
    assert all(other[key].equal(value) for key, value in whole.items())


def test_a_signal_to_one_process_ends_both_with_a_checkpoint(launches):
    folder = launches[0] / "stop"
    assert (folder / "stopped-0").exists() and (folder / "stopped-1").exists()


def test_a_reward_that_fails_on_one_process_ends_all(launches):
    folder, (failed, errors, end), _ = launches
    assert failed and end - (folder / "fail" / "begun").stat().st_mtime < 60
    assert "out of ink" in errors and "broken" in errors


def test_one_killed_process_ends_all_and_leaves_a_checkpoint(launches):
    folder, _, (failed, errors, end) = launches
    assert failed and end - (folder / "kill" / "begun").stat().st_mtime < 60
    # Whichever process the agent hears of first: the killed one, or the one that lost it.
    assert any(said in errors for said in ("SIGKILL", "exitcode: -9", "closed by peer", "reset by peer"))
    assert last_complete_checkpoint(folder / "kill" / "run").name in ("checkpoint-1", "checkpoint-2")
