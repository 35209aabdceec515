# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Rewards: names, call styles, answers, gradients; the built-ins against their formulas, computed otherwise."""

import asyncio
import io
import sys
import time

import numpy as np
import pytest
import torch
from conftest import make_text_config
from PIL import Image, ImageDraw, ImageFont
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
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


def test_models_that_cannot_be_loaded_are_named(offline, tmp_path):
    for reward in ("clip_score", "hps_v2", "image_reward", "aesthetic", "classifier"):
        with pytest.raises(OSError, match=f"The reward '{reward}' cannot load '{tmp_path}'"):
            resolve_reward(f"{reward}:{tmp_path}")(IMAGES, PROMPTS, None)


class OpenClipTower(torch.nn.Module):
    """A CLIP tower by the names and with the modules that open_clip has, written from the paper (arXiv 2103.00020)."""

    class Block(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
            self.attn = torch.nn.MultiheadAttention(width, 2, batch_first=True)
            self.mlp = torch.nn.Sequential()
            self.mlp.add_module("c_fc", torch.nn.Linear(width, 2 * width))
            self.mlp.add_module("gelu", torch.nn.GELU())
            self.mlp.add_module("c_proj", torch.nn.Linear(2 * width, width))

        def forward(self, x, mask=None):
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
            return x + self.mlp(self.ln_2(x))

    def __init__(self, width):
        super().__init__()
        self.transformer = torch.nn.Module()
        self.transformer.resblocks = torch.nn.ModuleList([self.Block(width), self.Block(width)])

    def blocks(self, x, mask=None):
        for block in self.transformer.resblocks:
            x = block(x, mask)
        return x


class OpenClip(OpenClipTower):
    def __init__(self, vocab_size, length, embed_dim=12):
        super().__init__(16)
        self.visual = OpenClipTower(16)
        self.visual.conv1 = torch.nn.Conv2d(3, 16, 8, 8, bias=False)
        self.visual.class_embedding = torch.nn.Parameter(torch.randn(16))
        self.visual.positional_embedding = torch.nn.Parameter(torch.randn(5, 16))
        self.visual.ln_pre, self.visual.ln_post = torch.nn.LayerNorm(16), torch.nn.LayerNorm(16)
        self.visual.proj = torch.nn.Parameter(torch.randn(16, embed_dim))
        self.token_embedding = torch.nn.Embedding(vocab_size, 16)
        self.positional_embedding = torch.nn.Parameter(torch.randn(length, 16))
        self.ln_final = torch.nn.LayerNorm(16)
        self.text_projection = torch.nn.Parameter(torch.randn(16, embed_dim))
        self.logit_scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, pixels, tokens, end):
        visual = self.visual
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
        image = visual.ln_post(visual.blocks(visual.ln_pre(x))[:, 0]) @ visual.proj
        length = tokens.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        y = self.ln_final(self.blocks(self.token_embedding(tokens) + self.positional_embedding[:length], mask))
        text = y[torch.arange(len(y)), (tokens == end).int().argmax(1)] @ self.text_projection
        return torch.nn.functional.cosine_similarity(image, text)


