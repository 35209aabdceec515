# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""How a run went, on one page that needs no server and no network; or several runs, side by side."""

import base64
import io
import json
import math
import re
import shlex
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, Template
from PIL import Image
from transformers.trainer import TRAINER_STATE_NAME

from ..config import RdmDistillConfig
from ..guardrails import GUARDRAILS, drift_warnings
from ..models.pipelines import Base
from .pictures import format_seconds, read_grid, student_seconds


PLOTLY = '<script id="plotly"></script>'  # where the template leaves room for it
REPORT_NEEDS = 'The report needs plotly: `pip install "rdm_trl[report]"`.'
TEMPLATE = Path(__file__).with_name("report_template.html")
# Of all pictures, as they stand in the page; plotly itself takes 5 MB, and 15 are allowed.
PICTURE_BYTES = 8 * 2**20
MOST_STEPS, MOST_POINTS, MOST_ON_PATH, LARGEST = 24, 600, 40, 256
WHO = ("teacher", "base", "student")
# What figures are called, and whether a higher one is better (None: near the teacher's).
FIGURES = {
    "fid": ("FID", False),
    "fid_teacher": ("FID to teacher", False),
    "class_accuracy": ("Class accuracy", True),
    "diversity": ("Diversity", None),
}


@dataclass
class Run:
    """
    What a folder says of its run; whatever is missing or cannot be read is empty, and `problems` says so.

    Args:
        name: to tell it from others by.
        metrics: of `metrics.json`.
        history: rows of the logs.
        state: the rest of `trainer_state.json`.
        grids: by step, the columns and prompts of a sample grid, or the whole picture of one without a layout.
        problems: in words.
    """

    name: str
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    grids: dict[int, tuple[dict[str, list[list[Image.Image]]], list[str]] | Image.Image] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        return table_of(self.metrics.get("settings"))

    @property
    def cost(self) -> dict[str, Any]:
        return table_of(self.metrics.get("cost"))


def table_of(value: Any) -> dict[str, Any]:
    """`value`, if it is a table."""
    return value if isinstance(value, dict) else {}


def number_of(value: Any) -> float | None:
    """`value`, if it is a finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def is_report_available() -> bool:
    return find_spec("plotly") is not None


# ---------------------------------------------------------------------------------------------------------------- read


def read_json(file: Path, problems: list[str]) -> dict[str, Any]:
    """A table, or nothing and a line in `problems`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        problems.append(f"{file.name} is not what a run writes.")
    except FileNotFoundError:
        problems.append(f"There is no {file.name}.")
    except (OSError, ValueError):
        problems.append(f"{file.name} cannot be read: it was cut off, or belongs to another program.")
    return {}


def read_run(folder: str | Path, most_steps: int = MOST_STEPS) -> Run:
    """The run of an output folder, of a checkpoint of one, or of one that was cut off."""
    folder = Path(folder)
    run = Run(folder.resolve().name)
    run.metrics = read_json(folder / "metrics.json", run.problems)
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int((re.findall(r"\d+$", path.name) or [0])[0]))
    # A run that was killed leaves its logs in its newest checkpoint only, and one that goes on writes the folder's.
    files = [folder / TRAINER_STATE_NAME, *(checkpoint / TRAINER_STATE_NAME for checkpoint in checkpoints)]
    states = [read_json(file, run.problems) for file in files if file.exists()]
    run.state = max(states, key=lambda state: number_of(state.get("global_step")) or 0, default={})
    if not states:
        run.problems.append(f"There is no {TRAINER_STATE_NAME}, which holds the logs.")
    rows = run.state.get("log_history")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    rows = [{key: number_of(value) for key, value in row.items()} for row in rows]
    run.history = [row for row in rows if row.get("step") is not None]

    found = {}
    for file in (folder / "samples").glob("step-*.png"):
        step = re.fullmatch(r"step-(\d+)", file.stem)
        if step:
            found[int(step[1])] = file
    steps = sorted(found)
    if len(steps) > most_steps:  # evenly, with the first and the last
        steps = sorted({steps[round(i * (len(steps) - 1) / (most_steps - 1))] for i in range(most_steps)})
    for step in steps:
        grid = read_grid(found[step])
        if grid is None:
            try:
                with Image.open(found[step]) as picture:
                    grid = picture.convert("RGB")
            except (OSError, SyntaxError, ValueError):
                run.problems.append(f"samples/{found[step].name} cannot be read.")
                continue
        run.grids[step] = grid
    if not run.grids:
        run.problems.append("There are no sample grids: `log_images_steps` asks for them.")
    return run


