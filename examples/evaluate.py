# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
# /// script
# dependencies = ["rdm_trl"]
# ///
"""
Compares distilled checkpoints of one base with each other, with the base and with the teacher: the same prompts, the
same noise, sampled by plain diffusers. Writes evaluation.md and grid.png.

python evaluate.py outputs/dmd outputs/gndm outputs/gndmr --reward_funcs classifier
python evaluate.py my-checkpoint --dataset_name prompts.txt --eval_feature_model facebook/dinov2-small
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset

from rdm_trl.demo import DEMO_PIPELINE, DEMO_PROMPTS, load_demo_judge
from rdm_trl.evaluation import Judge, PretrainedFeatures, machine
from rdm_trl.models.pipelines import base_in, family_of, read_pipeline
from rdm_trl.prompts import check_prompts, load_prompts, split_rows
from rdm_trl.rewards import Scorer, resolve_reward
from rdm_trl.saving.export import fuse
from rdm_trl.saving.hub import figures_table
from rdm_trl.saving.pictures import comparison_grid


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders of save_model")
    parser.add_argument("--dataset_name", help="of prompts (and images to edit); the embedded pipeline brings its own")
    parser.add_argument("--reward_funcs", nargs="*", default=[])
    parser.add_argument("--eval_feature_model", help="image model whose features serve for Fréchet distances")
    parser.add_argument("--num_images", type=int, default=2400)
    parser.add_argument("--batch_size", type=int, default=200)
    parser.add_argument("--num_log_images", type=int, default=10, help="prompts in the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/evaluation"))
    return parser.parse_args()


def family_for(pipeline, settings: dict):
    """Of the size that a run was trained at."""
    size = settings["sample_height"], settings["sample_width"], settings.get("sample_num_frames")
    return family_of(pipeline, *size, settings["max_sequence_length"])


def sample(pipeline, settings: dict, steps: int, scale: float | None, prompts: list[str], args, name: str):
    """Images (B, 3, H, W); with `scale` None as a student: unguided, on the grid that it was trained on."""
    family = family_for(pipeline, settings)
    scheduler = pipeline.scheduler
    if scale is None:
        family.make_student_scheduler(steps, settings["sample_sigmas"], settings["sample_timesteps"])
        family.student_scheduler = scheduler  # the saved one; the grid of the user's own is the call's
    guidance = family.student_guidance_scale if scale is None else scale
    rest = settings["negative_prompts"], args.seed, args.batch_size, name
    return family.sample_in_batches(scheduler, prompts, steps, guidance, *rest)


def main():
    args = parse_args()
    all_settings = [json.loads((folder / "metrics.json").read_text())["settings"] for folder in args.checkpoints]
    settings = all_settings[0]
    bases = {found["base_model"] for found in all_settings}
    if len(bases) > 1:
        raise SystemExit(f"The checkpoints are of different bases: {', '.join(sorted(bases))}.")
    is_demo = settings["base_model"] == "rdm_trl.demo"

    def load_base():
        base = read_pipeline(DEMO_PIPELINE) if is_demo else read_pipeline(**base_in(settings))
        return base.to("cuda" if torch.cuda.is_available() else "cpu")

    if args.dataset_name is None and not is_demo:
        raise SystemExit("There are no prompts: give --dataset_name.")
    family = family_for(load_base(), settings)
    dataset = load_prompts(args.dataset_name) if args.dataset_name else Dataset.from_dict({"prompt": DEMO_PROMPTS})
    dataset = check_prompts(dataset, "dataset_name", family)
    known, columns_of = split_rows([dataset[i] for i in range(min(len(dataset), args.num_images))], family)
    prompts = [known[i % len(known)] for i in range(args.num_images)]
    metadata = [columns_of[i % len(known)] for i in range(args.num_images)]
    judge = load_demo_judge() if is_demo else Judge()
    if args.eval_feature_model:
        judge = Judge(PretrainedFeatures(args.eval_feature_model))
    rewards = [resolve_reward(name) for name in args.reward_funcs]
    score = Scorer(rewards, frame_stride=settings.get("reward_frame_stride"))

    teacher_steps, scale = settings["teacher_num_steps"], settings["teacher_guidance_scale"]
    unguided = family.student_guidance_scale
    models = {
        "teacher": (load_base, settings, teacher_steps, scale),
        f"base, {settings['sample_num_steps']} steps": (load_base, settings, settings["sample_num_steps"], unguided),
    }
    for folder, found in zip(args.checkpoints, all_settings, strict=True):
        name = f"{folder.resolve().name}, {found['sample_num_steps']} steps"
        models[name] = (lambda folder=folder: fuse(load_base(), folder), found, found["sample_num_steps"], None)

    metrics, columns = {}, {}
    count = min(args.num_log_images, len(known), args.num_images)
    shown = [i * min(len(known), args.num_images) // count for i in range(count)]
    for name, (load, found, steps, guidance) in models.items():
        pipeline = load()
        images = sample(pipeline, found, steps, guidance, prompts, args, name)
        rewards, _ = score(images, prompts, metadata)
        named = dict(zip(score.names, rewards.nanmean(0).tolist(), strict=True))
        metrics[name] = {**judge(name, images, prompts), "rewards": named}
        # The same prompt comes again behind all others, with other noise.
        rounds = range(0, max(1, min(4, len(prompts) // len(known))) * len(known), len(known))
        columns[name] = [family_of(pipeline).to_pil(images[[i + r for r in rounds]]) for i in shown]

    args.output_dir.mkdir(parents=True, exist_ok=True)
    comparison_grid(columns, [prompts[i] for i in shown]).save(args.output_dir / "grid.png")
    text = f"{figures_table(metrics, models)}\n\n{args.num_images} images of each, seed {args.seed}, {machine()}."
    (args.output_dir / "evaluation.md").write_text(text + "\n")
    print(f"\n{text}\n{args.output_dir / 'grid.png'}")


if __name__ == "__main__":
    main()
