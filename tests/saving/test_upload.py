# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Pushes by the Hub's own client, to a server in a thread."""

import json
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_pipeline, make_trainer
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard, constants, hf_hub_download
from safetensors.torch import load, load_file
from transformers import TrainerCallback


ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(monkeypatch):
    """What `HF_ENDPOINT` and `HF_TOKEN` set, in a process that has imported the client already."""
    hub = Hub()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.server.shutdown()


def run(hub, tmp_path, *command):
    """A fresh process with the environment that a user would set."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


UPLOADED = {
    "README.md",
    "metrics.json",
    "pytorch_lora_weights.safetensors",
    "scheduler/scheduler_config.json",
    "samples/grid.png",
    "samples/card.png",
    "report.html",
    "samples/step-000002.png",
}


def test_a_push_uploads_the_checkpoint_and_its_card_runs_from_there(hub, tmp_path):
    make_tiny_pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: openrail++\n---\n")
    options = dict(max_steps=2, log_images_steps=2, save_strategy="steps", save_steps=1)
    trainer = make_trainer(tmp_path, pipeline=str(tmp_path / "base"), hub_private_repo=True, **options)
    trainer.train()
    trainer.evaluate()
    (tmp_path / "run" / "unet.safetensors").write_bytes(b"somebody's base")
    trainer.push_to_hub(dataset_name="me/prompts", tags="cats")

    files = hub.files["me/run"]["main"]
    assert files.keys() == UPLOADED and hub.private["me/run"] and hub.commits == ["End of training"]
    for name, content in files.items():
        assert content == (tmp_path / "run" / name).read_bytes()
    card = files["README.md"].decode()
    data = ModelCard(card).data
    assert data.license == "openrail++" and data.datasets == "me/prompts" and data.library_name == "diffusers"
    assert data.base_model is None  # a path on this machine means nothing to the Hub
    assert {"diffusers", "lora", "rdm-trl", "text-to-image", "cats"} <= set(data.tags)
    for line in ("load_lora_weights('me/run')", "| student | ", "![teacher, base and student](samples/grid.png)"):
        assert line in card
    for name, value in json.loads(files["metrics.json"])["settings"].items():
        assert f"| `{name}` | `{value}` |" in card

    code = card.split("```python\n")[1].split("```")[0]
    run(hub, tmp_path, sys.executable, "-c", code)
    assert (tmp_path / "image.png").is_file()


def test_the_card_of_a_base_on_the_hub(hub, tmp_path, monkeypatch):
    """Its licence is told only where its own card is at hand; nothing is asked of the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    trainer = make_trainer(tmp_path)
    trainer.base_model = "them/base"
    trainer.save_model()
    data = ModelCard.load(tmp_path / "run" / "README.md").data
    assert data.base_model == "them/base" and data.to_dict()["base_model_relation"] == "adapter"
    assert data.license is None and not hub.requests

    readme = b"---\nlicense: other\nlicense_name: theirs\nlicense_link: https://a.b/c\n---\n"
    hub.files["them/base"] = {"main": {"README.md": readme}}
    hf_hub_download("them/base", "README.md")
    trainer.save_model()
    data = ModelCard.load(tmp_path / "run" / "README.md").data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "theirs", "https://a.b/c")


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_hub_strategy(hub, tmp_path, strategy):
    hub.faults = {"/preupload/": [(429, {"Retry_After": "0"})]}  # a rate limit that passes is waited for
    trainer = make_trainer(
        tmp_path,
        push_to_hub=True,
        hub_strategy=strategy,
        hub_model_id="me/student",
        hub_revision="try",
        hub_always_push=True,
        log_images_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    assert hub.files["me/student"] == {"main": {}, "try": {}}  # nothing yet, but there is a place for it
    trainer.train()
    during = dict(hub.files["me/student"]["try"])
    trainer.save_model()
    assert not hub.files["me/student"]["main"]
    files = hub.files["me/student"]["try"]
    folders = {name.split("/")[0] for name in files if "checkpoint" in name}
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-1", "checkpoint-2"}}
    assert folders == expected.get(strategy, set())
    assert {name for name in files if "checkpoint" not in name} == UPLOADED
    assert bool(during) == (strategy != "end")
    assert "load_lora_weights('me/student')" in files["README.md"].decode()
    for folder in folders:
        assert f"{folder}/optimizer.pt" in files and f"{folder}/adapters.safetensors" in files
    assert not any(name.endswith("training_args.bin") for name in files)  # which would hold the token
    assert hub.commits.count("Model save") == 1


@pytest.mark.parametrize(
    "faults, message",
    [
        ({"/api/repos/create": [(401, {})]}, "log in by `hf auth login`"),
        ({"/auth-check/write": [(403, {})]}, "name a repository of your own by `hub_model_id`"),
        ({"/commit/": ["drop"]}, "The connection failed"),
        ({"/commit/": [(429, {"Retry_After": "77"})]}, "wait for 77 seconds"),
    ],
)
def test_a_failed_push_loses_nothing_and_can_be_repeated(hub, tmp_path, faults, message):
    hub.faults = faults
    trainer = make_trainer(tmp_path, hub_model_id="me/student", log_images_steps=2)
    trainer.train()
    with pytest.raises(RuntimeError, match="The push to 'me/student' failed") as error:
        trainer.push_to_hub()
    assert message in str(error.value) and "`trainer.push_to_hub()`" in str(error.value)
    assert not hub.commits
    saved = contents(tmp_path / "run")
    assert UPLOADED <= saved.keys()
    weights = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    trainer.push_to_hub()
    assert hub.files["me/student"]["main"].keys() == UPLOADED
    uploaded = load(hub.files["me/student"]["main"]["pytorch_lora_weights.safetensors"])
    assert uploaded.keys() == weights.keys() and all(torch.equal(uploaded[key], weights[key]) for key in weights)


def test_the_command_that_a_failed_push_names_uploads_the_same(hub, tmp_path):
    hub.faults = {"/commit/": ["drop"]}
    trainer = make_trainer(tmp_path, hub_model_id="me/student", hub_revision="try", log_images_steps=2)
    trainer.train()
    with pytest.raises(RuntimeError) as error:
        trainer.push_to_hub()
    command = shlex.split(next(line for line in str(error.value).splitlines() if line.strip().startswith("hf upload")))
    run(hub, tmp_path, str(Path(sysconfig.get_path("scripts")) / command[0]), *command[1:])
    assert hub.files["me/student"]["try"] == {k: v for k, v in contents(tmp_path / "run").items() if k in UPLOADED}


def test_a_connection_dropped_within_a_file_is_taken_up_again(hub, tmp_path):
    hub.faults = {"/lfs/": ["drop"]}
    trainer = make_trainer(tmp_path, hub_model_id="me/student")
    trainer.push_to_hub()
    assert hub.files["me/student"]["main"]["pytorch_lora_weights.safetensors"]


@pytest.mark.parametrize(
    "name, token, exists, status",
    [("me/student", "hf_wrong", False, 401), ("you/student", TOKEN, False, 403), ("you/student", TOKEN, True, 403)],
)
def test_without_a_repository_to_write_to_training_does_not_begin(
    hub, tmp_path, monkeypatch, name, token, exists, status
):
    if exists:
        hub.files[name], hub.private[name] = {"main": {}}, False
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(RuntimeError, match=f"Nothing was trained yet.*{status}"):
        make_trainer(tmp_path, push_to_hub=True, hub_model_id=name)


def test_a_failure_in_the_background_is_a_warning(hub, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("rdm_trl.saving.upload.logger.warning", warnings.append)
    options = dict(hub_model_id="me/student", hub_strategy="every_save", save_strategy="steps", save_steps=1)
    trainer = make_trainer(tmp_path, push_to_hub=True, hub_always_push=True, **options)
    one_by_one = TrainerCallback()  # or the second save would change files in the midst of the first one's upload
    one_by_one.on_step_begin = lambda *args, **kwargs: trainer._finish_current_push()
    trainer.add_callback(one_by_one)
    hub.faults = {"/commit/": [(403, {}), "drop"]}
    trainer.train()
    assert trainer.state.global_step == 2 and len(warnings) == 2
    assert "may not write there" in warnings[0] and "The connection failed" in warnings[1]
    trainer.push_to_hub()
    assert "pytorch_lora_weights.safetensors" in hub.files["me/student"]["main"]
