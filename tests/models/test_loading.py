# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Bases as people have them: folders with one variant's files alone, and single files in the original layout."""

import json
import re
import runpy

import pytest
import torch
from conftest import PROMPTS, load_script, make_tiny_pipeline, make_trainer
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import save_file
from tiny_pipelines import CASES, rollout_of, run_card

from rdm_trl import cli
from rdm_trl.demo.page import export_space
from rdm_trl.models.pipelines import load_pipeline, read_pipeline
from rdm_trl.saving.export import export


SHORT = "--max_steps 1 --num_eval_images 4 --teacher_num_steps 2 --log_images_steps 0 --use_cpu --lora_r 2".split()
SHORT += "--num_teacher_images 0 --save_strategy no --per_device_train_batch_size 4 --disable_tqdm True".split()


def denoise(pipeline):
    generator = torch.Generator().manual_seed(1)
    x_t, embeds = torch.randn(2, 4, 4, 4, generator=generator), pipeline.encode_prompt(PROMPTS[:2], "cpu", 1, False)[0]
    with torch.no_grad():
        return pipeline.unet(x_t, torch.tensor([100, 700]), embeds).sample


def original_unet(state: dict, per_block: int) -> dict:
    """Keys of the original layout: `input_blocks.N.M`, `middle_block.N`, `output_blocks.N.M`."""
    names = DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"]
    resnet = [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3")]
    resnet += [("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection")]
    attended = {key.rsplit(".attentions", 1)[0] for key in state if ".attentions." in key}
    renamed = {}
    for key, value in state.items():
        if key in names:
            renamed[names[key]] = value
            continue
        side, *rest = key.split(".")
        if side == "mid_block":
            kind, index, *rest = rest
            new = f"middle_block.{2 * int(index) + (kind == 'attentions')}"
        else:
            block, kind, index, *rest = rest
            size, start, name = (per_block, 1, "input") if side == "down_blocks" else (per_block + 1, 0, "output")
            place = int(block) * (per_block + 1) + start
            if kind in ("resnets", "attentions"):
                new = f"{name}_blocks.{place + int(index)}.{int(kind == 'attentions')}"
            elif kind == "downsamplers":
                new, rest = f"input_blocks.{place + size}.0.op", rest[1:]
            else:
                new = f"output_blocks.{place + size - 1}.{1 + (f'{side}.{block}' in attended)}"
        rest = ".".join(rest)
        if ".resnets." in key:
            for ours, theirs in resnet:
                rest = rest.replace(ours, theirs)
        renamed[f"{new}.{rest}"] = value
    return renamed


def original_vae(state: dict, num_blocks: int) -> dict:
    renamed = {}
    for key, value in state.items():
        new = DIFFUSERS_TO_LDM_MAPPING["vae"].get(key, key).replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.", lambda found: f"up.{num_blocks - 1 - int(found[1])}.", new)
        new = new.replace(".resnets.", ".block.") if new.startswith("decoder.up") else new
        new = new.replace("upsamplers.0", "upsample")
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", new)
        if "mid_block.attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            new = new.replace("to_out.0", "proj_out")
            new = re.sub(r"to_([qkv])\.", r"\1.", new)
            value = value[:, :, None, None] if new.endswith("weight") and value.dim() == 2 else value
        renamed[new] = value
    return renamed


def save_single_file(pipeline, file):
    """As Stable Diffusion 1's own code saves it, in half precision."""
    unet = original_unet(pipeline.unet.state_dict(), pipeline.unet.config.layers_per_block)
    vae = original_vae(pipeline.vae.state_dict(), len(pipeline.vae.config.down_block_types))
    clip = {
        f"text_model.{key.removeprefix('text_model.')}": v for key, v in pipeline.text_encoder.state_dict().items()
    }
    state = {f"model.diffusion_model.{key}": value for key, value in unet.items()}
    state |= {f"first_stage_model.{key}": value for key, value in vae.items()}
    state |= {f"cond_stage_model.transformer.{key}": value for key, value in clip.items()}
    save_file({key: value.half().contiguous() for key, value in state.items()}, file)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The same pipeline in half precision: a plain folder, a folder of the variant alone, a single file, a config."""
    folder = tmp_path_factory.mktemp("bases")
    pipeline = make_tiny_pipeline()
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())
    pipeline.save_pretrained(folder / "plain")
    pipeline.save_pretrained(folder / "variant", variant="fp16")
    save_single_file(pipeline, folder / "one.safetensors")
    pipeline.save_pretrained(folder / "config")
    for file in (folder / "config").rglob("*.safetensors"):
        file.unlink()
    return folder


def test_a_variant_alone(bases, tmp_path):
    for load in (
        lambda: load_pipeline(bases / "variant", torch.float32),
        lambda: make_trainer(tmp_path, pipeline=str(bases / "variant")),
        lambda: load_pipeline(bases / "variant", torch.float32, variant="bf16"),
    ):
        with pytest.raises(OSError, match=r"holds weights of the variant fp16 alone.*: give `--variant fp16`"):
            load()
    with pytest.raises(OSError, match="no such modeling files are available"):  # diffusers' own words, and no advice
        load_pipeline(bases / "plain", torch.float32, variant="fp16")
    with pytest.raises(OSError, match="`single_file_config` is for a single .safetensors file"):
        load_pipeline(bases / "plain", torch.float32, single_file_config="x")
    pipeline = load_pipeline(bases / "variant", torch.float32, variant="fp16")
    assert pipeline.unet.dtype == torch.float32
    assert torch.equal(denoise(pipeline), denoise(DiffusionPipeline.from_pretrained(bases / "plain")))


def test_a_single_file_is_the_folder_it_was_made_from(bases):
    pipeline = load_pipeline(bases / "one.safetensors", torch.float32, single_file_config=bases / "config")
    plain = DiffusionPipeline.from_pretrained(bases / "plain")
    assert type(pipeline) is StableDiffusionPipeline and pipeline.scheduler.config == plain.scheduler.config
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(pipeline, name).state_dict(), getattr(plain, name).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(denoise(pipeline), denoise(plain))


def test_what_is_said_of_a_single_file_that_cannot_be_loaded(bases, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match=r"of the kind 'v1', and the configuration of 'stable-diff.*--single_file_config FOLDER"
    ):
        make_trainer(tmp_path, pipeline=str(bases / "one.safetensors"))
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((bases / "one.safetensors").read_bytes()[:-50])
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1)}, lora)
    (tmp_path / "old.ckpt").write_bytes(b"x")
    for file, message in (
        (tmp_path / "none.safetensors", "there is no file"),
        (torn, "not a whole .safetensors file"),
        (lora, ""),
        (tmp_path / "old.ckpt", "a .ckpt file is not loaded, since it may run code of its own"),
    ):
        config = bases / "config" if file == lora else None
        with pytest.raises(OSError, match=f"`sd_pipeline` '{file}' cannot be loaded.*{message}"):
            load_pipeline(file, torch.float32, single_file_config=config)
    with pytest.raises(OSError, match="`variant` chooses among the files of a folder"):
        load_pipeline(bases / "one.safetensors", torch.float32, variant="fp16")
    with pytest.raises(ValueError, match="A single file cannot be loaded in 8 or 4 bits"):
        load_pipeline(bases / "one.safetensors", torch.float32, 8)
    main = load_script("examples/train_gndm.py").main
    with pytest.raises(ValueError, match="give it too"):
        main(["--output_dir", str(tmp_path / "run"), "--variant", "fp16"])


@pytest.mark.parametrize("kind", ["variant", "single file"])
def test_a_run_of_the_script_its_card_its_export_and_its_page(bases, tmp_path, kind):
    """The card's code, which is plain diffusers, draws the trainer's sample; so does what is exported."""
    base, option = (bases / "variant", ["--variant", "fp16"])
    if kind == "single file":
        base, option = bases / "one.safetensors", ["--single_file_config", str(bases / "config")]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ["--output_dir", str(tmp_path / "run"), "--model_name_or_path", str(base), *option]
    main, trainers = load_script("examples/train_gndm.py"), []
    made = main.RdmDistillTrainer
    main.RdmDistillTrainer = lambda *args, **kwargs: trainers.append(made(*args, **kwargs)) or trainers[0]
    main.main([*arguments, *SHORT, "--learning_rate", "0.05", "--dataset_name", str(tmp_path / "prompts.txt")])
    trainer = trainers[0]
    settings = json.loads((tmp_path / "run" / "metrics.json").read_text())["settings"]
    assert settings["base_model"] == str(base) and settings[option[0][2:]] == option[1]
    ours = rollout_of(trainer, CASES["sd_epsilon"], PROMPTS[0], "ema")
    torch.testing.assert_close(ours, run_card(tmp_path / "run" / "README.md"), atol=1e-5, rtol=1e-5)
    exported = DiffusionPipeline.from_pretrained(export(tmp_path / "run", tmp_path / "whole", "diffusers"))
    with trainer.model.use("ema"):
        expected = denoise(trainer.sd_pipeline)
    torch.testing.assert_close(denoise(exported), expected, atol=1e-5, rtol=1e-4)
    assert (expected - denoise(read_pipeline(bases / "plain"))).abs().max() > 1e-3
    # The demo's page is plain diffusers too.
    pytest.importorskip("gradio", reason='needs gradio: pip install "rdm_trl[demo]"')
    app = runpy.run_path(str(export_space(tmp_path / "run", tmp_path / "space") / "app.py"), run_name="space")
    app["draw"]("student", "a bag", 0)
    app["set_lora"]("student", 0.0)
    torch.testing.assert_close(denoise(app["pipe"]), denoise(read_pipeline(bases / "plain")))


def test_the_planner_reads_a_single_files_configuration(bases, capsys):
    arguments = ["plan", "--gpu-memory", "8", "--model"]
    config = ["--single-file-config", str(bases / "config")]
    cli.main([*arguments, str(bases / "one.safetensors"), *config])
    ours = capsys.readouterr().out
    cli.main([*arguments, str(bases / "plain")])
    assert ours == capsys.readouterr().out and "GiB" in ours
