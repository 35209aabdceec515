# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Checkpoints of runs that were killed, ran out of disk or were told to stop; of other runs; and of strangers."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import FEW, make_trainer, redness
from interrupted import OPTIONS
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from rdm_trl.saving import checkpoint
from rdm_trl.saving.checkpoint import find_checkpoint, last_complete_checkpoint, what_is_missing


ROOT = Path(__file__).parents[2]


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {f"{name}.{k}": v for name in trainer.model.adapters for k, v in trainer.model.adapter_state(name).items()}


def check_equal(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    for key, value in expected.items():
        assert torch.equal(weights[key], value), key


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of five updates that nothing interrupts, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder, [redness], max_steps=5, **OPTIONS)
    trainer.train()
    return trainer, folder / "run"


ENDS = {
    "killed-adapters": -signal.SIGKILL,
    "killed-state": -signal.SIGKILL,
    "disk": 1,
    "SIGTERM": 128 + signal.SIGTERM,
    "SIGINT": -signal.SIGINT,
    "endless": 1,
    "endless_in_its_loop": 1,
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Of each end of a run its folder, exit status and errors."""
    folder = tmp_path_factory.mktemp("interrupted")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "interrupted.py"), str(folder), *ENDS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    ended = re.findall(r"(.*?)^(\S+) ended: (-?\d+)$", result.stderr, flags=re.S | re.M)
    assert [how for _, how, _ in ended] == list(ENDS)
    return {how: (folder / how, int(returncode), errors) for errors, how, returncode in ended}


@pytest.fixture
def saved(whole, tmp_path):
    """A copy of its checkpoints, of steps 2, 4 and 5, in the output folder of `make_trainer(tmp_path)`."""
    shutil.copytree(whole[1], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def warned(monkeypatch):
    warnings = []
    monkeypatch.setattr(checkpoint.logger, "warning", warnings.append)
    return warnings


def check_that_it_goes_on(folder: Path, whole):
    resumed = make_trainer(folder, [redness], max_steps=5, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    check_equal(weights_of(resumed), weights_of(whole[0]))


# -------------------------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("how, torn", [("killed-adapters", "checkpoint.json"), ("killed-state", "trainer_state.json")])
def test_a_run_killed_in_a_save_goes_on_from_the_checkpoint_before(interrupted, whole, warned, how, torn):
    folder, returncode, errors = interrupted[how]
    assert returncode == ENDS[how], errors[-3000:]
    assert (folder / "run" / "checkpoint-4").is_dir()
    assert last_complete_checkpoint(folder / "run").name == "checkpoint-2"
    assert len(warned) == 1 and f"checkpoint-4 is skipped: {torn} is missing or torn" in warned[0]
    check_that_it_goes_on(folder, whole)
    assert last_complete_checkpoint(folder / "run").name == "checkpoint-5"


def test_a_full_disk_leaves_the_checkpoint_before(interrupted, whole):
    folder, returncode, errors = interrupted["disk"]
    assert returncode == ENDS["disk"] and "File too large" in errors
    assert last_complete_checkpoint(folder / "run").name == "checkpoint-2"
    check_that_it_goes_on(folder, whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_run_with_a_checkpoint(tmp_path, interrupted, name):
    folder, returncode, errors = interrupted[name]
    assert returncode == ENDS[name], errors[-3000:]
    newest = last_complete_checkpoint(folder / "run")
    step = json.loads((newest / "trainer_state.json").read_text())["global_step"]
    assert 2 <= step < 20 and f"Stopped at step {step} by {name}" in errors
    # Wherever the signal came: the run goes on as if it had not.
    alone = make_trainer(tmp_path, [redness], max_steps=step + 1, **OPTIONS)
    alone.train()
    resumed = make_trainer(folder, [redness], max_steps=step + 1, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    check_equal(weights_of(resumed), weights_of(alone))


@pytest.mark.parametrize("name", ["endless", "endless_in_its_loop"])
def test_a_reward_that_never_returns_ends_the_process(interrupted, name):
    """Also the one that holds up its event loop; and the interpreter does not wait for it at its end."""
    _, returncode, errors = interrupted[name]
    assert returncode == ENDS[name]
    assert f"TimeoutError: Reward function '{name}' took longer than `reward_timeout` (0.2 s)." in errors


def test_signals_in_this_process(tmp_path):
    """Handlers come back, whatever happens; a second Ctrl-C does not wait; other threads are left alone."""
    trainer = make_trainer(tmp_path, [redness])
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt), trainer.stop_callback.listening():
        signal.raise_signal(signal.SIGINT)  # only remembered
    with pytest.raises(ZeroDivisionError), trainer.stop_callback.listening():
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError
    with trainer.stop_callback.listening():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        trainer.stop_callback.received = 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 2


def test_a_full_disk_with_a_limit_of_checkpoints(tmp_path, monkeypatch):
    """The error is seen, and the one checkpoint that is kept is the good one."""

    def full(tensors, path, metadata=None):
        if "checkpoint-2" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    trainer = make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1)
    with pytest.raises(OSError, match="No space left on device"):
        trainer.train()
    assert last_complete_checkpoint(tmp_path / "run").name == "checkpoint-1"


def test_a_torn_checkpoint_does_not_count_for_the_limit(tmp_path, saved):
    """It would be kept as the newest, and the new one deleted, where the clock of another machine says so."""
    (saved / "checkpoint-5").rename(saved / "checkpoint-9")
    (saved / "checkpoint-9" / "trainer_state.json").unlink()
    os.utime(saved / "checkpoint-9", (2**31, 2**31))
    trainer = make_trainer(tmp_path, [redness], max_steps=6, save_total_limit=1, **OPTIONS)
    trainer.train(resume_from_checkpoint=True)
    assert [path.name for path in checkpoint.checkpoints_of(saved)] == ["checkpoint-6"]
    assert what_is_missing(saved / "checkpoint-6") is None


def test_a_save_over_an_old_checkpoint_is_not_taken_for_it(tmp_path, saved, monkeypatch):
    """Killed in the middle: half of the files are the old run's, of the right size."""
    monkeypatch.setattr(checkpoint, "save_training_state", lambda *args: 1 / 0)
    trainer = make_trainer(tmp_path, [redness], max_steps=2, **OPTIONS)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert "checkpoint.json is missing" in what_is_missing(saved / "checkpoint-2")


# -------------------------------------------------------------------------------------------------------- what is torn


def cut(name):
    def damage(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:-10])

    return damage


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


