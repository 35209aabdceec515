# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
# /// script
# dependencies = ["rdm_trl[eval]"]
# ///
"""
Compares methods on the embedded teacher, or others, over paired seeds: the same prompts and noise, one option apart,
at equal updates, images drawn, teacher evaluations or seconds (`--budget`). Other teachers have the same prompts or
classes, or prompts and a judge of their own in their folder (train_emoji_teacher.py, train_moving_teacher.py). Every
run is kept in a file (a second call goes on where the first stopped); all end in `results.json`, a table with means,
spreads and bootstrap intervals of the paired differences, and pictures, in a folder for each teacher, and
`pairs.png` of all.

A method may change options of its own, `gndm,num_iterations=4`, and names its rewards with their weights:
`gndmr+classifier@0.3`, `constrained,target_dm=0.002+classifier@1`. Runs with rewards start from the checkpoint that
the plain method (dmd or gndm, with the method's other options) left after `reward_warmup` updates, which is what they
would have reached themselves.

python examples/compare_methods.py --methods dmd gndm --seeds 100 101 102 103 104
python examples/compare_methods.py --methods dmd,fake_updates=3 gndm,fake_updates=1 --budget seconds --workers 2
python examples/compare_methods.py --methods gndm gndm,num_iterations=2 --budget rollouts \
    --teachers embedded outputs/flow_teacher,max_sequence_length=10 outputs/dit_teacher    # of train_teacher.py
python examples/compare_methods.py --methods dmdr+classifier@0.02 gndmr+classifier@0.3 --set reward_warmup=100
python examples/compare_methods.py --methods dmd gndm --measure classifier    # of all images, and nobody trains by it
"""

import argparse
import json
import logging
import re
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from datasets import Dataset
from diffusers import DiffusionPipeline
from tqdm import tqdm
from transformers import TrainerCallback

from rdm_trl import RdmDistillConfig, RdmDistillTrainer, evaluation
from rdm_trl.callbacks import ReportCallback
from rdm_trl.demo import CLASSES, DEMO_PROMPTS, load_demo_judge, load_judge
from rdm_trl.rewards import Scorer, resolve_reward


DMD = {"dm_centering": "none", "dm_normalization": "sample"}
GNDM = {"dm_centering": "group", "dm_normalization": "group"}
METHODS = {
    "dmd": DMD,
    "gndm": GNDM,
    "scale": {"dm_centering": "none", "dm_normalization": "group"},  # GNDM by a shared divisor alone
    "dmdr": {**DMD, "reward_mixing": "sum"},
    "gndmr": {**GNDM, "reward_mixing": "adaptive"},
    "constrained": {**GNDM, "reward_mixing": "constrained"},
}
# Distribution matching alone, from which a method with rewards sets out.
PLAIN = {"dmdr": "dmd", "gndmr": "gndm", "constrained": "gndm"}
FORM = "METHOD[,OPTION=YAML...][+REWARD@WEIGHT...]"
FIGURES = ("fid", "fid_teacher", "class_accuracy", "diversity")
# The figures of all runs are taken on these images, whatever the seed of training.
EVAL_SEED = 1_000_000
# What all students are measured against: the teacher, the teacher again from other noise, and the base. A student that
# cannot be told from the teacher has the distance of the second.
CONSTANT = ("teacher", "again", "base")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", default=["dmd", "gndm"], metavar="METHOD[,OPTION=YAML...][+REWARD@WEIGHT...]"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 101, 102, 103, 104])
    parser.add_argument(
        "--teachers",
        nargs="+",
        default=["embedded"],
        metavar="TEACHER[,OPTION=YAML...]",
        help="folders of pipelines that draw the demo's prompts or have a judge, or embedded",
    )
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "configs" / "gndm.yaml")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=YAML", help="such as learning_rate=2.0e-4")
    parser.add_argument(
        "--budget",
        choices=["updates", "rollouts", "teacher_evaluations", "seconds"],
        default="updates",
        help="what is equal: each method gets the updates that cost as much as `max_steps` of the first; the seconds "
        "of an update are measured before any run, one method after the other",
    )
    parser.add_argument("--workers", type=int, default=1, help="runs at once, a process of one thread each")
    parser.add_argument("--eval_steps", type=int, default=50, help="updates between two points of a curve")
    parser.add_argument("--num_images", type=int, default=2400)
    parser.add_argument("--measure", nargs="*", default=[], help="rewards that are measured, whoever trains by them")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare"))
    args = parser.parse_args()
    for method in args.methods:
        try:
            options_of(method)
        except (KeyError, ValueError):
            parser.error(f"{method!r} is not {FORM} with one of {', '.join(METHODS)}.")
        if args.budget != "updates" and "max_steps" in options_of(method):
            parser.error(f"{method!r} gets its `max_steps` from the budget of {args.budget}.")
    return args


