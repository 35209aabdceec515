# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Exported checkpoints against weights that are added up by hand, and against the LoRA pipeline's images."""

import pytest
import torch
from conftest import PROMPTS, make_tiny_pipeline, make_trainer
from diffusers import DiffusionPipeline, LCMScheduler
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_editing import EDITING, shrink_qwen
from tiny_pipelines import CASES, images_of, make, make_family_trainer

from rdm_trl.cli import main
from rdm_trl.models.lora import make_roles
from rdm_trl.models.pipelines import family_of
from rdm_trl.models.roles import Roles
from rdm_trl.saving.export import WEIGHTS, export


RANK, ALPHA = 2, 5.0


def save(pipeline, folder) -> dict[str, torch.Tensor]:
    """A checkpoint with random weights; returns the denoiser's weights as they are with it, W + alpha / r B A."""
    family = family_of(pipeline)
    before = {key: value.clone() for key, value in family.denoiser.state_dict().items()}
    roles = Roles(family.denoiser, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=family.lora_target_modules))
    for parameter in roles.adapter_parameters("ema"):
        torch.nn.init.normal_(parameter, std=0.1)
    raw = roles.adapter_state("ema")
    config, state = roles.plain_lora("ema")
    folder.mkdir()
    family.save_lora(folder, state, config.to_dict())
    family.make_student_scheduler(4).save_pretrained(folder / "scheduler")
    layers = {key.removesuffix(".lora_A.weight") for key in raw if key.endswith(".lora_A.weight")}
    return before | {
        f"{layer}.weight": before[f"{layer}.weight"]
        + ALPHA / RANK * product(raw[f"{layer}.lora_B.weight"], raw[f"{layer}.lora_A.weight"])
        for layer in layers
    }


def product(up, down):
    return (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


def check(weights, expected):
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, atol=1e-5, rtol=1e-4, msg=key)


def added_by_hand(pipeline, file) -> dict[str, torch.Tensor]:
    """The weights of a reader that looks under every name it knows and scales by alpha / rank, without alpha by 1."""
    family, lora = family_of(pipeline), load_file(file)
    weights, used = family.denoiser.state_dict(), set()
    for key in list(weights):
        layer = key.removesuffix(".weight")
        kohya = f"lora_unet_{layer.replace('.', '_')}"
        for name, up, down in (
            (kohya, "lora_up", "lora_down"),
            (f"transformer.{layer}", "lora_B", "lora_A"),
            (f"base_model.model.{layer}", "lora_B", "lora_A"),
        ):
            if f"{name}.{up}.weight" in lora:
                used |= {f"{name}.{up}.weight", f"{name}.{down}.weight", f"{name}.alpha"}
                up, down = lora[f"{name}.{up}.weight"], lora[f"{name}.{down}.weight"]
                scale = lora[f"{name}.alpha"].item() / len(down) if f"{name}.alpha" in lora else 1.0
                weights[key] = weights[key] + scale * product(up, down)
    assert lora.keys() <= used
    return weights


@pytest.mark.parametrize("name", CASES)
def test_every_form_has_the_students_weights(name, tmp_path):
    def base():
        return make(CASES[name])

    expected = save(base(), tmp_path / "run")
    base().save_pretrained(tmp_path / "base")
    fused = export(tmp_path / "run", tmp_path / "fused", "diffusers", base=str(tmp_path / "base"))
    fused = DiffusionPipeline.from_pretrained(fused, dtype=torch.float32)
    check(family_of(fused).denoiser.state_dict(), expected)
    assert "LCM" in type(fused.scheduler).__name__
    options = dict(base().config)
    assert {key: fused.config[key] for key, value in options.items() if isinstance(value, bool)} == {
        key: value for key, value in options.items() if isinstance(value, bool)
    }

    file = export(tmp_path / "run", tmp_path / "comfy", "kohya")
    assert file == tmp_path / "comfy" / "run.safetensors"
    check(added_by_hand(base(), file), expected)
    if name.startswith("sd") and name != "sd3":
        keys = load_file(file).keys()
        assert all(key.startswith("lora_unet_") for key in keys) and sum(key.endswith(".alpha") for key in keys) > 9
    plain = base()
    if isinstance(plain, LoraBaseMixin):
        family = family_of(plain)
        plain.load_lora_weights(file)
        plain.fuse_lora(components=[family.denoiser_name])
        plain.unload_lora_weights()
        check(family.denoiser.state_dict(), expected)


