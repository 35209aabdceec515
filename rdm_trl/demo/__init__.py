# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The embedded teacher: a small but real `StableDiffusionPipeline`, made by `examples/train_teacher.py`."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification

from ..evaluation import Judge


DEMO_PIPELINE = str(Path(__file__).parent / "pipeline")
DEMO_CLASSIFIER = str(Path(__file__).parent / "classifier")
DEMO_REFERENCE = str(Path(__file__).parent / "reference_statistics.safetensors")

# In the order of Fashion-MNIST's labels.
CLASSES = (
    "a t-shirt",
    "a pair of trousers",
    "a pullover",
    "a dress",
    "a coat",
    "a sandal",
    "a shirt",
    "a sneaker",
    "a bag",
    "an ankle boot",
)
PHRASINGS = (
    "a photo of {}",
    "{}",
    "a picture of {}",
    "a studio photo of {}",
    "a product photo of {}",
    "{} on a black background",
)
# All captions, class by class: `DEMO_PROMPTS[len(PHRASINGS) * c + p]` is phrasing `p` of class `c`.
DEMO_PROMPTS = [phrasing.format(name) for name in CLASSES for phrasing in PHRASINGS]
DEMO_PROMPT_CLASS = {prompt: i // len(PHRASINGS) for i, prompt in enumerate(DEMO_PROMPTS)}


def load_demo_pipeline(dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Loads the embedded teacher from the package; no network. Images are 32x32 RGB, latents 16x8x8."""
    return StableDiffusionPipeline.from_pretrained(DEMO_PIPELINE, dtype=dtype, local_files_only=True)


class DemoClassifier(nn.Module):
    """The embedded Fashion-MNIST classifier, whose features stand in for Inception's.

    `forward` takes images of shape `(B, 3, 32, 32)` in `[0, 1]` and returns features `(B, D)` and class logits
    `(B, 10)`.
    """

    def __init__(self, path: str | Path = DEMO_CLASSIFIER):
        super().__init__()
        self.model = AutoModelForImageClassification.from_pretrained(
            path, dtype=torch.float32, local_files_only=True
        ).eval()
        self.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.model.base_model(pixel_values=images * 2 - 1).pooler_output.flatten(1)
        return features, self.model.classifier(features)


def load_demo_reference() -> dict[str, torch.Tensor]:
    """Feature statistics of Fashion-MNIST's 10,000 test images: `mean` (D,), `cov` (D, D) and `num_samples`."""
    return load_file(DEMO_REFERENCE)


def load_demo_judge() -> Judge:
    """Measures images against Fashion-MNIST's test images, and their classes against the demo's prompts."""
    return Judge(DemoClassifier(), load_demo_reference(), DEMO_PROMPT_CLASS)


def load_judge(teacher: str | Path) -> Judge:
    """
    The judge that lies beside a teacher, in its folder's `judge`: a classifier as `DemoClassifier` reads it, whose
    labels are the teacher's prompts, and `reference_statistics.safetensors`.
    """
    folder = Path(teacher) / "judge"
    classifier = DemoClassifier(folder)
    return Judge(classifier, load_file(folder / "reference_statistics.safetensors"), classifier.model.config.label2id)
