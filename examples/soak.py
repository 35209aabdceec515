# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
# /// script
# dependencies = ["rdm_trl[eval]"]
# ///
"""
A long run with three rewards, checkpoints and evaluation: memory, quality and disk must not drift. Writes soak.json
and soak.png. From this folder:

python soak.py
python soak.py --target_dm 0.0012 --output_dir outputs/soak_constrained
python soak.py --updates 200 --every 50
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import psutil
import torch
from transformers import TrainerCallback

from rdm_trl import RdmDistillConfig, RdmDistillTrainer


class SoakCallback(TrainerCallback):
    """Memory (MiB), files and logged figures, at every log."""

    def __init__(self, folder: Path):
        self.folder, self.records = folder, []

    def on_log(self, args, state, control, logs, **kwargs):
        memory = psutil.Process().memory_info().rss / 2**20
        files = [path.stat().st_size for path in self.folder.rglob("*") if path.is_file()]
        checkpoints = len(list(self.folder.glob("checkpoint-*")))
        figures = {"memory": memory, "disk": sum(files) / 2**20, "files": len(files), "checkpoints": checkpoints}
        self.records.append({"step": state.global_step, **figures, **logs})
        (self.folder / "soak.json").write_text(json.dumps(self.records, indent=2) + "\n")


def plot(records: list[dict], names: list[str], path: Path):
    panels = {
        "memory, MiB": ["memory"],
        "disk, MiB": ["disk"],
        "student, on evaluation": ["eval_fid", "eval_fid_teacher"],
        "diversity": ["eval_diversity", "eval_teacher_diversity"],
        "latents": ["x0/std", "x0/diversity"],
        "distance to the teacher": ["dm/kl"],
        **{f"reward: {name}": [f"rewards/{name}/mean", f"eval_{name}", f"eval_teacher_{name}"] for name in names},
    }
    figure, axes = plt.subplots(3, 3, figsize=(14, 9), layout="constrained", sharex=True)
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=True):
        for key in keys:
            points = [(record["step"], record[key]) for record in records if key in record]
            axis.plot(*zip(*points, strict=True), label=key, marker="o" if key.startswith("eval") else None)
        axis.set_title(title)
        axis.legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("update")
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--every", type=int, default=200, help="updates between two evaluations and checkpoints")
    parser.add_argument("--target_dm", type=float, help="a budget for the distance to the teacher")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/soak"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = RdmDistillConfig(
        output_dir=str(args.output_dir),
        max_steps=args.updates,
        per_device_train_batch_size=16,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        fake_learning_rate=2e-4,
        fake_updates=3,
        num_iterations=2,
        reward_funcs=["classifier", "my_reward:symmetry", "jpeg_compressibility"],
        reward_weights=[1.0, 0.5, 1.0],
        reward_mixing="adaptive" if args.target_dm is None else "constrained",
        target_dm=args.target_dm,
        reward_gradient_steps=2,
        num_eval_images=1200,
        per_device_eval_batch_size=200,
        eval_strategy="steps",
        eval_steps=args.every,
        save_steps=args.every,
        save_total_limit=3,
        log_images_steps=args.every,
    )
    callback = SoakCallback(args.output_dir)
    trainer = RdmDistillTrainer(config, callbacks=[callback])
    trainer.train()
    plot(callback.records, trainer.rewards.names, args.output_dir / "soak.png")
    memory = [record["memory"] for record in callback.records if record["step"] > args.updates // 10]
    print(f"memory behind the first tenth: {min(memory):.0f} to {max(memory):.0f} MiB")
    divergence = [r["dm/kl"] for r in callback.records if "dm/kl" in r and r["step"] > args.updates // 4]
    print(f"estimated divergence behind the first quarter: {sum(divergence) / len(divergence):.5f}")
    print(args.output_dir / "soak.png")


if __name__ == "__main__":
    main()
