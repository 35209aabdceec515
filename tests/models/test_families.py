# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Every family against plain diffusers, on tiny random pipelines."""

import math
import re

import pytest
import torch
from conftest import make_config, record_steps
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from peft import LoraConfig, inject_adapter_in_model
from tiny_pipelines import (
    CASES,
    family_for,
    images_of,
    make,
    make_dit,
    make_family_trainer,
    make_flux,
    make_ltx,
    make_sd3,
    rollout_of,
    run_card,
)
from transformers import BatchFeature

from rdm_trl.method.diffusion import NoiseProcess, make_student_scheduler
from rdm_trl.models.pipelines import base, family_of


# Whose pipelines can be told how long a prompt may be.
LIMITED = ["sd3", "flux_dev", "pixart_sigma", "sana", "lumina2", "z_image", "qwen_image", "flux2_klein", "wan", "ltx"]


@pytest.mark.parametrize("name", CASES)
def test_family(name, tmp_path):
    """Trains, and the code of its model card draws the trainer's own rollout; the teacher is still the base."""
    case = CASES[name]
    make(case).save_pretrained(tmp_path / "base")
    trainer = make_family_trainer(case, tmp_path, str(tmp_path / "base"), **case.size)
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
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    untrained = rollout_of(trainer, case, case.prompts[0], "teacher")
    assert (untrained - theirs).abs().max() > 1e-4  # ten times what the comparison above lets pass
    samples, _ = trainer._generate_samples(iterations=1, batch_size=2)
    assert len(samples[0]["prompt_ids"]) == 2

    # Evaluation draws the same images whenever it is asked, and leaves training's noise alone.
    state = torch.get_rng_state()
    first = trainer.sample("student", list(case.prompts))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
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
        denoiser = base.components[trainer.family.denoiser_name].eval().requires_grad_(False)
        expected = trainer.family.denoise(
            lambda *args, **kwargs: denoiser(*args, **kwargs, return_dict=False)[0], x_t, timesteps, condition
        )
        student = trainer.family.denoise(lambda *a, **k: trainer.model("student", *a, **k), x_t, timesteps, condition)
    assert len(calls) == 1 and torch.equal(found, expected)
    assert not torch.equal(found, student)


@pytest.mark.parametrize("name", CASES)
def test_a_default_lora_covers_the_blocks(name):
    """All that is linear in them, what modulates them too; not a DiT's embeddings, which each of its blocks has."""
    family = family_for(name)
    inject_adapter_in_model(LoraConfig(target_modules=family.lora_target_modules), family.denoiser)
    parts = {path: module for path, module in family.denoiser.named_modules() if re.search(r"\.\d+\.", path)}
    kinds = torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d
    plain = {path for path, module in parts.items() if isinstance(module, kinds) and ".lora_" not in path}
    left = {re.sub(r".*\.\d+\.", "", path) for path in plain if not path.endswith("base_layer")}
    expected = {
        "dit": {"norm1.emb.timestep_embedder.linear_1", "norm1.emb.timestep_embedder.linear_2"},
        "sana": {"ff.conv_depth"},  # of a group for each channel
        # Attention's and feed-forward's output in one, of single blocks: large, and measured by nobody here.
        "flux_dev": {"proj_out"},
        "flux_schnell": {"proj_out"},
        "flux2_klein": {"attn.to_out"},
        "flux2_klein_distilled": {"attn.to_out"},
    }
    assert left == expected.get(name, set())


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
        base(**case.guided(list(prompts), scale, negative), num_inference_steps=2, output_type="pt")
        options = dict(sample_guidance_scale=scale, negative_prompts=negative)
        if name in ("sana", "z_image", "wan", "ltx"):
            options |= case.size  # their own is large, whatever the model's
        trainer = make_family_trainer(case, tmp_path, pipeline, **options)
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


# ------------------------------------------------------------------------------------------------------ student's grid


