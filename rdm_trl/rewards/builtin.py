# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""
Rewards by name. Models are loaded when they are first asked, onto the images' device, and are differentiable. An id or
path behind the name takes another model of the kind: `"clip_score:google/siglip-base-patch16-224"`.
"""

import io
import re
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from huggingface_hub import hf_hub_download
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoTokenizer

from ..demo import DEMO_CLASSIFIER


__all__ = ["aesthetic", "classifier", "clip_score", "jpeg_compressibility", "jpeg_incompressibility", "pick_score"]


class jpeg_incompressibility:
    """Size in kB of the image as a JPEG file of quality 95 (DDPO's reward, arXiv 2305.13301); a black box."""

    sign = 1.0

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[Any]) -> torch.Tensor:
        sizes = []
        for image in VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images)):
            file = io.BytesIO()
            image.save(file, format="JPEG", quality=95)
            sizes.append(self.sign * file.tell() / 1000)
        return torch.tensor(sizes)


class jpeg_compressibility(jpeg_incompressibility):
    """Minus the size in kB of the image as a JPEG file of quality 95 (DDPO's reward); a black box."""

    sign = -1.0


class clip_score:
    """
    Cosine similarity in [-1, 1] of image and prompt in the embedding of a CLIP or SigLIP model.

    Raises:
        OSError: from transformers, if the model cannot be loaded; it names the id.
    """

    differentiable = True
    default_model = "openai/clip-vit-large-patch14"
    default_tokenizer = None  # the model's own

    def __init__(self, model: str | None = None):
        self.model_name = model or self.default_model
        self.model = None

    def load(self, device: torch.device):
        self.model = AutoModel.from_pretrained(self.model_name).eval().requires_grad_(False).to(device)
        processor_name = self.default_tokenizer if self.model_name == self.default_model else None
        self.tokenizer = AutoTokenizer.from_pretrained(processor_name or self.model_name)
        self.processor = AutoImageProcessor.from_pretrained(processor_name or self.model_name)

    def similarity(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Cosine similarities (B,), differentiable in the images (B, 3, H, W) in [0, 1]."""
        if self.model is None:
            self.load(images.device)
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(images.device)
        size = self.model.config.vision_config.image_size
        image = self.model.get_image_features(prepare(images, size, self.processor)).pooler_output
        # SigLIP reads its padding, CLIP must not: each model's tokenizer gives the mask that it wants.
        text = self.model.get_text_features(**tokens).pooler_output
        return F.cosine_similarity(image, text)

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[Any]) -> torch.Tensor:
        return self.similarity(images, prompts)


class pick_score(clip_score):
    """PickScore (arXiv 2305.01569): the cosine similarity times the model's logit scale, about 17 to 24."""

    default_model = "yuvalkirstain/PickScore_v1"
    default_tokenizer = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[Any]) -> torch.Tensor:
        similarity = self.similarity(images, prompts)
        return self.model.logit_scale.exp() * similarity


class aesthetic:
    """
    LAION's aesthetic score, about 1 to 10: linear layers on the normalised image embedding of CLIP ViT-L/14, as in
    DDPO. `model` is another CLIP model, `head` a file of the layers' weights.
    """

    differentiable = True

    def __init__(self, model: str = "openai/clip-vit-large-patch14", head: str | None = None):
        self.model_name, self.head_file = model, head
        self.model = None

    def load(self, device: torch.device):
        self.model = AutoModel.from_pretrained(self.model_name).eval().requires_grad_(False).to(device)
        self.processor = AutoImageProcessor.from_pretrained(self.model_name)
        file = self.head_file or hf_hub_download("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
        weights = torch.load(file, map_location=device, weights_only=True)
        # The dropout between the layers is off, so that only they are left.
        layers = sorted({int(key.split(".")[1]) for key in weights})
        self.head = [(weights[f"layers.{i}.weight"].float(), weights[f"layers.{i}.bias"].float()) for i in layers]

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[Any]) -> torch.Tensor:
        if self.model is None:
            self.load(images.device)
        images = prepare(images, self.model.config.vision_config.image_size, self.processor)
        features = F.normalize(self.model.get_image_features(images).pooler_output, dim=-1)
        for weight, bias in self.head:
            features = F.linear(features, weight, bias)
        return features.squeeze(1)


class classifier:
    """
    Probability in [0, 1] of the prompt's class under an image classifier, by default the embedded pipeline's. The
    class is the longest of the model's labels that the prompt contains as words.

    Raises:
        ValueError: a prompt contains no label.
    """

    differentiable = True

    def __init__(self, model: str = DEMO_CLASSIFIER):
        self.model_name = model
        self.model = None

    def load(self, device: torch.device):
        model = AutoModelForImageClassification.from_pretrained(self.model_name, dtype=torch.float32)
        self.model = model.eval().requires_grad_(False).to(device)
        self.processor = None
        if self.model_name != DEMO_CLASSIFIER:
            self.processor = AutoImageProcessor.from_pretrained(self.model_name)

    def class_of(self, prompt: str) -> int:
        labels = self.model.config.id2label
        found = [i for i, label in labels.items() if re.search(rf"(?<!\w){re.escape(label)}(?!\w)", prompt)]
        if not found:
            raise ValueError(f"The prompt {prompt!r} names none of the classes {', '.join(labels.values())}.")
        return max(found, key=lambda i: len(labels[i]))

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[Any]) -> torch.Tensor:
        if self.model is None:
            self.load(images.device)
        classes = torch.tensor([self.class_of(prompt) for prompt in prompts], device=images.device)
        logits = self.model(prepare(images, self.model.config.image_size, self.processor)).logits
        return logits.softmax(1).gather(1, classes[:, None]).squeeze(1)


def prepare(images: torch.Tensor, size: int, processor: Any | None) -> torch.Tensor:
    """
    Images (B, 3, H, W) in [0, 1] as a model wants them, differentiably: the shorter side resized to `size`, the centre
    cropped, and normalised as its `processor` says, or to [-1, 1].
    """
    scale = size / min(images.shape[2:])
    if scale != 1:
        shape = [round(side * scale) for side in images.shape[2:]]
        images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((side - size) // 2 for side in images.shape[2:])
    images = images[:, :, top : top + size, left : left + size]
    mean, std = ([0.5] * 3, [0.5] * 3) if processor is None else (processor.image_mean, processor.image_std)
    mean, std = images.new_tensor(mean).view(-1, 1, 1), images.new_tensor(std).view(-1, 1, 1)
    return (images - mean) / std
