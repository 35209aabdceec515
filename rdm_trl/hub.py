# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What a distilled checkpoint is, beside its LoRA: a model card that says how to use it and how it was made."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig

from .config import RdmDistillConfig


CARD = """---
{{ card_data }}
---

# {{ name }}: {{ num_steps }}-step LoRA for {{ base_name }}

A LoRA that lets {{ base_name }} draw an image in {{ num_steps }} unguided denoising steps instead of
{{ settings.teacher_num_steps }} guided ones. It was distilled with [rdm_trl](https://huggingface.co/papers/2603.28460):
{{ method }}.

```python
import torch
from diffusers import DiffusionPipeline, {{ scheduler_class }}
{{ base_import }}
pipe = DiffusionPipeline.from_pretrained({{ base }}, dtype=torch.float32)
pipe.load_lora_weights({{ repo }})
pipe.scheduler = {{ scheduler_class }}.from_pretrained({{ repo }}, subfolder="scheduler")
image = pipe({{ prompt }}, num_inference_steps={{ num_steps }}, guidance_scale=1.0).images[0]
image.save("image.png")
```

The scheduler is part of the model: with another one the student was never trained. Its timesteps are {{ timesteps }}.
{% if table %}
## Figures

{{ table }}

{{ figures_note }}
{% endif %}
![teacher, base and student]({{ grid }})

## Settings

| setting | value |
|---|---|
{% for key, value in settings.items() -%}
| `{{ key }}` | `{{ value }}` |
{% endfor %}
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


def run_settings(
    config: RdmDistillConfig, base_model: str, lora_config: LoraConfig, rewards: list[str]
) -> dict[str, Any]:
    """All that is needed to repeat a run: our options, those of `Trainer` that matter, the LoRA's, the rewards."""
    ours = [name for name in RdmDistillConfig.__annotations__ if name not in ("report_to", "remove_unused_columns")]
    settings = {name: getattr(config, name) for name in (*ours, *TRAINING_SETTINGS)}
    settings = {name: str(v.value) if hasattr(v, "value") else v for name, v in settings.items()}
    settings["reward_funcs"] = rewards
    lora = {"lora_r": lora_config.r, "lora_alpha": lora_config.lora_alpha}
    return {"base_model": base_model, "num_processes": config.world_size, **settings, **lora}


def write_metrics(folder: Path, metrics: dict[str, Any]):
    """`metrics.json` of a checkpoint: figures, settings and cost."""
    folder.mkdir(parents=True, exist_ok=True)
    # NumPy's numbers count as numbers.
    text = json.dumps(metrics, indent=2, default=lambda value: value.item())
    (folder / "metrics.json").write_text(text + "\n")


def figures_table(metrics: dict) -> str:
    """Markdown table of `metrics.json`'s figures, a row for each of teacher, base and student."""
    rows = {name: metrics[name] for name in ("teacher", "base", "student") if name in metrics}
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


def model_card(
    name: str, repo: str, base: str | None, prompt: str, scheduler, settings: dict, metrics: dict, tags: list[str]
) -> ModelCard:
    """
    Args:
        repo (`str`): where `load_lora_weights` finds the checkpoint: a Hub id or a folder.
        base (`str`, *optional*): path or Hub id of the base pipeline; `None` for the embedded one.
        scheduler: the student's, with its timesteps set.
    """
    method = METHODS[settings["dm_normalization"]]
    if settings["reward_funcs"]:
        names = ", ".join(f"`{reward}`" for reward in settings["reward_funcs"])
        method += f"; with the rewards {names} (`reward_mixing={settings['reward_mixing']!r}`)"
    return ModelCard.from_template(
        ModelCardData(
            base_model=base,
            library_name="diffusers",
            pipeline_tag="text-to-image",
            tags=tags,
        ),
        template_str=CARD,
        name=name,
        repo=repr(repo),
        base=repr(base) if base else "DEMO_PIPELINE",
        base_name=base or "rdm_trl's embedded Fashion-MNIST pipeline",
        base_import="" if base else "from rdm_trl.demo import DEMO_PIPELINE  # a path\n",
        scheduler_class=type(scheduler).__name__,
        timesteps=scheduler.timesteps.tolist(),
        num_steps=settings["sample_num_steps"],
        prompt=repr(prompt),
        method=method,
        settings=settings,
        table=figures_table(metrics) if "student" in metrics else "",
        figures_note=metrics.get("note", ""),
        grid="samples/grid.png",
    )
