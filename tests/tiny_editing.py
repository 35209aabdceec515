# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""A tiny random pipeline of every family that is given an image with the prompt, and images for it."""

import math

import torch
from conftest import make_config, redness
from datasets import Dataset
from diffusers import FluxKontextPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from peft import LoraConfig
from PIL import Image
from tiny_encoders import words
from tiny_pipelines import CASES, Case, make_flux, make_qwen_image, pack_flux
from tiny_videos import make_wan_image_to_video
from transformers import (
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from rdm_trl import RdmDistillTrainer
from rdm_trl.prompts import PicturePrompt


def picture(seed: int, size: tuple[int, int] = (20, 12)) -> Image.Image:
    pixels = torch.rand(*size[::-1], 3, generator=torch.Generator().manual_seed(seed)).numpy()
    return VaeImageProcessor.numpy_to_pil(pixels)[0]


PROMPTS = (PicturePrompt("a photo of a bag", picture(0)), PicturePrompt("a dress", picture(1, (24, 16))))


SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


class ImagesAlone(Qwen2VLProcessor):
    """Without its part for videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
            [self.image_token, self.video_token]
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def make_kontext(**options):
    return small(FluxKontextPipeline(**make_flux(**options).components))


def small(pipeline):
    """Of small images by default; what another image changes is far above rounding."""
    pipeline.default_sample_size = 4
    pipeline.vae.encoder.conv_out.weight.data *= 30
    for block in pipeline.transformer.transformer_blocks:
        block.attn.to_out[0].weight.data *= 30
    return pipeline


def make_qwen_edit(pipeline_class=QwenImageEditPipeline, **options):
    tokenizer = words()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    image, video, start, end = tokenizer.convert_tokens_to_ids(SPECIAL)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            bos_token_id=0,
            eos_token_id=1,
        ),
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[0]
        ),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    processor = ImagesAlone(Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 4), tokenizer)
    components = make_qwen_image(**options).components
    components |= {"text_encoder": Qwen2_5_VLForConditionalGeneration(config), "tokenizer": tokenizer}
    return small(pipeline_class(**components, processor=processor))


def small_dimensions(area, ratio):
    """`calculate_dimensions`, in the scale of these pipelines: 16 x 32 pixels of 1024 x 1024."""
    width = math.sqrt(area / 2048 * ratio)
    return 4 * round(width / 4), 4 * round(width / ratio / 4), None


def shrink_qwen(patch):
    patch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", small_dimensions)
    patch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda *a: small_dimensions(*a)[:2])


def resized(prompts, width, height):
    """By the rule that the pipelines' own image processors have."""
    return [prompt.image.resize((width, height), Image.Resampling.LANCZOS) for prompt in prompts]


def guided_kontext(prompts, scale, negative):
    return dict(
        image=resized(prompts, 16, 8),
        prompt=[*map(str, prompts)],
        guidance_scale=scale,
        height=8,
        width=16,
        max_area=8 * 16,
        _auto_resize=False,
    )


def guided_qwen_edit(prompts, scale, negative):
    return dict(
        image=resized(prompts, 32, 16),
        prompt=[*map(str, prompts)],
        true_cfg_scale=scale,
        negative_prompt=[negative] * len(prompts),
        height=8,
        width=16,
    )


def guided_wan(prompts, scale, negative):
    call = CASES["wan"].guided([*map(str, prompts)], scale, negative)
    return {**call, "image": resized(prompts, 32, 16)[0]}


EDITING = {
    "kontext": Case(make_kontext, guided_kontext, pack=pack_flux, prompts=PROMPTS, negative=("",)),
    "qwen_edit": Case(make_qwen_edit, guided_qwen_edit, pack=pack_flux, prompts=PROMPTS),
    "qwen_edit_plus": Case(
        lambda: make_qwen_edit(QwenImageEditPlusPipeline), guided_qwen_edit, pack=pack_flux, prompts=PROMPTS
    ),
    "wan_i2v": Case(make_wan_image_to_video, guided_wan, size=CASES["wan"].size, prompts=PROMPTS),
    "wan_ti2v": Case(lambda: make_wan_image_to_video(True), guided_wan, size=CASES["wan"].size, prompts=PROMPTS),
}
# Their calls take one prompt and its image.
ONE_BY_ONE = ("qwen_edit_plus", "wan_i2v", "wan_ti2v")


def dataset_of(prompts) -> Dataset:
    return Dataset.from_dict({"prompt": [*map(str, prompts)], "image": [prompt.image for prompt in prompts]})


def make_editing_trainer(name, tmp_path, pipeline, rewards=(redness,), dataset=None, **options) -> RdmDistillTrainer:
    """`dataset` may be a prompt function."""
    case = EDITING[name]
    defaults = dict(
        per_device_train_batch_size=4, num_generations=2, sample_num_steps=3, learning_rate=0.05, fake_updates=1
    )
    source = "prompt_function" if callable(dataset) else "train_dataset"
    return RdmDistillTrainer(
        make_config(tmp_path, **{**defaults, **case.size, **options}),
        list(rewards),
        sd_pipeline=pipeline,
        peft_config=LoraConfig(r=2, lora_alpha=6),
        **{source: dataset_of(case.prompts) if dataset is None else dataset},
    )
