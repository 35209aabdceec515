# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The memory estimate, against what a real pipeline takes."""

import ctypes
import gc
import resource
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import make_tiny_pipeline, make_trainer
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from tiny_pipelines import CASES, kept_activations, make

from rdm_trl import plan
from rdm_trl.cli import main
from rdm_trl.demo import DEMO_PIPELINE, load_demo_pipeline
from rdm_trl.models.pipelines import family_of
from rdm_trl.models.roles import Roles


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Gives a tiny pipeline without its weights, a new one each time."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_pipeline().save_pretrained(folder)
    return partial(plan.load_without_weights, str(folder))


def test_weights_are_those_of_the_real_pipeline():
    memory = plan.memory_of(plan.load_without_weights(DEMO_PIPELINE), 4, False, lora_r=8)
    pipeline = load_demo_pipeline()
    assert memory.denoiser == 2 * sum(p.numel() for p in pipeline.unet.parameters())
    assert memory.encoders == 2 * sum(p.numel() for p in pipeline.text_encoder.parameters())
    assert memory.others == 2 * sum(p.numel() for p in pipeline.vae.parameters())
    family = family_of(pipeline)
    roles = Roles(family.denoiser, LoraConfig(r=8, target_modules=family.lora_target_modules))
    parameters = {name: sum(p.numel() for p in roles.adapter_parameters(name)) for name in ("student", "fake", "ema")}
    trained = parameters["student"] + parameters["fake"]
    assert memory.adapters == 4 * (sum(parameters.values()) + 3 * trained)
    learned = plan.memory_of(plan.load_without_weights(DEMO_PIPELINE), 4, False, lora_r=8, learn_target=True)
    assert learned.adapters - memory.adapters == 4 * 4 * parameters["fake"]


def resident() -> int:
    """Bytes of memory that this process holds."""
    ctypes.CDLL(None).malloc_trim(0)  # without what was needed for a moment only
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_activations_are_what_a_forward_pass_keeps():
    """In float32, where a CPU computes: the memory that a process holds more while the graph is alive."""
    family = family_of(load_demo_pipeline())
    roles = Roles(family.denoiser, LoraConfig(r=32, target_modules=family.lora_target_modules))

    def forward(batch_size):
        x_t, t = torch.randn(batch_size, *family.latent_shape), torch.full((batch_size,), 500.0)
        condition = family.encode_prompts(["a photo"] * batch_size)
        return family.denoise(lambda *a, **k: roles("student", *a, **k), x_t, t, condition)

    forward(2)
    gc.collect()  # what earlier tests have left
    before = resident()
    kept = forward(96)
    held = resident() - before
    assert kept.requires_grad
    pipeline = plan.load_without_weights(DEMO_PIPELINE, torch.float32)
    assert plan.memory_of(pipeline, 96, False).activations == pytest.approx(held, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_discriminator_takes_what_the_trainers_takes(tmp_path, load, checkpointing):
    """In float32: the storages that are alive in the midst of its pass, and those of its head behind an update."""
    Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * 4}).save_to_disk(tmp_path / "real")
    options = dict(adversarial_weight=0.1, image_dataset=str(tmp_path / "real"))
    options |= dict(activation_checkpointing=checkpointing, teacher_cache_dir=str(tmp_path / "cache"))
    lora = LoraConfig(r=2, target_modules=family_of(load()).lora_target_modules)
    trainer = make_trainer(tmp_path, peft_config=lora, max_steps=1, **options)
    trainer.train()
    head, score = trainer.adversary.head, trainer.adversary.score
    trained = [value for state in score.optimizer.state.values() for value in state.values() if value.ndim]
    for parameter in head.parameters():
        trained += [parameter, torch.zeros_like(parameter)]  # with its gradient
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    condition, x0 = trainer.encode(["a photo of a bag"] * 8), torch.randn(8, *trainer.family.latent_shape)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.adversary.push(x0, torch.randn_like(x0), torch.full((8,), 500), condition)
    weights = {p.untyped_storage()._cdata for p in (*trainer.model.parameters(), *head.parameters())}
    real = sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
    plain, planned = (
        plan.memory_of(load(dtype=torch.float32), 8, checkpointing, 2, **with_it)
        for with_it in ({}, dict(with_discriminator=True))
    )
    assert planned.adapters - plain.adapters == sum(value.nbytes for value in trained)
    assert planned.activations - plain.activations == pytest.approx(real, rel=0.1)


def test_the_option_of_a_discriminator(capsys):
    arguments = ["plan", "--model", DEMO_PIPELINE, "--gpu-memory", "80"]
    totals = []
    for more in ([], ["--adversarial"]):
        main([*arguments, *more])
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("in all"))
        totals.append(float(line.split()[-2]))
    assert totals[1] > totals[0]
    with pytest.raises(ValueError, match="are for images, and WanPipeline draws videos"):
        plan.memory_of(make(CASES["wan"]), 4, False, 2, *CASES["wan"].size.values(), with_discriminator=True)


def test_checkpointing_and_batch_size(load):
    def activations(*args):
        return plan.memory_of(load(), *args).activations

    eight = activations(8, False)
    assert eight == pytest.approx(2 * activations(4, False), rel=0.05)
    assert activations(8, True) < 0.4 * eight


@pytest.mark.parametrize("name", CASES)
def test_every_family_without_its_weights(name, tmp_path):
    """On the meta device a forward pass keeps what the real pipeline's keeps."""
    real, planned = kept_activations(CASES[name], tmp_path, 4)
    assert planned == pytest.approx(real, rel=0.1)