def parse_options(assignments: list[str]) -> dict:
    return {name: yaml.safe_load(value) for name, value in (text.split("=", 1) for text in assignments)}


def options_of(method: str) -> dict:
    """The options that `gndmr,num_iterations=2+classifier@0.3` stands for."""
    first, *rewards = method.split("+")
    name, *changes = first.split(",")
    if (name in PLAIN) != bool(rewards):
        raise ValueError(method)
    options = {**METHODS[name], **parse_options(changes)}
    if rewards:
        pairs = [reward.rsplit("@", 1) for reward in rewards]
        options |= {"reward_funcs": [f for f, _ in pairs], "reward_weights": [float(w) for _, w in pairs]}
    return options


def cost_of_update(options: dict, budget: str, teacher: str | None = None) -> float:
    """
    What an update with these options takes of the budget, in batches or, measured, in seconds. Evaluations of the
    teacher are those without a look ahead of the target.
    """
    if budget == "updates":
        return 1.0
    if budget == "seconds":
        return seconds_of_update(options, teacher)
    config = RdmDistillConfig(**options)
    guides = config.num_teacher_images > 0 or config.sample_guidance_scale > 1
    guided = budget == "teacher_evaluations" and guides
    images = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return images * (1 + guided) / config.num_iterations


def seconds_of_update(options: dict, teacher: str | None, updates: int = 12) -> float:
    """Mean time of an update, the first few apart; `updates` is a multiple of the usual `num_iterations`."""
    with tempfile.TemporaryDirectory() as folder:
        result = run(lambda *_: {}, teacher, {**options, "max_steps": updates + 4}, None, Path(folder), 1)
    seconds = [point["seconds"] for point in result["curve"]]
    return (seconds[-1] - seconds[3]) / updates


def plain(method: str) -> str:
    """The method itself, or distribution matching alone where it has rewards, with all options that are not theirs."""
    name, *changes = method.split("+")[0].split(",")
    if name not in PLAIN:
        return method
    of_rewards = re.compile("target_dm=|reward_(?!warmup)")
    return ",".join([PLAIN[name], *(change for change in changes if not of_rewards.match(change))])


class CurveCallback(TrainerCallback):
    """Measures the student every so many updates and after the last, and keeps a checkpoint of the warm-up's end."""

    def __init__(self, measure, every: int):
        self.measure, self.every, self.trainer, self.curve = measure, every, None, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            mixer = self.trainer.rewards.mixer
            mixing = {"kl": mixer.kl, "weights": mixer.factors().mean(1).tolist()}
            cost = {name: self.trainer.cost[name] for name in ("rollouts", "teacher_evaluations", "seconds")}
            figures = self.measure(self.trainer, "student")
            self.curve.append({"step": state.global_step, **figures, **mixing, **cost})
        control.should_save = state.global_step == args.reward_warmup


def has_judge(teacher: str | None) -> bool:
    """Whether the teacher brings prompts and a judge along; Fashion-MNIST's know nothing of its images."""
    return teacher is not None and (Path(teacher) / "judge").is_dir()


def prompts_of(teacher: str | None) -> list[str]:
    """What the teacher is trained and measured on: its own prompts, the demo's captions, or the classes it lists."""
    if has_judge(teacher):
        return (Path(teacher) / "prompts.txt").read_text().splitlines()
    is_class_conditional = teacher is not None and "id2label" in DiffusionPipeline.load_config(teacher)
    return list(CLASSES) if is_class_conditional else DEMO_PROMPTS


