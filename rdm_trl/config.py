# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.

from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType


@dataclass
class RdmDistillConfig(TrainingArguments):
    r"""
    Configuration class for the [`RdmDistillTrainer`].

    This class includes only the parameters that are specific to distillation. For all others, see
    [`~transformers.TrainingArguments`]; as in GRPO, `per_device_train_batch_size` counts images, so that 32 with
    `num_generations=4` is eight prompts. These defaults differ from it: `per_device_train_batch_size=32`,
    `per_device_eval_batch_size=32`, `learning_rate=5e-5`, `lr_scheduler_type="constant"`, `max_steps=1000`,
    `logging_steps=10`, `remove_unused_columns=False` and `report_to="none"`.

    Parameters:
        > Parameters that control sampling

        sample_num_steps (`int`, *optional*, defaults to `4`):
            Number K of denoising steps of the student.
        sample_guidance_scale (`float`, *optional*, defaults to `1.75`):
            Guidance scale of the teacher, which the student learns to do without; `1.0` turns it off.
        negative_prompts (`str`, *optional*, defaults to `""`):
            Negative prompt of the teacher's guidance.
        num_generations (`int`, *optional*, defaults to `4`):
            Images per prompt: the group. `per_device_train_batch_size` must be divisible by it.

        > Parameters that control distribution matching

        dm_weight (`float`, *optional*, defaults to `1.0`):
            Weight of distribution matching.
        dm_normalization (`str`, *optional*, defaults to `"group"`):
            What divides R_dm's direction: `"group"`, the scale averaged over the images of a prompt (GNDM);
            `"sample"`, each image's own scale (DMD); `"batch"`, the average over all images; `"none"`, nothing.
        dm_timestep_sampling (`str`, *optional*, defaults to `"uniform"`):
            How the noise levels of R_dm are drawn: `"uniform"`, an independent draw for each image; `"stratified"`,
            one draw from each of `num_generations` equal parts of the range for the images of a prompt; `"shared"`,
            one draw for each prompt.
        dm_timestep_range (`list[float]`, *optional*, defaults to `[0.02, 0.98]`):
            Smallest and largest noise level of R_dm, as fractions of the training range (DMD's).

        dm_subintervals (`bool`, *optional*, defaults to `True`):
            Match the images of an exit step only at noise levels above the next step's, which is all that the rest of
            the trajectory sees of them (and train the fake score on them only there). `False` matches every step's
            images at all noise levels, as DMD2 does.

        > Parameters that control the fake score

        fake_updates (`int`, *optional*, defaults to `5`):
            Updates of the fake score for each update of the student, all on the student's rollout.
        fake_learning_rate (`float`, *optional*, defaults to `5e-5`):
            Learning rate of the fake score, which uses the same kind of optimizer as the student.
        fake_lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Learning rate schedule of the fake score, over all of its updates.
        fake_warmup_steps (`int`, *optional*, defaults to `0`):
            Updates of the fake score over which its learning rate rises from 0.

        > Parameters that control the student

        ema_decay (`float`, *optional*, defaults to `0.95`):
            Decay, per update, of the average of the student's weights, which is what is evaluated and saved.

        > Parameters that control the rewards

        reward_weights (`list[float]`, *optional*):
            Weight of each reward function, in their order; all `1.0` by default.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            What divides the advantage: the standard deviation over the images of a prompt (`"group"`) or over all
            images (`"batch"`), or nothing (`"none"`).
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Clip range of the importance ratio (of densities averaged over elements, as in DDPO).

        > Parameters that control evaluation and logging

        teacher_num_steps (`int`, *optional*, defaults to `25`):
            Denoising steps of the teacher's own samples, with guidance, in evaluation and sample grids.
        num_eval_images (`int`, *optional*, defaults to `1000`):
            Images of each model that `evaluate` compares, `num_generations` of a prompt.
        eval_feature_model (`str`, *optional*):
            Path or Hub id of an image model (`AutoModel`) whose pooled features serve for Fréchet distances and
            diversity. The embedded pipeline brings its own; for any other, `None` leaves those figures out.
        log_images_steps (`int`, *optional*, defaults to `100`):
            Save a sample grid (teacher, base, student; same prompts and noise) every so many updates, and at the end.
            `0` turns grids off.
        num_log_images (`int`, *optional*, defaults to `10`):
            Prompts in a sample grid.
    """

    # Parameters whose default values are overridden from TrainingArguments
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Images a step and device."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Images sampled at once in evaluation."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of the student."})
    lr_scheduler_type: SchedulerType | str = field(
        default="constant", metadata={"help": "Learning rate schedule of the student."}
    )
    max_steps: int = field(default=1000, metadata={"help": "Updates of the student."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many updates."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Kept off: other columns than `prompt` are for the rewards."}
    )
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Where to report logs: `tensorboard`, `wandb`, `trackio`, ..., or `none`."}
    )

    # Parameters that control sampling
    sample_num_steps: int = field(default=4, metadata={"help": "Number of denoising steps of the student."})
    sample_guidance_scale: float = field(
        default=1.75, metadata={"help": "Guidance scale of the teacher, which the student learns to do without."}
    )
    negative_prompts: str = field(default="", metadata={"help": "Negative prompt of the teacher's guidance."})
    num_generations: int = field(default=4, metadata={"help": "Images per prompt: the group."})

    # Parameters that control distribution matching
    dm_weight: float = field(default=1.0, metadata={"help": "Weight of distribution matching."})
    dm_normalization: str = field(
        default="group",
        metadata={
            "help": "What divides the direction of R_dm.",
            "choices": ["group", "sample", "batch", "none"],
        },
    )
    dm_timestep_sampling: str = field(
        default="uniform",
        metadata={
            "help": "How the noise levels of R_dm are drawn within a prompt's group.",
            "choices": ["uniform", "stratified", "shared"],
        },
    )
    dm_timestep_range: list[float] = field(
        default_factory=lambda: [0.02, 0.98],
        metadata={"help": "Smallest and largest noise level of R_dm, as fractions of the training range."},
    )

    dm_subintervals: bool = field(
        default=True, metadata={"help": "Match a step's images only at noise levels above the next step's."}
    )

    # Parameters that control the fake score
    fake_updates: int = field(default=5, metadata={"help": "Fake-score updates for each update of the student."})
    fake_learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of the fake score."})
    fake_lr_scheduler_type: SchedulerType | str = field(
        default="constant", metadata={"help": "Learning rate schedule of the fake score, over all of its updates."}
    )
    fake_warmup_steps: int = field(default=0, metadata={"help": "Warm-up of the fake score, in its updates."})

    # Parameters that control the student
    ema_decay: float = field(default=0.95, metadata={"help": "Decay, per update, of the student's average."})

    # Parameters that control the rewards
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function; all 1.0 by default."}
    )
    scale_rewards: str = field(
        default="group",
        metadata={"help": "Whose standard deviation divides the advantage.", "choices": ["group", "batch", "none"]},
    )
    epsilon: float = field(default=1e-4, metadata={"help": "Clip range of the importance ratio."})

    # Parameters that control evaluation and logging
    teacher_num_steps: int = field(default=25, metadata={"help": "Denoising steps of the teacher's own samples."})
    num_eval_images: int = field(default=1000, metadata={"help": "Images of each model that evaluation compares."})
    eval_feature_model: str | None = field(
        default=None, metadata={"help": "Image model whose pooled features serve for FID and diversity."}
    )
    log_images_steps: int = field(
        default=100, metadata={"help": "Save a sample grid every so many updates; 0: never."}
    )
    num_log_images: int = field(default=10, metadata={"help": "Prompts in a sample grid."})

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (
            ("dm_normalization", ("group", "sample", "batch", "none")),
            ("dm_timestep_sampling", ("uniform", "stratified", "shared")),
            ("scale_rewards", ("group", "batch", "none")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"`{name}` is {value!r}, but must be one of {', '.join(choices)}.")
        for name, smallest in (
            ("sample_num_steps", 1),
            ("num_generations", 1),
            ("fake_updates", 1),
            ("teacher_num_steps", 1),
            ("num_eval_images", 2),
            ("num_log_images", 1),
            ("log_images_steps", 0),
            ("fake_warmup_steps", 0),
            ("dm_weight", 0),
            ("sample_guidance_scale", 1),
        ):
            if getattr(self, name) < smallest:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least {smallest}.")
        if self.dm_normalization == "group" and self.num_generations < 2:
            raise ValueError(
                "`dm_normalization='group'` needs `num_generations` of at least 2: one image has no group. Use "
                "`dm_normalization='sample'` (DMD) for single images."
            )
        if self.per_device_train_batch_size % self.num_generations != 0:
            raise ValueError(
                f"`per_device_train_batch_size` ({self.per_device_train_batch_size}) must be divisible by "
                f"`num_generations` ({self.num_generations}): a group of images of one prompt is never split."
            )
        low, high = self.dm_timestep_range if len(self.dm_timestep_range) == 2 else (1, 0)
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"`dm_timestep_range` is {self.dm_timestep_range}, but must be two rising fractions in [0, 1]."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` is {self.ema_decay}, but must be in [0, 1).")
        if self.epsilon <= 0:
            raise ValueError(f"`epsilon` is {self.epsilon}, but must be positive.")
        if self.fp16:
            raise ValueError("`fp16` is not supported: its gradients under- and overflow here. Use `bf16`.")
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must stay off: rewards may read the data set's other columns.")
        if Path(self.output_dir).is_file():
            raise ValueError(f"`output_dir` is a file: {self.output_dir}. Give a folder.")