def test_offloaded_encoders_do_not_count(load):
    memory = plan.memory_of(load(), 4, True)
    encoder = make_tiny_pipeline().text_encoder
    assert memory.encoders == 2 * sum(p.numel() for p in encoder.parameters())
    # A device on which all but the encoders fits.
    enough = replace(memory, encoders=0).total + memory.encoders // 2
    found, settings, fits = plan.choose(load, enough / plan.GIB)
    assert fits and settings["offload_encoders"] and settings["per_device_train_batch_size"] == 4
    assert found.total == replace(memory, encoders=0).total
    # What was counted is in the settings.
    assert "learn_target" not in settings and plan.choose(load, 80, learn_target=True)[1]["learn_target"]


def test_the_base_in_shards_and_in_fewer_bits():
    """What a process really holds in shards, tests/distributed compares."""
    with torch.device("meta"):
        transformer = make(CASES["sd3"]).transformer.to(torch.bfloat16)
    sizes = plan.sizes_of_base(transformer, 2)
    first, last = transformer.transformer_blocks
    outside = sum(p.nbytes for p in transformer.parameters()) - plan.size_of(first, last)
    gathered = outside + 2 * max(plan.size_of(first), plan.size_of(last))
    assert plan.gathered_size(transformer) == gathered
    assert sizes["shards"] - gathered == pytest.approx(sizes["whole"] / 2, rel=0.1)
    assert sizes["whole"] > sizes["8 bits"] > sizes["4 bits"] > sizes["whole"] / 4
    assert list(sizes) == ["whole", "shards", "8 bits", "4 bits"]
    assert "shards" not in plan.sizes_of_base(transformer)


def test_what_is_gathered_of_nested_blocks():
    """Of a UNet: a block in another one needs both."""
    unet = make_tiny_pipeline().unet
    block = unet.up_blocks[0]

    def leaves(*modules):
        names = ("BasicTransformerBlock", "ResnetBlock2D")
        return [inner for m in modules for inner in m.modules() if type(inner).__name__ in names]

    alone = leaves(*unet.down_blocks, unet.mid_block)
    own = plan.size_of(block) - plan.size_of(*leaves(block))
    outside = plan.size_of(unet) - plan.size_of(*alone) - plan.size_of(unet.up_blocks)
    largest = max(own + max(map(plan.size_of, leaves(block))), *map(plan.size_of, alone))
    assert plan.gathered_size(unet) == outside + 2 * largest


def test_encoders_are_in_shards_with_the_base(load):
    """What a process really holds of them, tests/distributed compares."""
    family = family_of(load())
    part, gathered = plan.encoders_in_shards(family, 8)
    encoder, four = load().text_encoder, plan.memory_of(load(), 4, True)
    assert four.encoders / 8 <= part < four.encoders / 7 and gathered == plan.gathered_size(encoder)
    base = dict(denoiser=plan.sizes_of_base(family.denoiser, 8)["shards"], base="shards")
    needed = replace(four, encoders=part, activations=max(four.activations, gathered), **base)
    found, settings, fits = plan.choose(load, (needed.total + 1) / plan.GIB, 8)
    assert fits and found == needed and not settings["offload_encoders"]
    # What does not fit says the least, which is not the last.
    found, _, fits = plan.choose(load, 1e-9, 8)
    assert not fits and found.total <= needed.total
    # One whose class names no blocks stays whole, and so does one in fewer bits.
    with patch.object(family.pipeline.text_encoder, "_no_split_modules", None):
        assert plan.encoders_in_shards(family, 8) == (four.encoders, 0)
    family.pipeline.text_encoder.is_quantized = True
    assert plan.encoders_in_shards(family, 8) == (four.encoders, 0)


def test_a_discriminators_pass_in_shards_goes_to_the_end(load):
    ends, goes_on = (
        plan.memory_of(load(), 4, False, with_discriminator=True, in_shards=in_shards) for in_shards in (False, True)
    )
    assert goes_on.activations > ends.activations and goes_on.adapters == ends.adapters
    with patch.object(plan, "memory_of", wraps=plan.memory_of) as asked:
        plan.choose(load, 1e-9, 8, with_discriminator=True)
    assert {call.kwargs["in_shards"] for call in asked.call_args_list} == {False, True}


def test_shards_come_before_bits(load, capsys):
    least = plan.memory_of(load(), 4, True)
    least = replace(least, encoders=0, activations=max(least.activations, least.encoders))
    sizes = plan.sizes_of_base(family_of(load()).denoiser, 8)
    order = list(sizes)
    for base, size in sizes.items():
        enough = replace(least, denoiser=size, base=base).total + 1
        found, settings, fits = plan.choose(load, enough / plan.GIB, 8)
        assert fits and found.total < enough and order.index(found.base) <= order.index(base)
        assert settings["per_device_train_batch_size"] == 4 and settings["gradient_accumulation_steps"] == 1
        assert settings.get(f"load_in_{found.base[0]}bit", False) == found.base.endswith("bits")
    main(["plan", "--model", DEMO_PIPELINE, "--gpu-memory", "80", "--num-gpus", "2"])
    text = capsys.readouterr().out
    assert "per_device_train_batch_size: 16" in text and "gradient_accumulation_steps: 1" in text
    assert text.rstrip().endswith("accelerate launch --num_processes 2")


def test_plan_picks_what_fits(load, capsys):
    (folder,) = load.args
    main(["plan", "--model", folder, "--gpu-memory", "1"])
    text = capsys.readouterr().out
    assert "per_device_train_batch_size: 32" in text and "activation_checkpointing: false" in text
    assert "Does not fit in 1e-05 GiB" in plan.plan(folder, gpu_memory=1e-5)
    needs = plan.memory_of(load(), 8, True).total
    text = plan.plan(folder, gpu_memory=1.02 * needs / plan.GIB)
    assert "per_device_train_batch_size: 8" in text and "activation_checkpointing: true" in text
    assert "gradient_accumulation_steps: 4" in text
