# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.

from collections.abc import Callable, Iterable

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn


class FakeScore:
    """
    Trains the adapter that knows the student's distribution, by denoising, or what learns beside it. It has its own
    optimizer and schedule, and stands outside DDP, which wraps the student.

    Args:
        parameters: of the adapter.
        optimizer, scheduler: of these parameters; the schedule counts the adapter's own updates.
        max_grad_norm (`float`, *optional*): gradients are clipped to it.
        name (`str`, *optional*): for errors.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        max_grad_norm: float | None,
        name: str = "fake score",
    ):
        self.parameters, self.optimizer, self.scheduler = parameters, optimizer, scheduler
        self.max_grad_norm, self.name = max_grad_norm, name

    def update(self, loss_fn: Callable[..., torch.Tensor], batches: Iterable[tuple]) -> torch.Tensor:
        """
        One update on the mean of `loss_fn(*batch)` over the batches of all processes; returns this process's mean.

        Raises:
            FloatingPointError: a loss or the gradient is not finite; no weight was changed.
        """
        values = []
        for batch in batches:
            loss = loss_fn(*batch)
            if not loss.isfinite():
                self.optimizer.zero_grad()
                raise FloatingPointError(f"The {self.name}'s loss is {loss.item()}; lower `fake_learning_rate`.")
            loss.backward()
            values.append(loss.detach())
        # Some layers may have no part in the output: the last block's text stream, for example.
        trained = [parameter for parameter in self.parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in trained]
        if PartialState().num_processes > 1:  # one message: an adapter is hundreds of small tensors
            nn.utils.vector_to_parameters(reduce(torch.cat([g.flatten() for g in gradients]), "mean"), gradients)
        torch._foreach_div_(gradients, len(values))
        norm = nn.utils.get_total_norm(gradients)
        if not norm.isfinite():
            self.optimizer.zero_grad()
            raise FloatingPointError(
                f"The {self.name}'s gradient is {norm.item()}; lower `fake_learning_rate` or train in full precision."
            )
        if self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(trained, self.max_grad_norm, norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return torch.stack(values).mean()

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict):
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
