# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Every family against plain diffusers, on tiny random pipelines."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from conftest import make_config, make_text_config, make_tiny_pipeline, redness
from datasets import Dataset
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from rdm_trl import RdmDistillTrainer, policy
from rdm_trl.demo import DEMO_PIPELINE
from rdm_trl.diffusion import NoiseProcess, make_student_scheduler
from rdm_trl.pipelines import family_of


# ------------------------------------------------------------------------------------------------------ tiny pipelines


def clip(seed: int = 0):
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_PIPELINE, subfolder="tokenizer")
    return CLIPTextModelWithProjection(make_text_config(tokenizer)).eval(), tokenizer


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, in place of SentencePiece's."""
    names = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "bag", "dress", "coat", "tench"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    tokenizer.chat_template = "a photo {{ messages[0]['content'] }}"
    return tokenizer


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=16, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def tiny_vae(num_blocks=2, **options) -> AutoencoderKL:
    """Latents are smaller than the image by 2 for each block but the first."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * num_blocks,
        up_block_types=("UpDecoderBlock2D",) * num_blocks,
        block_out_channels=(4,) + (8,) * (num_blocks - 1),
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


def make_sd3(**options):
    (text_encoder, tokenizer), (text_encoder_2, tokenizer_2) = clip(1), clip(2)
    transformer = SD3Transformer2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **options}),
        tiny_vae(shift_factor=0.1),
        text_encoder,
        tokenizer,
        text_encoder_2,
        tokenizer_2,
        t5(),
        words(),
    )


def make_flux(guidance_embeds=True, **options):
    _, tokenizer = clip()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, "use_dynamic_shifting": True, **options})
    text_encoder = CLIPTextModel(make_text_config(tokenizer))
    pipeline = FluxPipeline(scheduler, tiny_vae(shift_factor=0.1), text_encoder, tokenizer, t5(), words(), transformer)
    pipeline.default_sample_size = 4
    return pipeline


def make_pixart(**options):
    transformer = PixArtTransformer2DModel(
        sample_size=4,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=32,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(words(), t5(), tiny_vae(), transformer, DPMSolverMultistepScheduler(**options))


def make_dit(**options):
    transformer = DiTTransformer2DModel(
        sample_size=4, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1
    )
    return DiTPipeline(transformer, tiny_vae(), DDIMScheduler(**options), id2label={0: "tench, Tinca", 7: "cock"})


def make_unconditional(pipeline_class, scheduler, channels):
    unet = UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return pipeline_class(unet, scheduler)


def gemma() -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Gemma2Model(config).eval()


def qwen(model_class, config_class, num_layers: int):
    config = config_class(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return model_class(config).eval()


def make_sana(**options):
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=1,
        timestep_scale=0.5,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(4,) * 6,
        decoder_block_out_channels=(4,) * 6,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.4,
    )
    scheduler = DPMSolverMultistepScheduler(
        **{"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0, **options}
    )
    return SanaPipeline(words(), gemma(), vae, transformer, scheduler)


def make_lumina(**options):
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 16, 16),
        cap_feat_dim=32,
    )
    vae = tiny_vae(4, shift_factor=0.1)
    scheduler = FlowMatchEulerDiscreteScheduler(**{"shift": 6.0, **options})
    return Lumina2Pipeline(transformer, scheduler, vae, gemma(), words())


def make_z_image(**options):
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 4, 8],
        axes_lens=[1024, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)  # left as it is in memory, otherwise
    scheduler = FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **options})
    return ZImagePipeline(
        scheduler, tiny_vae(shift_factor=0.1), qwen(Qwen3Model, Qwen3Config, 2), words(), transformer
    )


def make_qwen_image(**options):
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.1, 0.9, 0.8, 0.7],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        **{"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9, **options}
    )
    pipeline = QwenImagePipeline(scheduler, vae, qwen(Qwen2Model, Qwen2Config, 1), words(), transformer)
    pipeline.default_sample_size = 4
    return pipeline


def make_flux2(is_distilled=False, **options):
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
    )
    torch.nn.init.uniform_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var)
    scheduler = FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, **options})
    text_encoder = qwen(Qwen3ForCausalLM, Qwen3Config, 27)
    pipeline = Flux2KleinPipeline(scheduler, vae, text_encoder, words(), transformer, is_distilled)
    pipeline.default_sample_size = 4
    return pipeline


@dataclass
class Case:
    """
    Args:
        make: builds the pipeline.
        guided: `(prompts, scale, negative prompt) -> arguments of the pipeline's call`.
        size: height and width of an image that is not square, or empty.
        pack: the initial noise (B, C, H, W) to the denoiser's form, where it has one of its own.
        prompts: two.
        negative: negative prompts.
    """

    make: Callable
    guided: Callable = lambda prompts, scale, negative: dict(
        prompt=prompts, guidance_scale=scale, negative_prompt=[negative] * len(prompts)
    )
    size: dict = field(default_factory=lambda: dict(sample_height=8, sample_width=16))
    pack: Callable | None = None
    prompts: tuple = ("a photo of a bag", "a dress")
    negative: tuple = ("", "a coat")


def guided_sdxl(prompts, scale, negative):
    # No negative prompt is not an empty one here.
    return dict(prompt=prompts, guidance_scale=scale, negative_prompt=[negative] * len(prompts) if negative else None)


def guided_flux(prompts, scale, negative):
    return dict(prompt=prompts, guidance_scale=scale)


def guided_qwen(prompts, scale, negative):
    return dict(prompt=prompts, true_cfg_scale=scale, negative_prompt=[negative] * len(prompts))


def guided_dit(prompts, scale, negative):
    return dict(class_labels=[0, 7], guidance_scale=scale)


def guided_unconditional(prompts, scale, negative):
    return dict(batch_size=2)


def pack_flux(noise):
    return FluxPipeline._pack_latents(noise, *noise.shape)


def pack_flux2(noise):
    # Drawn patch by patch.
    batch, channels, height, width = noise.shape
    return Flux2KleinPipeline._pack_latents(noise.view(batch, 4 * channels, height // 2, width // 2))


CASES = {
    "sd_epsilon": Case(make_tiny_pipeline),
    "sd_v": Case(lambda: make_tiny_pipeline("v_prediction")),
    "sdxl": Case(make_sdxl, guided_sdxl),
    "sd3": Case(make_sd3),
    "flux_dev": Case(make_flux, guided_flux, pack=pack_flux, negative=("",)),
    "flux_schnell": Case(
        lambda: make_flux(False, shift=1.0, use_dynamic_shifting=False), guided_flux, pack=pack_flux, negative=("",)
    ),
    "pixart_sigma": Case(
        make_pixart,
        lambda *arguments: {**Case.guided(*arguments), "use_resolution_binning": False},
    ),
    "sana": Case(
        make_sana,
        lambda *arguments: {**Case.guided(*arguments), "use_resolution_binning": False, "height": 64, "width": 32},
        size=dict(sample_height=64, sample_width=32),
    ),
    "lumina2": Case(make_lumina, size=dict(sample_height=16, sample_width=32)),
    # Its scale counts from 0.
    "z_image": Case(
        make_z_image,
        lambda prompts, scale, negative: {**Case.guided(prompts, scale - 1, negative), "height": 8, "width": 16},
    ),
    "qwen_image": Case(make_qwen_image, guided_qwen, pack=pack_flux),
    "flux2_klein": Case(make_flux2, guided_flux, pack=pack_flux2, negative=("",)),
    "flux2_klein_distilled": Case(lambda: make_flux2(True), guided_flux, pack=pack_flux2, negative=("",)),
    "dit": Case(make_dit, guided_dit, size={}, prompts=("0", "7"), negative=("",)),
    "ddpm": Case(
        lambda: make_unconditional(DDPMPipeline, DDPMScheduler(clip_sample=False, prediction_type="sample"), 3),
        guided_unconditional,
        size={},
        negative=("",),
    ),
    "ddim": Case(
        lambda: make_unconditional(DDIMPipeline, DDIMScheduler(clip_sample=False, prediction_type="v_prediction"), 1),
        guided_unconditional,
        size={},
        negative=("",),
    ),
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
        peft_config=LoraConfig(r=2, lora_alpha=6) if lora is None else lora,
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


def rollout_of(trainer, case, prompt, role):
    """Our rollout for the noise that a plain call draws behind `torch.manual_seed(3)`."""
    condition = trainer.encode([prompt])
    family = trainer.family
    torch.manual_seed(3)
    first = torch.randn(1, *family.latent_shape)
    if case.pack is not None:
        factor = trainer.sd_pipeline.vae_scale_factor
        torch.manual_seed(3)
        first = case.pack(torch.randn(1, 4, family.height // factor, family.width // factor))
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
    return eval(call, scope).images.expand(-1, 3, -1, -1)  # of grey images three channels


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
        if name in ("sana", "z_image"):
            options |= case.size  # their own is 1024 x 1024, whatever the model's
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
    trainer = make_trainer(case, tmp_path, str(tmp_path / "base"), lora=lora, **options, **case.size)
    torch.testing.assert_close(trainer.student_timesteps.float(), torch.tensor(expected).float())
    trainer.save_model()
    ours, theirs = rollout_of(trainer, case, case.prompts[0], "ema"), run_card(tmp_path / "run" / "README.md")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    # The pipeline's own number of steps would be another.
    assert trainer.sample("student", list(case.prompts)).shape == (2, *ours.shape[1:])


@pytest.mark.parametrize("name, said", [("flux_dev", True), ("flux_schnell", False)])
def test_the_card_says_what_guidance_the_network_was_given(name, said, tmp_path):
    trainer = make_trainer(CASES[name], tmp_path, make(CASES[name]))
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
        ("dit", dict(sample_timesteps=[999, 500, 200]), "`sample_timesteps` cannot be given to a call of DiTPipeline"),
        ("sd3", dict(sample_height=8, sample_width=10), r"\(8 x 10\) must be divisible by 4 for StableDiffusion3"),
        ("dit", dict(sample_height=8, sample_width=16), "DiTPipeline draws images of 8 x 8 pixels only"),
        ("ddpm", dict(sample_height=8, sample_width=16), "DDPMPipeline draws images of 8 x 8 pixels only"),
    ],
)
def test_what_a_pipeline_cannot_do(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(CASES[name], tmp_path, make(CASES[name]), **options)


@pytest.mark.parametrize("name", ["flux_dev", "dit", "ddpm"])
def test_no_negative_prompts(name, tmp_path):
    trainer = make_trainer(CASES[name], tmp_path, make(CASES[name]), negative_prompts="a dog")
    with pytest.raises(ValueError, match="has no negative prompts"):
        trainer.train()


def test_classes_by_name_and_by_number():
    family = family_of(make_dit())
    assert family.prompt_ids(["Tinca", "cock", "12", ""]).tolist() == [0, 7, 12, 1000]
    for prompt in ("a dog", "1000", "-1"):
        with pytest.raises(ValueError, match=f"'{prompt}' is not a class of DiTPipeline"):
            family.prompt_ids([prompt])


# --------------------------------------------------------------------------------------------------- parts of a family


def family_for(name):
    size = CASES[name].size
    return family_of(make(CASES[name]), size.get("sample_height"), size.get("sample_width"))


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
    assert family.decode(torch.empty(shape, device="meta")).shape == (2, 3, family.height, family.width)


@pytest.mark.parametrize("name", CASES)
def test_rewards_can_differentiate_images(name):
    family = family_for(name)
    latents = torch.randn(2, *family.latent_shape, requires_grad=True)
    images = family.decode(latents)
    images.mean().backward()
    assert latents.grad.isfinite().all() and latents.grad.abs().sum() > 0
    assert images.min() >= 0 and images.max() <= 1 and len(family.to_pil(images.detach())) == 2
