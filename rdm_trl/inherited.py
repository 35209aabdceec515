# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What `TrainingArguments` and `accelerate launch` can say that has no meaning for a distillation: refused by name."""

import os
from dataclasses import MISSING

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from .models import sharding
from .models.sharding import FSDP2


# Options of `TrainingArguments` that would be without effect here, or fail: any value but the default is refused.
REFUSED = {
    "num_train_epochs": "a run is counted in updates; use `max_steps`",
    "neftune_noise_alpha": "the student has no embeddings of tokens",
    "label_smoothing_factor": "there are no labels",
    "label_names": "there are no labels",
    "include_num_input_tokens_seen": "there are no tokens to count",
    "average_tokens_across_devices": "there are no tokens to count",
    "use_liger_kernel": "its kernels are those of language models",
    "liger_kernel_config": "its kernels are those of language models",
    "use_cache": "a denoiser has no cache",
    "optim_target_modules": "only adapters are trained; choose their layers by `peft_config`",
    "bf16_full_eval": "evaluation draws in the precision of training; use `bf16`",
    "fp16_full_eval": "evaluation draws in the precision of training; use `bf16`",
    "prediction_loss_only": "evaluation has no loss: it draws and measures images",
    "eval_do_concat_batches": "evaluation draws and measures images",
    "eval_use_gather_object": "evaluation draws and measures images, on one process",
    "eval_accumulation_steps": "evaluation draws and measures images",
    "include_for_metrics": "evaluation draws and measures images",
    "batch_eval_metrics": "evaluation draws and measures images",
    "data_seed": "the order of the prompts is `seed`'s",
    "train_sampling_strategy": "prompts are drawn in groups, in an order of our own",
    "length_column_name": "prompts are drawn in groups, in an order of our own",
    "dataloader_drop_last": "batches are always complete",
    "fsdp_config": "FSDP is switched on by accelerate's configuration; docs/scaling.md shows it",
    "do_train": "it is for scripts, and ours trains",
    "do_predict": "it is for scripts, and ours does not read it",
    "do_eval": "it is for scripts; `eval_strategy` says when to evaluate",
}
# Numbers of updates that are read with the strategy "steps" alone.
STEPS = {"save_steps": "save_strategy", "eval_steps": "eval_strategy"}
# Beginnings of the names of optimizers that cannot serve student and fake score.
OPTIMIZERS = {
    "galore": "it projects the gradients of large matrices, and an adapter's are small",
    "apollo": "it projects the gradients of large matrices, and an adapter's are small",
    "lomo": "it updates all weights in the backward pass, also those that are not trained there",
    "adalomo": "it updates all weights in the backward pass, also those that are not trained there",
    "schedule_free": "its weights between updates are not those to draw with, which `ema_decay` averages here",
}