DAMAGES = [
    (cut("adapters.safetensors"), r"adapters.safetensors has \d+ bytes of \d+"),
    (cut("optimizer.pt"), r"optimizer.pt has \d+ bytes of \d+"),
    (cut("experience_0.pt"), r"experience_0.pt has \d+ bytes of \d+"),
    (cut("trainer_state.json"), "trainer_state.json is missing or torn"),
    (cut("checkpoint.json"), "checkpoint.json is missing or torn"),
    (write("trainer_state.json", "garbage"), "trainer_state.json is missing or torn"),
    (write("trainer_state.json", "[]"), "trainer_state.json is missing or torn"),
    (write("trainer_state.json", ""), "trainer_state.json is missing or torn"),
    (write("metrics.json", "{}"), r"metrics.json has 2 bytes of \d+"),
    *[(remove(name), f"{name} is missing") for name in
      ("adapters.safetensors", "fake_optimizer.pt", "mixer.safetensors", "optimizer.pt", "scheduler.pt",
       "rng_state.pth", "experience_0.pt", "metrics.json", "checkpoint.json", "trainer_state.json")],
]  # fmt: skip


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_a_damaged_checkpoint_is_named_or_skipped(saved, warned, damage, message):
    damage(saved / "checkpoint-5")
    with pytest.raises(ValueError, match=f"checkpoint-5' cannot be resumed from: {message}"):
        find_checkpoint(str(saved / "checkpoint-5"), saved)
    assert find_checkpoint(True, saved) == str(saved / "checkpoint-4")
    assert len(warned) == 1 and "checkpoint-5 is skipped" in warned[0]


def test_nothing_to_resume_from(tmp_path, saved):
    trainer = make_trainer(tmp_path, [redness], **OPTIONS)
    before = weights_of(trainer)
    with pytest.raises(ValueError, match="'/no/such/folder' cannot be resumed from: there is no such folder"):
        trainer.train(resume_from_checkpoint="/no/such/folder")
    with pytest.raises(ValueError, match="cannot be resumed from: checkpoint.json is missing"):
        trainer.train(resume_from_checkpoint=str(saved))
    for folder in checkpoint.checkpoints_of(saved):
        shutil.rmtree(folder)
    (saved / "checkpoint-x").mkdir()
    (saved / "checkpoint-3").write_text("a file")
    with pytest.raises(ValueError, match="There is no complete checkpoint in .* Leave `resume_from_checkpoint` out"):
        trainer.train(resume_from_checkpoint=True)
    check_equal(weights_of(trainer), before)
    for nothing in (None, False):
        assert find_checkpoint(nothing, saved) is None


