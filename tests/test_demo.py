# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The embedded teacher is what its README says, and evaluation is right about known distributions."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import load_script
from diffusers import DiTPipeline

from rdm_trl import demo, evaluation
from rdm_trl.real_images import load_images, to_pixels


FOLDER = Path(demo.__file__).parent


def test_the_package_is_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.suffix != ".py") <= 8 * 2**20


def test_samples_are_the_garments_asked_for():
    """The report's figures, checked on fewer images and steps: they are drawn by plain diffusers."""
    figures = json.loads((FOLDER / "figures.json").read_text())
    assert figures["classifier_accuracy_on_test_images"] >= 0.88
    best = figures["guidance_1.75"]
    assert best["class_accuracy"] >= 0.85 and best["fid"] <= 6.0
    pipeline, classifier = demo.load_demo_pipeline(), demo.DemoClassifier()
    pipeline.set_progress_bar_config(disable=True)
    prompts = demo.DEMO_PROMPTS * 2
    images = pipeline(
        prompts,
        num_inference_steps=14,
        guidance_scale=1.75,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images
    assert images.shape == (120, 3, 32, 32)
    features, logits = classifier(images)
    target = torch.tensor([demo.DEMO_PROMPT_CLASS[prompt] for prompt in prompts])
    assert evaluation.class_accuracy(logits, target) > 0.8
    # 120 images are few: their distance is biased upwards, from 0.3 to 1.
    distance = evaluation.frechet_distance(evaluation.feature_statistics(features), demo.load_demo_reference())
    assert distance < 3.0


def test_prompts_and_classes():
    assert len(demo.DEMO_PROMPTS) == len(set(demo.DEMO_PROMPTS)) == 60
    for prompt, index in demo.DEMO_PROMPT_CLASS.items():
        assert demo.CLASSES[index] in prompt


def test_frechet_distance_against_scipy():
    torch.manual_seed(0)
    first, second = torch.randn(200, 6) @ torch.randn(6, 6), torch.randn(300, 6) @ torch.randn(6, 6) + 1
    one, other = evaluation.feature_statistics(first), evaluation.feature_statistics(second)
    c1, c2 = np.cov(first.double().numpy().T), np.cov(second.double().numpy().T)
    difference = first.double().mean(0).numpy() - second.double().mean(0).numpy()
    expected = difference @ difference + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert evaluation.frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert evaluation.frechet_distance(one, one) == pytest.approx(0.0, abs=1e-6)
    # One dimension, by hand: (m1 - m2)^2 + (s1 - s2)^2.
    narrow = {"mean": torch.tensor([1.0]).double(), "cov": torch.tensor([[4.0]]).double()}
    wide = {"mean": torch.tensor([4.0]).double(), "cov": torch.tensor([[25.0]]).double()}
    assert evaluation.frechet_distance(narrow, wide) == pytest.approx(9 + 9)


def test_diversity_and_accuracy():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [1.0, 1.0], [9.0, 9.0]])
    prompts = ["a", "a", "b", "b", "c"]
    assert evaluation.diversity(features, prompts) == pytest.approx(2.5)  # 5 and 0; a single image does not count
    assert np.isnan(evaluation.diversity(features[:1], ["a"]))
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert evaluation.class_accuracy(logits, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)


def test_the_dit_teacher_is_drawn_with_guidance_by_plain_diffusers(tmp_path):
    """The null class is the one that DiT's pipeline guides by, and the classes' names come back with the weights."""
    script = load_script("examples/train_teacher.py")
    labels = torch.arange(10).repeat(13)
    script.train_dit(torch.rand(130, 3, 32, 32) * 2 - 1, labels, 1, FOLDER, tmp_path)
    pipeline = DiTPipeline.from_pretrained(tmp_path)
    assert pipeline.labels == {name: i for i, name in enumerate(demo.CLASSES)}
    images = pipeline(
        pipeline.get_label_ids(["a bag", "a dress"]), guidance_scale=2.0, num_inference_steps=2, output_type="pt"
    ).images
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()


def test_the_training_images_are_written_as_the_discriminator_reads_them(tmp_path):
    labels = torch.tensor([0, 5, 9])
    load_script("examples/train_teacher.py").save_images(torch.ones(3, 3, 32, 32), labels, tmp_path / "images")
    rows = load_images(str(tmp_path / "images"))
    assert [demo.DEMO_PROMPT_CLASS[prompt] for prompt in rows["prompt"]] == labels.tolist()
    assert (to_pixels(rows[0]["image"], 32, 32) == 1).all()
