# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""
Rewards by name. Models are loaded when they are first asked, onto the images' device, and are differentiable. An id or
path behind the name takes another model of the kind: `"clip_score:google/siglip-base-patch16-224"`.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from huggingface_hub import hf_hub_download
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from ..demo import DEMO_CLASSIFIER
from .conversion import blip_state_dict, clip_state_dict, head_of


__all__ = [
    "aesthetic",
    "classifier",
    "clip_score",
    "hps_v2",
    "image_reward",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "ocr",
    "pick_score",
]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class jpeg_incompressibility:
    """Size in kB of the image as a JPEG file of quality 95 (DDPO's reward, arXiv 2305.13301); a black box."""

    sign = 1.0

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[Any]) -> torch.Tensor:
        sizes = []
        for image in pil_images(images):
            file = io.BytesIO()
            image.save(file, format="JPEG", quality=95)
            sizes.append(self.sign * file.tell() / 1000)
        return torch.tensor(sizes)


class jpeg_compressibility(jpeg_incompressibility):
    """Minus the size in kB of the image as a JPEG file of quality 95 (DDPO's reward); a black box."""

    sign = -1.0


class ModelReward:
    """
    A differentiable reward with a pretrained model, `model` (id or path), loaded when it is first asked. `load` sets
    `self.model` last: until then the reward counts as not loaded.

    Raises:
        OSError: the model cannot be loaded; names the reward and the id.
    """

    differentiable = True
    default_model: str

    def __init__(self, model: str | None = None):
        self.model_name = model or self.default_model
        self.model = None

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[Any]) -> torch.Tensor:
        if self.model is None:
            try:
                self.load(images.device)
            except Exception as error:
                raise OSError(
                    f"The reward {type(self).__name__!r} cannot load {self.model_name!r}: {error}"
                ) from error
        return self.score(images, prompts)

    def load(self, device: torch.device):
        raise NotImplementedError

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        raise NotImplementedError


class clip_score(ModelReward):
    """Cosine similarity in [-1, 1] of image and prompt in the embedding of a CLIP or SigLIP model."""

    default_model = "openai/clip-vit-large-patch14"
    default_tokenizer = None  # the model's own

    def load(self, device: torch.device):
        processor_name = self.default_tokenizer if self.model_name == self.default_model else None
        self.tokenizer = AutoTokenizer.from_pretrained(processor_name or self.model_name)
        self.processor = AutoImageProcessor.from_pretrained(processor_name or self.model_name)
        self.model = AutoModel.from_pretrained(self.model_name).eval().requires_grad_(False).to(device)

    def similarity(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Cosine similarities (B,), differentiable in the images (B, 3, H, W) in [0, 1]."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(images.device)
        size = self.model.config.vision_config.image_size
        pixels = prepare(images, size, self.processor.image_mean, self.processor.image_std)
        image = self.model.get_image_features(pixels).pooler_output
        # SigLIP reads its padding, CLIP must not: each model's tokenizer gives the mask that it wants.
        text = self.model.get_text_features(**tokens).pooler_output
        return F.cosine_similarity(image, text)

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.similarity(images, prompts)


class pick_score(clip_score):
    """PickScore (arXiv 2305.01569): the cosine similarity times the model's logit scale, about 17 to 24."""

    default_model = "yuvalkirstain/PickScore_v1"
    default_tokenizer = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.model.logit_scale.exp() * self.similarity(images, prompts)


class hps_v2(clip_score):
    """
    HPSv2.1 (arXiv 2306.09341): the cosine similarity in [-1, 1], about 0.2 to 0.35 (tables show it times 100), under
    CLIP ViT-H/14 with the authors' weights; in half precision on a GPU, as they use it. An image that is not square
    is cropped here; the authors' package pads it.

    `model` is a folder or repository with another file of such weights.
    """

    default_model = "xswu/HPSv2"
    architecture = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    weights_file = "HPS_v2.1_compressed.pt"

    def load(self, device: torch.device):
        weights = load_weights(self.model_name, self.weights_file)
        weights = weights["state_dict"] if "state_dict" in weights else weights
        model = AutoModel.from_config(AutoConfig.from_pretrained(self.architecture), dtype=torch.float32)
        model.load_state_dict(clip_state_dict(weights))
        self.tokenizer = AutoTokenizer.from_pretrained(self.architecture)
        self.processor = AutoImageProcessor.from_pretrained(self.architecture)
        self.model = model.eval().requires_grad_(False).to(device)

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        with torch.autocast(images.device.type, torch.float16, enabled=images.device.type == "cuda"):
            return self.similarity(images, prompts).float()


class image_reward(ModelReward):
    """
    ImageReward 1.0 (arXiv 2304.05977), about -2.3 to 2: linear layers on what BLIP's text encoder makes of the prompt
    (its first 35 tokens) when it looks at the image, standardised with the authors' constants.

    `model` is a folder or repository with another file of such weights.
    """

    default_model = "zai-org/ImageReward"
    weights_file = "ImageReward.pt"
    tokenizer_name = "bert-base-uncased"
    mean, std = 0.16717362830052426, 1.0333394966054072
    vision_config = BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    text_config = BlipTextConfig(vocab_size=30524, num_attention_heads=12, encoder_hidden_size=1024)

    def load(self, device: torch.device):
        weights = load_weights(self.model_name, self.weights_file)
        vision, text, self.head = blip_state_dict(weights, device)
        self.vision = BlipVisionModel(self.vision_config)
        self.vision.load_state_dict(vision)
        self.vision.eval().requires_grad_(False).to(device)
        model = BlipTextModel(self.text_config, add_pooling_layer=False)
        model.load_state_dict(text)
        self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name)
        self.model = model.eval().requires_grad_(False).to(device)

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        pixels = prepare(images, self.vision_config.image_size, CLIP_MEAN, CLIP_STD)
        seen = self.vision(pixels).last_hidden_state
        states = self.model(
            input_ids=tokens.input_ids.to(images.device),
            attention_mask=tokens.attention_mask.to(images.device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], device=images.device, dtype=torch.long),
        ).last_hidden_state
        return (linear_layers(states[:, 0], self.head) - self.mean) / self.std