class Measure:
    """Figures of the student, and once of what does not change, on the same images for all runs."""

    def __init__(self, teacher: str | None, num_images: int, rewards: list[str]):
        prompts = prompts_of(teacher)
        self.prompts = [prompts[i % len(prompts)] for i in range(num_images)]
        self.rewards, self.score = rewards, Scorer([resolve_reward(name) for name in rewards])
        self.judge, self.known = load_judge(teacher) if has_judge(teacher) else load_demo_judge(), {}

    def __call__(self, trainer: RdmDistillTrainer, who: str) -> dict[str, float]:
        key = (who, trainer.args.sample_num_steps if who == "base" else None)
        if key in self.known:
            return self.known[key]
        again = who == "again"
        images = trainer.sample("teacher" if again else who, self.prompts, seed=(1 + again) * EVAL_SEED)
        values, _ = self.score(images, self.prompts, [None] * len(self.prompts))
        named = {f"reward/{name}": v for name, v in zip(self.rewards, values.mean(0).tolist(), strict=True)}
        figures = {**self.judge(who, images, self.prompts), **named}
        if who != "student":
            self.known[key] = figures
        return figures


def make_trainer(teacher: str | None, options: dict, folder: Path, callbacks: list) -> RdmDistillTrainer:
    fixed = {"output_dir": str(folder), "log_images_steps": 0, "save_strategy": "no", "logging_strategy": "no"}
    options = {name: value for name, value in options.items() if name != "save_steps"}
    fixed["resume_with_changes"] = True  # from a plain run to one with rewards, whose mixing starts there
    config = RdmDistillConfig(**{**options, **fixed})
    dataset = Dataset.from_dict({"prompt": prompts_of(teacher)}) if teacher else None
    trainer = RdmDistillTrainer(config, sd_pipeline=teacher, train_dataset=dataset, callbacks=callbacks)
    trainer.remove_callback(ReportCallback)  # 5 MB for each of many runs, of which the table and the curves tell
    return trainer


def run(measure, teacher: str | None, options: dict, checkpoint: Path | None, folder: Path, eval_steps: int) -> dict:
    """One training run in `folder`, from `checkpoint`: its curve, the figures of what never changes, and its cost."""
    curve = CurveCallback(measure, eval_steps)
    curve.trainer = trainer = make_trainer(teacher, options, folder, [curve])
    constant = {who: measure(trainer, who) for who in CONSTANT}
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return {"curve": curve.curve, **constant, "cost": trainer.cost}


