# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Every family against plain diffusers, on tiny random pipelines."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from conftest import make_config, make_text_config, make_tiny_pipeline, redness
from datasets import Dataset
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from rdm_trl import RdmDistillTrainer, policy
from rdm_trl.demo import DEMO_PIPELINE
from rdm_trl.diffusion import NoiseProcess


# ------------------------------------------------------------------------------------------------------ tiny pipelines


def clip(seed: int = 0):
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_PIPELINE, subfolder="tokenizer")
    return CLIPTextModelWithProjection(make_text_config(tokenizer)).eval(), tokenizer


def tiny_vae(**options) -> AutoencoderKL:
    """8x8 images of 4x4 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=8,
        **options,
    )


def make_sdxl(**options):
    (text_encoder, tokenizer), (text_encoder_2, tokenizer_2) = clip(1), clip(2)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
    )
    return StableDiffusionXLPipeline(
        tiny_vae(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[0.9, 0.8, 0.7, 0.6]),
        text_encoder,
        text_encoder_2,
        tokenizer,
        tokenizer_2,
        unet.eval(),
        EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1, **options),
    )


@dataclass
class Case:
    """
    Args:
        make: builds the pipeline.
        guided: `(prompts, scale, negative prompt) -> arguments of the pipeline's call`.
        size: height and width of an image that is not square, or empty.
        pack: of the initial noise (B, C, H, W) to the denoiser's form.
        prompts: two.
        negative: negative prompts.
    """

    make: Callable
    guided: Callable = lambda prompts, scale, negative: dict(
        prompt=prompts, guidance_scale=scale, negative_prompt=[negative] * len(prompts)
    )
    size: dict = field(default_factory=lambda: dict(sample_height=8, sample_width=16))
    pack: Callable = lambda noise: noise
    prompts: tuple = ("a photo of a bag", "a dress")
    negative: tuple = ("", "a coat")
    unguided: float = 1.0


def guided_sdxl(prompts, scale, negative):
    # No negative prompt is not an empty one here.
    return dict(prompt=prompts, guidance_scale=scale, negative_prompt=[negative] * len(prompts) if negative else None)


CASES = {
    "sd_epsilon": Case(make_tiny_pipeline),
    "sd_v": Case(lambda: make_tiny_pipeline("v_prediction")),
    "sdxl": Case(make_sdxl, guided_sdxl),
}


def make(case: Case) -> DiffusionPipeline:
    torch.manual_seed(0)
    pipeline = case.make()
    pipeline.set_progress_bar_config(disable=True)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    return pipeline


def make_trainer(case: Case, tmp_path, pipeline, rewards=(redness,), lora=None, **options) -> RdmDistillTrainer:
    defaults = dict(
        per_device_train_batch_size=4, num_generations=2, sample_num_steps=3, learning_rate=0.05, fake_updates=1
    )
    return RdmDistillTrainer(
        make_config(tmp_path, **{**defaults, **options}),
        list(rewards),
        sd_pipeline=pipeline,
        train_dataset=Dataset.from_dict({"prompt": list(case.prompts)}),
        peft_config=lora or LoraConfig(r=2, lora_alpha=6),
    )


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", CASES)
def test_family(name, tmp_path):
    """Trains, and the code of its model card draws the trainer's own rollout; the teacher is still the base."""
    case = CASES[name]
    make(case).save_pretrained(tmp_path / "base")
    trainer = make_trainer(case, tmp_path, str(tmp_path / "base"), **case.size)
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    trainer.train()
    changed = {key for key, value in trainer.model.named_parameters() if not torch.equal(value, before[key])}
    assert {key.split(".")[-2] for key in changed} == {"student", "fake", "ema"}
    check_gradients(trainer, case)
    check_teacher(trainer, case, DiffusionPipeline.from_pretrained(tmp_path / "base"))

    trainer.save_model()
    ours = rollout_of(trainer, case, case.prompts[0], "ema")
    theirs = run_card(tmp_path / "run" / "README.md")
    assert theirs.shape == ours.shape
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    untrained = rollout_of(trainer, case, case.prompts[0], "teacher")
    assert (untrained - theirs).abs().max() > 1e-3
    samples, _ = trainer._generate_samples(iterations=1, batch_size=2)
    assert len(samples[0]["prompt_ids"]) == 2

    # Evaluation draws the same images whenever it is asked, and leaves training's noise alone.
    state = torch.get_rng_state()
    first = trainer.sample("student", list(case.prompts))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, trainer.sample("student", list(case.prompts)))
    assert trainer.sample("teacher", list(case.prompts)).shape == first.shape == (2, *ours.shape[1:])


