# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
# /// script
# dependencies = ["rdm_trl"]
# ///
"""
What `rdm-trl plan` says of well-known models, without their files: the architectures are typed in here, from the
models' published configurations. Prints the tables of docs/recipes.md and, for several GPUs, of docs/scaling.md.
Estimates, not run on a GPU.

python examples/memory_table.py
"""

import argparse

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.utils import logging

from rdm_trl.demo import DEMO_PIPELINE
from rdm_trl.models.pipelines import family_of
from rdm_trl.plan import GIB, choose, tensors_of


CARDS = (24, 48, 80)
NUM_GPUS = (2, 4, 8)
# Only the number of tokens matters, to which every tokenizer pads.
TOKENIZER = CLIPTokenizer.from_pretrained(DEMO_PIPELINE, subfolder="tokenizer", model_max_length=77)


def clip(width: int, num_layers: int, num_heads: int, cls=CLIPTextModelWithProjection):
    sizes = dict(hidden_size=width, intermediate_size=4 * width, projection_dim=width)
    return cls(CLIPTextConfig(num_hidden_layers=num_layers, num_attention_heads=num_heads, **sizes))


def t5_xxl() -> T5EncoderModel:
    sizes = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes))


def vae(latent_channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=latent_channels,
        shift_factor=0.1,
    )


def sd15() -> DiffusionPipeline:
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    rest = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionPipeline(
        vae(4),
        clip(768, 12, 12, CLIPTextModel),
        TOKENIZER,
        unet,
        DDIMScheduler(steps_offset=1, clip_sample=False),
        **rest,
    )


def sdxl() -> DiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    encoders = clip(768, 12, 12, CLIPTextModel), clip(1280, 32, 20)
    return StableDiffusionXLPipeline(
        vae(4), *encoders, TOKENIZER, TOKENIZER, unet, DDIMScheduler(steps_offset=1, clip_sample=False)
    )


def sd35_medium() -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    text = clip(768, 12, 12), TOKENIZER, clip(1280, 32, 20), TOKENIZER, t5_xxl(), TOKENIZER
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae(16), *text)


def flux1_dev() -> DiffusionPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    text = clip(768, 12, 12, CLIPTextModel), TOKENIZER, t5_xxl(), TOKENIZER
    return FluxPipeline(scheduler, vae(16), *text, FluxTransformer2DModel(guidance_embeds=True))


def z_image() -> DiffusionPipeline:
    sizes = dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, head_dim=128, vocab_size=151936)
    text = Qwen3Model(Qwen3Config(num_attention_heads=32, num_key_value_heads=8, **sizes))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return ZImagePipeline(scheduler, vae(16), text, TOKENIZER, ZImageTransformer2DModel())


def qwen_image() -> DiffusionPipeline:
    sizes = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, vocab_size=152064)
    text = dict(num_attention_heads=28, num_key_value_heads=4, **sizes)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, out_hidden_size=3584)
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return QwenImagePipeline(scheduler, AutoencoderKLQwenImage(), encoder, TOKENIZER, QwenImageTransformer2DModel())


def flux2_klein() -> DiffusionPipeline:
    """Of the two sizes, the 9 B one."""
    sizes = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, head_dim=128, vocab_size=151936)
    text = Qwen3ForCausalLM(Qwen3Config(num_attention_heads=32, num_key_value_heads=8, **sizes))
    heads = dict(num_attention_heads=32, joint_attention_dim=3 * 4096, guidance_embeds=False)
    transformer = Flux2Transformer2DModel(num_layers=8, num_single_layers=24, **heads)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return Flux2KleinPipeline(scheduler, AutoencoderKLFlux2(), text, TOKENIZER, transformer)


def wan21_1_3b() -> DiffusionPipeline:
    sizes = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=256384)
    encoder = UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", **sizes))
    transformer = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return WanPipeline(TOKENIZER, encoder, AutoencoderKLWan(), scheduler, transformer)


def wan21_i2v_14b() -> DiffusionPipeline:
    sizes = dict(num_attention_heads=40, ffn_dim=13824, num_layers=40, in_channels=36)
    transformer = WanTransformer3DModel(**sizes, image_dim=1280, added_kv_proj_dim=5120)
    sizes = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14)
    parts = {name: wan21_1_3b().components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    vision = CLIPVisionModel(CLIPVisionConfig(**sizes))
    return WanImageToVideoPipeline(
        **parts, transformer=transformer, image_encoder=vision, image_processor=CLIPImageProcessorPil()
    )


def ltx_video() -> DiffusionPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return LTXPipeline(scheduler, AutoencoderKLLTXVideo(), t5_xxl(), TOKENIZER, LTXVideoTransformer3DModel())


MODELS = {
    "Stable Diffusion 1.5": sd15,
    "Stable Diffusion XL": sdxl,
    "Stable Diffusion 3.5 medium": sd35_medium,
    "FLUX.1-dev": flux1_dev,
    "Z-Image": z_image,
    "Qwen-Image": qwen_image,
    "FLUX.2 klein 9B": flux2_klein,
    "Wan 2.1 1.3B, 81 frames of 480 x 832": wan21_1_3b,
    "Wan 2.1 I2V 14B, 81 frames of 480 x 832": wan21_i2v_14b,
    "LTX-Video, 161 frames of 512 x 704": ltx_video,
}
LARGE = ("FLUX.1-dev", "Qwen-Image", "FLUX.2 klein 9B")


def without_weights(make) -> DiffusionPipeline:
    with torch.device("meta"):
        pipeline = make()
    return pipeline.to(dtype=torch.bfloat16)


def billions(*modules: torch.nn.Module) -> float:
    return sum(tensor.numel() for tensor in tensors_of(*modules)) / 1e9


def cell(make, card: int, num_gpus: int = 1, **options) -> str:
    """The need in GiB and the first settings that fit."""
    memory, settings, fits = choose(lambda: without_weights(make), card, num_gpus, **options)
    names = {"activation_checkpointing": "checkpointing", "offload_encoders": "offload"}
    chosen = [str(settings["per_device_train_batch_size"]), *(v for k, v in names.items() if settings[k])]
    chosen += [memory.base] * (memory.base != "whole")
    need = f"{memory.total / GIB:.1f}"
    return f"{need}: {', '.join(chosen)}" if fits else f"no ({need})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learn_target", action="store_true", help="with the adapter that `learn_target` asks for")
    options = vars(parser.parse_args())
    logging.set_verbosity_error()
    cards = " | ".join(f"{card} GiB" for card in CARDS)
    lines = [f"| model | denoiser | encoders | {cards} |", "|---" * (3 + len(CARDS)) + "|"]
    for name, make in tqdm(MODELS.items(), desc="models"):
        family = family_of(without_weights(make))
        cells = [name, f"{billions(family.denoiser):.2f} B", f"{billions(*family.encoders()):.2f} B"]
        lines.append("| " + " | ".join(cells + [cell(make, card, **options) for card in CARDS]) + " |")
    lines += ["", f"| model | GPUs | {cards} |", "|---" * (2 + len(CARDS)) + "|"]
    for name in tqdm(LARGE, desc="on several GPUs"):
        for num_gpus in NUM_GPUS:
            cells = [name, str(num_gpus), *(cell(MODELS[name], card, num_gpus, **options) for card in CARDS)]
            lines.append("| " + " | ".join(cells) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
