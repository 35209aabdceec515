# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
# /// script
# dependencies = ["rdm_trl[eval]"]
# ///
r"""
How far is the teacher, guided or fitted, from resting where the guided teacher is? What a prediction's error has in
common over the images of a prompt moves them as a whole. For the student's own guidance (mostly none), the sampler's,
and fits to so many images, in quarters of the noise levels: this common error of held-out pairs (the last third) in %
of the mean square error, and the fitted weights. Images are kept, and those of a run are used.

python examples/target_study.py                                                    # the embedded teacher
python examples/target_study.py --teacher outputs/flow_teacher --set max_sequence_length=10
python examples/target_study.py --teacher outputs/emoji_teacher --set teacher_guidance_scale=4 \
    --num_images 300 --sizes 40 200
"""

import argparse
import tempfile

import torch
from compare_methods import make_trainer, parse_options

from rdm_trl import guidance
from rdm_trl.method import target
from rdm_trl.method.target import Moments


QUARTERS = ("least noise", "less", "more", "most noise")


def chosen(moments: Moments, draws: torch.Tensor) -> Moments:
    return Moments(*(value[draws] for value in moments))


def common_error(moments: Moments, weights: torch.Tensor) -> list[float]:
    """
    The product of the target's two residuals in a pair, with `weights` (2, KNOTS), in % of the mean square residual of
    the teacher without them, in each quarter of the noise levels.
    """
    w = target.hats(moments.fractions).double() @ weights.double().T
    error = moments.common - (w * moments.correlation).sum(1) + torch.einsum("bi,bij,bj->b", w, moments.gram, w) / 2
    quarter = (moments.fractions * 4).long().clamp(max=3)
    return [(200 * error[quarter == k].sum() / moments.square[quarter == k].sum()).item() for k in range(4)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="folder or Hub id of a pipeline; the embedded one by default")
    parser.add_argument("--num_images", type=int, default=1500)
    parser.add_argument("--sizes", nargs="+", type=int, default=[40, 100, 300, 1000], help="images of a fit")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=YAML", help="of the trainer's config")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = {"num_teacher_images": args.num_images, "use_cpu": not torch.cuda.is_available()}
        trainer = make_trainer(args.teacher, {**options, **parse_options(args.set)}, folder, [])
        images = guidance.GuidedImages(trainer)
        moments = guidance.moments_of(trainer, images()[0], images.prompts)
    images_before = 2 * torch.arange(args.num_images // 2).repeat(guidance.LEVELS)
    held_out = images_before >= args.num_images * 2 // 3
    none, most = guidance.range_of_guidance(trainer.family, trainer.args.teacher_guidance_scale)
    fits = {f"fitted to {size} images": chosen(moments, (images_before < size) & ~held_out) for size in args.sizes}
    weights = {"the student's own guidance": torch.zeros(2, target.KNOTS)}
    weights["the sampler's"] = torch.tensor([[most], [0.0]]).expand(2, target.KNOTS)
    weights |= {name: target.fit(draws, none, most) for name, draws in fits.items()}
    print("| | " + " | ".join(QUARTERS) + " | weights of guidance | of the prediction |")
    print("|---" * (len(QUARTERS) + 3) + "|")
    for name, found in weights.items():
        cells = [f"{error:.2f}" for error in common_error(chosen(moments, held_out), found)]
        cells += [", ".join(f"{weight:.2f}" for weight in row) for row in found.tolist()]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