@pytest.mark.parametrize("num_steps", [1, 2, 4, 7])
@pytest.mark.parametrize(
    "options, shift",
    [
        (dict(shift=1.0), 1.0),
        (dict(shift=3.0), 3.0),
        # 16 tokens on the line from 0.5 at 256 tokens to 1.16 at 4096.
        (dict(use_dynamic_shifting=True, max_shift=1.16), math.exp(0.5 + (16 - 256) * 0.66 / 3840)),
        (
            dict(use_dynamic_shifting=True, max_shift=1.16, time_shift_type="linear"),
            0.5 + (16 - 256) * 0.66 / 3840,
        ),
    ],
)
def test_sd3s_grid_wastes_no_step(options, shift, num_steps, tmp_path):
    """The scheduler's own grid would end near 0: 0.0089 for shift 3. Ours is the even grid under the same shift."""
    pipeline = make_sd3(**options)
    scheduler = family_of(pipeline, 16, 16).make_student_scheduler(num_steps)
    even = torch.arange(num_steps, 0, -1) / num_steps
    expected = shift * even / (1 + (shift - 1) * even)
    torch.testing.assert_close(scheduler.timesteps, 1000 * expected, atol=1e-3, rtol=0)
    # What plain diffusers makes of the saved file.
    scheduler.save_pretrained(tmp_path)
    pipeline.scheduler = FlowMatchLCMScheduler.from_pretrained(tmp_path)
    seen = record_steps(pipeline.scheduler)
    pipeline("a dress", height=16, width=16, num_inference_steps=num_steps, guidance_scale=1.0, output_type="pt")
    torch.testing.assert_close(torch.stack([t for _, t, _ in seen]), 1000 * expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("options", [dict(), dict(shift_terminal=0.02), dict(time_shift_type="linear")])
def test_fluxs_grid_is_shifted_by_the_size_of_the_image(options, tmp_path):
    pipeline = make_flux(base_image_seq_len=1, max_image_seq_len=9, base_shift=0.5, max_shift=2.5, **options)
    family = family_of(pipeline, 8, 16)
    timesteps = family.make_student_scheduler(4).timesteps
    mu = 0.5 + 7 * 2.0 / 8  # 2 x 4 tokens
    even = torch.tensor([1.0, 0.75, 0.5, 0.25])
    shift = mu if options.get("time_shift_type") == "linear" else math.exp(mu)
    torch.testing.assert_close(timesteps, 1000 * shift * even / (1 + (shift - 1) * even), atol=1e-3, rtol=0)
    family.student_scheduler.save_pretrained(tmp_path)
    pipeline.scheduler = FlowMatchLCMScheduler.from_pretrained(tmp_path)
    seen = record_steps(pipeline.scheduler)
    pipeline("a dress", height=8, width=16, num_inference_steps=4, output_type="pt")
    torch.testing.assert_close(torch.stack([t for _, t, _ in seen]), timesteps)


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("sd_epsilon", dict(sample_timesteps=[999, 600, 100]), [999, 600, 100]),
        ("pixart_sigma", dict(sample_timesteps=[900, 600, 100]), [900, 600, 100]),
        ("sd3", dict(sample_sigmas=[1.0, 0.8, 0.3]), [1000, 800, 300]),
        ("flux_dev", dict(sample_sigmas=[0.9, 0.8, 0.3]), [900, 800, 300]),
    ],
)
def test_a_grid_of_the_users_own(name, options, expected, tmp_path):
    """It is saved, and the card's call asks for it."""
    case = CASES[name]
    make(case).save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, init_lora_weights=False)
    trainer = make_family_trainer(case, tmp_path, str(tmp_path / "base"), lora=lora, **options, **case.size)
    torch.testing.assert_close(trainer.student_timesteps.float(), torch.tensor(expected).float())
    trainer.save_model()
    ours, theirs = rollout_of(trainer, case, case.prompts[0], "ema"), run_card(tmp_path / "run" / "README.md")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    # The pipeline's own number of steps would be another.
    assert trainer.sample("student", list(case.prompts)).shape == (2, *ours.shape[1:])