# --------------------------------------------------------------------------------------------------- pictures and data


def data_uri(image: Image.Image, width: int) -> str:
    """An image for an `<img>`, not wider than `width`."""
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=86)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def strip(images: list[Image.Image]) -> Image.Image:
    """Images beside each other, with a hair between them."""
    width = sum(image.width for image in images) + 2 * (len(images) - 1)
    picture = Image.new("RGB", (width, images[0].height), "gray")
    left = 0
    for image in images:
        picture.paste(image, (left, 0))
        left += image.width + 2
    return picture


def who_drew(title: str) -> str:
    return title.split(",")[0]


def samples_of(runs: list[Run], largest: int) -> dict[str, Any]:
    """
    The slider's data: for each prompt that all runs drew, the constant strips (teacher and base, of the first run)
    and each run's student at each of its steps. Runs whose grids have no layout are whole pictures by step.
    """
    taken_apart = [{s: grid for s, grid in run.grids.items() if not isinstance(grid, Image.Image)} for run in runs]
    data = {"prompts": [], "constant": [], "students": [], "wholes": [], "different": ""}
    with_layout = [grids for grids in taken_apart if grids]
    if with_layout:
        lasts = [grids[max(grids)] for grids in with_layout]
        prompts = [p for p in lasts[0][1] if all(p in others for _, others in lasts)]
        data["prompts"] = prompts
        if len({tuple(drawn) for _, drawn in lasts}) > 1:
            data["different"] = "The runs drew other prompts; those that all of them drew are shown."
        columns, drawn = lasts[0]
        each = len(columns[next(iter(columns))][0])
        width = each * largest
        for title in columns:
            if who_drew(title) != "student":
                strips = [data_uri(strip(columns[title][drawn.index(prompt)]), width) for prompt in prompts]
                data["constant"].append({"who": who_drew(title), "title": title, "strips": strips})
    for index, (run, grids) in enumerate(zip(runs, taken_apart, strict=True)):
        steps = {}
        for step, (columns, drawn) in grids.items():
            title = next((title for title in columns if who_drew(title) == "student"), None)
            if title is not None and all(prompt in drawn for prompt in data["prompts"]):
                rows = [columns[title][drawn.index(prompt)] for prompt in data["prompts"]]
                steps[step] = [data_uri(strip(row), len(row) * largest) for row in rows]
        if steps:
            title = title if title is not None else "student"
            data["students"].append({"run": run.name, "index": index, "title": title, "steps": steps})
        wholes = {step: data_uri(grid, 1600) for step, grid in run.grids.items() if isinstance(grid, Image.Image)}
        if wholes and not steps:
            data["wholes"].append({"run": run.name, "index": index, "steps": wholes})
    seeds = {str(run.settings.get("seed")) for run in runs}
    if len(seeds) > 1:
        data["different"] += " The runs have other seeds, so that their noise differs too."
    return data


def size_of(samples: dict[str, Any]) -> int:
    return len(json.dumps(samples))


def series(history: list[dict[str, Any]], key: str) -> tuple[list[float], list[float | None]]:
    """Steps and values of a logged figure, thinned to what a screen can show."""
    rows = [row for row in history if key in row]
    every = math.ceil(len(rows) / MOST_POINTS)
    # The last one of each bunch: the run's end must be there.
    rows = rows[::-1][:: max(every, 1)][::-1]
    return [row["step"] for row in rows], [row[key] for row in rows]


def curve_chart(runs: list[Run], key: str, title: str, hint: str, rail=None) -> dict[str, Any] | None:
    """A chart of one logged figure, a line for each run that has it; `None` where none has."""
    chart = {"key": key, "title": title, "hint": hint, "lines": [], "levels": []}
    for index, run in enumerate(runs):
        steps, values = series(run.history, key)
        if not any(value is not None for value in values):
            continue
        line = {"run": index, "x": steps, "y": values, "band": None, "warning": None}
        healthy = rail.healthy if rail is not None else None
        if key == "dm/kl" and number_of(run.settings.get("target_dm")) is not None:
            healthy = (0, number_of(run.settings["target_dm"]))
        if healthy is not None:
            first = next((value for value in values if value), None) if rail.relative else 1
            line["band"] = [first * healthy[0], first * healthy[1]] if first else None
        found = drift_warnings(run.history).get(key)
        if found is not None:
            line["warning"] = {"x": found[0]["step"], "y": found[0][key]}
        chart["lines"].append(line)
    return chart if chart["lines"] else None


