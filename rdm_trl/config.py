# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.

from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from ._trl import get_callable_name
from .checks import check_adversarial, check_defaults, check_grid, check_guidance, check_output_dir, check_type
from .inherited import check_inherited, check_launcher


# Options of `TrainingArguments` that are checked as ours are: it takes any value for them.
INHERITED = {
    "gradient_accumulation_steps": int,
    "seed": int,
    "save_steps": float,
    "max_grad_norm": float,
    "weight_decay": float,
    "bf16": bool,
}
# Of the teacher's images, and their number, where guidance is absorbed: by default.
TEACHER_GUIDANCE_SCALE = 1.75
NUM_TEACHER_IMAGES = 300
LARGEST_SEED = 2**32
# Schedules that need no more than the number of updates and of warm-up updates.
FAKE_SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


@dataclass
class RdmDistillConfig(TrainingArguments):
    r"""
    Configuration class for the [`RdmDistillTrainer`].

    This class includes only the parameters that are specific to distillation. For all others, see
    [`~transformers.TrainingArguments`]; as in GRPO, `per_device_train_batch_size` counts images, so that 32 with
    `num_generations=4` is eight prompts. These defaults differ from it: `per_device_train_batch_size=32`,
    `per_device_eval_batch_size=32`, `learning_rate=1e-3`, `lr_scheduler_type="linear"`, `max_steps=500`,
    `logging_steps=10`, `remove_unused_columns=False` and `report_to="none"`.

    Parameters:
        > Parameters that control sampling

        sample_num_steps (`int`, *optional*, defaults to `4`):
            Number K of denoising steps of the student.
        teacher_guidance_scale (`float`, *optional*):
            Guidance scale that the teacher draws with: what the student learns to do without. By default `1.75`, or
            `sample_guidance_scale` where that is given. For FLUX.1-dev it is the teacher's embedded guidance. Without
            effect on pipelines that have no guidance.
        teacher_num_steps (`int`, *optional*, defaults to `25`):
            Denoising steps that the teacher draws with.
        sample_guidance_scale (`float`, *optional*):
            Guidance scale inside R_dm, in place of absorbed guidance, which is off where this is given: a teacher that
            is not asked for images, but for its guided predictions. `1.0` is none. With `num_teacher_images=0` by
            default `teacher_guidance_scale`.
        negative_prompts (`str`, *optional*, defaults to `""`):
            Negative prompt of the teacher's guidance; empty, what the pipeline guides away from by itself.
        sample_sigmas (`list[float]`, *optional*):
            The student's own noise levels with a flow-matching pipeline, noisiest first: `sample_num_steps` falling
            numbers in (0, 1]. By default an even grid under the pipeline's shift.
        sample_timesteps (`list[float]`, *optional*):
            The same for pipelines with another kind of scheduler, as its timesteps: `[999, 749, 499, 249]` is the
            default for four steps.
        sample_height, sample_width (`int`, *optional*):
            Height and width of the images in pixels; the pipeline's own by default. Give both or neither.
        sample_num_frames (`int`, *optional*):
            Frames of a video, for text-to-video pipelines, whose call has it as `num_frames`; the pipeline's own by
            default. One more than a multiple of what the autoencoder compresses time by (Wan: 4, LTX-Video: 8).
        max_sequence_length (`int`, *optional*):
            Longest prompt in tokens, 1 to 512, for pipelines whose call has this option (SD3, FLUX and others);
            the pipeline's own by default. Their networks are as slow as this is large.
        prompt_cache_dir (`str`, *optional*):
            Folder that keeps the embeddings of prompts, so that later runs and other processes need not encode them.
        offload_encoders (`bool`, *optional*, defaults to `False`):
            Text encoders wait in the computer's memory and come to the device only to encode a new prompt or to draw
            samples: less memory, more time. With `prompt_cache_dir` prompts of an earlier run need none. They are then
            whole on each process, also where the base is in shards.
        num_teacher_images (`int`, *optional*):
            Absorbed guidance: so many images of the training prompts, in pairs of one prompt, are drawn by the guided
            teacher (`teacher_num_steps`, `teacher_guidance_scale`, its own scheduler) before the first update, and the
            target is fitted to them: the teacher with weights of its guidance and contrast at each noise level, and a
            look ahead where these are wrong about single prompts. It then takes the teacher's place in R_dm. An even
            number. By default `300` where `teacher_guidance_scale` is above 1 and `sample_guidance_scale` is not
            given, else `0`, which turns it off. Without effect on pipelines that have no guidance.
        learn_target (`bool`, *optional*, defaults to `False`):
            Beside absorbed guidance: a fourth adapter learns the teacher's images in step with the fake score and says
            how the images of a prompt differ, which guidance with weights does not know. For long runs, and teachers
            of many prompts and strong guidance; takes up to half more time, and nearly half more memory for adapters.
        teacher_cache_dir (`str`, *optional*):
            Folder that keeps the teacher's images, the target, and the latents that evaluation draws of teacher and
            base, so that later runs of the same teacher and prompts need not make them again; by default `rdm_trl` in
            Hugging Face's cache (`HF_HOME`).
        num_generations (`int`, *optional*, defaults to `4`):
            Images per prompt: the group. `per_device_train_batch_size` must be divisible by it.

        > Parameters that control importance sampling

        num_iterations (`int`, *optional*, defaults to `1`):
            Updates that learn from one rollout and the teacher's judgement of it. After each, the fake score learns
            what the student draws now, and the direction is taken again against it.
        steps_per_generation (`int`, *optional*):
            Batches that are drawn, one a step, before the first of them is used again; `gradient_accumulation_steps`
            by default, and a multiple of it.
        importance_sampling_level (`str`, *optional*, defaults to `"element"`):
            What the importance ratio of a used rollout is of: `"element"`, each latent element; `"step"`, the mean
            log-probability over elements (DDPO, Flow-GRPO); `"sequence"`, the full density; `"none"`, always 1.
        epsilon (`float`, *optional*):
            Clip range of the importance ratio; by default `1e-4` for `"step"`, whose ratios hardly leave 1, and `0.2`
            for the others.
        epsilon_high (`float`, *optional*):
            Upper clip range, where it differs from the lower one.
        target_kl (`float`, *optional*, defaults to `0.05`):
            Trust region: once the logged `ratio/kl`, the divergence per element from the policy that acted, exceeds
            it, the remaining updates of the loop draw rollouts of their own. `None` turns it off.

        > Parameters that control distribution matching

        dm_weight (`float`, *optional*, defaults to `1.0`):
            Weight of distribution matching.
        dm_centering (`str`, *optional*, defaults to `"group"`):
            What is taken out of the fake score's residuals: `"group"`, the mean over the other images of the prompt,
            which is the error that a lagging fake score makes for all of them (GNDM, ours); `"none"`, nothing (DMD).
            `"group"` needs `num_generations` of at least 2 and `dm_timestep_sampling="shared"`. With 4, 6, 8 ...
            images a prompt and no black-box reward they are drawn in mirrored pairs: from noise and its negative.
        dm_normalization (`str`, *optional*, defaults to `"group"`):
            What divides R_dm's direction: `"group"`, the scale averaged over the images of a prompt (GNDM);
            `"sample"`, each image's own scale (DMD); `"batch"`, the average over all images; `"none"`, nothing.
        dm_normalization_level (`str`, *optional*, defaults to `"image"`):
            What has a scale of its own: `"image"`, so that a direction's length is normalised (DMD's); `"element"`,
            each element of the latents, which then move in units of their own mean distance to the teacher (ours; for
            `"group"` and `"batch"`, which average it over several images).
        dm_timestep_sampling (`str`, *optional*, defaults to `"shared"`):
            How the noise levels of R_dm are drawn: `"shared"`, one draw for each prompt, so that a group's scale is
            that of one level; `"uniform"`, an independent draw for each image; `"stratified"`, one draw from each of
            `num_generations` equal parts of the range for the images of a prompt. With very few prompts an update the
            last two cover more levels.
        dm_estimator (`str`, *optional*, defaults to `"pathwise"`):
            `"pathwise"`, R_dm's gradient as a direction; `"policy_gradient"`, its scalar estimate as a reward like
            any other, normalised over the prompt's group, through the re-noising policy (far noisier; an ablation).
        dm_timestep_range (`list[float]`, *optional*, defaults to `[0.02, 0.98]`):
            Smallest and largest noise level of R_dm, as fractions of the training range (DMD's).
        dm_subintervals (`bool`, *optional*, defaults to `True`):
            Match the images of an exit step only at noise levels above the next step's, which is all that the rest of
            the trajectory sees of them (and train the fake score on them only there). `False` matches every step's
            images at all noise levels, as DMD2 does.

        > Parameters that control the fake score

        fake_updates (`int`, *optional*, defaults to `1`):
            Updates of the fake score for each update of the student, all on the student's rollout. With
            `dm_centering="none"` (DMD) take 3 or more, and a `learning_rate` of 5e-4, since twice of it gained DMD
            nothing: its direction has all of the fake score's lag.
        fake_learning_rate (`float`, *optional*, defaults to `5e-4`):
            Learning rate of the fake score, which uses the same kind of optimizer as the student.
        fake_lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            Learning rate schedule of the fake score, over all of its updates.
        fake_warmup_steps (`int`, *optional*, defaults to `0`):
            Updates of the fake score over which its learning rate rises from 0.

        > Parameters that control the student

        ema_decay (`float`, *optional*, defaults to `0.95`):
            Decay, per update, of the average of the student's weights, which is what is evaluated and saved.

        > Parameters that control resuming

        resume_with_changes (`bool`, *optional*, defaults to `False`):
            Whether `resume_from_checkpoint` may go on with other settings than the checkpoint's, which it otherwise
            refuses and names. The run is then not what either settings would give from the start: weights and
            optimizers are the checkpoint's, learning rates and all else the config's.

        > Parameters that control the rewards

        reward_funcs (`list[str]`, *optional*):
            Rewards, joined with the constructor's `reward_function` and behind it: names of built-ins
            (`"clip_score"`, see `rdm_trl.rewards.builtin`), dotted paths (`"my_rewards:redness"`), in Python also
            functions.
        reward_weights (`list[float]`, *optional*):
            Weight of each reward, in their order. What it means depends on `reward_mixing`. By default `1.0`, but
            with `"adaptive"` differentiable rewards have `0.3` together.
        reward_mixing (`str`, *optional*, defaults to `"adaptive"`):
            How rewards join distribution matching: `"sum"`, the plain weighted sum (DMDR); `"adaptive"`, each reward's
            push scaled against distribution matching's, so that its weight is a share (GNDMR); `"constrained"`, as
            adaptive within a budget for the distance to the teacher, `target_dm`.
        target_dm (`float`, *optional*):
            Budget of `reward_mixing="constrained"` for the estimated KL divergence to the teacher, in the units of
            the logged `-rewards/distribution_matching/mean`.
        reward_gradients (`bool`, *optional*, defaults to `True`):
            Differentiate the rewards that declare themselves `differentiable` (ReFL). `False` treats all as black
            boxes.
        reward_gradient_steps (`int`, *optional*):
            At how many of the student's last steps differentiable rewards act; at all by default. What the early steps
            predict is a blurred mean of many images, and a reward's gradient there moves the whole distribution.
        reward_frame_stride (`int`, *optional*):
            Of a video each reward of images scores every so many-th frame, from the first, and the mean counts; every
            frame by default. A reward with an attribute `whole_clip = True` is given the whole.
        reward_warmup (`int`, *optional*, defaults to `0`):
            Updates of distribution matching alone before the rewards join.
        reward_timeout (`float`, *optional*):
            Seconds that a reward may take for a batch before the run stops with an error.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            What divides a black-box reward's advantage: the standard deviation over the images of a prompt
            (`"group"`) or over all images (`"batch"`), or nothing (`"none"`).
        multi_objective_aggregation (`str`, *optional*, defaults to `"normalize_then_sum"`):
            How `reward_mixing="sum"` makes one advantage of several black-box rewards, with GRPO's formulas:
            `"normalize_then_sum"`, or GRPO's own default `"sum_then_normalize"`, with which the reward of the largest
            scale wins. The sum then counts with the rewards' total weight. The other mixings normalise each reward.

        > Parameters that control real images

        adversarial_weight (`float`, *optional*, defaults to `0.0`):
            Weight of a discriminator's log-odds as a differentiable reward, which `reward_mixing` mixes like any
            other: DMD2's with `"sum"`, else a share. `0` trains none.
        image_dataset (`str`, *optional*):
            Path or Hub id of a data set, or a folder of images: what the student's images are compared with. A column
            `prompt`, where there is one, has their captions. Encoded once and kept in `teacher_cache_dir`.
        image_column (`str`, *optional*, defaults to `"image"`):
            Its column of images.

        > Parameters that control evaluation and logging

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
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the student."})
    lr_scheduler_type: SchedulerType | str = field(
        default="linear", metadata={"help": "Learning rate schedule of the student."}
    )
    max_steps: int = field(default=500, metadata={"help": "Updates of the student."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many updates."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Kept off: other columns than `prompt` are for the rewards."}
    )
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Where to report logs: `tensorboard`, `wandb`, `trackio`, ..., or `none`."}
    )

    # Parameters that control sampling
    sample_num_steps: int = field(default=4, metadata={"help": "Number of denoising steps of the student."})
    teacher_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale that the teacher draws with; 1.75 by default."}
    )
    teacher_num_steps: int = field(default=25, metadata={"help": "Denoising steps that the teacher draws with."})
    sample_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale inside R_dm, in place of absorbed guidance."}
    )
    negative_prompts: str = field(default="", metadata={"help": "Negative prompt of the teacher's guidance."})
    sample_sigmas: list[float] | None = field(
        default=None, metadata={"help": "Noise levels of the student's steps, for flow-matching pipelines."}
    )
    sample_timesteps: list[float] | None = field(
        default=None, metadata={"help": "Timesteps of the student's steps, for all other pipelines."}
    )
    sample_height: int | None = field(default=None, metadata={"help": "Height of the images in pixels."})
    sample_width: int | None = field(default=None, metadata={"help": "Width of the images in pixels."})
    sample_num_frames: int | None = field(default=None, metadata={"help": "Frames of a video."})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens, for pipelines whose call has this option."}
    )
    prompt_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder that keeps the embeddings of prompts for later runs."}
    )
    offload_encoders: bool = field(
        default=False, metadata={"help": "Text encoders are on the device only while they encode."}
    )
    num_teacher_images: int | None = field(
        default=None,
        metadata={"help": "Images of the guided teacher that R_dm's is fitted to: 300, or 0 without guidance."},
    )
    learn_target: bool = field(
        default=False, metadata={"help": "An adapter learns how the teacher's images of a prompt differ."}
    )
    teacher_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder that keeps the teacher's images and what learned them."}
    )
    num_generations: int = field(default=4, metadata={"help": "Images per prompt: the group."})

    # Parameters that control importance sampling
    num_iterations: int = field(default=1, metadata={"help": "Updates that learn from one rollout."})
    steps_per_generation: int | None = field(
        default=None,
        metadata={"help": "Batches drawn before one is used again; `gradient_accumulation_steps` by default."},
    )
    importance_sampling_level: str = field(
        default="element",
        metadata={
            "help": "What the importance ratio is of.",
            "choices": ["element", "step", "sequence", "none"],
        },
    )
    epsilon: float | None = field(
        default=None, metadata={"help": "Clip range of the importance ratio: 0.2, or 1e-4 at the level `step`."}
    )
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range; as the lower by default."})
    target_kl: float | None = field(
        default=0.05, metadata={"help": "Divergence from the acting policy that ends the use of a rollout."}
    )

    # Parameters that control distribution matching
    dm_weight: float = field(default=1.0, metadata={"help": "Weight of distribution matching."})
    dm_centering: str = field(
        default="group",
        metadata={"help": "What is taken out of the fake score's residuals.", "choices": ["group", "none"]},
    )
    dm_normalization: str = field(
        default="group",
        metadata={
            "help": "What divides the direction of R_dm.",
            "choices": ["group", "sample", "batch", "none"],
        },
    )
    dm_normalization_level: str = field(
        default="image",
        metadata={"help": "What has a scale of its own.", "choices": ["image", "element"]},
    )
    dm_timestep_sampling: str = field(
        default="shared",
        metadata={
            "help": "How the noise levels of R_dm are drawn within a prompt's group.",
            "choices": ["shared", "uniform", "stratified"],
        },
    )
    dm_estimator: str = field(
        default="pathwise",
        metadata={
            "help": "R_dm as the gradient it has, or as a scalar reward through the policy gradient.",
            "choices": ["pathwise", "policy_gradient"],
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
    fake_updates: int = field(default=1, metadata={"help": "Fake-score updates for each update of the student."})
    fake_learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of the fake score."})
    fake_lr_scheduler_type: SchedulerType | str = field(
        default="constant", metadata={"help": "Learning rate schedule of the fake score, over all of its updates."}
    )
    fake_warmup_steps: int = field(default=0, metadata={"help": "Warm-up of the fake score, in its updates."})

    # Parameters that control the student
    ema_decay: float = field(default=0.95, metadata={"help": "Decay, per update, of the student's average."})

    # Parameters that control resuming
    resume_with_changes: bool = field(
        default=False, metadata={"help": "Whether to go on from a checkpoint of other settings."}
    )

    # Parameters that control the rewards
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Rewards: names of built-ins or dotted paths, as my_rewards:redness."}
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of each reward; 1.0 by default, adaptive differentiable ones 0.3 together."},
    )
    reward_mixing: str = field(
        default="adaptive",
        metadata={
            "help": "How rewards join distribution matching: DMDR's sum, GNDMR's shares, or within a budget.",
            "choices": ["sum", "adaptive", "constrained"],
        },
    )
    target_dm: float | None = field(
        default=None, metadata={"help": "Budget of the constrained mixing for the KL divergence to the teacher."}
    )
    reward_gradients: bool = field(
        default=True, metadata={"help": "Differentiate rewards that declare themselves differentiable."}
    )
    reward_gradient_steps: int | None = field(
        default=None, metadata={"help": "Differentiable rewards act at so many of the last steps; all by default."}
    )
    reward_frame_stride: int | None = field(default=None, metadata={"help": "Every so many-th frame is scored."})
    reward_warmup: int = field(default=0, metadata={"help": "Updates of distribution matching alone, at first."})
    reward_timeout: float | None = field(default=None, metadata={"help": "Seconds that a reward may take."})
    multi_objective_aggregation: str = field(
        default="normalize_then_sum",
        metadata={
            "help": "How the sum mixing makes one advantage of several black-box rewards.",
            "choices": ["normalize_then_sum", "sum_then_normalize"],
        },
    )
    scale_rewards: str = field(
        default="group",
        metadata={"help": "Whose standard deviation divides the advantage.", "choices": ["group", "batch", "none"]},
    )

    # Parameters that control real images
    adversarial_weight: float = field(default=0.0, metadata={"help": "Weight of a discriminator's reward; 0: none."})
    image_dataset: str | None = field(default=None, metadata={"help": "Data set or folder of real images."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})

    # Parameters that control evaluation and logging
    num_eval_images: int = field(default=1000, metadata={"help": "Images of each model that evaluation compares."})
    eval_feature_model: str | None = field(
        default=None, metadata={"help": "Image model whose pooled features serve for FID and diversity."}
    )
    log_images_steps: int = field(
        default=100, metadata={"help": "Save a sample grid every so many updates; 0: never."}
    )
    num_log_images: int = field(default=10, metadata={"help": "Prompts in a sample grid."})

    def __post_init__(self):
        self._check_types()
        check_inherited(self)
        super().__post_init__()
        check_launcher(self)
        for name, choices in (
            ("dm_centering", ("group", "none")),
            ("dm_normalization", ("group", "sample", "batch", "none")),
            ("dm_normalization_level", ("image", "element")),
            ("dm_timestep_sampling", ("shared", "uniform", "stratified")),
            ("dm_estimator", ("pathwise", "policy_gradient")),
            ("importance_sampling_level", ("element", "step", "sequence", "none")),
            ("scale_rewards", ("group", "batch", "none")),
            ("reward_mixing", ("sum", "adaptive", "constrained")),
            ("multi_objective_aggregation", ("normalize_then_sum", "sum_then_normalize")),
            ("fake_lr_scheduler_type", FAKE_SCHEDULES),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"`{name}` is {value!r}, but must be one of {', '.join(choices)}.")
        for name in ("teacher_guidance_scale", "sample_guidance_scale"):  # before one stands in for the other
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least 1.")
        if self.teacher_guidance_scale is None:
            self.teacher_guidance_scale = self.sample_guidance_scale or TEACHER_GUIDANCE_SCALE
        if self.num_teacher_images is None:
            absorbs = self.sample_guidance_scale is None and self.teacher_guidance_scale > 1
            self.num_teacher_images = NUM_TEACHER_IMAGES if absorbs else 0
        if self.sample_guidance_scale is None:
            self.sample_guidance_scale = 1.0 if self.num_teacher_images else self.teacher_guidance_scale
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.epsilon is None:
            self.epsilon = 1e-4 if self.importance_sampling_level == "step" else 0.2
        for name, smallest in (
            ("max_steps", 1),  # a run is counted in updates, not epochs
            ("per_device_train_batch_size", 1),
            ("per_device_eval_batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("learning_rate", 0),
            ("fake_learning_rate", 0),
            ("weight_decay", 0),
            ("max_grad_norm", 0),
            ("seed", 0),
            ("sample_num_steps", 1),
            ("num_generations", 1),
            ("num_iterations", 1),
            ("fake_updates", 1),
            ("teacher_num_steps", 1),
            ("num_eval_images", 2),
            ("num_log_images", 1),
            ("log_images_steps", 0),
            ("fake_warmup_steps", 0),
            ("dm_weight", 0),
            ("adversarial_weight", 0),
            ("reward_warmup", 0),
            ("num_teacher_images", 0),
        ):
            if getattr(self, name) < smallest:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least {smallest}.")
        if self.seed > LARGEST_SEED - self.world_size:  # each process has one of its own
            raise ValueError(f"`seed` is {self.seed}, but must be below {LARGEST_SEED}, which NumPy can count to.")
        check_guidance(self)
        check_adversarial(self)
        if self.dm_normalization == "group" and self.num_generations < 2:
            raise ValueError(
                "`dm_normalization='group'` needs `num_generations` of at least 2: one image has no group. Use "
                "`dm_normalization='sample'` (DMD) for single images."
            )
        if self.dm_centering == "group":
            for name, value, needed in (
                ("num_generations", self.num_generations, self.num_generations >= 2),
                ("dm_timestep_sampling", self.dm_timestep_sampling, self.dm_timestep_sampling == "shared"),
                ("dm_estimator", self.dm_estimator, self.dm_estimator == "pathwise"),
            ):
                if not needed:
                    raise ValueError(
                        "`dm_centering='group'` centres the directions of several images of a prompt at one noise "
                        f"level, but `{name}` is {value!r}. Use `dm_centering='none'` (DMD) with it."
                    )
        several = self.dm_normalization in ("group", "batch") and self.per_device_train_batch_size > 1
        if self.dm_normalization_level == "element" and not several:
            raise ValueError(
                "`dm_normalization_level='element'` is averaged over images: it needs `dm_normalization` 'group' or "
                f"'batch', which is {self.dm_normalization!r}, and several images a step."
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
        if (self.reward_mixing == "constrained") != (self.target_dm is not None):
            raise ValueError("`target_dm` is the budget of `reward_mixing='constrained'`: give both or neither.")
        if self.steps_per_generation < 1 or self.steps_per_generation % self.gradient_accumulation_steps != 0:
            raise ValueError(
                f"`steps_per_generation` ({self.steps_per_generation}) must be a multiple of "
                f"`gradient_accumulation_steps` ({self.gradient_accumulation_steps}): an update never mixes new "
                "rollouts with used ones."
            )
        positive = ("epsilon", "epsilon_high", "target_kl", "target_dm", "reward_timeout", "reward_gradient_steps")
        for name in (*positive, "reward_frame_stride", "save_steps"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be positive.")
        if self.dm_estimator == "policy_gradient" and self.num_generations < 2:
            raise ValueError(
                "`dm_estimator='policy_gradient'` compares the images of a prompt: `num_generations` >= 2."
            )
        check_grid(self)
        check_defaults()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` is {self.ema_decay}, but must be in [0, 1).")
        if self.dm_estimator == "policy_gradient" and self.num_iterations > 1:
            raise ValueError("`dm_estimator='policy_gradient'` is on-policy here: `num_iterations` must be 1.")
        check_output_dir(self.output_dir)

    def _check_types(self):
        """What a YAML file or a caller gives is not converted: `4.0` images, or text in place of a list."""
        kinds = {**RdmDistillConfig.__annotations__, **INHERITED}
        for name, kind in kinds.items():
            if name == "reward_funcs" and isinstance(self.reward_funcs, list):
                continue  # functions are allowed; `resolve_reward` checks each
            if name not in ("lr_scheduler_type", "fake_lr_scheduler_type", "report_to"):
                check_type(name, getattr(self, name), kind)

    @property
    def mirrors_noise(self) -> bool:
        """
        Whether the images of a prompt are drawn in mirrored pairs, of which centring needs at least two. The trainer
        does not while black boxes act: in an image's baseline are the others' rewards, which must not know of its
        noise.
        """
        return self.dm_centering == "group" and self.num_generations >= 4 and self.num_generations % 2 == 0

    @property
    def prompts_per_generation(self) -> int:
        """Prompts of all processes that are drawn before one of their rollouts is used again."""
        return self.per_device_train_batch_size // self.num_generations * self.world_size * self.steps_per_generation

    @property
    def prompts_in_all(self) -> int:
        """Prompts of all processes that the run draws, used rollouts counted once."""
        updates = -(-self.max_steps * self.gradient_accumulation_steps // self.num_iterations)
        return -(-updates // self.steps_per_generation) * self.prompts_per_generation

    def to_dict(self):
        """As in `TrainingArguments`, with functions among `reward_funcs` by name, for logs and checkpoints."""
        values = super().to_dict()
        if self.reward_funcs is not None:
            values["reward_funcs"] = [
                reward if isinstance(reward, str) else get_callable_name(reward) for reward in self.reward_funcs
            ]
        return values
