# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Whole networks instead of adapters, against the untouched base and pipelines that plain diffusers loads."""

import json

import pytest
import torch
from conftest import PROMPTS, make_tiny_pipeline, make_trainer
from diffusers import DiffusionPipeline
from tiny_pipelines import CASES, make, make_family_trainer, rollout_of, run_card

from rdm_trl.models.full import FullRoles
from rdm_trl.saving.export import export


def train(tmp_path, name="sd_epsilon", **options):
    make(CASES[name]).save_pretrained(tmp_path / "base")
    options = {"learning_rate": 0.01, "max_steps": 2, **CASES[name].size, **options}
    trainer = make_family_trainer(CASES[name], tmp_path, str(tmp_path / "base"), lora=False, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["sd_epsilon", "sd3", "ddpm"])
def test_the_saved_network_draws_the_trainers_rollout(name, tmp_path):
    trainer = train(tmp_path, name)
    case, base = CASES[name], DiffusionPipeline.from_pretrained(tmp_path / "base")
    network = base.components[trainer.family.denoiser_name]
    for key, value in trainer.model.denoiser.state_dict().items():
        assert torch.equal(value, network.state_dict()[key]), key
    trainer.save_model()
    ours = rollout_of(trainer, case, case.prompts[0], "ema")
    torch.testing.assert_close(ours, run_card(tmp_path / "run" / "README.md"), atol=1e-5, rtol=1e-5)
    assert (rollout_of(trainer, case, case.prompts[0], "teacher") - ours).abs().max() > 1e-4
    card = (tmp_path / "run" / "README.md").read_text()
    assert "LoRA" not in card and "- lora" not in card
    assert not list((tmp_path / "run").glob("*.safetensors"))

    fused = export(tmp_path / "run", tmp_path / "fused", "diffusers", base=str(tmp_path / "base"))
    fused = DiffusionPipeline.from_pretrained(fused).components[trainer.family.denoiser_name].state_dict()
    for key, value in trainer.model.adapter_state("ema").items():
        assert torch.equal(value, fused[key]), key
    with pytest.raises(ValueError, match="is a whole network, not a LoRA"):
        export(tmp_path / "run", tmp_path / "file", "kohya")
    settings = json.loads((tmp_path / "run" / "metrics.json").read_text())["settings"]
    assert settings["full_finetuning"] and "lora_r" not in settings


def test_roles_are_copies(tmp_path):
    pipeline = make_tiny_pipeline()
    roles = FullRoles(pipeline.unet)
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([100, 700]), torch.randn(2, 16, 16)
    expected = pipeline.unet(*inputs).sample
    for role in ("teacher", "student", "fake", "ema"):
        assert torch.equal(roles(role, *inputs), expected)
    with torch.no_grad():
        roles.networks["student"].conv_out.bias += 1.0
    with roles.use("student"):
        torch.testing.assert_close(pipeline.unet(*inputs).sample, expected + 1.0)
        with roles.use("teacher"):
            assert torch.equal(pipeline.unet(*inputs).sample, expected)
        torch.testing.assert_close(pipeline.unet(*inputs).sample, expected + 1.0)
    assert torch.equal(pipeline.unet(*inputs).sample, expected)
    roles("student", *inputs).square().mean().backward()
    touched = {name for name, parameter in roles.named_parameters() if parameter.grad is not None}
    assert touched and all(name.startswith("networks.student.") for name in touched)
    assert touched <= {n for n, _ in roles.named_parameters()} - set(roles._ddp_params_and_buffers_to_ignore)
    roles.update_ema(0.75)
    torch.testing.assert_close(roles("ema", *inputs), expected + 0.25)


def test_resume_and_checkpointing(tmp_path):
    """2 + 2 updates are 4 updates, and activation checkpointing changes nothing."""
    options = dict(peft_config=False, learning_rate=1e-3)
    whole = make_trainer(tmp_path / "whole", max_steps=4, **options)
    whole.train()
    saving = dict(save_strategy="steps", save_steps=2, activation_checkpointing=True)
    make_trainer(tmp_path / "parts", max_steps=2, **options, **saving).train()
    resumed = make_trainer(tmp_path / "parts", max_steps=4, **options, **saving)
    resumed.train(resume_from_checkpoint=True)
    for role in ("student", "fake", "ema"):
        start = dict(make_tiny_pipeline().unet.named_parameters())
        state, other = whole.model.adapter_state(role), resumed.model.adapter_state(role)
        for key, value in state.items():
            assert torch.equal(value, other[key]), (role, key)
        assert max((state[key] - value).abs().max() for key, value in start.items()) > 1e-4
    assert torch.equal(whole.sample("student", PROMPTS), resumed.sample("student", PROMPTS))


def test_what_full_finetuning_has_not(tmp_path):
    with pytest.raises(ValueError, match="need LoRAs"):
        make_trainer(tmp_path, peft_config=False, teacher_lora=tmp_path)
    with pytest.raises(TypeError, match="or `False` for no LoRA"):
        make_trainer(tmp_path, peft_config=True)
    trainer = make_trainer(tmp_path, peft_config=False)
    with pytest.raises(ValueError, match="Unknown role"), trainer.model.use("someone"):
        pass
    with pytest.raises(ValueError, match="do not fit the network"):
        trainer.model.load_adapter("student", {})
