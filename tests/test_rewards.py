# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Rewards: names, call styles, answers, gradients; the built-ins against their formulas, computed otherwise."""

import asyncio
import io
import time

import numpy as np
import pytest
import torch
from conftest import make_text_config
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from rdm_trl.demo import DEMO_PIPELINE, DEMO_PROMPTS, DemoClassifier
from rdm_trl.rewards import Scorer, builtin, resolve_reward, reward_gradient


IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "bb", "ccc"]


def test_names(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def redness(images, prompts, metadata):\n    return images[:, 0]\n")
    monkeypatch.chdir(tmp_path)
    assert resolve_reward("my_rewards:redness").__name__ == "redness"
    assert resolve_reward("my_rewards.redness").__name__ == "redness"
    assert isinstance(resolve_reward("jpeg_compressibility"), builtin.jpeg_compressibility)
    assert resolve_reward("clip_score:some/id").model_name == "some/id"
    assert resolve_reward(len) is len
    for name, message in (
        ("sharpness", "There is no reward 'sharpness'. Built in are aesthetic, classifier, clip_score"),
        ("no_such_file:f", "The reward 'no_such_file:f' cannot be found: No module named 'no_such_file'"),
        ("my_rewards:blueness", "has no function 'blueness'"),
        (3, "A reward is a function or a name, but 3 is a int"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_reward(name)


@pytest.mark.parametrize("answer", [[1, None, 3], np.array([1.0, np.nan, 3.0]), torch.tensor([1.0, 2.0, 3.0])])
def test_call_styles_and_answers(answer):
    def ddpo(images, prompts, metadata):
        return torch.tensor([1.0, 2.0, 3.0]), {"seen": metadata}

    def grpo(images, prompts, size, **columns):
        return [float(s) for s in size]

    def plain(images, prompts, metadata):
        return answer if not isinstance(answer, np.ndarray) else np.nan_to_num(answer, nan=2.0)

    rewards, metadata = Scorer([ddpo, grpo, plain])(IMAGES, PROMPTS, [{"size": i} for i in range(3)])
    assert rewards[:, 0].tolist() == [1, 2, 3] and rewards[:, 1].tolist() == [0, 1, 2]
    assert metadata["ddpo"] == {"seen": [{"size": 0}, {"size": 1}, {"size": 2}]} and metadata["plain"] == {}
    assert rewards[1, 2].isnan() if isinstance(answer, list) else rewards[1, 2] == 2


def test_async_rewards_run_concurrently_and_inside_a_running_loop():
    running, most = 0, 0

    async def slow(images, prompts, metadata):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return [1.0] * len(images)

    class Other:
        async def __call__(self, images, prompts, **kwargs):
            return await slow(images, prompts, None)

    scorer = Scorer([slow, Other()])
    assert scorer(IMAGES, PROMPTS, [{}] * 3)[0].tolist() == [[1.0, 1.0]] * 3
    assert most == 2

    async def notebook():
        return scorer(IMAGES, PROMPTS, [{}] * 3)[0]

    assert asyncio.run(notebook()).tolist() == [[1.0, 1.0]] * 3


@pytest.mark.parametrize(
    "answer, error, message",
    [
        ([1.0, 2.0], ValueError, "'bad' returned 2 rewards for 3 images"),
        ([1.0, float("nan"), 2.0], ValueError, "'bad' returned nan for the prompt 'bb'"),
        ([1.0, 2.0, float("inf")], ValueError, "'bad' returned inf for the prompt 'ccc'"),
        (["good", "bad", "ugly"], ValueError, "'bad' returned 'good' for the prompt 'a'"),
        ("abc", ValueError, "'bad' returned 'abc', but must return one number an image"),
        (None, ValueError, "'bad' returned None, but must return one number an image"),
        (1.0, ValueError, "'bad' returned 1.0, but must return one number an image"),
        (ZeroDivisionError("oops"), RuntimeError, "'bad' failed: ZeroDivisionError: oops"),
    ],
)
def test_bad_answers_name_the_reward(answer, error, message):
    def bad(images, prompts, metadata):
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def async_bad(images, prompts, metadata):
        return bad(images, prompts, metadata)

    async_bad.__name__ = "bad"
    for function in (bad, async_bad):
        with pytest.raises(error, match=message):
            Scorer([function])(IMAGES, PROMPTS, [{}] * 3)


def test_a_reward_may_not_take_forever():
    def stuck(images, prompts, metadata):
        time.sleep(1)

    async def async_stuck(images, prompts, metadata):
        await asyncio.sleep(60)

    for function, name in ((stuck, "stuck"), (async_stuck, "async_stuck")):
        with pytest.raises(TimeoutError, match=f"'{name}' took longer than `reward_timeout` \\(0.05 s\\)"):
            Scorer([function], timeout=0.05)(IMAGES, PROMPTS, [{}] * 3)


def test_a_black_box_never_keeps_a_graph():
    images = IMAGES.clone().requires_grad_(True)
    weight = torch.ones((), requires_grad=True)

    def learned(images, prompts, metadata):
        assert not images.requires_grad and not torch.is_grad_enabled()
        return weight * images.mean((1, 2, 3))

    assert not Scorer([learned])(images, PROMPTS, [{}] * 3)[0].requires_grad


def test_reward_gradient_is_the_rewards():
    """For `decode(z) = 2 z` and the reward mean(image^2) the gradient is 8 z / D, the push 8 z."""

    def energy(images, prompts, metadata):
        return images.square().mean((1, 2, 3))

    latents = torch.randn(3, 4, 2, 2)
    with torch.no_grad():  # as in the trainer
        rewards, push = reward_gradient(energy, lambda z: 2 * z, latents, PROMPTS, [{}] * 3)
    torch.testing.assert_close(rewards, (2 * latents).square().mean((1, 2, 3)))
    torch.testing.assert_close(push, 8 * latents)
    with pytest.raises(ValueError, match="'detached' declares itself differentiable, but returned no tensor with a"):

        def detached(images, prompts, metadata):
            return energy(images.detach(), prompts, metadata)

        reward_gradient(detached, lambda z: z, latents, PROMPTS, [{}] * 3)
    with pytest.raises(ValueError, match="The gradient of reward function 'edge' is not finite for the prompt 'a'"):

        def edge(images, prompts, metadata):
            return (images - images.detach()).abs().sqrt().sum((1, 2, 3))

        reward_gradient(edge, lambda z: z, latents, PROMPTS, [{}] * 3)


def test_jpeg_rewards():
    def kilobytes(image):
        file = io.BytesIO()
        Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype("uint8")).save(file, "JPEG", quality=95)
        return len(file.getvalue()) / 1000

    images = torch.stack([torch.zeros(3, 32, 32), torch.rand(3, 32, 32)])
    expected = torch.tensor([kilobytes(image) for image in images])
    assert expected[1] > expected[0]
    torch.testing.assert_close(resolve_reward("jpeg_incompressibility")(images, ["", ""], None), expected)
    torch.testing.assert_close(resolve_reward("jpeg_compressibility")(images, ["", ""], None), -expected)


def test_classifier_reward_is_the_probability_of_the_prompts_class():
    images = torch.rand(60, 3, 32, 32)
    reward = builtin.classifier()
    ours = reward(images, DEMO_PROMPTS, None)
    _, logits = DemoClassifier()(images)
    torch.testing.assert_close(ours, logits.softmax(1)[torch.arange(60), torch.arange(60) // 6])
    with pytest.raises(ValueError, match="The prompt 'a banana' names none of the classes a t-shirt"):
        reward(images[:1], ["a banana"], None)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_PIPELINE, subfolder="tokenizer")
    text = make_text_config(tokenizer)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def test_clip_rewards(tiny_clip, tmp_path):
    """Against the model's own forward pass on what its own processor makes of PIL images."""
    arrays = (torch.rand(3, 16, 16, 3, generator=torch.Generator().manual_seed(1)) * 255).byte()
    images = arrays.permute(0, 3, 1, 2).float() / 255
    prompts = ["a photo of a bag", "a coat", "a dress"]
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    processor = CLIPImageProcessorPil.from_pretrained(tiny_clip)
    tokens = CLIPTokenizer.from_pretrained(tiny_clip)(prompts, padding=True, return_tensors="pt")
    pixels = processor([Image.fromarray(a.numpy()) for a in arrays], return_tensors="pt").pixel_values
    with torch.no_grad():
        output = model(**tokens, pixel_values=pixels)
    logits = output.logits_per_image.diagonal()
    torch.testing.assert_close(builtin.pick_score(tiny_clip)(images, prompts, None), logits, atol=1e-4, rtol=1e-4)
    cosine = (output.image_embeds * output.text_embeds).sum(1)
    torch.testing.assert_close(builtin.clip_score(tiny_clip)(images, prompts, None), cosine, atol=1e-5, rtol=1e-4)

    torch.manual_seed(0)
    sizes = [12, 8, 4, 1]
    layers = torch.nn.Sequential()
    for first, second in zip(sizes[:-1], sizes[1:], strict=True):
        layers.extend([torch.nn.Linear(first, second), torch.nn.Dropout(0.2)])
    layers = layers[:-1].eval()
    torch.save({f"layers.{key}": value for key, value in layers.state_dict().items()}, tmp_path / "head.pth")
    reward = builtin.aesthetic(tiny_clip, tmp_path / "head.pth")
    torch.testing.assert_close(
        reward(images, prompts, None), layers(output.image_embeds).squeeze(1), atol=1e-4, rtol=1e-4
    )

    large = torch.rand(2, 3, 24, 40, requires_grad=True)  # not square: resized and cropped, with a gradient
    builtin.clip_score(tiny_clip)(large, ["a bag", "a coat"], None).sum().backward()
    assert large.grad[:, :, :, 12:28].abs().sum() > 0 and large.grad[:, :, :, :4].abs().sum() == 0