def check_gradients(trainer, case):
    trainer.model.zero_grad()
    inputs = trainer._prepare_inputs([{"prompt": prompt} for prompt in case.prompts for _ in range(2)])
    trainer.compute_loss(trainer.model, inputs).backward()
    touched = {key for key, value in trainer.model.named_parameters() if value.grad is not None}
    assert touched and all(".student." in key for key in touched)
    assert any(value.grad.abs().sum() > 0 for value in trainer.model.adapter_parameters("student"))
    trainer.model.zero_grad()


def check_teacher(trainer, case, base):
    """The same call of the denoiser gives the same bits."""
    condition = trainer.encode(list(case.prompts))
    x_t = torch.randn(2, *trainer.family.latent_shape)
    timesteps = trainer.student_timesteps[1].expand(2)
    calls = []

    def spy(*args, **kwargs):
        calls.append((args, kwargs))
        return trainer.model("teacher", *args, **kwargs)

    with torch.no_grad():
        found = trainer.family.denoise(spy, x_t, timesteps, condition)
        denoiser = base.components[trainer.family.denoiser_name].eval()
        expected = trainer.family.denoise(
            lambda *args, **kwargs: denoiser(*args, **kwargs, return_dict=False)[0], x_t, timesteps, condition
        )
        student = trainer.family.denoise(lambda *a, **k: trainer.model("student", *a, **k), x_t, timesteps, condition)
    assert len(calls) == 1 and torch.equal(found, expected)
    assert not torch.equal(found, student)


def rollout_of(trainer, case, prompt, role):
    """Our rollout for the noise that a plain call draws behind `torch.manual_seed(3)`."""
    condition = trainer.encode([prompt])
    family, factor = trainer.family, trainer.sd_pipeline.components.get("vae") and trainer.sd_pipeline.vae_scale_factor
    torch.manual_seed(3)
    if len(family.latent_shape) == 2:
        channels = family.latent_shape[1] // 4
        first = case.pack(torch.randn(1, channels, family.height // factor, family.width // factor))
    else:
        first = torch.randn(1, *family.latent_shape)
    noise = [first] + [torch.randn(1, *family.latent_shape) for _ in trainer.student_timesteps[1:]]

    def predict(x_t, t, rows):
        chosen = {key: value[rows] for key, value in condition.items()}
        return trainer.predict_x0(trainer.model, role, x_t, t, chosen)

    last = torch.tensor([len(noise) - 1])
    latents = policy.rollout(predict, trainer.process, trainer.student_timesteps, torch.stack(noise, 1), last)
    return family.decode(latents.latents[:, -1])


def run_card(card):
    """Images of the model card's code, which is plain diffusers."""
    code = card.read_text().split("```python\n")[1].split("```")[0]
    assert "rdm_trl" not in code
    preparation, call = code.split("image = ")
    scope = {}
    exec(preparation, scope)
    scope["pipe"].set_progress_bar_config(disable=True)
    call = call.split(".images[0]")[0].replace("pipe(", "pipe(output_type='pt', ", 1)
    torch.manual_seed(3)
    return eval(call, scope).images


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", CASES)
def test_the_teachers_guidance_is_the_pipelines(name, scale, tmp_path):
    """What a plain guided call hands to its scheduler, at two of its steps and for prompts of different lengths."""
    case = CASES[name]
    for negative in case.negative if scale > 1 else case.negative[:1]:
        pipeline, base = make(case), make(case)
        seen = record_steps(base.scheduler)
        prompts = list(case.prompts)
        torch.manual_seed(5)
        base(**case.guided(prompts, scale, negative), num_inference_steps=2, output_type="pt")
        options = dict(sample_guidance_scale=scale, negative_prompts=negative)
        trainer = make_trainer(case, tmp_path, pipeline, **options)
        process = NoiseProcess(base.scheduler)
        for output, t, sample in seen:
            output, sample = output[:2].float(), sample[:2]
            if isinstance(base.scheduler, EulerDiscreteScheduler):
                # Its samples are scaled by the noise; what the network sees is not.
                index = (base.scheduler.timesteps == t).nonzero().item()
                sample = sample / (base.scheduler.sigmas[index] ** 2 + 1).sqrt()
            assert sample.shape[1:] == trainer.family.latent_shape
            t = t.expand(2) if process.alphas_cumprod is None else t.long().expand(2)
            found = trainer.predict_teacher(sample, t, trainer.encode(prompts))
            torch.testing.assert_close(found, process.to_x0(output, sample, t), atol=1e-3, rtol=1e-3)


def record_steps(scheduler):
    seen, step = [], scheduler.step

    def recording(model_output, timestep, sample, *args, **kwargs):
        seen.append((model_output.clone(), timestep, sample.clone()))
        return step(model_output, timestep, sample, *args, **kwargs)

    scheduler.step = recording
    return seen