def test_weights_of_another_rank(tmp_path, saved):
    state = load_file(saved / "checkpoint-5" / "adapters.safetensors")
    save_file({k: v[:1].contiguous() if "lora_A" in k else v for k, v in state.items()}, saved / "a.safetensors")
    shutil.move(saved / "a.safetensors", saved / "checkpoint-5" / "adapters.safetensors")
    trainer = make_trainer(tmp_path, [redness], **OPTIONS)
    before = weights_of(trainer)
    with pytest.raises(ValueError, match=r"do not fit the adapter 'student': .* is \(1, .*must be \(2, "):
        checkpoint.load_adapters(saved / "checkpoint-5", trainer.model)
    check_equal(weights_of(trainer), before)


# ----------------------------------------------------------------------------------------------------- other settings


@pytest.mark.parametrize(
    "rewards, options, message",
    [
        ([redness], dict(sample_num_steps=2), "`sample_num_steps` was 4, is 2"),
        ([redness], dict(num_generations=2), "`num_generations` was 4, is 2"),
        ([redness], dict(per_device_train_batch_size=4), "`per_device_train_batch_size` was 8, is 4"),
        ([redness], dict(num_iterations=3), "`num_iterations` was 2, is 3"),
        ([redness], dict(seed=7), "`seed` was 42, is 7"),
        ([redness], dict(learning_rate=1e-4), "`learning_rate` was 0.005, is 0.0001"),
        (
            [redness],
            dict(lr_scheduler_type="linear"),
            "`lr_scheduler_type` was 'constant', is 'linear'; `max_steps` was 5",
        ),
        ([], {}, r"`reward_funcs` was \['redness'\], is \[\]"),
        ([redness], dict(gradient_accumulation_steps=2), "`gradient_accumulation_steps` was 1, is 2"),
        ([redness], dict(lora_r=3), "`lora_r` was 2, is 3"),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path, saved, rewards, options, message):
    options = {**OPTIONS, "max_steps": 6, **options}
    lora = LoraConfig(r=options.pop("lora_r", 2), target_modules=FEW)
    trainer = make_trainer(tmp_path, rewards, peft_config=lora, **options)
    before = weights_of(trainer)
    with pytest.raises(ValueError, match="is of a run with other settings: .*resume_with_changes") as caught:
        trainer.train(resume_from_checkpoint=True)
    assert re.search(message, str(caught.value)), str(caught.value)
    check_equal(weights_of(trainer), before)


def test_a_run_from_before_mirrored_pairs_is_refused(tmp_path, saved):
    settings = make_trainer(tmp_path, [redness], **{**OPTIONS, "max_steps": 6}).settings()
    checkpoint.check_settings(saved / "checkpoint-5", settings, with_changes=False)
    metrics = checkpoint.read_metrics(saved / "checkpoint-5")
    del metrics["settings"]["mirrors_noise"]
    (saved / "checkpoint-5" / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="`mirrors_noise` was None, is True"):
        checkpoint.check_settings(saved / "checkpoint-5", settings, with_changes=False)


def test_settings_that_no_update_depends_on_may_change(tmp_path, saved, whole):
    free = dict(num_eval_images=4, per_device_eval_batch_size=2, logging_steps=3, teacher_num_steps=2, max_steps=6)
    trainer = make_trainer(tmp_path, [redness], **{**OPTIONS, **free, "save_steps": 3})
    trainer.train(resume_from_checkpoint=str(saved / "checkpoint-4"))
    assert trainer.state.global_step == 6


def test_changes_that_are_wanted(tmp_path, saved, warned):
    """Another reward, loop and learning rate: the rates act from the first update, a loop draws its own rollouts."""

    def brightness(images, prompts, metadata):
        return images.mean((1, 2, 3))

    changes = dict(learning_rate=1e-4, fake_learning_rate=2e-4, num_iterations=4, steps_per_generation=2)
    trainer = make_trainer(
        tmp_path, [redness, brightness], resume_with_changes=True, max_steps=6, **{**OPTIONS, **changes}
    )
    rates = []
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *args: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.fake_score.optimizer.register_step_pre_hook(lambda o, *args: rates.append(o.param_groups[0]["lr"]))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6 and set(rates) == {1e-4, 2e-4}
    assert any("goes on from" in warning and "`num_iterations` was 2, is 4" in warning for warning in warned)


# ----------------------------------------------------------------------------------------------------- rewards' state


class Novelty:
    """Distance from the running mean of all images so far: a reward that remembers."""

    def __init__(self):
        self.mean, self.calls = torch.zeros(3), 0

    def __call__(self, images, prompts, metadata):
        colors = images.mean((2, 3))
        scores = (colors - self.mean).abs().mean(1)
        self.mean, self.calls = 0.9 * self.mean + 0.1 * colors.mean(0), self.calls + 1
        return scores

    def state_dict(self):
        return {"mean": self.mean, "calls": self.calls}

    def load_state_dict(self, state):
        self.mean, self.calls = state["mean"], state["calls"]


def test_a_reward_goes_on_with_its_state(tmp_path):
    options = dict(learning_rate=5e-3, save_strategy="steps", save_steps=2)
    reward = Novelty()
    alone = make_trainer(tmp_path / "whole", [reward], max_steps=4, **options)
    alone.train()
    make_trainer(tmp_path, [Novelty()], max_steps=2, **options).train()
    resumed_reward = Novelty()
    resumed = make_trainer(tmp_path, [resumed_reward], max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed_reward.calls == reward.calls == 4 and torch.equal(resumed_reward.mean, reward.mean)
    check_equal(weights_of(resumed), weights_of(alone))

    class Forgetful(Novelty):
        load_state_dict = property()

    Forgetful.__name__ = "Novelty"
    with pytest.raises(ValueError, match=r"the state of the rewards \['Novelty'\], but those with a state are \[\]"):
        make_trainer(tmp_path, [Forgetful()], max_steps=5, **options).train(resume_from_checkpoint=True)


def test_a_state_that_could_not_be_loaded_is_named_at_once(tmp_path):
    class Unsafe(Novelty):
        def state_dict(self):
            return {"path": Path("x")}

    with pytest.raises(TypeError, match="`state_dict` of the reward 'Unsafe' must hold tensors and plain values only"):
        make_trainer(tmp_path, [Unsafe()])


# -------------------------------------------------------------------------------------------- checkpoints of strangers


class Exploit:
    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return (Path.touch, (self.proof,))


PICKLES = ["fake_optimizer.pt", "experience_0.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rewards_0.pt"]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", PICKLES)
def test_no_pickle_of_a_checkpoint_is_executed(tmp_path, saved, name, zipped):
    folder, proof = saved / "checkpoint-5", tmp_path / "executed"
    torch.save(Exploit(proof), folder / name, _use_new_zipfile_serialization=zipped)
    # It is a pickle that would run.
    torch.load(folder / name, weights_only=False)
    assert proof.exists()
    proof.unlink()
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest[name] = (folder / name).stat().st_size
    (folder / "checkpoint.json").write_text(json.dumps(manifest))
    trainer = make_trainer(tmp_path, [redness], **{**OPTIONS, "max_steps": 6})
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert not proof.exists() and trainer.state.global_step in (0, 5)


def test_rewards_that_a_checkpoint_names_are_not_imported(tmp_path, saved, monkeypatch):
    (tmp_path / "of_a_stranger.py").write_text("from pathlib import Path\nPath('executed').touch()\n")
    monkeypatch.chdir(tmp_path)
    folder = saved / "checkpoint-5"
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["settings"]["reward_funcs"] = ["of_a_stranger:reward"]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest["metrics.json"] = (folder / "metrics.json").stat().st_size
    (folder / "checkpoint.json").write_text(json.dumps(manifest))
    for changes in (False, True):
        trainer = make_trainer(tmp_path, [redness], resume_with_changes=changes, **{**OPTIONS, "max_steps": 6})
        if changes:
            trainer.train(resume_from_checkpoint=str(folder))
        else:
            with pytest.raises(ValueError, match="`reward_funcs` was .*of_a_stranger"):
                trainer.train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "executed").exists() and "of_a_stranger" not in sys.modules
