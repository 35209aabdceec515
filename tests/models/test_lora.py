# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""A teacher's own LoRA, and a student that begins as one, against pipelines that plain diffusers loads."""

import pytest
import torch
from conftest import PROMPTS, make_tiny_pipeline, make_trainer, save_style
from diffusers import LCMScheduler
from peft import LoraConfig
from safetensors.torch import load_file, save_file


def plain(folder=None, scheduler=False):
    pipeline = make_tiny_pipeline()
    if folder is not None:
        pipeline.load_lora_weights(folder)
    if scheduler:
        pipeline.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    return pipeline


def draw(pipeline, num_steps=4, guidance_scale=1.0, seed=42):
    generator = torch.Generator().manual_seed(seed)
    arguments = dict(num_inference_steps=num_steps, guidance_scale=guidance_scale, generator=generator)
    return pipeline(PROMPTS, output_type="pt", negative_prompt=None, **arguments).images


def denoise(unet):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 4, 4, 4, generator=generator), torch.tensor([100, 700])
    with torch.no_grad():
        return unet(*inputs, torch.randn(2, 16, 16, generator=generator)).sample


def roles_output(trainer, role):
    with trainer.model.use(role):
        return denoise(trainer.model.denoiser)


def test_the_teacher_is_the_base_with_its_lora_bit_for_bit(tmp_path):
    style = save_style(tmp_path / "style")
    trainer = make_trainer(tmp_path, teacher_lora=style, peft_config=LoraConfig(r=2, lora_alpha=5))
    expected = denoise(plain(style).unet)
    assert (expected - denoise(make_tiny_pipeline().unet)).abs().max() > 0.01
    for _ in range(2):  # before and behind the training
        assert torch.equal(roles_output(trainer, "teacher"), expected)
        if trainer.state.global_step == 0:
            for role in ("student", "fake", "ema"):
                torch.testing.assert_close(roles_output(trainer, role), expected, atol=1e-5, rtol=1e-5)
            trainer.train()
    teacher = trainer.sample("teacher", PROMPTS)
    torch.testing.assert_close(teacher, draw(plain(style), 3, 1.75), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank_alpha", [(2, 2), (2, 5)])
def test_the_saved_lora_alone_gives_the_styled_students_sample(tmp_path, rank_alpha):
    style = save_style(tmp_path / "style")
    rank, alpha = rank_alpha
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["to_k", "to_v", "to_out.0", "conv2"])
    trainer = make_trainer(tmp_path, teacher_lora=style, peft_config=lora, learning_rate=0.04)
    frozen = trainer.model.adapter_state("teacher")
    trainer.train()
    trainer.save_model()
    for key, value in trainer.model.adapter_state("teacher").items():
        assert torch.equal(value, frozen[key])
    assert all(p.grad is None for p in trainer.model.adapter_parameters("teacher"))

    alone = plain(tmp_path / "run", scheduler=True)
    ours = trainer.sample("student", PROMPTS)
    torch.testing.assert_close(ours, draw(alone), atol=1e-5, rtol=1e-5)
    untrained = plain(style)
    untrained.scheduler = alone.scheduler
    assert (ours - draw(untrained)).abs().max() > 0.01
    ranks = {name: module.r["default_0"] for name, module in alone.unet.named_modules() if hasattr(module, "lora_A")}
    where = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert (ranks[f"{where}.to_q"], ranks[f"{where}.to_k"], ranks[f"{where}.to_v"]) == (3, 2, 5)
    card = (tmp_path / "run" / "README.md").read_text()
    assert str(style) in card.split("## Settings")[0]


def test_a_students_folder_is_continued(tmp_path):
    first = make_trainer(tmp_path / "first", peft_config=LoraConfig(r=2, lora_alpha=5), learning_rate=0.02)
    first.train()
    first.save_model()
    second = make_continued(tmp_path, student_lora=tmp_path / "first" / "run", learning_rate=0.02)
    assert second.settings()["lora_r"] == 2
    expected = first.sample("student", PROMPTS)
    assert (first.sample("base", PROMPTS) - expected).abs().max() > 0.01
    torch.testing.assert_close(second.sample("student", PROMPTS), expected, atol=1e-5, rtol=1e-5)
    # The fake score begins as the teacher, which is the base.
    base = denoise(make_tiny_pipeline().unet)
    assert torch.equal(roles_output(second, "teacher"), base)
    torch.testing.assert_close(roles_output(second, "fake"), base, atol=1e-5, rtol=1e-5)
    second.train()
    second.save_model()
    torch.testing.assert_close(
        second.sample("student", PROMPTS), draw(plain(tmp_path / "run", scheduler=True)), atol=1e-5, rtol=1e-5
    )