@pytest.mark.parametrize("name", LIMITED)
def test_short_prompts(name, tmp_path):
    """`max_sequence_length` reaches the denoiser's conditions and the card's call, and changes the image."""
    case, images = CASES[name], {}
    make(case).save_pretrained(tmp_path / "base")
    for limit in (None, 2):
        torch.manual_seed(0)
        trainer = make_family_trainer(
            case,
            tmp_path,
            str(tmp_path / "base"),
            lora=LoraConfig(r=2, init_lora_weights=False),
            max_sequence_length=limit,
            **case.size,
        )
        images[limit] = rollout_of(trainer, case, case.prompts[0], "ema")
    trainer.save_model()
    torch.testing.assert_close(images[2], run_card(tmp_path / "run" / "README.md"), atol=1e-4, rtol=1e-4)
    assert (images[2] - images[None]).abs().max() > 1e-3
    assert trainer.sample("teacher", list(case.prompts)).shape == (2, *images[2].shape[1:])


def test_a_pipeline_without_one_of_its_parts(tmp_path):
    """Stable Diffusion 3 without T5, from a checkpoint and as the card loads it."""
    case, base = CASES["sd3"], make_sd3()
    base.text_encoder_3 = base.tokenizer_3 = None
    base.register_to_config(text_encoder_3=(None, None), tokenizer_3=(None, None))
    base.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, init_lora_weights=False)
    trainer = make_family_trainer(case, tmp_path, str(tmp_path / "base"), lora=lora, **case.size)
    assert trainer.sd_pipeline.text_encoder_3 is None
    trainer.save_model()
    ours, theirs = rollout_of(trainer, case, case.prompts[0], "ema"), run_card(tmp_path / "run" / "README.md")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, said", [("flux_dev", True), ("flux_schnell", False)])
def test_the_card_says_what_guidance_the_network_was_given(name, said, tmp_path):
    trainer = make_family_trainer(CASES[name], tmp_path, make(CASES[name]))
    trainer.save_model()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "guidance_scale=3.5" in card
    assert ("knows no other `guidance_scale`" in card) is said


