# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Options of `TrainingArguments` and of accelerate's launcher that would be silently without effect."""

import pytest
from conftest import make_config
from transformers import TrainingArguments

from rdm_trl.inherited import REFUSED


@pytest.mark.parametrize("name", REFUSED)
def test_options_of_transformers_without_a_meaning_here(tmp_path, name):
    default = getattr(TrainingArguments("here"), name)
    default = None if name == "fsdp_config" else default  # which it fills in
    other = {bool: not default, float: 0.5, str: "all"}.get(type(default), 5)
    with pytest.raises(ValueError, match=f"`{name}` is .*, but must be left out: "):
        make_config(tmp_path, **{name: other})
    make_config(tmp_path, **{name: default})


def test_options_of_checkpointing(tmp_path):
    with pytest.raises(ValueError, match="not reentrant"):
        make_config(tmp_path, activation_checkpointing_kwargs={"use_reentrant": True})
    make_config(tmp_path, activation_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("MIXED_PRECISION", "fp16", "Use `bf16`"),
        ("MIXED_PRECISION", "fp8", "'no' or 'bf16'"),
        ("DYNAMO_BACKEND", "INDUCTOR", "`torch_compile`"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "say it in the config"),
        ("USE_MEGATRON_LM", "true", "Megatron-LM is not supported"),
        ("USE_PARALLELISM_CONFIG", "true", "model parallelism is not supported"),
        ("USE_FSDP", "true", "FSDP is not supported"),
        ("USE_DEEPSPEED", "true", "DeepSpeed is not supported"),
    ],
)
def test_what_the_launcher_says_is_not_silent(tmp_path, monkeypatch, name, value, message):
    """`accelerate launch` and its configuration file speak by these variables."""
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path)


def test_the_launchers_bf16_is_the_option(tmp_path, monkeypatch):
    assert not make_config(tmp_path).bf16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = make_config(tmp_path)
    assert config.bf16 and config.to_dict()["bf16"] and config.mixed_precision == "bf16"


@pytest.mark.parametrize(
    "accelerator", [dict(split_batches=True), dict(gradient_accumulation_kwargs=dict(num_steps=2))]
)
def test_accelerators_own_options(tmp_path, accelerator):
    with pytest.raises(ValueError, match="`accelerator_config` has"):
        make_config(tmp_path, accelerator_config=accelerator)
