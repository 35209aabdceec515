# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What a distilled checkpoint is: LoRA, scheduler, figures, and a card that says how to use it and how it was made."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from ..config import RdmDistillConfig
from ..evaluation import peak_memory_mb
from ..models.pipelines.loading import Base, is_single_file
from ..prompts import split_rows
from .pictures import card_picture, format_seconds, read_grid, student_seconds


CARD = """---
{{ card_data }}
---

# {{ name }}: {{ num_steps }}-step {{ kind }} for {{ base_name }}

A {{ kind }} that lets {{ base_name }} draw {{ drawn }} in {{ num_steps }} unguided denoising steps instead of
{{ settings.teacher_num_steps }} guided ones. It was distilled with [rdm_trl](https://huggingface.co/papers/2603.28460):
{{ method }}.
{% if picture %}
![teacher and student on the same prompts, with steps and seconds]({{ picture }})
{% endif %}{% if report %}
How the run went, on one page: [report.html]({{ report }}).
{% endif %}
```python
import torch
from diffusers import {{ pipeline_class }}, {{ scheduler_class }}
{{ lora_import }}{{ base_import }}{{ show_import }}
pipe = {{ pipeline_class }}.{{ loader }}({{ base }}, dtype=torch.float32)
{{ load_lora }}
pipe.scheduler = {{ scheduler_class }}.from_pretrained({{ repo }}, subfolder="scheduler")
{{ show }}
```

The scheduler is part of the model: with another one the student was never trained. Its timesteps are {{ timesteps }}.
{{ note }}{% if table %}
## Figures

{{ table }}

{{ figures_note }}
{% endif %}{% if grid %}
![teacher, base and student]({{ grid }})
{% endif %}{% if animation %}
![the same as videos]({{ animation }})
{% endif %}
## Settings

<details><summary>All that is needed to repeat the run</summary>

| setting | value |
|---|---|
{% for key, value in settings.items() -%}
| `{{ key }}` | `{{ value | string | replace("|", "\\|") }}` |
{% endfor %}
</details>

The licence of {{ base_name }} holds for what is made with it, this {{ kind }} included.

## Citation

```bibtex
@article{fan2026rdm,
    title={R_dm: Re-conceptualizing Distribution Matching as a Reward for Diffusion Distillation},
    author={Linqian Fan and Peiqin Sun and Tiancheng Wen and Shun Lu and Chengru Song},
    journal={arXiv preprint arXiv:2603.28460},
    year={2026}
}
```
"""

METHODS = {
    "group": "GNDM, distribution matching normalised by group statistics (our reconstruction of the paper's method)",
    "sample": "DMD, distribution matching normalised by each image",
    "batch": "distribution matching normalised by batch statistics",
    "none": "distribution matching without normalisation",
}


# Options of `TrainingArguments` that a run's result depends on, beside those that our config defines itself.
TRAINING_SETTINGS = (
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "bf16",
    "seed",
)


def run_settings(trainer) -> dict[str, Any]:
    """All that is needed to repeat a run: our options, those of `Trainer` that matter, the LoRA's, the rewards."""
    config, lora_config = trainer.args, trainer.model.lora_config
    ours = [name for name in RdmDistillConfig.__annotations__ if name not in ("report_to", "remove_unused_columns")]
    settings = {name: getattr(config, name) for name in (*ours, *TRAINING_SETTINGS)}
    settings = {name: str(v.value) if hasattr(v, "value") else v for name, v in settings.items()}
    settings["num_teacher_images"] *= trainer.absorbs_guidance  # a pipeline may have none
    if not config.learn_target:  # as in a checkpoint of before it
        del settings["learn_target"]
    if any(weight != 1 for weight in trainer.rewards.weights):  # by default too, which was 1 once
        settings["reward_weights"] = trainer.rewards.weights
    lora = {}
    if lora_config is not None:
        layers = lora_config.target_modules
        lora = {"lora_r": lora_config.r, "lora_alpha": lora_config.lora_alpha}
        lora["lora_target_modules"] = layers if isinstance(layers, str) else sorted(layers)
    return {
        "base_model": "rdm_trl.demo" if trainer.is_demo else trainer.base_model,
        "variant": trainer.variant,
        "single_file_config": trainer.single_file_config,
        "teacher_lora": trainer.teacher_lora,
        "student_lora": trainer.student_lora,
        "num_processes": config.world_size,
        **settings,
        "reward_funcs": trainer.rewards.names,
        "full_finetuning": lora_config is None,
        # No option, but a run of before it would not go on as it was.
        **({"mirrors_noise": True} if config.mirrors_noise else {}),
        **lora,
    }


