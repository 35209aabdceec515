# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What is in shards, and what switches it on. Runs in shards are tested over two processes, in tests/distributed."""

from contextlib import nullcontext

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT, make_config, make_trainer
from tiny_pipelines import CASES, make

from rdm_trl import plan
from rdm_trl.models import sharding
from rdm_trl.models.pipelines import family_of


@pytest.mark.parametrize("name", CASES)
def test_every_familys_model_names_its_blocks(name):
    denoiser = family_of(make(CASES[name]), *CASES[name].size.values()).denoiser
    if name in ("dit", "ddpm", "ddim"):  # small ones, whose classes name none
        with pytest.raises(ValueError, match="cannot be in shards: its class names no blocks"):
            sharding.blocks_of(denoiser)
        assert "shards" not in plan.sizes_of_base(denoiser, 2)
        return
    assert "shards" in plan.sizes_of_base(denoiser, 2)
    blocks = sharding.blocks_of(denoiser)
    for i, block in enumerate(blocks):  # inner ones first
        assert not any(inner in blocks[i + 1 :] for inner in block.modules())


def says(*arguments) -> dict[str, str]:
    """The variables that `accelerate launch` would set."""
    args, *_ = _validate_launch_command(launch_command_parser().parse_args([*arguments, "script.py"]))
    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), None),
        (("--num_machines", "2", "--num_processes", "16", "--main_process_ip", "10.0.0.1"), None),
        (("--fsdp_offload_params", "true"), None),
        (("--fsdp_version", "1"), "FSDP1 is not supported"),
        (("--fsdp_reshard_after_forward", "false"), "`fsdp_reshard_after_forward` must be true"),
        (("--fsdp_cpu_ram_efficient_loading", "true"), "`fsdp_cpu_ram_efficient_loading` must be false"),
        (("--fsdp_activation_checkpointing", "true"), "`activation_checkpointing`, which knows of roles"),
        (("--fsdp_transformer_layer_cls_to_wrap", "Block"), "`fsdp_transformer_layer_cls_to_wrap` must be"),
        (("--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP"), "`fsdp_auto_wrap_policy`"),
    ],
)
def test_the_configuration_file(tmp_path, monkeypatch, arguments, message):
    path = ROOT / "examples" / "accelerate_configs" / "fsdp2.yaml"
    for name, value in says("--config_file", str(path), *arguments).items():
        if name.startswith(("ACCELERATE_USE_FSDP", "FSDP_")):
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        assert make_config(tmp_path) and sharding.is_asked_for()


def test_what_cannot_be_in_shards(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`fsdp` must be left out.*accelerate_configs/fsdp2.yaml"):
        make_config(tmp_path, fsdp=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="`torch_compile` cannot be had with FSDP"):
        make_config(tmp_path, torch_compile=True)
    with pytest.raises(ValueError, match="One process has nobody"):
        make_trainer(tmp_path)
    with pytest.raises(ValueError, match="`full_finetuning`"):
        make_trainer(tmp_path, peft_config=False)
