# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
# /// script
# dependencies = ["rdm_trl[eval]"]
# ///
"""
Compares methods on the embedded teacher over paired seeds: the same prompts, noise and number of updates, one option
apart. Results go to `results.json` as they come (a second call goes on where the first stopped), then to a table with
means, spreads and bootstrap intervals of the paired differences, and to a picture.

python examples/compare_methods.py --methods dmd gndm --seeds 100 101 102 103 104
"""

import argparse
import json
import logging
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import yaml
from tqdm import tqdm
from transformers import TrainerCallback

from rdm_trl import RdmDistillConfig, RdmDistillTrainer, evaluation
from rdm_trl.demo import DEMO_PROMPTS, load_demo_judge


METHODS = {
    "dmd": {"dm_normalization": "sample"},
    "gndm": {"dm_normalization": "group"},
    "batch": {"dm_normalization": "batch"},
    "none": {"dm_normalization": "none"},
}
FIGURES = ("fid", "fid_teacher", "class_accuracy", "diversity")
# The figures of all runs are taken on these images, whatever the seed of training.
EVAL_SEED = 1_000_000


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["dmd", "gndm"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 101, 102, 103, 104])
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "configs" / "gndm.yaml")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=YAML", help="such as learning_rate=2.0e-4")
    parser.add_argument("--eval_steps", type=int, default=50, help="updates between two points of a curve")
    parser.add_argument("--num_images", type=int, default=2400)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare"))
    return parser.parse_args()


class CurveCallback(TrainerCallback):
    """Measures the student every so many updates and after the last."""

    def __init__(self, measure, every: int):
        self.measure, self.every, self.trainer, self.curve = measure, every, None, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.curve.append({"step": state.global_step, **self.measure(self.trainer, "student")})


def run(measure, constant: dict, options: dict, args) -> dict:
    """One training run: its curve, and the figures of teacher and base, measured once for all runs."""
    folder = args.output_dir / "run"
    curve = CurveCallback(measure, args.eval_steps)
    fixed = {"output_dir": str(folder), "log_images_steps": 0, "save_strategy": "no", "logging_strategy": "no"}
    curve.trainer = trainer = RdmDistillTrainer(RdmDistillConfig(**{**options, **fixed}), callbacks=[curve])
    for who in ("teacher", "base"):
        if who not in constant:
            constant[who] = measure(trainer, who)
    trainer.train()
    shutil.rmtree(folder, ignore_errors=True)
    return {"curve": curve.curve, **constant, "cost": trainer.cost}


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean."""
    draws = np.random.default_rng(0).choice(differences, (10_000, len(differences))).mean(1)
    return tuple(np.quantile(draws, (0.025, 0.975)))


def table(results: dict, methods: list[str], seeds: list[int]) -> str:
    def last(method, name):
        return np.array([results[f"{method}-{seed}"]["curve"][-1][name] for seed in seeds])

    first = results[f"{methods[0]}-{seeds[0]}"]
    header = ["", *FIGURES, "worst fid_teacher"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for who in ("teacher", "base"):
        cells = [f"{first[who][name]:.3f}" if name in first[who] else "" for name in FIGURES]
        lines.append(f"| {who} | " + " | ".join(cells) + " | |")
    for method in methods:
        cells = [f"{last(method, name).mean():.3f} ± {last(method, name).std(ddof=1):.3f}" for name in FIGURES]
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {last(method, 'fid_teacher').max():.3f} |")
    for method in methods[1:]:
        cells = []
        for name in FIGURES:
            difference = last(method, name) - last(methods[0], name)
            low, high = interval(difference)
            cells.append(f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append(f"| {method} − {methods[0]}, 95 % | " + " | ".join(cells) + " | |")
    return "\n".join(lines)


def plot(results: dict, methods: list[str], seeds: list[int], path: Path):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, name in zip(axes, ("fid", "fid_teacher"), strict=True):
        for i, method in enumerate(methods):
            curves = [results[f"{method}-{seed}"]["curve"] for seed in seeds]
            steps = [point["step"] for point in curves[0]]
            values = np.array([[point[name] for point in curve] for curve in curves])
            axis.plot(steps, values.T, color=f"C{i}", alpha=0.25, linewidth=1)
            axis.plot(steps, values.mean(0), color=f"C{i}", linewidth=2, label=method)
        if name == "fid":
            teacher = results[f"{methods[0]}-{seeds[0]}"]["teacher"]["fid"]
            axis.axhline(teacher, color="gray", linestyle="--", label="teacher, 25 guided steps")
        axis.set(xlabel="updates", ylabel=name, yscale="log")
        axis.legend()
    figure.suptitle(f"{len(seeds)} paired seeds: mean and each seed")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    changes = {name: yaml.safe_load(value) for name, value in (option.split("=", 1) for option in args.set)}
    options = {**yaml.safe_load(args.config.read_text()), **changes}
    path = args.output_dir / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"options": options, "num_images": args.num_images}
    if results["options"] != options or results["num_images"] != args.num_images:
        raise SystemExit(f"{path} holds runs with other settings: give another --output_dir.")
    judge, constant = load_demo_judge(), {}
    prompts = [DEMO_PROMPTS[i % len(DEMO_PROMPTS)] for i in range(args.num_images)]

    def measure(trainer, who):
        return judge(who, trainer.sample(who, prompts, seed=EVAL_SEED), prompts)

    todo = [(m, seed) for seed in args.seeds for m in args.methods if f"{m}-{seed}" not in results]
    for method, seed in tqdm(todo, desc="runs"):
        results[f"{method}-{seed}"] = run(measure, constant, {**options, **METHODS[method], "seed": seed}, args)
        path.write_text(json.dumps(results, indent=1) + "\n")
    text = table(results, args.methods, args.seeds)
    note = f"{options['max_steps']} updates, seeds {args.seeds}, {args.num_images} images, {evaluation.machine()}."
    (args.output_dir / "table.md").write_text(f"{text}\n\n{note}\n")
    plot(results, args.methods, args.seeds, args.output_dir / "curves.png")
    print(f"\n{text}\n\n{note}\n{args.output_dir / 'curves.png'}")


if __name__ == "__main__":
    main()