def results_of(jobs: dict[str, tuple], workers: int, title: str):
    """Names and results of `run(*job)`, as they come: one after the other here, or `workers` processes at once."""
    if workers == 1:
        yield from ((name, run(*job)) for name, job in tqdm(jobs.items(), desc=f"runs, {title}"))
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        names = {pool.submit(run, *job): name for name, job in jobs.items()}
        for future in tqdm(as_completed(names), desc=f"runs, {title}", total=len(jobs)):
            yield names[future], future.result()


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean."""
    draws = np.random.default_rng(0).choice(differences, (10_000, len(differences))).mean(1)
    return tuple(np.quantile(draws, (0.025, 0.975)))


def last(results: dict, method: str, seeds: list[int], name: str) -> np.ndarray:
    """A figure at the end of training, for each seed."""
    return np.array([results[f"{method}-{seed}"]["curve"][-1][name] for seed in seeds])


def table(results: dict, methods: list[str], seeds: list[int], names: list[str]) -> str:
    first = results[f"{methods[0]}-{seeds[0]}"]
    header = ["", *names, "worst fid_teacher", "rollouts"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for who in filter(first.get, CONSTANT):  # runs of older versions know of no other noise
        cells = [f"{first[who][name]:.3f}" if name in first[who] else "" for name in names]
        lines.append(f"| {'teacher, other noise' if who == 'again' else who} | " + " | ".join(cells) + " | | |")
    for method in methods:
        values = [last(results, method, seeds, name) for name in names]
        cells = [f"{v.mean():.3f}" + (f" ± {v.std(ddof=1):.3f}" if len(v) > 1 else "") for v in values]
        cells += [f"{values[names.index('fid_teacher')].max():.3f}", f"{last(results, method, seeds, 'rollouts')[0]}"]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    for method in methods[1:]:
        if plain(method) != method:
            continue
        cells = []
        for name in names:
            difference = last(results, method, seeds, name) - last(results, methods[0], seeds, name)
            low, high = interval(difference)
            cells.append(f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append(f"| {method} − {methods[0]}, 95 % | " + " | ".join(cells) + " | | |")
    return "\n".join(lines)


def by_reward(methods: list[str]) -> dict[str, dict[str, list[str]]]:
    """
    For each reward that methods have alone, and each kind of method (its options count, but for the budget of
    constrained ones), these methods from small to large weight.
    """
    found = {}
    for method in methods:
        first, *rewards = method.split("+")
        if len(rewards) == 1:
            kind = ",".join(part for part in first.split(",") if not part.startswith("target_dm="))
            found.setdefault(rewards[0].rsplit("@", 1)[0], {}).setdefault(kind, []).append(method)
    for kinds in found.values():
        for chosen in kinds.values():
            chosen.sort(key=lambda method: float(method.rsplit("@", 1)[1]))
    return found


def matched(results: dict, methods: list[str], seeds: list[int]) -> str:
    """How far GNDMR is from the teacher at the reward that each DMDR run reaches, between its weights linearly."""
    header = [
        "reward",
        "GNDMR",
        "DMDR",
        "reached",
        "its fid_teacher",
        "GNDMR at that reward",
        "difference, 95 %",
        "seeds",
    ]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for reward, kinds in by_reward(methods).items():
        ours, theirs = ([kind for kind in kinds if kind.split(",")[0] == name] for name in ("gndmr", "dmdr"))
        for kind, method in ((kind, method) for kind in ours for other in theirs for method in kinds[other]):
            path = [plain(kind), *kinds[kind]]
            goals, reached = (last(results, method, seeds, name) for name in (f"reward/{reward}", "fid_teacher"))
            found = []
            for goal, seed in zip(goals, seeds, strict=True):
                points = [results[f"{m}-{seed}"]["curve"][-1] for m in path]
                x, y = ([point[name] for point in points] for name in (f"reward/{reward}", "fid_teacher"))
                # NaN where GNDMR's weights do not reach that far.
                found.append(np.interp(goal, *zip(*sorted(zip(x, y, strict=True)), strict=True), np.nan, np.nan))
            found = np.array(found)
            known = ~np.isnan(found)
            cells = [reward, kind, method, f"{goals.mean():.3f}", f"{reached.mean():.3f}"]
            if known.any():
                relative = found[known] / reached[known] - 1
                low, high = interval(relative)
                cells += [f"{found[known].mean():.3f}", f"{relative.mean():+.0%} [{low:+.0%}, {high:+.0%}]"]
            else:
                cells += ["not reached", ""]
            lines.append("| " + " | ".join([*cells, f"{known.sum()} of {len(seeds)}"]) + " |")
    return "\n".join(lines)


def budgets(results: dict, methods: list[str], seeds: list[int]) -> str:
    """The mean estimate of the divergence that constrained runs ended up with, behind a first quarter of readings."""
    lines = ["| | seed | budget | estimate |", "|---|---|---|---|"]
    for method in (method for method in methods if method.startswith("constrained")):
        for seed in seeds:
            readings = [point["kl"] for point in results[f"{method}-{seed}"]["curve"]]
            estimate = np.mean(readings[len(readings) // 4 :])
            lines.append(f"| {method} | {seed} | {options_of(method)['target_dm']} | {estimate:.5f} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def label(kind: str, kinds: list[str]) -> str:
    """The name of a kind of method, with its options where others of `kinds` have the same name."""
    name = kind.split(",")[0]
    return kind if sum(other.split(",")[0] == name for other in kinds) > 1 else name


def plot_curves(results: dict, methods: list[str], seeds: list[int], path: Path):
    first = results[f"{methods[0]}-{seeds[0]}"]
    # Of one image a prompt there is no diversity.
    known = [name for name in FIGURES if np.isfinite(first["curve"][0].get(name, np.nan))]
    panels = [*(("step", name) for name in known), ("rollouts", "fid_teacher")]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4))
    for axis, (cost, name) in zip(axes, panels, strict=True):
        for i, method in enumerate(methods):
            curves = [results[f"{method}-{seed}"]["curve"] for seed in seeds]
            x = [point[cost] for point in curves[0]]
            values = np.array([[point[name] for point in curve] for curve in curves])
            axis.plot(x, values.T, color=f"C{i}", alpha=0.25, linewidth=1)
            axis.plot(x, values.mean(0), color=f"C{i}", linewidth=2, label=label(method, methods))
        for who, text, style in (("teacher", "teacher", "--"), ("again", "teacher, other noise", ":")):
            if name in first.get(who, {}):
                axis.axhline(first[who][name], color="gray", linestyle=style, label=text)
        axis.set(xlabel="updates" if cost == "step" else "images drawn in training", ylabel=name)
        axis.set(yscale="log" if name.startswith("fid") else "linear")
        axis.legend(fontsize=7)
    figure.suptitle(f"{len(seeds)} paired seeds: mean and each seed")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_trade_offs(results: dict, methods: list[str], seeds: list[int], path: Path):
    """Reward against distance to the teacher: one panel a reward, one line a method, one point a weight."""
    panels = by_reward(methods)
    all_kinds = list(dict.fromkeys(kind for kinds in panels.values() for kind in kinds))
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (reward, kinds) in zip(axes[0], panels.items(), strict=True):
        for kind, chosen in kinds.items():
            color = f"C{all_kinds.index(kind)}"  # the same in every panel
            line = chosen if kind.startswith("constrained") else [plain(kind), *chosen]
            x, y = ([last(results, m, seeds, name) for m in line] for name in (f"reward/{reward}", "fid_teacher"))
            axis.plot(np.array(x), np.array(y), ".", color=color, alpha=0.3)
            axis.plot(np.mean(x, 1), np.mean(y, 1), "o-", color=color, label=label(kind, list(kinds)))
            for m, *place in zip(line, np.mean(x, 1), np.mean(y, 1), strict=True):
                axis.annotate(
                    m.rpartition("@")[2] if "@" in m else m.split(",")[0],
                    place,
                    xytext=(3, 3),
                    textcoords="offset points",
                    fontsize=7,
                )
        axis.set(xlabel=f"reward: {reward}", ylabel="fid_teacher")
        axis.locator_params(axis="x", nbins=5)
        axis.legend()
    figure.suptitle(f"{len(seeds)} paired seeds: means and each seed; a point is a weight")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_pairs(teachers: dict[str, dict], methods: list[str], seeds: list[int], path: Path):
    """Distance to the teacher at the end of training: a panel for each teacher, a line for each seed."""
    figure, axes = plt.subplots(1, len(teachers), figsize=((1.5 + len(methods)) * len(teachers), 4), squeeze=False)
    for axis, (name, results) in zip(axes[0], teachers.items(), strict=True):
        values = np.array([last(results, method, seeds, "fid_teacher") for method in methods])
        axis.plot(values, ".-", color="C0", alpha=0.4, linewidth=1)
        axis.plot(values.mean(1), "_", color="C0", markersize=40, markeredgewidth=3)
        floor = results[f"{methods[0]}-{seeds[0]}"].get("again")  # runs of older versions know of no other noise
        if floor:
            axis.axhline(floor["fid_teacher"], color="gray", linestyle=":", label="teacher, other noise")
            axis.legend()
        axis.set(title=name, ylabel="fid_teacher", xlim=(-0.5, len(methods) - 0.5))
        names = [label(method, methods).replace(",", "\n") for method in methods]
        axis.set_xticks(range(len(methods)), names, fontsize=8)
        axis.set_ylim(bottom=0)
    figure.suptitle(f"{len(seeds)} paired seeds, and their means")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    args = parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    teachers = {}
    for teacher in args.teachers:
        path, *changes = teacher.split(",")
        name = Path(path).name
        known = None if path == "embedded" else path
        teachers[name] = compare(args, known, parse_options(changes), args.output_dir / name)
    methods = list(dict.fromkeys(map(plain, args.methods)))
    if len(methods) > 1:
        plot_pairs(teachers, methods, args.seeds, args.output_dir / "pairs.png")


def compare(args, teacher: str | None, changes: dict, output_dir: Path) -> dict:
    """Results of all methods and seeds on one teacher, with its own changes of the options."""
    runs = output_dir / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    options = {**yaml.safe_load(args.config.read_text()), **parse_options(args.set), **changes}
    settings = {
        "options": options,
        "num_images": args.num_images,
        "eval_steps": args.eval_steps,
        "budget": args.budget,
        "teacher": teacher,
    }
    warming = [m for m in args.methods if plain(m) != m and {**options, **options_of(m)}.get("reward_warmup")]
    if warming and args.budget == "seconds":
        raise SystemExit(
            f"An update of {warming[0]!r} takes less time before `reward_warmup` than behind it, and --budget seconds "
            "measures one of either: leave one of them out, or set `max_steps` yourself."
        )
    path = output_dir / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{path} belongs to runs with other settings: give another --output_dir.")
    path.write_text(json.dumps(settings, indent=1) + "\n")
    trained = [name for m in args.methods for name in options_of(m).get("reward_funcs", [])]
    rewards = list(dict.fromkeys([*trained, *args.measure]))
    methods = list(dict.fromkeys([plain(m) for m in args.methods] + args.methods))
    for file in (runs / f"{m}-{s}.json" for m in methods for s in args.seeds):
        missing = [name for name in rewards if file.exists() and f"reward/{name}" not in file.read_text()]
        if missing:
            raise SystemExit(
                f"{file} was measured without {', '.join(missing)}: remove it, or give another --output_dir."
            )
    measure = Measure(teacher, args.num_images, rewards)
    costs = {}
    if args.budget != "updates":
        known = output_dir / "cost_of_update.json"  # kept: a second call must give the same updates
        costs = json.loads(known.read_text()) if known.exists() else {}
        for method in tqdm([m for m in methods if m not in costs], desc="cost of an update"):
            costs[method] = cost_of_update({**options, **options_of(method)}, args.budget, teacher)
        known.write_text(json.dumps(costs, indent=1) + "\n")

    def job(method: str, seed: int) -> tuple:
        checkpoint, chosen = None, {**options, **options_of(method), "seed": seed}
        if plain(method) != method and chosen.get("reward_warmup"):
            checkpoint = runs / f"{plain(method)}-{seed}" / f"checkpoint-{chosen['reward_warmup']}"
        if costs:
            chosen["max_steps"] = max(1, round(options["max_steps"] * costs[methods[0]] / costs[method]))
        return measure, teacher, chosen, checkpoint, runs / f"{method}-{seed}", args.eval_steps

    todo = [(m, s) for s in args.seeds for m in methods if not (runs / f"{m}-{s}.json").exists()]
    if todo and args.workers > 1:  # what all runs are measured against, once and not in each process
        trainer = make_trainer(teacher, options, output_dir / "constant", [])
        for who in CONSTANT:
            measure(trainer, who)
    # Those with rewards set out from where the plain ones stop.
    waves = [[run_ for run_ in todo if (plain(run_[0]) == run_[0]) == is_plain] for is_plain in (True, False)]
    for wave in filter(None, waves):
        for name, result in results_of({f"{m}-{s}": job(m, s) for m, s in wave}, args.workers, output_dir.name):
            (runs / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for method, seed in waves[1]:
        shutil.rmtree(runs / f"{method}-{seed}")

    results = {f"{m}-{s}": json.loads((runs / f"{m}-{s}.json").read_text()) for m in methods for s in args.seeds}
    (output_dir / "results.json").write_text(json.dumps({**settings, **results}, indent=1) + "\n")
    text = table(results, methods, args.seeds, [*FIGURES, *(f"reward/{name}" for name in rewards)])
    if trained:
        text += "\n\n" + matched(results, methods, args.seeds)
        text += "\n\n" + budgets(results, methods, args.seeds)
        plot_trade_offs(results, methods, args.seeds, output_dir / "trade_offs.png")
    updates = f"{options['max_steps']} updates"
    if args.budget != "updates":
        updates += f" of {methods[0]}, equal {args.budget.replace('_', ' ')}"
    note = f"{updates}, seeds {args.seeds}, {args.num_images} images, {evaluation.machine()}."
    (output_dir / "table.md").write_text(f"{text}\n\n{note}\n")
    plot_curves(results, [m for m in methods if plain(m) == m], args.seeds, output_dir / "curves.png")
    print(f"\n{text}\n\n{note}\n{output_dir}")
    return results


if __name__ == "__main__":
    main()
