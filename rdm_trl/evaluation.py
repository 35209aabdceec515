# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What a student is judged by. Features are `(N, D)`; all statistics are computed in float64."""

import sys
import time

import psutil
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import AutoImageProcessor, AutoModel

from .ddpo import scores_of
from .frames import as_frames, num_frames
from .guidance import batches_of, kept_images
from .prompts import split_rows


# Beginnings of the names of the components that draw.
DRAWING = ("unet", "transformer", "vae", "text_encoder")


class PretrainedFeatures(nn.Module):
    """
    Pooled features of an image model (DINOv2, CLIP's vision tower, ...) for Fréchet distances and diversity.

    `forward` takes images (B, 3, H, W) in [0, 1] and returns features (B, D) and `None` in place of class logits.

    Raises:
        OSError: there is no such model, or it is not one of images; names it.
    """

    def __init__(self, model_name_or_path: str):
        super().__init__()
        try:
            self.model = AutoModel.from_pretrained(model_name_or_path).eval().requires_grad_(False)
            processor = AutoImageProcessor.from_pretrained(model_name_or_path)
        except Exception as error:
            raise OSError(f"`eval_feature_model` {model_name_or_path!r} cannot be loaded: {error}") from error
        self.register_buffer("mean", torch.tensor(processor.image_mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(processor.image_std).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        size = self.model.config.image_size
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
        return self.model(pixel_values=(images - self.mean) / self.std).pooler_output, None


def feature_statistics(features: torch.Tensor) -> dict[str, torch.Tensor]:
    """`mean` (D,), `cov` (D, D) and `num_samples` of features (N, D)."""
    features = features.double()
    return {
        "mean": features.mean(0),
        "cov": features.T.cov(),
        "num_samples": torch.tensor(len(features)),
    }


def frechet_distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    r"""
    Fréchet distance between two Gaussians, "FID" where the features are Inception's (arXiv 1706.08500):
    \\(|m_1 - m_2|^2 + \mathrm{tr}(C_1 + C_2 - 2 (C_1 C_2)^{1/2})\\).
    """
    # C1 C2 is similar to a positive semi-definite matrix: the trace of its root is the sum of its eigenvalues' roots.
    root = torch.linalg.eigvals(first["cov"] @ second["cov"]).real.clamp(min=0).sqrt().sum()
    means = (first["mean"] - second["mean"]).square().sum()
    return (means + first["cov"].trace() + second["cov"].trace() - 2 * root).item()


def class_accuracy(logits: torch.Tensor, target: torch.Tensor) -> float:
    """Share of images whose largest logit (N, C) is their target class (N,)."""
    return (logits.argmax(1) == target).double().mean().item()


def diversity(features: torch.Tensor, prompts: list[str]) -> float:
    """
    Mean Euclidean distance between the features (N, D) of two different images of one prompt, averaged over the
    prompts that have at least two images (NaN if none has): collapse to one image per prompt is 0.
    """
    distances = []
    for prompt in dict.fromkeys(prompts):
        chosen = features[[i for i, other in enumerate(prompts) if other == prompt]].double()
        if len(chosen) > 1:
            distances.append(torch.pdist(chosen).mean())
    return torch.stack(distances).mean().item() if distances else float("nan")


class Judge:
    """
    Measures images of teacher, base and student with the same features.

    Args:
        features_of (*optional*): `images (B, 3, H, W) in [0, 1] -> (features, logits)`; or nothing is measured.
        reference (`dict`, *optional*): feature statistics of real images, for `fid`.
        classes (`dict[str, int]`, *optional*): the class that each prompt asks for, for `class_accuracy`.
    """

    def __init__(
        self,
        features_of: nn.Module | None = None,
        reference: dict[str, torch.Tensor] | None = None,
        classes: dict[str, int] | None = None,
    ):
        self.features_of, self.reference, self.classes = features_of, reference, classes
        self.teacher = None

    @property
    def names(self) -> list[str]:
        """Of the figures that a student can have."""
        known = {"fid": self.reference is not None, "fid_teacher": True, "class_accuracy": self.classes is not None}
        return [name for name, has in {**known, "diversity": True}.items() if has and self.features_of is not None]

    @torch.no_grad()
    def __call__(self, who: str, images: torch.Tensor, prompts: list[str]) -> dict[str, float]:
        """
        Figures of the images (B, 3, H, W) that `who` drew for `prompts` (B). The images of `"teacher"` are remembered:
        those of all others, judged later, have a `fid_teacher`. Of videos (B, 3, F, H, W) Fréchet distances are
        between all their frames; diversity is that of the frames' mean features, so that motion is none; and the class
        is that of the mean logits.
        """
        if self.features_of is None:
            return {}
        number = num_frames(images)
        outputs = [self.features_of.to(images.device)(chunk) for chunk in as_frames(images).split(100)]
        features = torch.cat([features for features, _ in outputs]).cpu()
        statistics = feature_statistics(features)
        figures = {}
        if self.reference is not None:
            figures["fid"] = frechet_distance(statistics, self.reference)
        if who == "teacher":
            self.teacher = statistics
        elif self.teacher is not None:
            figures["fid_teacher"] = frechet_distance(statistics, self.teacher)
        if self.classes is not None and all(prompt in self.classes for prompt in prompts):
            target = torch.tensor([self.classes[prompt] for prompt in prompts])
            logits = torch.cat([logits for _, logits in outputs]).cpu().unflatten(0, (-1, number)).mean(1)
            figures["class_accuracy"] = class_accuracy(logits, target)
        figures["diversity"] = diversity(features.unflatten(0, (-1, number)).mean(1), prompts)
        return figures


def sample(trainer, who: str, prompts: list[str], description: str | None, seed: int | None) -> torch.Tensor:
    """`RdmDistillTrainer.sample`, which see."""
    return draw(trainer, who, prompts, description, seed)[0]


def how_drawn(trainer, who: str) -> tuple[int, float]:
    """Number of steps and guidance scale of the images that a model is judged by."""
    args, unguided = trainer.args, trainer.family.student_guidance_scale
    if who == "teacher":
        return args.teacher_num_steps, args.teacher_guidance_scale
    return args.sample_num_steps, unguided


def draw(
    trainer, who: str, prompts: list[str], description: str | None, seed: int | None
) -> tuple[torch.Tensor, float]:
    """`sample`, and the seconds that an image took: of the teacher and the base, when it was drawn."""
    args, family = trainer.args, trainer.family
    num_steps, guidance_scale = how_drawn(trainer, who)
    role = "ema" if who == "student" else "teacher"
    scheduler = trainer.student_scheduler if who == "student" else family.pipeline.scheduler
    seed = args.seed if seed is None else seed
    title = None if args.disable_tqdm or not trainer.is_world_process_zero() else description
    with trainer.model.use(role), trainer.accelerator.autocast():
        if who != "student":
            return kept_images(trainer, prompts, num_steps, guidance_scale, seed, title)
        rest = args.negative_prompts, seed, args.per_device_eval_batch_size, title
        start = time.perf_counter()
        images = family.sample_in_batches(scheduler, prompts, num_steps, guidance_scale, *rest)
        if images.is_cuda:
            torch.cuda.synchronize()
        return images, (time.perf_counter() - start) / len(prompts)


def check_types(trainer):
    """
    Raises `ValueError` where components of several precisions cannot draw together, with which a run would fail at its
    first picture: hours later.
    """
    family, args = trainer.family, trainer.args
    components = {name: m for name, m in family.pipeline.components.items() if isinstance(m, nn.Module)}
    types = {name: m.dtype for name, m in components.items() if name.startswith(DRAWING)}
    if len(set(types.values())) < 2:
        return
    rest = args.sample_num_steps, family.student_guidance_scale, "", torch.Generator().manual_seed(args.seed)
    prompts, _ = split_rows([trainer.train_dataset[0]], family)
    try:
        with trainer.model.use("ema"), trainer.accelerator.autocast():
            family.sample(trainer.student_scheduler, prompts, *rest)
    except RuntimeError as error:
        found = ", ".join(f"{name} in {str(dtype).removeprefix('torch.')}" for name, dtype in types.items())
        raise ValueError(
            f"The pipeline has components of several precisions, and cannot draw with them: {found}. Load all of them "
            f"in one, or train with `bf16`, which casts between them. PyTorch says: {error}"
        ) from error


def drawn_rows(trainer, dataset: Dataset) -> tuple[list[str], list]:
    """Prompts and metadata of the images of an evaluation, in turn, `num_generations` of each."""
    args = trainer.args
    number = -(-args.num_eval_images // args.num_generations)
    # Those rows alone: an image may come with each.
    prompts, metadata = split_rows(list(dataset.select(range(min(number, len(dataset))))), trainer.family)
    chosen = [i % len(prompts) for i in range(number) for _ in range(args.num_generations)]
    return [prompts[i] for i in chosen], [metadata[i] for i in chosen]


def cost_of_first(trainer) -> str:
    """What the first evaluation will draw, in passes of the denoiser, for those who wait for it."""
    prompts, parts, total = drawn_rows(trainer, trainer.eval_dataset)[0], [], 0
    for who in ("teacher", "base", "student"):
        num_steps, guidance_scale = how_drawn(trainer, who)
        guided = who == "teacher" and guidance_scale > 1
        missing = len(prompts)
        if who != "student":
            batches = batches_of(trainer, prompts, num_steps, guidance_scale, trainer.args.seed)
            missing = sum(len(chunk) for chunk, file in batches if not file.exists())
        parts.append(f"{missing:,} of the {who} ({num_steps} step{'s' * (num_steps > 1)}{', guided' * guided})")
        total += missing * num_steps * (2 if guided and not trainer.family.embeds_guidance else 1)
    return (
        f"The first evaluation draws {', '.join(parts[:-1])} and {parts[-1]}: {total:,} passes of the denoiser. Those "
        "of teacher and base are kept for later ones. Fewer: `num_eval_images`."
    )


def measure(trainer, dataset: Dataset):
    """
    Fills `trainer.metrics` for `num_eval_images` images of the prompts in turn, `num_generations` of each; the
    teacher's and the base's figures only once, since they never change. Called by the main process, and in shards by
    all, whose part is to draw with it.
    """
    args, (prompts, metadata) = trainer.args, drawn_rows(trainer, dataset)
    for who in ("teacher", "base", "student"):
        if who != "student" and trainer._measured.get(who) == prompts:
            continue
        images, seconds = draw(trainer, who, prompts, f"evaluating the {who}", None)
        trainer._measured[who] = prompts
        if not trainer.is_world_process_zero():
            continue
        trainer.cost.setdefault("seconds_per_image", {})[who] = seconds
        rewards, _ = scores_of(trainer, images, prompts, metadata)
        named = dict(zip(trainer.rewards.names, rewards.nanmean(0).tolist(), strict=True))
        trainer.metrics[who] = {**trainer.judge(who, images, prompts), "rewards": named}
    trainer.metrics["note"] = f"{len(prompts)} images of each model, seed {args.seed}, {machine()}.{trainer.best_note}"


def flat_figures(metrics: dict, prefix: str) -> dict[str, float]:
    """`metrics` as `RdmDistillTrainer.evaluate` returns them."""
    results = {}
    for who, of in (("student", ""), ("base", "base_"), ("teacher", "teacher_")):
        figures = {**metrics[who], **metrics[who]["rewards"]}
        results |= {f"{prefix}_{of}{name}": value for name, value in figures.items() if name != "rewards"}
    return results


def peak_memory_mb() -> float:
    """Peak memory of the accelerator, or of the process where there is none, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # which Windows has not

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def machine() -> str:
    """The kind of machine, for figures that depend on it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, not run on a GPU"
