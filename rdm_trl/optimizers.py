# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Optimizers and schedules of the student and of what learns beside it."""

import torch
from torch import nn
from transformers import get_scheduler

from .method.fake_score import FakeScore


def check_optimizers(trainer):
    """
    Raises `ValueError` for an optimizer or schedule of the user's own, which can know nothing of the parameters that
    the trainer has made; and what those of the config raise: before the teacher draws for hours.
    """
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise ValueError(
            "`optimizers` must be left out: the trainer makes the adapters, which no optimizer from before can hold. "
            "Use `optim` and `lr_scheduler_type`, or set `trainer.optimizer` before `train()`, an optimizer of "
            '`trainer.model.adapter_parameters("student")`.'
        )
    args, parameter = trainer.args, nn.Parameter(torch.zeros(1))
    warmup = args.get_warmup_steps(args.max_steps)
    kwargs = {"scheduler_specific_kwargs": args.lr_scheduler_kwargs}
    get_scheduler(args.lr_scheduler_type, make_optimizer(trainer, [parameter]), warmup, args.max_steps, **kwargs)


def make_optimizer(trainer, parameters: list[nn.Parameter], **options) -> torch.optim.Optimizer:
    """What `optim` and its companions say, with some of its `options` otherwise."""
    args = trainer.args
    optimizer_class, kwargs = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    return optimizer_class(parameters, weight_decay=args.weight_decay, **{**kwargs, **options})


def create_optimizers(trainer) -> torch.optim.Optimizer:
    """
    `RdmDistillTrainer.create_optimizer`: the student's, and beside it the fake score's and the discriminator's. All
    schedules begin with each `train()`, as `Trainer`'s own does.

    Raises:
        ValueError: `trainer.optimizer` was set to one that does not train the student, or not it alone.
    """
    student = trainer.model.adapter_parameters("student")
    if trainer.optimizer is None:
        trainer.optimizer = make_optimizer(trainer, student)
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    if held != {id(parameter) for parameter in student}:
        raise ValueError(
            "`trainer.optimizer` must hold the student's parameters and no others: "
            '`trainer.model.adapter_parameters("student")`.'
        )
    others = [other for other in (trainer.adversary, trainer.learned_target) if other is not None]
    if trainer.fake_score is None:
        trainer.fake_score = make_score(trainer, trainer.model.adapter_parameters("fake"), "fake score")
        for other in others:
            other.create_score()
    else:
        for score in (trainer.fake_score, *(other.score for other in others)):
            score.scheduler = fake_schedule(trainer.args, score.optimizer)
    return trainer.optimizer


def make_score(trainer, parameters: list[nn.Parameter], name: str, rate: float = 1.0) -> FakeScore:
    """What trains `parameters` beside the student, at `rate` times `fake_learning_rate`."""
    args = trainer.args
    optimizer = make_optimizer(trainer, parameters, lr=rate * args.fake_learning_rate)
    return FakeScore(parameters, optimizer, fake_schedule(args, optimizer), args.max_grad_norm, name)


def fake_schedule(args, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    updates = args.max_steps * args.fake_updates
    return get_scheduler(args.fake_lr_scheduler_type, optimizer, args.fake_warmup_steps, updates)