def test_flow_matching_by_another_scheduler():
    """Sana's DPM-Solver has `alphas_cumprod` too, but its process is flow matching."""
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    process = NoiseProcess(scheduler)
    x0, noise, t = torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([250.0])
    torch.testing.assert_close(process.add_noise(x0, noise, t), torch.full((1, 2), 0.75))
    student = make_student_scheduler(scheduler, 4)
    torch.testing.assert_close(student.sigmas[:4], torch.tensor([1.0, 0.9, 0.75, 0.5]))


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sample_height=8), "Give `sample_height` and `sample_width`, or neither"),
        (dict(max_sequence_length=0), "`max_sequence_length` is 0, but must be from 1 to 512"),
        (dict(sample_sigmas=[1.0]), "`sample_sigmas` has 1 values for `sample_num_steps=3`"),
        (dict(sample_sigmas=[1.0, 0.5, 0.5]), "must be falling numbers above 0, at most 1"),
        (dict(sample_sigmas=[1.1, 0.5, 0.2]), "must be falling numbers above 0, at most 1"),
        (dict(sample_timesteps=[999, 500, 0]), "must be falling numbers above 0"),
    ],
)
def test_bad_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, sample_num_steps=3, **options)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("sd_epsilon", dict(sample_sigmas=[1.0, 0.5, 0.2]), "flow-matching schedulers: give `sample_timesteps`"),
        ("sd3", dict(sample_timesteps=[999, 500, 200]), "`sample_timesteps` cannot be given to a call of StableDiff"),
        ("sdxl", dict(max_sequence_length=9), "`max_sequence_length` cannot be given to a call of StableDiffusionXL"),
        ("dit", dict(sample_timesteps=[999, 500, 200]), "`sample_timesteps` cannot be given to a call of DiTPipeline"),
        ("sd3", dict(sample_height=8, sample_width=10), r"\(8 x 10\) must be divisible by 4 for StableDiffusion3"),
        ("sd3", dict(sample_num_frames=5), "`sample_num_frames` is for videos, and StableDiffusion3Pipeline draws im"),
        ("wan", dict(sample_num_frames=6), "makes one frame and 4 for each further frame of latents: 5 or 9"),
        ("ltx", dict(sample_num_frames=4), "makes one frame and 4 for each further frame of latents: 1 or 5"),
        ("wan", dict(sample_sigmas=[1.0, 0.5, 0.2]), "`sample_sigmas` cannot be given to a call of WanPipeline"),
        ("ltx", dict(sample_sigmas=[1.0, 0.5, 0.2]), "`sample_sigmas` cannot be given to a call of LTXPipeline"),
        ("wan", dict(adversarial_weight=0.1, image_dataset="none"), "are for images, and WanPipeline draws videos"),
        ("sd3", dict(reward_frame_stride=2), "`reward_frame_stride` is for the frames of videos"),
        ("dit", dict(sample_height=8, sample_width=16), "DiTPipeline draws images of 8 x 8 pixels only"),
        ("ddpm", dict(sample_height=8, sample_width=16), "DDPMPipeline draws images of 8 x 8 pixels only"),
    ],
)
def test_what_a_pipeline_cannot_do(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_family_trainer(CASES[name], tmp_path, make(CASES[name]), **options)


@pytest.mark.parametrize("name", ["flux_dev", "dit", "ddpm"])
def test_no_negative_prompts(name, tmp_path):
    trainer = make_family_trainer(CASES[name], tmp_path, make(CASES[name]), negative_prompts="a dog")
    with pytest.raises(ValueError, match="has no negative prompts"):
        trainer.train()


def test_classes_by_name_and_by_number():
    family = family_of(make_dit())
    assert family.prompt_ids(["Tinca", "cock", "12", ""]).tolist() == [0, 7, 12, 1000]
    for prompt in ("a dog", "1000", "-1"):
        with pytest.raises(ValueError, match=f"'{prompt}' is not a class of DiTPipeline"):
            family.prompt_ids([prompt])


# --------------------------------------------------------------------------------------------------- parts of a family


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("z_image", "qwen_image")])
def test_nothing_stays_on_the_cpu(name):
    """With latents elsewhere, on "meta" for want of a GPU, so is all that the denoiser is given."""
    family = family_for(name)
    condition = {key: value.to("meta") for key, value in family.encode_prompts(list(CASES[name].prompts)).items()}
    shape = (2, *family.latent_shape)

    def denoiser(*args, **kwargs):
        given = [*args, *kwargs.values(), *kwargs.get("added_cond_kwargs", {}).values()]
        assert {value.device.type for value in given if isinstance(value, torch.Tensor)} == {"meta"}
        return torch.empty(shape, device="meta")

    output = family.denoise(denoiser, torch.empty(shape, device="meta"), torch.empty(2, device="meta"), condition)
    assert output.shape == shape
    for module in family.pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.to("meta")
    frames = () if family.num_frames is None else (family.num_frames,)
    images = family.decode(torch.empty(shape, device="meta"))
    assert images.shape == (2, 3, *frames, family.height, family.width)


@pytest.mark.parametrize("name", CASES)
def test_rewards_can_differentiate_images(name):
    family = family_for(name)
    latents = torch.randn(2, *family.latent_shape, requires_grad=True)
    images = family.decode(latents)
    images.mean().backward()
    assert latents.grad.isfinite().all() and latents.grad.abs().sum() > 0
    assert images.min() >= 0 and images.max() <= 1 and len(family.to_pil(images.detach())) == 2


