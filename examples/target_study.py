# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
# /// script
# dependencies = ["rdm_trl[eval]"]
# ///
r"""
How far is the teacher, guided or fitted, from resting where the guided teacher is? What a prediction's error has in
common over the images of a prompt moves them as a whole. For the student's own guidance (mostly none), the sampler's,
and fits to so many images, without and with a look ahead, in quarters of the noise levels: this common error of
held-out pairs (the last third) in % of the mean square error, and the fitted weights. A run looks ahead where the last
two, of its own fit to all of its images, are above 10 % on average, and then in those two. Images are kept, and those
of a run are used.

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
        latents = images()[0]
        moments, ahead = (guidance.moments_of(trainer, latents, images.prompts, look) for look in (False, True))
    images_before = 2 * torch.arange(args.num_images // 2).repeat(guidance.LEVELS)
    held_out = images_before >= args.num_images * 2 // 3
    none, most = guidance.range_of_guidance(trainer.family, trainer.args.teacher_guidance_scale)
    rows = {"the student's own guidance": (moments, torch.zeros(2, target.KNOTS))}
    rows["the sampler's"] = moments, torch.tensor([[most], [0.0]]).expand(2, target.KNOTS)
    for size in args.sizes:
        draws = (images_before < size) & ~held_out
        rows[f"fitted to {size} images"] = moments, target.fit(chosen(moments, draws), none, most)
        rows[f"and looking ahead, {size}"] = ahead, target.fit(chosen(ahead, draws), 0.0, 1.0)
    print("| | " + " | ".join(QUARTERS) + " | weights of guidance, or of what is ahead | of the prediction |")
    print("|---" * (len(QUARTERS) + 3) + "|")
    for name, (of, found) in rows.items():
        cells = [f"{error:.2f}" for error in target.common_error(chosen(of, held_out), found)]
        cells += [", ".join(f"{weight:.2f}" for weight in row) for row in found.tolist()]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