def check_inherited(config: TrainingArguments):
    """
    Raises `ValueError` for what would be ignored, fail or train something else. Called before `TrainingArguments`
    changes what was given, and fills in a language model's loss as what is best.
    """
    for name, reason in REFUSED.items():
        value, default = getattr(config, name), TrainingArguments.__dataclass_fields__[name].default
        off = value is False or value in (None, "no", [])  # the command line's default is not always the same
        if value != default and not (off and default in (MISSING, None, False, "no")):
            raise ValueError(f"`{name}` is {value!r}, but must be left out: {reason}.")
    optim = getattr(config.optim, "value", config.optim)
    for beginning, reason in OPTIMIZERS.items():
        if optim.startswith(beginning):
            raise ValueError(f"`optim` is {optim!r}, but must be another: {reason}.")
    for name, strategy in STEPS.items():
        chosen, default = getattr(config, strategy), TrainingArguments.__dataclass_fields__[name].default
        if getattr(config, name) != default and getattr(chosen, "value", chosen) != "steps":
            raise ValueError(
                f"`{name}` is {getattr(config, name)!r}, but `{strategy}` is {getattr(chosen, 'value', chosen)!r}: it "
                "would be without effect. Set the latter to 'steps', or leave one of the two out."
            )
    for prefix in ("", "fake_"):
        schedule, steps = getattr(config, f"{prefix}lr_scheduler_type"), getattr(config, f"{prefix}warmup_steps")
        if steps and getattr(schedule, "value", schedule) == "constant":
            raise ValueError(
                f"`{prefix}warmup_steps` is {steps}, but `{prefix}lr_scheduler_type='constant'` has no warm-up: use "
                "'constant_with_warmup'."
            )
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if getattr(config, name, None) not in (None, {}, {"use_reentrant": False}):
            raise ValueError(f"`{name}` must be left out: each role is recomputed in its own, not reentrant.")
    if config.remove_unused_columns:
        raise ValueError("`remove_unused_columns` must stay off: rewards may read the data set's other columns.")
    if config.auto_find_batch_size:
        raise ValueError("`auto_find_batch_size` must stay off: a smaller batch would split the groups.")
    if config.enable_jit_checkpoint:
        raise ValueError(
            "`enable_jit_checkpoint` must stay off: it saves in the middle of an update. SIGTERM ends a run behind "
            "its update anyway, with a checkpoint."
        )
    if config.fsdp:
        raise ValueError(f"`fsdp` must be left out: shards are switched on by {FSDP2}.")
    for engine, given, flag in (
        ("DeepSpeed", config.deepspeed, "ACCELERATE_USE_DEEPSPEED"),
        ("Megatron-LM", None, "ACCELERATE_USE_MEGATRON_LM"),
        ("accelerate's model parallelism", config.parallelism_config, "ACCELERATE_USE_PARALLELISM_CONFIG"),
    ):
        if given or parse_flag_from_env(flag):
            raise ValueError(
                f"{engine} is not supported: the fake score is trained beside the wrapped student, where its "
                "weights would stay in shards. Use DDP (`accelerate launch --num_processes N`), or where the base "
                f"does not fit FSDP2, by {FSDP2}."
            )
    choose_best_metric(config)


def choose_best_metric(config: TrainingArguments):
    """
    What "best" means to `load_best_model_at_end` and `save_strategy="best"`: by default the distance to the teacher.
    Of Fréchet distances the smallest is best.

    Raises:
        ValueError: checkpoints would not hold what is loaded.
    """
    if config.metric_for_best_model is None and (config.load_best_model_at_end or config.save_strategy == "best"):
        config.metric_for_best_model = "fid_teacher"
    if config.load_best_model_at_end and config.save_only_model:
        raise ValueError("`load_best_model_at_end` needs whole checkpoints: leave `save_only_model` out.")
    if config.greater_is_better is None and config.metric_for_best_model is not None:
        config.greater_is_better = "fid" not in config.metric_for_best_model


def check_best_metric(config: TrainingArguments, known: list[str]):
    """Raises `ValueError` for a `metric_for_best_model` that no evaluation of this run will have."""
    name = config.metric_for_best_model
    if name is not None and name.removeprefix("eval_") not in known:
        raise ValueError(
            f"`metric_for_best_model` is {name!r}, but evaluation measures {', '.join(known) or 'nothing'} here. "
            "`eval_feature_model` names the features of `fid_teacher` and `diversity`; rewards go by their names."
        )


def check_launcher(config: TrainingArguments):
    """What `accelerate launch` or its configuration file says is refused, or is the option it stands for."""
    if config.mixed_precision == "fp16":
        raise ValueError(
            "`fp16`, here or as accelerate's `mixed_precision`, is not supported: its gradients under- and overflow "
            "here. Use `bf16`."
        )
    if config.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"accelerate's `mixed_precision` is {config.mixed_precision!r}, but must be 'no' or 'bf16'.")
    config.bf16 = config.mixed_precision == "bf16"
    sharding.check_launcher(config.torch_compile)
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no" and not config.torch_compile:
        raise ValueError(f"accelerate's `dynamo_backend` is {backend!r}: use `torch_compile`, for all roles.")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", config.gradient_accumulation_steps)
    if str(steps) != str(config.gradient_accumulation_steps):
        raise ValueError(
            f"accelerate's `gradient_accumulation_steps` is {steps}, the config's "
            f"{config.gradient_accumulation_steps}: say it in the config."
        )
    accelerator = config.accelerator_config
    if (accelerator.gradient_accumulation_kwargs or {}).get("num_steps") is not None:
        raise ValueError("`accelerator_config` has `num_steps`: use `gradient_accumulation_steps`.")
    for name in ("split_batches", "dispatch_batches"):
        if getattr(accelerator, name):
            raise ValueError(f"`accelerator_config` has `{name}`, which would split the groups: leave it out.")