def test_conditions_that_no_prompt_gives_are_refused():
    for name, options in (
        ("class_embed_type", dict(class_embed_type="timestep")),
        ("num_class_embeds", dict(num_class_embeds=3)),
        ("addition_embed_type", dict(addition_embed_type="text_time")),
        ("encoder_hid_dim_type", dict(encoder_hid_dim_type="ip_image_proj")),
    ):
        pipeline = make(CASES["sd_epsilon"])
        pipeline.unet.register_to_config(**options)
        with pytest.raises(ValueError, match=name):
            family_of(pipeline)
    pipeline = make(CASES["qwen_image"])
    pipeline.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ValueError, match="guidance_embeds"):
        family_of(pipeline)


def test_what_a_student_of_videos_is_not_made_for_is_refused():
    pipeline = make(CASES["wan"])
    pipeline.register_to_config(boundary_ratio=0.9)
    with pytest.raises(ValueError, match="two experts"):
        family_of(pipeline)
    pipeline = make(CASES["wan"])
    pipeline.register_modules(transformer_2=pipeline.transformer)
    with pytest.raises(ValueError, match="two experts"):
        family_of(pipeline)
    pipeline = make(CASES["wan"])
    pipeline.transformer.register_to_config(image_dim=16)
    with pytest.raises(ValueError, match="Load it as a WanImageToVideoPipeline"):
        family_of(pipeline)
    noisy = make_ltx(vae_options={"decoder_inject_noise": (True, False, False)})
    with pytest.raises(ValueError, match="decoder_inject_noise"):
        family_of(noisy)


def test_an_autoencoder_that_is_told_of_noise():
    """LTX-Video's newer ones: by default the pipeline's call says there is none."""
    pipeline = make_ltx(vae_options={"timestep_conditioning": True})
    family = family_for("ltx", pipeline)
    latents = torch.randn(1, *family.latent_shape)
    size = dict(height=32, width=64, num_frames=5, num_inference_steps=1, output_type="pt")
    pipeline.scheduler.step = lambda *args, **kwargs: (latents,)
    expected = images_of(pipeline("a dress", **size))
    torch.testing.assert_close(family.decode(latents), expected, atol=1e-5, rtol=1e-5)


def test_an_ip_adapter_is_refused():
    pipeline = make(CASES["sd_epsilon"])
    processors = {
        name: IPAdapterAttnProcessor2_0(hidden_size=16, cross_attention_dim=16) if "attn2" in name else processor
        for name, processor in pipeline.unet.attn_processors.items()
    }
    pipeline.unet.set_attn_processor(processors)
    with pytest.raises(ValueError, match="IP-Adapter"):
        family_of(pipeline)


class FlagsAll(torch.nn.Module):
    """As diffusers' safety checker, with every image flagged."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, images, clip_input):
        return torch.zeros_like(images), [True] * len(images)


def test_the_safety_checker_blackens_nothing_that_is_judged(tmp_path, monkeypatch):
    """The student's images come from the pipeline's whole call, the teacher's from its latents."""
    said = []
    monkeypatch.setattr(base.logger, "warning", said.append)
    case = CASES["sd_epsilon"]
    pipeline, plain = make(case), make(case)
    pipeline.safety_checker = checker = FlagsAll()
    pipeline.feature_extractor = lambda images, return_tensors: BatchFeature({"pixel_values": torch.zeros(2, 1)})
    trainer = make_family_trainer(case, tmp_path, pipeline)
    assert len(said) == 1 and "safety checker is off" in said[0]
    for who, scale, scheduler in (("teacher", 1.75, plain.scheduler), ("student", 1.0, trainer.student_scheduler)):
        plain.scheduler = type(scheduler).from_config(scheduler.config)
        expected = plain(
            **case.guided(list(case.prompts), scale, ""),
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(42),
            output_type="pt",
        ).images
        torch.testing.assert_close(trainer.sample(who, list(case.prompts)), expected, atol=1e-5, rtol=1e-5)
    assert pipeline.safety_checker is checker
    blackened = pipeline(list(case.prompts), num_inference_steps=1, output_type="pt").images
    assert blackened.abs().max() == 0  # the user's own calls are as they were