class aesthetic(ModelReward):
    """
    LAION's aesthetic score, about 1 to 10: linear layers on the normalised image embedding of CLIP ViT-L/14, as in
    DDPO. `model` is another CLIP model, `head` a file of the layers' weights.
    """

    default_model = "openai/clip-vit-large-patch14"

    def __init__(self, model: str | None = None, head: str | None = None):
        super().__init__(model)
        self.head_file = head

    def load(self, device: torch.device):
        file = self.head_file or hf_hub_download("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
        # The dropout between the layers is off, so that only they are left.
        self.head = head_of(torch.load(file, map_location=device, weights_only=True), "layers.", device)
        self.processor = AutoImageProcessor.from_pretrained(self.model_name)
        self.model = AutoModel.from_pretrained(self.model_name).eval().requires_grad_(False).to(device)

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        size = self.model.config.vision_config.image_size
        images = prepare(images, size, self.processor.image_mean, self.processor.image_std)
        features = F.normalize(self.model.get_image_features(images).pooler_output, dim=-1)
        return linear_layers(features, self.head)


class classifier(ModelReward):
    """
    Probability in [0, 1] of the prompt's class under an image classifier, by default the embedded pipeline's. The
    class is the longest of the model's labels that the prompt contains as words.

    Raises:
        ValueError: a prompt contains no label.
    """

    default_model = DEMO_CLASSIFIER

    def load(self, device: torch.device):
        model = AutoModelForImageClassification.from_pretrained(self.model_name, dtype=torch.float32)
        self.mean = self.std = (0.5, 0.5, 0.5)
        if self.model_name != DEMO_CLASSIFIER:
            processor = AutoImageProcessor.from_pretrained(self.model_name)
            self.mean, self.std = processor.image_mean, processor.image_std
        self.model = model.eval().requires_grad_(False).to(device)

    def class_of(self, prompt: str) -> int:
        labels = self.model.config.id2label
        found = [i for i, label in labels.items() if re.search(rf"(?<!\w){re.escape(label)}(?!\w)", prompt)]
        if not found:
            raise ValueError(f"The prompt {prompt!r} names none of the classes {', '.join(labels.values())}.")
        return max(found, key=lambda i: len(labels[i]))

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        classes = torch.tensor([self.class_of(prompt) for prompt in prompts], device=images.device)
        logits = self.model(prepare(images, self.model.config.image_size, self.mean, self.std)).logits
        return logits.softmax(1).gather(1, classes[:, None]).squeeze(1)


class ocr:
    """
    How well the image spells the text that stands in double quotes in the prompt, in [0, 1]: 1 minus the edit
    distance of what is read to it, over its length; upper and lower case and spaces do not count (the reward of
    Flow-GRPO, arXiv 2505.05470, by PP-OCR, which the extra `ocr` ships). A black box.

    Raises:
        ImportError: the extra `ocr` is not installed.
        ValueError: a prompt quotes no text.
    """

    def __init__(self):
        self.engine = None

    def load(self):
        try:
            from rapidfuzz.distance import Levenshtein
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError("The reward 'ocr' needs an extra: `pip install rdm_trl[ocr]`.") from error
        self.engine, self.distance = RapidOCR(params={"Global.log_level": "error"}), Levenshtein.distance

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[Any]) -> torch.Tensor:
        if self.engine is None:
            self.load()
        rewards = []
        for image, prompt in zip(pil_images(images), prompts, strict=True):
            quoted = re.search(r'"(.+?)"', prompt)
            if quoted is None:
                raise ValueError(f'The prompt {prompt!r} quotes no text to write, as in: a sign that says "open".')
            wanted = "".join(quoted[1].lower().split())
            read = "".join("".join(self.engine(image).txts or ()).lower().split())
            rewards.append(1.0 if wanted in read else 1 - min(self.distance(wanted, read) / len(wanted), 1))
        return torch.tensor(rewards)


def pil_images(images: torch.Tensor) -> list[Image.Image]:
    """PIL images of a tensor (B, 3, H, W) in [0, 1]."""
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))


def load_weights(model: str, file: str) -> dict[str, torch.Tensor]:
    """A file of tensors in a folder or a repository of the Hub."""
    path = Path(model, file) if Path(model).is_dir() else hf_hub_download(model, file)
    return torch.load(path, map_location="cpu", weights_only=True)


def linear_layers(features: torch.Tensor, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """`layers`, weights and biases down to one number, of `features` (B, D), one after the other: (B,)."""
    for weight, bias in layers:
        features = F.linear(features, weight, bias)
    return features.squeeze(1)


def prepare(images: torch.Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """
    Images (B, 3, H, W) in [0, 1] as a model wants them, differentiably: the shorter side resized to `size`, the centre
    cropped, less `mean` (3,), divided by `std` (3,).
    """
    scale = size / min(images.shape[2:])
    if scale != 1:
        shape = [round(side * scale) for side in images.shape[2:]]
        images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((side - size) // 2 for side in images.shape[2:])
    images = images[:, :, top : top + size, left : left + size]
    mean, std = images.new_tensor(mean).view(-1, 1, 1), images.new_tensor(std).view(-1, 1, 1)
    return (images - mean) / std