def test_a_styled_student_is_continued_under_its_teacher(tmp_path):
    style = save_style(tmp_path / "style")
    first = make_trainer(tmp_path / "first", teacher_lora=style, peft_config=LoraConfig(r=2), learning_rate=0.02)
    first.train()
    first.save_model()
    second = make_continued(tmp_path, student_lora=tmp_path / "first" / "run", teacher_lora=style)
    torch.testing.assert_close(
        second.sample("student", PROMPTS), first.sample("student", PROMPTS), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(roles_output(second, "fake"), denoise(plain(style).unet), atol=1e-5, rtol=1e-5)
    second.train()


def make_continued(tmp_path, **loras):
    options = {"learning_rate": loras.pop("learning_rate", 1e-3)}
    return make_trainer(tmp_path, peft_config=None, **loras, **options)


def test_what_is_no_lora_for_the_pipeline(tmp_path):
    other = make_tiny_pipeline()
    other.save_pretrained(tmp_path / "base")
    style = save_style(tmp_path / "style")
    dora = save_style(tmp_path / "dora", use_dora=True)
    wide = save_style(tmp_path / "wide")
    weights = wide / "pytorch_lora_weights.safetensors"
    state = {key: torch.cat([value] * 2, 1) if "lora_A" in key else value for key, value in load_file(weights).items()}
    save_file(state, weights)
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    state = {key.replace("unet.", "transformer."): value for key, value in load_file(style / weights.name).items()}
    save_file(state, renamed / weights.name)
    for option in ("teacher_lora", "student_lora"):
        for path, message in (
            (tmp_path / "nothing", ""),
            (tmp_path / "base", ""),
            (wide, "size mismatch"),
            (renamed, "must change the unet, but changes nothing"),
        ):
            with pytest.raises(ValueError, match=f"`{option}`, '.*', is not a LoRA for StableDiffusion.*{message}"):
                make_continued(tmp_path, **{option: path})
    with pytest.raises(ValueError, match="no DoRA"):
        make_continued(tmp_path, teacher_lora=dora)
    with pytest.raises(ValueError, match="leave `peft_config` out"):
        make_trainer(tmp_path, student_lora=style, peft_config=LoraConfig(r=2))
    with pytest.raises(ValueError, match="give it as `teacher_lora`"):
        make_trainer(tmp_path, pipeline=plain(style))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(modules_to_save=["conv_in"]), "modules_to_save"),
        (dict(bias="lora_only"), "bias"),
        (dict(bias="all"), "bias"),
        (dict(init_lora_weights="pissa"), "init_lora_weights"),
        (dict(target_parameters=["conv_in.weight"]), "target_parameters"),
    ],
)
def test_what_diffusers_would_not_load_is_refused_before_training(tmp_path, options, message):
    pipeline = make_tiny_pipeline()
    before = denoise(pipeline.unet)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, pipeline=pipeline, peft_config=LoraConfig(r=2, **options))
    assert torch.equal(denoise(pipeline.unet), before)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(use_dora=True),
        dict(use_rslora=True),
        dict(lora_alpha=7, rank_pattern={"to_q": 3}, alpha_pattern={"to_k": 1}),
        dict(lora_bias=True),
        dict(target_modules="all-linear"),
        dict(target_modules=r".*attn1\.to_(q|k)$"),
        dict(target_modules=["conv_in", "time_embedding.linear_1"]),
        dict(exclude_modules=["to_q"], init_lora_weights=False),
        dict(layers_to_transform=[0], layers_pattern="down_blocks"),
    ],
)
def test_every_accepted_config_loads_in_plain_diffusers(tmp_path, options):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(**{"r": 2, **options}), learning_rate=0.02)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    expected = roles_output(trainer, "ema")
    torch.testing.assert_close(denoise(plain(tmp_path / "saved").unet), expected, atol=1e-5, rtol=1e-4)