@pytest.mark.parametrize("name", [*CASES, *EDITING])
def test_a_styled_student_alone_has_the_weights_of_its_role(name, tmp_path, monkeypatch):
    """`teacher_lora` in every family: all roles begin as the styled base, and the saved LoRA is all of the student."""
    shrink_qwen(monkeypatch)
    case = {**CASES, **EDITING}[name]
    styled = save(make(case), tmp_path / "style")
    make(case).save_pretrained(tmp_path / "base")
    family = family_of(make(case), *case.size.values())
    lora = LoraConfig(r=3, lora_alpha=7, target_modules=family.lora_target_modules[:2])
    roles = make_roles(family, lora, teacher_lora=tmp_path / "style")
    condition = family.encode_prompts(list(case.prompts))
    x_t, timesteps = torch.randn(2, *family.latent_shape), torch.tensor([500.0, 500.0])

    def output(network):
        with torch.no_grad():
            return family.denoise(network, x_t, timesteps, condition)

    def weights_alone(weights):
        plain = family_of(make(case)).denoiser
        plain.load_state_dict(weights)
        return output(lambda *args, **kwargs: plain(*args, **kwargs, return_dict=False)[0])

    expected = weights_alone(styled)
    for role in ("teacher", "student", "fake", "ema"):
        found = output(lambda *args, role=role, **kwargs: roles(role, *args, **kwargs))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=role)

    for parameter in roles.adapter_parameters("student"):
        parameter.data += 0.05 * torch.randn_like(parameter)
    config, state = roles.plain_lora("student")
    (tmp_path / "run").mkdir()
    family.save_lora(tmp_path / "run", state, config.to_dict())
    family.make_student_scheduler(4).save_pretrained(tmp_path / "run" / "scheduler")
    fused = export(tmp_path / "run", tmp_path / "fused", "diffusers", base=str(tmp_path / "base"))
    fused = family_of(DiffusionPipeline.from_pretrained(fused, dtype=torch.float32)).denoiser.state_dict()
    trained = output(lambda *args, **kwargs: roles("student", *args, **kwargs))
    torch.testing.assert_close(trained, weights_alone(fused), atol=1e-4, rtol=1e-4)
    assert (trained - expected).abs().max() > 1e-3


def draw(pipeline):
    generator = torch.Generator().manual_seed(42)
    return pipeline(PROMPTS, num_inference_steps=4, guidance_scale=1.0, generator=generator, output_type="pt").images


def test_the_command_exports_what_draws_as_the_student(tmp_path, capsys):
    make_tiny_pipeline().save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA)
    trainer = make_trainer(tmp_path, pipeline=str(tmp_path / "base"), peft_config=lora, learning_rate=0.02)
    trainer.train()
    trainer.save_model()
    expected = trainer.sample("student", PROMPTS)
    assert (expected - trainer.sample("base", PROMPTS)).abs().max() > 0.01

    main(["export", str(tmp_path / "run"), "--output_dir", str(tmp_path / "fused"), "--format", "diffusers"])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "fused")
    fused = DiffusionPipeline.from_pretrained(tmp_path / "fused", dtype=torch.float32)
    assert isinstance(fused.scheduler, LCMScheduler)
    torch.testing.assert_close(draw(fused), expected, atol=1e-4, rtol=1e-4)

    main(["export", str(tmp_path / "run"), "--output_dir", str(tmp_path / "comfy"), "--format", "kohya"])
    plain = make_tiny_pipeline()
    plain.load_lora_weights(tmp_path / "comfy" / "run.safetensors")
    plain.scheduler = fused.scheduler
    torch.testing.assert_close(draw(plain), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name, layer", [("wan", "blocks.0.cross_attn.o"), ("ltx", "transformer_blocks.0.attn2.to_out.0")]
)
def test_a_video_lora_under_comfyuis_names_draws_as_the_students_own(name, layer, tmp_path):
    """diffusers reads these names as those of the models' own repositories."""
    case = CASES[name]
    options = dict(lora=LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights=False), rewards=(), **case.size)
    trainer = make_family_trainer(case, tmp_path, make(case), **options)
    trainer.save_model()
    file = export(tmp_path / "run", tmp_path / "comfy", "kohya")
    assert f"diffusion_model.{layer}.lora_A.weight" in load_file(file)
    images = []
    for lora in (tmp_path / "run", file):
        plain = make(case)
        plain.load_lora_weights(lora)
        generator = torch.Generator().manual_seed(0)
        size = {key.removeprefix("sample_"): value for key, value in case.size.items()}
        rest = dict(guidance_scale=1.0, num_inference_steps=2, generator=generator, output_type="pt")
        images.append(images_of(plain(case.prompts[0], **size, **rest)))
    assert torch.equal(*images)
    assert len(load_file(file)) == len(load_file(tmp_path / "run" / WEIGHTS[0]))


def test_what_cannot_be_exported(tmp_path):
    save(make_tiny_pipeline(), tmp_path / "run")
    for arguments, message in (
        ((tmp_path, tmp_path / "out", "kohya"), "is not a distilled checkpoint"),
        ((tmp_path / "run", tmp_path / "out", "onnx"), "must be one of diffusers, kohya"),
        ((tmp_path / "run", tmp_path / "run", "diffusers"), "is the checkpoint itself"),
    ):
        with pytest.raises(ValueError, match=message):
            export(*arguments)
