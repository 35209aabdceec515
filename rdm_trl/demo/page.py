# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""A page to try a finished run on, as a folder that is a Space of the Hub: plain diffusers, none of our code."""

import importlib.metadata
import json
import os
import runpy
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from diffusers.loaders.lora_base import LoraBaseMixin
from huggingface_hub import ModelCard, SpaceCardData

from ..models.pipelines import base_in, family_of
from ..models.pipelines.loading import is_single_file
from ..plan import load_without_weights
from ..saving.export import WEIGHTS
from ..saving.hub import base_licence
from ..saving.pictures import read_grid
from . import DEMO_PIPELINE, DEMO_PROMPTS


APP = Path(__file__).with_name("space") / "app.py"
NEEDS = 'The demo needs gradio: `pip install "rdm_trl[demo]"`.'
REQUIREMENTS = "torch diffusers>=0.42 transformers accelerate peft safetensors sentencepiece gradio>=6".split()


def describe(checkpoint: Path, base: str | None = None) -> dict:
    """
    What `app.py` has to know of a checkpoint: its `demo.json`. Only the base's configuration is read.

    Raises:
        ValueError: `checkpoint` is none, or its pipeline takes no prompt, draws videos or takes images.
    """
    try:
        settings = json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8"))["settings"]
        scheduler = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint} is not a finished run of `RdmDistillTrainer`: {error}") from error
    loading = base_in(settings) if base is None else {**base_in({}), "base_model": base}
    base, config = loading["base_model"], loading["single_file_config"]
    pipeline = load_without_weights(DEMO_PIPELINE if base == "rdm_trl.demo" else base, single_file_config=config)
    size = settings["sample_height"], settings["sample_width"], settings.get("sample_num_frames")
    family = family_of(pipeline, *size, settings.get("max_sequence_length"))
    if family.num_frames is not None:
        raise ValueError(f"{type(pipeline).__name__} draws videos, and the demo is one of images.")
    if family.takes_image:
        raise ValueError(f"{type(pipeline).__name__} takes images, and the demo is one of prompts alone.")
    family.make_student_scheduler(
        settings["sample_num_steps"], settings["sample_sigmas"], settings["sample_timesteps"]
    )

    def arguments(guidance_scale: float) -> dict:
        given = family.call_arguments(["a"], guidance_scale, settings.get("negative_prompts") or "")
        if "prompt" not in given:
            raise ValueError(f"{type(pipeline).__name__} takes no prompt, and the demo is one of prompts.")
        del given["prompt"]
        return {name: value[0] if isinstance(value, list) else value for name, value in given.items()}

    found = [name for name in WEIGHTS if (checkpoint / name).is_file()]
    if not found and not (checkpoint / family.denoiser_name / "config.json").is_file():
        raise ValueError(f"{checkpoint} holds no student: save it by `trainer.save_model()`.")
    optional = pipeline._optional_components
    grid = read_grid(checkpoint / "samples" / "grid.png")
    prompts = grid[1] if grid is not None else DEMO_PROMPTS[::6] if base == "rdm_trl.demo" else ["a photo of a cat"]
    return {
        "title": f"{checkpoint.resolve().name}: {settings['sample_num_steps']} steps",
        "base": base,
        "single_file_class": type(pipeline).__name__ if is_single_file(base) else None,
        "config": config and str(Path(config).resolve() if Path(config).exists() else config),
        "variant": loading["variant"],
        "absent": [name for name, part in pipeline.components.items() if part is None and name not in optional],
        "denoiser": family.denoiser_name,
        "kind": "network" if not found else "lora" if isinstance(pipeline, LoraBaseMixin) else "peft",
        "teacher_lora": settings.get("teacher_lora"),
        "scheduler": scheduler,
        "bf16": bool(settings.get("bf16")),
        "num_steps": settings["sample_num_steps"],
        "teacher_num_steps": settings["teacher_num_steps"],
        "arguments": arguments(family.student_guidance_scale),
        "teacher_arguments": arguments(settings["teacher_guidance_scale"]),
        "grid": family.student_grid,
        "prompts": prompts[:8],
    }


def export_space(checkpoint: str | Path, output_dir: str | Path, base: str | None = None) -> Path:
    """
    Writes a Space of a finished run: `app.py`, `requirements.txt`, `README.md` with its header, the student, and the
    embedded pipeline where that is the base.

    Args:
        base (`str`, *optional*): path or Hub id of the base pipeline; by default the run's.

    Raises:
        ValueError: `checkpoint` is no finished run, or its pipeline takes no prompt.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    demo = describe(checkpoint, base)
    output_dir.mkdir(parents=True, exist_ok=True)
    student = output_dir / "student"
    student.mkdir(exist_ok=True)
    for name in (*WEIGHTS, "adapter_config.json"):
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, student / name)
    for name in ("scheduler", *([demo["denoiser"]] if demo["kind"] == "network" else [])):
        shutil.copytree(checkpoint / name, student / name, dirs_exist_ok=True)
    if demo["teacher_lora"] and Path(demo["teacher_lora"]).exists():
        copy_lora(Path(demo["teacher_lora"]), output_dir / "teacher")
        demo["teacher_lora"] = "teacher"
    on_hub = not Path(demo["base"]).exists()
    note = ""
    if demo["base"] == "rdm_trl.demo":
        shutil.copytree(DEMO_PIPELINE, output_dir / "base", dirs_exist_ok=True)
        demo["base"], on_hub = "base", False
    elif not on_hub:
        demo["base"] = str(Path(demo["base"]).resolve())
        note = "Its base is a folder of the machine that wrote this: upload it, and write its id into `demo.json`.\n"
    (output_dir / "demo.json").write_text(json.dumps(demo, indent=2) + "\n", encoding="utf-8")
    (output_dir / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")
    shutil.copy(APP, output_dir / "app.py")
    header = SpaceCardData(
        title=demo["title"],
        sdk="gradio",
        sdk_version=importlib.metadata.version("gradio") if is_demo_available() else "6.0.0",
        app_file="app.py",
        emoji="⚡",
        colorFrom="indigo",
        colorTo="purple",
        pinned=False,
        models=[demo["base"]] if on_hub else None,
        **base_licence(demo["base"]),
    )
    text = (
        f"A student of {demo['num_steps']} steps beside its teacher of {demo['teacher_num_steps']}, by plain "
        f"diffusers. `pip install -r requirements.txt && python app.py` runs it anywhere.\n{note}"
    )
    ModelCard(f"---\n{header}\n---\n\n# {demo['title']}\n\n{text}").save(output_dir / "README.md")
    return output_dir


def copy_lora(path: Path, folder: Path):
    """The files of a LoRA that is a folder or one file."""
    folder.mkdir(exist_ok=True)
    found = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("adapter_config.json")]
    for file in found:
        shutil.copy(file, folder / (WEIGHTS[0] if path.is_file() else file.name))


def is_demo_available() -> bool:
    return find_spec("gradio") is not None


def run_demo(checkpoint: str | Path, base: str | None = None, port: int | None = None, share: bool = False):
    """
    Serves the page until it is interrupted.

    Raises:
        ImportError: gradio is missing.
        ValueError: as `export_space`.
    """
    if not is_demo_available():
        raise ImportError(NEEDS)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    if port is not None:
        os.environ["GRADIO_SERVER_PORT"] = str(port)
    if share:
        os.environ["GRADIO_SHARE"] = "True"
    with tempfile.TemporaryDirectory() as folder:
        runpy.run_path(str(export_space(checkpoint, folder, base) / "app.py"), run_name="__main__")
