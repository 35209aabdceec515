# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""A tiny random pipeline of every family, and how a plain call of it is made."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

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
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
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
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from tiny_encoders import clip, gemma, qwen, t5, words
from tiny_videos import make_ltx, make_wan
from transformers import (
    CLIPTextModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from rdm_trl import RdmDistillTrainer, plan
from rdm_trl.method import policy
from rdm_trl.models.pipelines import PipelineFamily, family_of
from rdm_trl.models.roles import Roles


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
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D", "UpBlock2D"),
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


def make_sd3(num_layers=2, **options):
    (text_encoder, tokenizer), (text_encoder_2, tokenizer_2) = clip(1), clip(2)
    transformer = SD3Transformer2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
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
        size: height and width of an image that is not square, and a video's frames, or empty.
        pack: the initial noise (B, C, H, W) or (B, C, F, H, W) to the denoiser's form, where it has one of its own.
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


def with_embedded_guidance(make_pipeline):
    """As the LCM family: the UNet takes the guidance scale as an input."""
    pipeline = make_pipeline()
    pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config, time_cond_proj_dim=8).eval()
    return pipeline


CASES = {
    "sd_embedded_guidance": Case(lambda: with_embedded_guidance(make_tiny_pipeline), guided_flux, negative=("",)),
    "sdxl_embedded_guidance": Case(lambda: with_embedded_guidance(make_sdxl), guided_flux, negative=("",)),
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
    "wan": Case(
        make_wan,
        lambda *arguments: {**Case.guided(*arguments), "height": 16, "width": 32, "num_frames": 5},
        size=dict(sample_height=16, sample_width=32, sample_num_frames=5),
    ),
    "ltx": Case(
        make_ltx,
        lambda *arguments: {**Case.guided(*arguments), "height": 32, "width": 64, "num_frames": 5},
        size=dict(sample_height=32, sample_width=64, sample_num_frames=5),
        pack=lambda noise: LTXPipeline._pack_latents(noise),
    ),
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


def family_for(name: str, pipeline: DiffusionPipeline | None = None) -> PipelineFamily:
    """Of a case, at its size."""
    return family_of(pipeline or make(CASES[name]), *CASES[name].size.values())


def images_of(output) -> torch.Tensor:
    """What a plain call put out with `output_type="pt"`: images, or videos (B, 3, F, H, W)."""
    return output.frames.transpose(1, 2) if "frames" in output else output.images


def make_family_trainer(case: Case, tmp_path, pipeline, rewards=(redness,), lora=None, **options) -> RdmDistillTrainer:
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


def kept_activations(case: Case, folder: Path, batch_size: int) -> list[int]:
    """What a forward pass keeps, in bytes: of the real pipeline, and of one without weights on the meta device."""
    pipeline, kept = make(case), []
    pipeline.save_pretrained(folder)
    for loaded in (pipeline, plan.load_without_weights(str(folder), torch.float32)):
        family = family_of(loaded, *case.size.values())
        if loaded is pipeline:
            example = family.example_condition(batch_size)
            real = {k: torch.ones(v.shape, dtype=v.dtype) if v.is_meta else v for k, v in example.items()}
            family.example_condition = lambda number, real=real: real
        with torch.device(family.denoiser.device):
            roles = Roles(family.denoiser, LoraConfig(r=2, target_modules=family.lora_target_modules))
        kept.append(plan.saved_activations(family, roles, batch_size))
    return kept


def rollout_of(trainer, case, prompt, role):
    """Our rollout for the noise that a plain call draws behind `torch.manual_seed(3)`."""
    condition = trainer.encode([prompt])
    family = trainer.family
    torch.manual_seed(3)
    first = torch.randn(1, *family.latent_shape)
    if case.pack is not None:
        if family.num_frames is None:
            factor = trainer.sd_pipeline.vae_scale_factor
            shape = family.height // factor, family.width // factor
        else:
            shape = family.latent_size()
        torch.manual_seed(3)
        first = case.pack(torch.randn(1, 4, *shape))
    noise = [first] + [torch.randn(1, *family.latent_shape) for _ in trainer.student_timesteps[1:]]

    def predict(x_t, t, rows):
        chosen = {key: value[rows] for key, value in condition.items()}
        return trainer.predict_x0(trainer.model, role, x_t, t, chosen)

    last = torch.tensor([len(noise) - 1])
    rollout = policy.rollout(predict, trainer.process, trainer.student_timesteps, torch.stack(noise, 1), last, True)
    return family.decode(rollout.latents[:, -1])


def run_card(card):
    """Images of the model card's code, which is plain diffusers."""
    code = card.read_text().split("```python\n")[1].split("```")[0]
    assert "rdm_trl" not in code
    preparation, call = re.split("^(?:image|video) = ", code, flags=re.M)
    scope = {}
    exec(preparation, scope)
    scope["pipe"].set_progress_bar_config(disable=True)
    call = re.split(r"\.(?:images|frames)\[0\]", call)[0].replace("pipe(", "pipe(output_type='pt', ", 1)
    torch.manual_seed(3)
    images = images_of(eval(call, scope))
    return images.expand(-1, 3, *images.shape[2:])  # of grey images three channels


# LoRAs that reach the text encoders too.
PIPELINES = {"sd": make_tiny_pipeline, "sdxl": lambda: make(CASES["sdxl"])}
ENCODERS = {"sd": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}
LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def save_lora(folder, kind="sd", form="diffusers", size=0.3, layers=LAYERS, alpha=None) -> Path:
    """
    Changes the UNet and each text encoder, with alphas that are not the ranks; `alpha` gives a layer's own, by its
    place, in kohya's form.
    """
    pipeline, generator, found, kohya = PIPELINES[kind](), torch.Generator().manual_seed(4), {}, {}
    short = {
        "unet": "lora_unet",
        "text_encoder": "lora_te" if kind == "sd" else "lora_te1",
        "text_encoder_2": "lora_te2",
    }
    for name in ("unet", *ENCODERS[kind]):
        targets = ["to_q", "to_v"] if name == "unet" else layers
        config = LoraConfig(r=3, lora_alpha=7 if name == "unet" else 5, target_modules=targets)
        network = inject_adapter_in_model(config, getattr(pipeline, name), "style")
        state = get_peft_model_state_dict(network, adapter_name="style")
        state = {k: torch.randn(v.shape, generator=generator) * math.sqrt(size) for k, v in sorted(state.items())}
        found |= {f"{name}_lora_layers": state, f"{name}_lora_adapter_metadata": config.to_dict()}
        for i, (key, value) in enumerate(state.items()):
            path, end = key.split(".lora_")
            path = path if name == "unet" else f"text_model.{path.removeprefix('text_model.')}"
            path = f"{short[name]}_{path.replace('.', '_')}"
            kohya[f"{path}.lora_{'down' if end[0] == 'A' else 'up'}.weight"] = value
            own = alpha(i // 2) if alpha else config.lora_alpha
            kohya[f"{path}.alpha"] = torch.tensor(float(own))
    Path(folder).mkdir()
    if form == "kohya":
        save_file(kohya, folder / "style.safetensors")
        return folder / "style.safetensors"
    pipeline.save_lora_weights(folder, **found)
    return folder