def reward_names(runs: list[Run]) -> list[str]:
    names = [str(name) for run in runs for name in run.settings.get("reward_funcs") or []]
    return list(dict.fromkeys(names))


def guardrail_charts(runs: list[Run]) -> list[dict[str, Any]]:
    charts = [curve_chart(runs, rail.key, rail.title, rail.hint, rail) for rail in GUARDRAILS]
    for name in reward_names(runs):
        charts.append(curve_chart(runs, f"rewards/{name}/mean", f"Reward {name}", "Rises, then levels."))
        charts.append(curve_chart(runs, f"reward_weight/{name}", f"Weight of {name}", "Steady."))
    return [chart for chart in charts if chart is not None]


def evaluation_charts(runs: list[Run]) -> list[dict[str, Any]]:
    """The student's figures at each evaluation, with the teacher's and the base's as levels."""
    keys = [(name, FIGURES[name][0], direction(FIGURES[name][1])) for name in FIGURES]
    keys += [(name, f"Reward {name}", "Higher is better, at an equal distance.") for name in reward_names(runs)]
    charts = []
    for name, title, hint in keys:
        chart = curve_chart(runs, f"eval_{name}", title, hint)
        if chart is None:
            continue
        for who in ("teacher", "base"):
            level = flat(runs[0].metrics.get(who)).get(name)
            if level is not None:
                chart["levels"].append({"who": who, "y": level})
        charts.append(chart)
    return charts


def direction(higher: bool | None) -> str:
    return {True: "Higher is better.", False: "Lower is better.", None: "Best near the teacher's."}[higher]