def write_metrics(trainer, folder: Path):
    """`metrics.json` of a checkpoint: figures, settings and cost so far."""
    trainer.cost |= {"updates": trainer.state.global_step, "peak_memory_mb": peak_memory_mb()}
    pipeline = type(trainer.family.pipeline).__name__  # whose layers' names an export may have to translate
    metrics = {**trainer.metrics, "pipeline": pipeline, "settings": trainer.settings(), "cost": trainer.cost}
    folder.mkdir(parents=True, exist_ok=True)
    # NumPy's numbers count as numbers.
    text = json.dumps(metrics, indent=2, default=lambda value: value.item())
    (folder / "metrics.json").write_text(text + "\n")


def save_checkpoint(trainer, folder: Path):
    """A distilled checkpoint; in the output folder its card is the Hub's, where there is a repository."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer.model.save(trainer.family, folder)
    trainer.student_scheduler.save_pretrained(folder / "scheduler")
    write_metrics(trainer, folder)
    for name in ("grid.png", "grid.webp"):
        grid = Path(trainer.args.output_dir) / "samples" / name
        if grid.exists() and not (folder / "samples" / name).exists():
            (folder / "samples").mkdir(exist_ok=True)
            shutil.copy(grid, folder / "samples" / name)
    write_card(trainer, folder, trainer.hub_model_id if folder == Path(trainer.args.output_dir) else None)


def base_licence(base: str) -> dict[str, str]:
    """What the base's own card says of its licence, if that card is in its folder or in the Hub's cache."""
    if Path(base).is_file():
        return {}
    readme = Path(base) / "README.md" if Path(base).is_dir() else try_to_load_from_cache(base, "README.md")
    if not isinstance(readme, (str, Path)) or not Path(readme).is_file():
        return {}
    card = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    return {key: card[key] for key in ("license", "license_name", "license_link") if key in card}


def figures_table(metrics: dict, names: Iterable[str] = ("teacher", "base", "student")) -> str:
    """Markdown table of `metrics.json`'s figures, a row for each of `names` that has them."""
    rows = {name: metrics[name] for name in names if name in metrics}
    flat = {
        name: {**{k: v for k, v in row.items() if k != "rewards"}, **row.get("rewards", {})}
        for name, row in rows.items()
    }
    keys = list(dict.fromkeys(key for row in flat.values() for key in row))
    lines = ["| | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, row in flat.items():
        cells = [f"{row[key]:.4g}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_card_picture(folder: Path, seconds: dict[str, float], is_lora: bool, each: str = "an image") -> str:
    """
    `samples/card.png` from the folder's grid, whose `seconds` are of `each`; its path in the folder, or nothing where
    there is no grid.
    """
    grid = read_grid(folder / "samples" / "grid.png")
    if grid is None:
        return ""
    below = {"teacher": seconds.get("teacher"), "student": student_seconds(seconds, is_lora)}
    below = {who: f"{format_seconds(value)} {each}" for who, value in below.items() if value}
    if is_lora and "student" in below:
        below["student"] += ", LoRA fused"
    card_picture(grid[0], below).save(folder / "samples" / "card.png")
    return "samples/card.png"


def write_card(
    trainer,
    folder: Path,
    repo: str | None = None,
    name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
):
    """
    `README.md` of a checkpoint.

    Args:
        repo (`str`, *optional*): where its code finds the checkpoint: a Hub id; by default `folder`.
        name (`str`, *optional*): in its heading; the repository's or folder's by default.
        dataset_name (`str` or `list[str]`, *optional*): Hub ids of the prompts' data sets.
        tags (`str` or `list[str]`, *optional*): beside the trainer's own.
    """
    settings, metrics, family = trainer.settings(), trainer.metrics, trainer.family
    drawn = "an image" if family.num_frames is None else "a video"
    seconds = trainer.cost.get("seconds_per_image", {})
    picture = write_card_picture(folder, seconds, trainer.model.kind == "LoRA", drawn)
    base = None if trainer.is_demo else trainer.base_model
    repo = repo or str(folder.absolute())
    kind = trainer.model.kind
    lora_import, load_lora = trainer.model.load_code(family, repo)
    own_tags = [tag for tag in trainer._tag_names if tag != "lora" or kind == "LoRA"]
    method = METHODS[settings["dm_normalization"]]
    if settings["dm_normalization_level"] == "element":
        method += ", with a scale for each element of the latents"
    if settings["reward_funcs"]:
        names = ", ".join(f"`{reward}`" for reward in settings["reward_funcs"])
        method += f"; with the rewards {names} (`reward_mixing={settings['reward_mixing']!r}`)"
    if trainer.absorbs_guidance:
        method += f"; guidance was absorbed from {settings['num_teacher_images']} images of the guided teacher"
        if trainer.target is not None and len(trainer.target) > 1:
            method += ", with a look at where its sampler goes"
        if trainer.learned_target is not None:
            method += ", and an adapter learned how those of one prompt differ"
    if trainer.teacher_lora is not None:
        method += f". Its teacher was the base with the LoRA `{trainer.teacher_lora}`, whose style it carries"
    on_hub = base is not None and not Path(base).exists()  # the Hub accepts no path
    loading = Base(base or "path/of/the/base", trainer.variant, trainer.single_file_config)
    loader, base_code = ("from_pretrained", "DEMO_PIPELINE") if trainer.is_demo else loading.code(family.absent_code())
    (prompt,), _ = split_rows([trainer.train_dataset[0]], family)
    base_name = "rdm_trl's embedded Fashion-MNIST pipeline" if trainer.is_demo else base or "a pipeline of its own"
    card = ModelCard.from_template(
        ModelCardData(
            base_model=base if on_hub else None,
            base_model_relation=("adapter" if kind == "LoRA" else "finetune") if on_hub else None,
            library_name="diffusers",
            pipeline_tag=family.pipeline_tag,
            datasets=dataset_name,
            tags=[family.pipeline_tag, *own_tags, *([tags] if isinstance(tags, str) else tags or [])],
            **(base_licence(base) if base else {}),
        ),
        template_str=CARD,
        kind=kind,
        name=name or repo.split("/")[-1],
        repo=repr(repo),
        loader=loader,
        base=base_code,
        base_name=base_name,
        base_import="from rdm_trl.demo import DEMO_PIPELINE  # a path\n" if trainer.is_demo else "",
        pipeline_class=type(family.pipeline).__name__ if is_single_file(base) else family.card_class,
        scheduler_class=type(family.student_scheduler).__name__,
        timesteps=family.student_scheduler.timesteps.tolist(),
        lora_import=lora_import,
        load_lora=load_lora,
        show_import=family.show_import,
        show=family.show_code(family.call_code(prompt, settings["sample_num_steps"])),
        drawn=drawn,
        num_steps=settings["sample_num_steps"],
        note=family.card_note,
        picture=picture,
        report="report.html" if (folder / "report.html").exists() else "",
        method=method,
        settings=settings,
        table=figures_table(metrics) if "student" in metrics else "",
        figures_note=metrics.get("note", ""),
        grid="samples/grid.png" if (folder / "samples" / "grid.png").exists() else "",
        animation="samples/grid.webp" if (folder / "samples" / "grid.webp").exists() else "",
    )
    card.save(folder / "README.md")
