# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""
Absorbed guidance: before the first update the guided teacher draws images, and the target is fitted to them. Both stay
on disk, under the name of all that they depend on; and so do the images that evaluation compares.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from safetensors.torch import load_file
from tqdm import tqdm
from transformers.utils import logging

from .method import matching, policy, target
from .models.roles import TEACHER
from .prompts import PicturePrompt, fingerprint, prompt_key, split_rows, write_tensors
from .saving import checkpoint


logger = logging.get_logger(__name__)

# Of the images' noise and the order of their prompts. Not the run's: runs of other seeds share the images.
SEED = 0
# Noise levels at which each pair of images is looked at for the fit.
LEVELS = 8


def image_prompts(dataset: Dataset, family, number: int) -> list[str]:
    """
    The prompts of `number` images, in pairs: each prompt twice in a row in a shuffled order, and again from the first.
    Of a pipeline that edits images each row is a prompt of its own, and those rows alone are read.
    """
    distinct = range(len(dataset)) if family.takes_image else sorted(set(dataset["prompt"]))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(SEED)).tolist()
    chosen = [distinct[order[i // 2 % len(order)]] for i in range(number)]
    if not family.takes_image:
        return chosen
    prompts = {row: split_rows([dataset[row]], family)[0][0] for row in dict.fromkeys(chosen)}
    return [prompts[row] for row in chosen]


def cache_of(args) -> Path:
    return Path(args.teacher_cache_dir) if args.teacher_cache_dir is not None else Path(HF_HOME) / "rdm_trl"


def weights_of(trainer) -> str:
    """Of all weights that draw the teacher's images."""
    conditions = (p for module in trainer.family.condition_modules() for p in module.parameters())
    return fingerprint([*trainer.model.frozen_parameters(), *conditions])


def describe(trainer, num_steps: int, guidance_scale: float) -> dict[str, Any]:
    """All that an image of the teacher depends on, but for its prompt and noise."""
    args, family = trainer.args, trainer.family
    return {
        "pipeline": type(family.pipeline).__name__,
        "weights": trainer.teacher_weights,
        "teacher_lora": trainer.model.adapter_config(TEACHER),
        "scheduler": json.loads(family.pipeline.scheduler.to_json_string()),
        "precision": [str(family.dtype), trainer.accelerator.mixed_precision],
        "num_steps": num_steps,
        "guidance_scale": guidance_scale,
        "negative_prompts": args.negative_prompts,
        "size": [size for size in (family.height, family.width, family.num_frames) if size],
        "prompt_limit": family.prompt_limit,
    }


def batches_of(
    trainer, prompts: list[str], num_steps: int, guidance_scale: float, seed: int
) -> list[tuple[list[str], Path]]:
    """The prompts of each batch that evaluation draws, and the file of its latents, whether it is there or not."""
    size, device = trainer.args.per_device_eval_batch_size, trainer.family.denoiser.device.type
    settings, folder = describe(trainer, num_steps, guidance_scale), cache_of(trainer.args) / "evaluated"
    chunks = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    keys = (
        digest(description({**settings, "prompts": [*map(prompt_key, chunk)], "seed": seed + i, "device": device}))
        for i, chunk in enumerate(chunks)
    )
    return [(chunk, folder / f"{key}.safetensors") for chunk, key in zip(chunks, keys, strict=True)]


def kept_images(
    trainer, prompts: list[str], num_steps: int, guidance_scale: float, seed: int, title: str | None
) -> tuple[torch.Tensor, float]:
    """
    Images (B, 3, H, W) in [0, 1] of the teacher by its own scheduler, as `sample_in_batches` draws them, and the
    seconds that each took. Their latents are drawn once and kept on disk, with that time: the next evaluation of the
    same teacher does not wait for them.
    """
    args, family = trainer.args, trainer.family
    images, seconds, device, sharded = [], 0.0, family.denoiser.device, trainer.model.sharded
    batches = batches_of(trainer, prompts, num_steps, guidance_scale, seed)
    for i, (chunk, file) in enumerate(tqdm(batches, desc=title, disable=title is None)):
        kept = load_file(file) if file.exists() else None
        if sharded:  # one process reads and writes for all, who draw together or not at all
            kept = broadcast_object_list([kept])[0]
        if kept is None:
            begin = time.perf_counter()
            draw = num_steps, guidance_scale, args.negative_prompts, torch.Generator().manual_seed(seed + i)
            latents = family.sample_latents(family.pipeline.scheduler, chunk, *draw).cpu()
            kept = {"latents": latents, "seconds": torch.tensor(time.perf_counter() - begin)}
            try:
                if trainer.is_world_process_zero():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_tensors(file, kept)
            except OSError as error:
                logger.warning_once(
                    f"The teacher's images cannot be kept in {file.parent}, and will be drawn again by the next run: "
                    f"{error}. Set `teacher_cache_dir`."
                )
        begin = time.perf_counter()
        with torch.no_grad():
            images.append(family.decode(kept["latents"].to(device)))
        seconds += kept["seconds"].item() + time.perf_counter() - begin
    return torch.cat(images), seconds / len(prompts)


class GuidedImages:
    """
    The guided teacher's images of the training prompts, drawn once and kept on disk.

    Image `i` depends on the teacher, its prompt and `i` alone: not on the run's seed, on how many images are drawn, at
    once or in all, or on the number of processes.

    Args:
        trainer (`RdmDistillTrainer`): whose teacher and prompts they are of.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        args = trainer.args
        self.prompts = image_prompts(trainer.train_dataset, trainer.family, args.num_teacher_images)
        # Which of the rows with images are drawn, the files' names say: the others were not read.
        self.suffixes = [f"-{digest(prompt_key(p))}" if isinstance(p, PicturePrompt) else "" for p in self.prompts]
        settings = describe(trainer, args.teacher_num_steps, args.teacher_guidance_scale)
        prompts = {"prompts": sorted(set(trainer.train_dataset["prompt"])), "images_of_a_prompt": 2}
        self.description = description(settings | prompts)
        self.key = broadcast_object_list([digest(self.description)])[0]
        self.folder = cache_of(args) / self.key

    def __call__(self) -> tuple[torch.Tensor, int]:
        """Latents (N, ...) of all images, in the computer's memory, and how many were drawn now."""
        trainer, args = self.trainer, self.trainer.args
        files = [self.folder / f"{i:06d}{suffix}.safetensors" for i, suffix in enumerate(self.suffixes)]
        images, main = {}, trainer.accelerator.is_main_process
        if main:  # one process reads and writes: another machine may not see this folder
            make_folder(self.folder)
            (self.folder / "description.json").write_text(self.description)
            images = {i: load_file(file)["latents"] for i, file in enumerate(files) if file.exists()}
        kept = broadcast_object_list([list(images)])[0]
        for start in range(0, len(kept), args.per_device_eval_batch_size):
            chunk = kept[start : start + args.per_device_eval_batch_size]
            images.update(broadcast_object_list([{i: images.get(i) for i in chunk}])[0])
        missing = [i for i in range(len(files)) if i not in images]
        rank, size = args.process_index, args.per_device_eval_batch_size
        hidden = args.disable_tqdm or not main or not missing
        bar = tqdm(desc="drawing the teacher's images", total=len(files), initial=len(kept), disable=hidden)
        for start in range(0, len(missing), size * args.world_size):
            turn = missing[start : start + size * args.world_size]
            own = turn[rank * size : (rank + 1) * size]
            # In shards all take part in every pass, of which some pipelines make one for each image: who has a smaller
            # share, draws what another does.
            drawn = self.draw([*own, *turn][: min(size, len(turn))] if trainer.model.sharded else own)
            drawn = gather_object(list(zip(own, drawn, strict=False)))
            for i, latents in drawn:
                images[i] = latents
                if main:
                    write_tensors(files[i], {"latents": latents})
            bar.update(len(drawn))
        bar.close()
        return torch.stack([images[i] for i in range(len(files))]), len(missing)

    def draw(self, rows: list[int]) -> list[torch.Tensor]:
        """Latents of some images, by the pipeline itself."""
        trainer, args = self.trainer, self.trainer.args
        if not rows:
            return []
        prompts, generators = [self.prompts[i] for i in rows], [torch.Generator().manual_seed(SEED + i) for i in rows]
        settings = args.teacher_num_steps, args.teacher_guidance_scale, args.negative_prompts
        with trainer.model.use(TEACHER), trainer.accelerator.autocast():
            scheduler = trainer.family.pipeline.scheduler
            latents = trainer.family.sample_latents(scheduler, prompts, *settings, generators)
        trainer._check_finite("teacher's image", latents.flatten(1).sum(1), prompts)
        return list(latents.cpu().contiguous())


def key_of_target(images: GuidedImages) -> str:
    """The name of all that the target depends on; no two runs of one name fit another target."""
    args = images.trainer.args
    weights = range_of_guidance(images.trainer.family, args.teacher_guidance_scale)
    draws = [args.num_teacher_images, LEVELS, target.KNOTS, target.RIDGE, target.LARGEST_CONTRAST, *weights]
    draws += [target.AHEAD_ABOVE, target.STEPS_AHEAD, target.AHEAD_FROM]
    rows = {"rows": images.suffixes} if any(images.suffixes) else {}
    return f"{images.key}-{digest(description({'draws': draws, **rows}))}"


def absorb_for(trainer, resumed_from: str | None):
    """`RdmDistillTrainer.absorb_guidance`: nothing is done where the target is there, or in the checkpoint."""
    images = GuidedImages(trainer)
    key = key_of_target(images)
    older = False
    if resumed_from is not None and trainer.target_key != key:
        trainer.target_key, trainer.target = checkpoint.read_target(Path(resumed_from))
        older = trainer.target is not None and trainer.target.ndim == 2
    if trainer.target_key != key:
        absorb_guidance(trainer, images, key)
    if older and len(trainer.target) > 1 and not trainer.args.resume_with_changes:
        raise ValueError(
            f"The checkpoint {resumed_from} is of before targets looked ahead, as this teacher's does now. Go on from "
            "it with the new one by `resume_with_changes`."
        )
    if trainer.learned_target is not None:
        trainer.learned_target.begin(images()[0], images.prompts)
    trainer.target_key = key


def absorb_guidance(trainer, images: GuidedImages, key: str):
    """
    Makes `trainer.target` what fits `images`, now or from the disk, and notes its cost.

    Raises:
        FloatingPointError: an image or a prediction is not finite.
        OSError: the cache cannot be written.
    """
    main, file = trainer.accelerator.is_main_process, images.folder / f"target-{key.split('-')[1]}.safetensors"
    start, drawn = time.perf_counter(), 0
    found = broadcast_object_list([load_file(file)["weights"] if main and file.exists() else None])[0]
    if found is None:
        trainer.encode_negative([trainer.args.negative_prompts])  # refused here, where the pipeline has none
        latents, drawn = images()
        found = fit_target(trainer, latents, images.prompts)
        if main:
            write_tensors(file, {"weights": found})
    trainer.target = found
    trainer.cost |= {"teacher_images": drawn, "target_seconds": time.perf_counter() - start}


def predict_halves(trainer, x_t, timesteps, condition) -> list[torch.Tensor]:
    """
    The teacher's two denoised predictions (B, ...) whose difference is guidance; and, where its pipeline makes the
    guided one of them, that.
    """
    negative, family = trainer.encode_negative([trainer.args.negative_prompts]), trainer.family
    outputs = family.halves(trainer.denoise_as_teacher, x_t, timesteps, condition, negative)
    if not family.embeds_guidance:
        outputs = *outputs, family.combine(*outputs, trainer.args.teacher_guidance_scale)
    return [trainer.process.to_x0(output, x_t, timesteps) for output in outputs]


def predict_guided(trainer, x_t, timesteps, condition) -> torch.Tensor:
    """The teacher's denoised prediction (B, ...) as its pipeline guides it."""
    negative, scale = trainer.encode_negative([trainer.args.negative_prompts]), trainer.args.teacher_guidance_scale
    output = trainer.family.guide(trainer.denoise_as_teacher, x_t, timesteps, condition, negative, scale)
    return trainer.process.to_x0(output, x_t, timesteps)


def range_of_guidance(family, guidance_scale: float) -> tuple[float, float]:
    """
    Weights of the difference of `halves` that stand for no guidance and for the sampler's. Of a network that takes the
    scale as an input the first half is guided already, by the student's scale; its output is taken as linear in it.
    """
    if not family.embeds_guidance or family.student_guidance_scale == 1:  # there the halves are one
        return 0.0, guidance_scale - 1
    return -1.0, (guidance_scale - 1) / (family.student_guidance_scale - 1) - 1


def look_ahead(trainer, x_t, timesteps, condition, guided: list[torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
    """
    The teacher's guided prediction (B, ...) where its sampler is `STEPS_AHEAD - 1` steps from `x_t` (B, ...) down.
    `guided`: the guided prediction at `x_t`, or nothing; `noise` (STEPS_AHEAD - 1, B, ...): of the steps.

    Steps are drawn, as DDPM's, not followed without noise: so what is ahead of two states is about as different as
    their predictions are, and its mean can stand for theirs.
    """
    process, fractions = trainer.process, trainer.process.fractions(timesteps)
    (x0,) = guided or [predict_guided(trainer, x_t, timesteps, condition)]
    for step, drawn in enumerate(noise, 1):
        earlier = process.timesteps_at(fractions * (1 - step / target.STEPS_AHEAD))
        x_t, timesteps = process.step_back(x_t, x0, timesteps, earlier, drawn), earlier
        x0 = predict_guided(trainer, x_t, timesteps, condition)
    return x0


def predict_target(trainer, x_t, timesteps, condition) -> torch.Tensor:
    """
    The target's denoised prediction (B, ...). Where it looks ahead, the mean of each group whose images share their
    noise level is moved to what is ahead of them; of others each image is.
    """
    args, (conditional, other, *guided) = trainer.args, predict_halves(trainer, x_t, timesteps, condition)
    fractions, weights = trainer.process.fractions(timesteps), trainer.target.to(x_t.device)
    found = target.predict(conditional, conditional - other, fractions, weights[0])
    if len(weights) == 1:
        return found
    noise = [policy.draw_noise(x_t.shape, x_t.device, args.mirrors_noise) for _ in range(1, target.STEPS_AHEAD)]
    # In shards all processes take part in every pass.
    rows = (fractions > target.AHEAD_FROM) | trainer.model.sharded
    if not rows.any():
        return found
    x_t, timesteps, fractions, conditional = x_t[rows], timesteps[rows], fractions[rows], conditional[rows]
    chosen, guided = {key: value[rows] for key, value in condition.items()}, [x0[rows] for x0 in guided]
    ahead = look_ahead(trainer, x_t, timesteps, chosen, guided, torch.stack(noise)[:, rows])
    shift = target.predict(conditional, ahead - conditional, fractions, weights[1]) - found[rows]
    shift = shift * target.share_ahead(fractions).view(-1, *(1,) * (shift.ndim - 1))
    size = args.num_generations if args.dm_timestep_sampling == "shared" else 1
    found[rows] += matching.group_mean(shift, size)
    return found


def fit_target(trainer, latents: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Weights (1, 2, KNOTS) of guidance, or (2, 2, KNOTS) with those of the look ahead, where it is needed."""
    moments = moments_of(trainer, latents, prompts)
    weights = target.fit(moments, *range_of_guidance(trainer.family, trainer.args.teacher_guidance_scale))
    error = sum(target.common_error(moments, weights)[2:]) / 2
    if error <= target.AHEAD_ABOVE:
        return weights[None]
    logger.warning_once(
        f"{error:.0f} % of the mean square error at high noise is what guidance with weights has wrong about single "
        "prompts: the target looks where the teacher's sampler goes, for which updates take longer."
    )
    return torch.stack([weights, target.fit(moments_of(trainer, latents, prompts, ahead=True), 0.0, 1.0)])


@torch.no_grad()
def moments_of(trainer, latents: torch.Tensor, prompts: list[str], ahead: bool = False) -> target.Moments:
    """
    What the fit has to know of the teacher's predictions of `latents` (N, ...) of `prompts`, each pair at `LEVELS`
    noise levels, pulled by guidance or to what is `ahead`. What is drawn depends neither on the global generators nor
    on the number of processes.
    """
    args, process, device = trainer.args, trainer.process, trainer.accelerator.device
    generator, found, rank = torch.Generator().manual_seed(SEED), [], args.process_index
    pairs = torch.arange(len(latents) // 2).repeat(LEVELS)
    fractions = target.draw_levels(len(pairs), generator)
    # As many passes on each process: in shards all take part in every one.
    own = pairs.new_tensor(range(rank, len(pairs) + -len(pairs) % args.world_size, args.world_size)) % len(pairs)
    hidden = args.disable_tqdm or not trainer.is_world_process_zero()
    title, draws = ("looking ahead", target.STEPS_AHEAD) if ahead else ("fitting the target", 1)
    for part in tqdm(own.split(args.per_device_eval_batch_size), desc=title, disable=hidden):
        timesteps, sides = process.timesteps_at(fractions[part]).to(device), []
        for side in range(2):
            rows = 2 * pairs[part] + side
            x0 = latents[rows].to(device)
            seeds = (SEED + len(latents) + 2 * i + side for i in part.tolist())  # none that an image was drawn from
            noise = (
                torch.randn(draws, *x0.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds
            )
            noise = torch.stack([*noise], 1).to(device)
            x_t = process.add_noise(x0, noise[0], timesteps)
            condition = trainer.encode([prompts[i] for i in rows])
            with trainer.accelerator.autocast():
                conditional, other, *guided = predict_halves(trainer, x_t, timesteps, condition)
                pull = conditional - other
                if ahead:
                    pull = look_ahead(trainer, x_t, timesteps, condition, guided, noise[1:]) - conditional
            sides.append([value.cpu() for value in (x0, conditional, pull)])  # not every device has double precision
        values = target.moments(*sides, process.fractions(timesteps).cpu())
        found += list(zip(part.tolist(), *values, strict=True))
    draws = {row[0]: row[1:] for row in gather_object(found)}  # the same of several are one
    values = zip(*(draws[i] for i in range(len(pairs))), strict=True)
    moments = target.Moments(*(torch.stack(value) for value in values))
    trainer._check_finite("prediction of the teacher's images", moments.square + moments.own.sum(1))
    return moments


def description(what: dict[str, Any]) -> str:
    """`what` as JSON, one text for one meaning."""
    ordered = dict(sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    return json.dumps(what, indent=2, **ordered) + "\n"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_folder(folder: Path):
    """Raises `OSError` where it cannot be made, and names the option."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"The teacher's images cannot be kept in {folder}: {error}. Set `teacher_cache_dir`.") from error
