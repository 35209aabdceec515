# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""
A healthy run, three that are made sick on purpose, and what centring makes of one of them, for metrics.md: their
curves and samples, in docs/images.

python docs/sick_runs.py
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

from rdm_trl import RdmDistillConfig, RdmDistillTrainer  # noqa: E402


IMAGES = Path(__file__).parent / "images"
PROMPTS = [f"a photo of a {name}" for name in ("t-shirt", "dress", "sneaker", "bag")]


def brightness(images, prompts, metadata):
    """A reward that is easy to hack."""
    return images.mean(dim=(1, 2, 3))


brightness.differentiable = True
HEALTHY = dict(sample_guidance_scale=1.0)
RUNS = {
    "healthy": HEALTHY,
    "collapsed:\nguidance 8 in R_dm": dict(sample_guidance_scale=8.0),
    "over-saturated: DMD, fake\nscore left behind": dict(
        sample_guidance_scale=2.0, fake_learning_rate=1e-7, dm_centering="none"
    ),
    "the same, GNDM": dict(sample_guidance_scale=2.0, fake_learning_rate=1e-7),
    "hacked: a reward\nof too much weight": dict(reward_mixing="sum", reward_weights=[3.0]),
}
PANELS = (
    "x0/std",
    "x0/diversity",
    "x0/saturation",
    "dm/direction",
    "dm/fake_error",
    "loss/fake",
    "rewards/distribution_matching/mean",
)


def run(options: dict, updates: int) -> tuple[list[dict], torch.Tensor]:
    """What a run logs, and the student's images (P * 4, 3, H, W) at its end."""
    defaults = dict(
        max_steps=updates,
        lr_scheduler_type="constant",
        logging_steps=5,
        log_images_steps=0,
        save_strategy="no",
    )
    rewards = [brightness] if "reward_weights" in options else []
    with tempfile.TemporaryDirectory() as folder:
        config = RdmDistillConfig(folder, **{**defaults, **HEALTHY, **options})
        # The hook only asks for final images, of which the saturation is measured.
        trainer = RdmDistillTrainer(config, rewards, image_samples_hook=lambda *_: None)
        trainer.train()
        return trainer.state.log_history, trainer.sample("student", [p for p in PROMPTS for _ in range(4)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=80)
    args = parser.parse_args()
    runs = {name: run(options, args.updates) for name, options in RUNS.items()}

    figure, axes = plt.subplots(2, 4, figsize=(15, 6.5), layout="constrained")
    for axis, key in zip(axes.flat, PANELS, strict=False):
        for name, (logs, _) in runs.items():
            points = [(row["step"], row[key]) for row in logs if key in row]
            axis.plot(*zip(*points, strict=True), label=name.replace("\n", " "))
        axis.set_title(key)
        if key in ("x0/std", "x0/diversity", "dm/direction", "dm/fake_error", "loss/fake"):
            axis.set_yscale("log")
        axis.set_xlabel("update")
    axes[1, 3].axis("off")
    axes[1, 3].legend(*axes[0, 0].get_legend_handles_labels(), loc="center")
    figure.savefig(IMAGES / "sick_curves.png", dpi=70)

    figure, axes = plt.subplots(1, len(runs), figsize=(15, 3.5), layout="constrained")
    for axis, (name, (_, images)) in zip(axes, runs.items(), strict=True):
        rows = [torch.cat(list(images[i : i + 4]), 2) for i in range(0, len(images), 4)]
        axis.imshow(torch.cat(rows, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(name, fontsize=10)
        axis.axis("off")
    figure.savefig(IMAGES / "sick_samples.png", dpi=70)


if __name__ == "__main__":
    main()
