# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
# /// script
# dependencies = ["rdm_trl[eval]"]
# ///
"""
How well can guidance, fitted or not, predict what the guided teacher draws? For feature sets of the target and numbers
of images: the share of the mean square error of the teacher's own predictions that the fit takes off held-out images
(the last third), and the fitted weights. A negative share adds error. Images are kept, and those of a run are used.

python examples/target_study.py                                                    # the embedded teacher
python examples/target_study.py --teacher outputs/flow_teacher --set max_sequence_length=10
"""

import argparse
import tempfile

import torch
import yaml
from compare_methods import make_trainer, parse_options

from rdm_trl import guidance
from rdm_trl.method import target
from rdm_trl.method.target import Moments


# Rows of `target.features`.
SETS = {"guidance": [0], "noisy image": [1], "guidance, noisy image": [0, 1], "all three": [0, 1, 2]}


def chosen(moments: Moments, draws: torch.Tensor, features: list[int]) -> Moments:
    """Of some draws and features."""
    fractions, gram, correlation, square = (value[draws] for value in moments)
    return Moments(fractions, gram[:, features][:, :, features], correlation[:, features], square)


def gain(moments: Moments, weights: torch.Tensor) -> float:
    """Share of the mean square residual, of each level alike, that `weights` (J, KNOTS) take off."""
    shares = target.hats(moments.fractions).double()
    w = shares @ weights.double().T
    change = torch.einsum("bi,bij,bj->b", w, moments.gram, w) - 2 * (w * moments.correlation).sum(1)
    level = (shares.T @ moments.square) / shares.sum(0).clamp(min=1e-12)
    return -(change / (shares @ level)).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="folder or Hub id of a pipeline; the embedded one by default")
    parser.add_argument("--num_images", type=int, default=1500)
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 100, 200, 300, 500, 1000], help="images of a fit")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=YAML", help="of the trainer's config")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = {"num_teacher_images": args.num_images, "use_cpu": not torch.cuda.is_available()}
        trainer = make_trainer(args.teacher, {**options, **parse_options(args.set)}, folder, [])
        images = guidance.GuidedImages(trainer)
        moments = guidance.moments_of(trainer, images()[0], images.prompts)
    rows = torch.arange(args.num_images).repeat(guidance.LEVELS)
    held_out = rows >= args.num_images * 2 // 3
    print("| features | " + " | ".join(f"{size} images" for size in args.sizes) + " |")
    print("|---" * (len(args.sizes) + 1) + "|")
    for name, features in SETS.items():
        fits = [target.fit(chosen(moments, (rows < size) & ~held_out, features)) for size in args.sizes]
        cells = [f"{100 * gain(chosen(moments, held_out, features), weights):+.2f} %" for weights in fits]
        print(f"| {name} | " + " | ".join(cells) + " |")
    scale = torch.full((1, target.KNOTS), trainer.args.teacher_guidance_scale - 1)
    print(f"| guidance at the sampler's own scale | {100 * gain(chosen(moments, held_out, [0]), scale):+.2f} % |")
    print("\nWeights of all images, from the least noise to the most:\n")
    weights = target.fit(moments).tolist()
    for name, row in zip(("guidance", "noisy image", "prediction itself"), weights, strict=True):
        print(yaml.safe_dump({name: [round(value, 3) for value in row]}, default_flow_style=None, width=200).strip())


if __name__ == "__main__":
    main()