def test_hps_v2_reads_the_authors_weights(tiny_clip, tmp_path, monkeypatch):
    """A network by open_clip's names, saved as the authors save theirs, scores as it does by itself."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_clip)
    config = CLIPConfig.from_pretrained(tiny_clip)
    for tower in (config.text_config, config.vision_config):
        tower.hidden_size, tower.intermediate_size, tower.num_hidden_layers = 16, 32, 2
        tower.num_attention_heads, tower.hidden_act = 2, "gelu"
    config.save_pretrained(tmp_path / "architecture")
    tokenizer.save_pretrained(tmp_path / "architecture")
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        tmp_path / "architecture"
    )
    length = config.text_config.max_position_embeddings
    model = OpenClip(config.text_config.vocab_size, length).eval()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    monkeypatch.setattr(builtin.hps_v2, "architecture", str(tmp_path / "architecture"))
    prompts = ["a photo of a bag", "a coat", "a dress"]
    images = torch.rand(3, 3, 16, 16, requires_grad=True)
    tokens = tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(normalized(images), tokens, tokenizer.eos_token_id)
    reward = resolve_reward(f"hps_v2:{tmp_path}")
    rewards = reward(images, prompts, None)
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=1e-4)
    rewards.sum().backward()
    assert images.grad.abs().sum() > 0


def normalized(images):
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    return (images - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def vision_transformer(w, x):
    """BLIP's image encoder, with two layers of two heads, from weights by its authors' names."""
    functional = torch.nn.functional
    x = functional.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + w["pos_embed"]

    def norm(name, x):
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(name, x):
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    for i in range(2):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
        q, k, v = qkv.unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(f"blocks.{i}.attn.proj", seen)
        y = functional.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x)))
        x = x + linear(f"blocks.{i}.mlp.fc2", y)
    return norm("norm", x)


def test_image_reward_reads_the_authors_weights(tiny_clip, tmp_path, monkeypatch):
    """The image encoder and the head in plain torch, by the authors' names; the text encoder is transformers' BERT."""
    torch.manual_seed(0)
    shapes = {"cls_token": (1, 1, 16), "pos_embed": (1, 5, 16), "patch_embed.proj.weight": (16, 3, 8, 8)}
    shapes |= {"patch_embed.proj.bias": (16,), "norm.weight": (16,), "norm.bias": (16,)}
    sizes = {"attn.qkv": (48, 16), "attn.proj": (16, 16), "mlp.fc1": (32, 16), "mlp.fc2": (16, 32)}
    for i in range(2):
        for name, (out, width) in sizes.items():
            shapes |= {f"blocks.{i}.{name}.weight": (out, width), f"blocks.{i}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (16,), f"blocks.{i}.{name}.bias": (16,)}
    vision = {key: torch.randn(shape) * 0.3 for key, shape in shapes.items()}
    vision_config = BlipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(tiny_clip)
    text_config = BlipTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        encoder_hidden_size=16,
    )  # fmt: skip
    text = BlipTextModel(text_config, add_pooling_layer=False).eval()
    sizes = [16, 8, 4, 4, 2, 1]
    head = torch.nn.Sequential()
    for i, (first, second) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        head.append(torch.nn.Linear(first, second))
        if i < 3:
            head.append(torch.nn.Dropout(0.2))
    weights = {f"blip.visual_encoder.{key}": value for key, value in vision.items()}
    weights |= {f"blip.text_encoder.{key}": value for key, value in text.state_dict().items()}
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    weights |= {f"mlp.layers.{key}": value for key, value in head.state_dict().items()}
    torch.save(weights, tmp_path / "ImageReward.pt")
    for name, value in (("vision_config", vision_config), ("text_config", text_config), ("tokenizer_name", tiny_clip)):
        monkeypatch.setattr(builtin.image_reward, name, value)

    prompts = ["a photo of a bag", "a coat"]
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    tokens = tokenizer(prompts, padding="max_length", max_length=35, return_tensors="pt")
    with torch.no_grad():
        seen = vision_transformer(vision, normalized(images))
        states = text(**tokens, encoder_hidden_states=seen).last_hidden_state
        expected = (head.eval()(states[:, 0]).squeeze(1) - 0.16717362830052426) / 1.0333394966054072
    rewards = resolve_reward(f"image_reward:{tmp_path}")(images, prompts, None)
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=1e-4)
    rewards.sum().backward()
    assert images.grad.abs().sum() > 0


def test_ocr_reads():
    """PP-OCR itself, on text that PIL draws: right, one letter of eight wrong, none at all."""
    pictures = []
    for text in ("HELLO 42", "HELLO 43", ""):
        picture = Image.new("RGB", (256, 128), "white")
        ImageDraw.Draw(picture).text((20, 40), text, fill="black", font=ImageFont.load_default(40))
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    reward = resolve_reward("ocr")
    prompts = ['a sign that says "Hello 42"'] * 3
    torch.testing.assert_close(reward(torch.stack(pictures), prompts, None), torch.tensor([1.0, 1 - 1 / 7, 0.0]))
    with pytest.raises(ValueError, match="The prompt 'a sign' quotes no text to write"):
        reward(torch.stack(pictures[:1]), ["a sign"], None)


def test_ocr_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match=r"The reward 'ocr' needs an extra: `pip install rdm_trl\[ocr\]`"):
        resolve_reward("ocr")(IMAGES, ["a"] * 3, None)