def trade_charts(runs: list[Run]) -> list[dict[str, Any]]:
    """
    Reward against distance to the teacher, a path for each run: by evaluations where there are features, by the logs'
    running divergence where there are none.
    """
    charts = []
    for name in reward_names(runs):
        paths, source = [], "eval_fid_teacher"
        for x_key, y_key in (("eval_fid_teacher", f"eval_{name}"), ("dm/kl", f"rewards/{name}/mean")):
            if paths:
                break
            source = x_key
            for index, run in enumerate(runs):
                rows = [row for row in run.history if row.get(x_key) is not None and row.get(y_key) is not None]
                rows = rows[::-1][:: max(1, len(rows) // MOST_ON_PATH)][::-1]
                if rows:
                    path = {"run": index, "x": [r[x_key] for r in rows], "y": [r[y_key] for r in rows]}
                    paths.append({**path, "steps": [r["step"] for r in rows]})
        points = []
        if source == "eval_fid_teacher":
            for who in ("teacher", "base"):
                figures = flat(runs[0].metrics.get(who))
                x = 0.0 if who == "teacher" else figures.get("fid_teacher")
                if x is not None and figures.get(name) is not None:
                    points.append({"who": who, "x": x, "y": figures[name]})
        if paths:
            x_title = "FID to teacher" if source == "eval_fid_teacher" else "divergence from the teacher (dm/kl)"
            charts.append({"reward": name, "x_title": x_title, "paths": paths, "points": points})
    return charts


# --------------------------------------------------------------------------------------------------- tables and words


def flat(row: Any) -> dict[str, float]:
    """A row of `metrics.json` with its rewards beside its figures."""
    row = table_of(row)
    values = {**{key: value for key, value in row.items() if key != "rewards"}, **table_of(row.get("rewards"))}
    return {key: float(value) for key, value in values.items() if number_of(value) is not None}


def show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(show, value)) or "–"
    return "–" if value is None else str(value)


def figures_rows(runs: list[Run]) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """Head and rows of the table: teacher and base of the first run that has them, and every run's student."""
    rows = []
    for who in ("teacher", "base"):
        run = next((run for run in runs if flat(run.metrics.get(who))), None)
        if run is not None:
            rows.append((who, who, None, run))
    for index, run in enumerate(runs):
        if flat(run.metrics.get("student")):
            rows.append(("student", "student" if len(runs) == 1 else run.name, index, run))
    values = [flat(run.metrics.get(who)) for who, _, _, run in rows]
    keys = [key for key in FIGURES if any(key in row for row in values)]
    keys += list(dict.fromkeys(key for row in values for key in row if key not in FIGURES))
    head = [{"key": key, "title": FIGURES.get(key, (key,))[0]} for key in keys]
    for column in head:
        better = FIGURES.get(column["key"], (None, True))[1]
        column["arrow"] = {True: "↑", False: "↓", None: ""}[better]
    table = []
    for (who, title, index, run), row in zip(rows, values, strict=True):
        seconds, fused = seconds_of(run, who)
        steps = run.settings.get("teacher_num_steps" if who == "teacher" else "sample_num_steps")
        table.append(
            {
                "who": who,
                "title": title,
                "index": index,
                "steps": show(steps),
                "seconds": (format_seconds(seconds) + " fused" * fused) if seconds else "",
                "cells": [show(row[key]) if key in row else "" for key in keys],
            }
        )
    return head, table


LORA_OPTIONS = ("lora_r", "lora_alpha", "lora_target_modules")


def run_file(settings: dict[str, Any]) -> str:
    """The settings that are not the defaults, as a file for `--config` of `examples/train_gndm.py`."""
    known = RdmDistillConfig.__dataclass_fields__
    chosen = {}
    if settings.get("base_model") not in (None, "rdm_trl.demo"):
        chosen["model_name_or_path"] = settings["base_model"]
    for name, value in settings.items():
        if name in known:
            default = known[name].default
            if value != default and not (callable(known[name].default_factory) and value in (None, [], {})):
                chosen[name] = value
        elif name in (*Base._fields[1:], "teacher_lora", "student_lora", *LORA_OPTIONS) and value:
            if isinstance(value, list) or name != "lora_target_modules":
                chosen[name] = value
        elif name == "full_finetuning" and value:
            chosen[name] = True
    return yaml.safe_dump(json.loads(json.dumps(chosen, default=str)), sort_keys=False, allow_unicode=True)


def command_of(run: Run) -> str:
    processes = run.settings.get("num_processes") or 1
    launch = "accelerate launch" + (f" --num_processes {processes}" if processes != 1 else "")
    return f"{launch} examples/train_gndm.py --config run.yaml --output_dir {shlex.quote(run.name)}"


def cost_rows(run: Run) -> list[tuple[str, str]]:
    """What the run took, in words."""
    cost, names = run.cost, {"rollouts": "images drawn by the student", "teacher_evaluations": "teacher evaluations"}
    rows = [(show(cost["updates"]), "updates")] if number_of(cost.get("updates")) is not None else []
    for key, title in names.items():
        if number_of(cost.get(key)):
            rows.append((f"{cost[key]:,.0f}".replace(",", " "), title))
    if number_of(cost.get("teacher_images")):
        rows.append((f"{cost['teacher_images']:,.0f}".replace(",", " "), "images drawn by the guided teacher"))
    for key, title in (("seconds", "of training"), ("target_seconds", "to absorb guidance")):
        if number_of(cost.get(key)):
            rows.append((format_seconds(cost[key]), title))
    if number_of(cost.get("peak_memory_mb")):
        rows.append((f"{cost['peak_memory_mb'] / 1024:.2g} GiB", "peak memory"))
    return rows


def settings_rows(runs: list[Run]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, list[str]]]]:
    """Settings in which the runs differ, and the others."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = [(key, [show(run.settings.get(key)) for run in runs]) for key in keys]
    different = [row for row in rows if len(set(row[1])) > 1]
    return different, [row for row in rows if len(set(row[1])) == 1]


def seconds_of(run: Run, who: str) -> tuple[float | None, bool]:
    """What an image of `who` took, and whether that is with a fused LoRA."""
    seconds, fused = table_of(run.cost.get("seconds_per_image")), not run.settings.get("full_finetuning")
    if who != "student":
        return number_of(seconds.get(who)), False
    return number_of(student_seconds(seconds, fused)), fused


def tiles_of(run: Run) -> list[dict[str, str]]:
    """The run in four numbers."""
    tiles, figures = [], {who: flat(run.metrics.get(who)) for who in WHO}
    (fast, fused), (slow, _) = seconds_of(run, "student"), seconds_of(run, "teacher")
    if fast and slow:
        below = f"{format_seconds(fast)} an image{', LoRA fused' * fused}; the teacher {format_seconds(slow)}"
        tiles.append({"value": f"{slow / fast:.1f}×", "title": "faster than its teacher", "below": below})
    for key in ("fid_teacher", "fid", "class_accuracy"):
        value = figures["student"].get(key)
        if value is not None:
            others = [f"{who} {show(figures[who][key])}" for who in ("teacher", "base") if key in figures[who]]
            tiles.append({"value": f"{value:.3g}", "title": FIGURES[key][0], "below": ", ".join(others)})
    return tiles[:4]


def head_of(run: Run) -> dict[str, str]:
    """Title and the line below it."""
    settings, words = run.settings, []
    step, most = (number_of(run.state.get(key)) for key in ("global_step", "max_steps"))
    if settings.get("base_model"):
        base = settings["base_model"]
        words.append("the embedded Fashion-MNIST pipeline" if base == "rdm_trl.demo" else str(base))
    if settings.get("sample_num_steps"):
        words.append(f"{settings.get('teacher_num_steps')} → {settings['sample_num_steps']} steps")
    if settings.get("reward_funcs"):
        words.append("rewards: " + ", ".join(map(str, settings["reward_funcs"])))
    status = ""
    if step is not None and most:
        status = f"finished, {step:.0f} updates" if step >= most else f"update {step:.0f} of {most:.0f}"
    return {"line": " · ".join(words), "status": status, "done": "yes" if step is not None and step == most else ""}


def warnings_of(run: Run) -> list[dict[str, Any]]:
    found = drift_warnings(run.history)
    found = [{"key": key, "step": int(row["step"]), "text": text} for key, (row, text) in found.items()]
    return sorted(found, key=lambda warning: warning["step"])


# ---------------------------------------------------------------------------------------------------------------- page


def for_script(data: Any) -> str:
    """JSON that may stand in a `<script>`: whatever a prompt says, it ends no element there."""
    return json.dumps(data).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def template_and_plotly() -> tuple[Template, str]:
    """The page that is to be filled, and the script that draws in it."""
    from plotly.offline import get_plotlyjs

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")), get_plotlyjs()


def make_page(runs: list[Run]) -> str:
    """The page of one run, or of several side by side. Needs plotly."""
    largest = LARGEST
    samples = samples_of(runs, largest)
    while size_of(samples) > PICTURE_BYTES and largest > 32:
        largest //= 2
        samples = samples_of(runs, largest)
    head, table = figures_rows(runs)
    different, same = settings_rows(runs)
    data = {
        "runs": [run.name for run in runs],
        "samples": samples,
        "guardrails": guardrail_charts(runs),
        "evaluations": evaluation_charts(runs),
        "trades": trade_charts(runs),
    }
    template, plotly = template_and_plotly()
    page = template.render(
        title=" · ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
        runs=[
            {
                "name": run.name,
                **head_of(run),
                "tiles": tiles_of(run),
                "warnings": warnings_of(run),
                "problems": run.problems,
                "cost": cost_rows(run),
                "file": run_file(run.settings) if run.settings else "",
                "command": command_of(run),
                "is_demo": run.settings.get("base_model") == "rdm_trl.demo",
                "note": run.metrics.get("note") or "",
            }
            for run in runs
        ],
        head=head,
        table=table,
        samples=samples,
        guardrails=data["guardrails"],
        evaluations=data["evaluations"],
        trades=data["trades"],
        different=different,
        same=same,
        data=for_script(data),
    )
    # Behind the template, which would copy these 5 MB again and again; nothing that it escapes looks like this mark.
    return page.replace(PLOTLY, f"<script>{plotly}</script>", 1)


def write_report(folders: list[str | Path], output: str | Path | None = None) -> Path:
    """
    Writes the report of the runs in `folders`, by default to `report.html` in the folder itself, or in the working
    directory where there are several.

    Raises:
        ImportError: plotly is missing.
        ValueError: one of `folders` is none.
    """
    if not is_report_available():
        raise ImportError(REPORT_NEEDS)
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is not a folder: give the `output_dir` of a run.")
    # As many pictures in all as one run would have, where there are several.
    runs = [read_run(folder, max(4, MOST_STEPS // len(folders))) for folder in folders]
    names = [run.name for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run.name) > 1:
            run.name = "/".join(Path(folder).resolve().parts[-2:])
    if output is None:
        output = Path(folders[0]) / "report.html" if len(folders) == 1 else Path("report.html")
    output, page = Path(output), make_page(runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.part")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(output)  # whoever has the page open never reloads half of it
    return output
