# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Rewards: how they are named, called, and what they may return."""

import asyncio
import importlib
import inspect
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Future
from typing import Any

import torch
from torch import nn

from .._trl import get_callable_name, is_async_callable
from ..frames import as_frames, num_frames
from ..noise import noise_apart
from . import builtin


RewardFunction = Callable[..., Any]


def resolve_reward(reward: str | RewardFunction) -> RewardFunction:
    """
    The function behind a reward's name.

    Args:
        reward: a callable, which is returned as it is; a built-in's name (`"clip_score"`), with a model of its kind
            behind a colon (`"clip_score:google/siglip-base-patch16-224"`); or a dotted path, `"my_rewards:redness"` or
            `"my_rewards.redness"`, importable from the working directory. Such a path runs the module's code.

    Raises:
        ValueError: neither, or the module has no such function.
    """
    if callable(reward):
        return reward
    if not isinstance(reward, str):
        raise ValueError(f"A reward is a function or a name, but {reward!r} is a {type(reward).__name__}.")
    name, _, model = reward.partition(":")
    if name in builtin.__all__:
        function = getattr(builtin, name)
        if model and not inspect.signature(function).parameters:
            raise ValueError(f"The reward {name!r} has no model to choose: name it without {':' + model!r}.")
        return function(model) if model else function()
    module_name, separator, attribute = reward.rpartition(":" if ":" in reward else ".")
    if not separator:
        raise ValueError(
            f"There is no reward {reward!r}. Built in are {', '.join(builtin.__all__)}; your own is named by its "
            "module, as 'my_rewards:my_function'."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The reward {reward!r} cannot be found: {error}. It must be importable from the working directory, "
            f"{os.getcwd()}."
        ) from error
    except Exception as error:
        raise ValueError(
            f"The reward {reward!r} cannot be imported: {module_name} raised {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"The reward {reward!r} cannot be found: {module_name} has no function {attribute!r}.")
    return function


def is_differentiable(reward_function: RewardFunction) -> bool:
    """Whether a reward declares, by an attribute `differentiable = True`, that images may carry a graph through it."""
    return getattr(reward_function, "differentiable", False) is True


def wants_clips(reward_function: RewardFunction) -> bool:
    """Whether a reward declares, by an attribute `whole_clip = True`, that it judges videos, not their frames."""
    return getattr(reward_function, "whole_clip", False) is True


def check_clips(reward_functions: list[RewardFunction], draws_videos: bool, frame_stride: int | None):
    """Raises `ValueError` for a reward of videos, or a stride of their frames, with a pipeline of images."""
    if draws_videos:
        return
    clips = [get_callable_name(function) for function in reward_functions if wants_clips(function)]
    if clips:
        raise ValueError(f"The reward {clips[0]!r} judges videos (`whole_clip`), but this pipeline draws images.")
    if frame_stride is not None:
        raise ValueError("`reward_frame_stride` is for the frames of videos, but this pipeline draws images.")


def frames_seen(reward_function: RewardFunction, images: torch.Tensor, frame_stride: int) -> int:
    """How many images a reward is given for each of `images`: frames of a video, or one."""
    return 1 if wants_clips(reward_function) else -(-num_frames(images) // frame_stride)


def ask(
    reward_function: RewardFunction,
    images: torch.Tensor,
    prompts: list[str],
    metadata: list[Any],
    frame_stride: int = 1,
) -> Any:
    """
    Calls a reward function in its own style; the answer of an async one is a coroutine. Of videos (B, 3, F, H, W) it
    gets every `frame_stride`-th frame as an image of the video's prompt and metadata, or the whole where it declares
    `whole_clip`.
    """
    number = frames_seen(reward_function, images, frame_stride)
    if not wants_clips(reward_function):
        images = as_frames(images, frame_stride)
    words = [str(prompt) for prompt in prompts]  # an image that comes with it is in the metadata
    prompts, metadata = ([row for row in rows for _ in range(number)] for rows in (words, metadata))
    # A module's own signature is that of `nn.Module`, which takes anything.
    function = reward_function.forward if isinstance(reward_function, nn.Module) else reward_function
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        rows = [row if isinstance(row, dict) else {"metadata": row} for row in metadata]
        columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
        return reward_function(images=images, prompts=prompts, **columns)
    return reward_function(images, prompts, metadata)


def check_answer(
    name: str, answer: Any, images: torch.Tensor, prompts: list[str], number: int = 1
) -> tuple[torch.Tensor, Any]:
    """
    Rewards (B,), float32, NaN where not scored, and the function's own metadata (`{}` if it gave none). Of a function
    that was given `number` frames of each video, the mean over those that it scored.

    Raises:
        ValueError: wrong length, or a value that is not a finite number; the message names the function and prompt.
    """
    rewards, reward_metadata = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, {})
    # A dictionary or set has a length, but no order; a tuple is the pair of rewards and metadata.
    unordered = isinstance(rewards, str | bytes | tuple | Mapping | Set)
    shape = getattr(rewards, "shape", (len(images),))
    if unordered or not hasattr(rewards, "__len__") or len(shape) != 1:
        what = f"an array of shape {tuple(shape)}" if len(shape) != 1 else repr(rewards)
        raise ValueError(f"Reward function {name!r} returned {what}, but must return one number an image, in a list.")
    if len(rewards) != len(images) * number:
        what = f"{len(images)} images" if number == 1 else f"{number} frames each of {len(images)} videos"
        raise ValueError(f"Reward function {name!r} returned {len(rewards)} rewards for {what}.")
    values, prompts = [], [prompt for prompt in prompts for _ in range(number)]
    for reward, prompt in zip(rewards, prompts, strict=True):
        try:
            if isinstance(reward, str | bytes):
                raise TypeError("text is no number")
            value = math.nan if reward is None else torch.tensor(float(reward)).item()  # as large as float32 holds
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(f"Reward function {name!r} returned {reward!r} for the prompt {prompt!r}.") from error
        if reward is not None and not math.isfinite(value):
            raise ValueError(f"Reward function {name!r} returned {value} for the prompt {prompt!r}.")
        values.append(value)
    return torch.tensor(values, device=images.device).view(-1, number).nanmean(1), reward_metadata


def in_thread(call: Callable) -> Future:
    """`call()` in a thread that the interpreter does not wait for at its end: a reward may never come back."""
    future = Future()

    def run():
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Scorer:
    """
    Asks rewards about a batch of images without gradient: async functions concurrently, the others in turn.

    Args:
        reward_functions (`list`):
            DDPO's style, `f(images, prompts, metadata)`, or GRPO's, any function that takes `**kwargs`:
            `f(images=..., prompts=..., **columns)`, where the columns come from metadata that are dictionaries. They
            return one number an image (list, array or tensor; `None` is "not scored"), or that and a dictionary. One
            with a `state_dict` (of tensors and plain values) and a `load_state_dict` is saved with a checkpoint. Of
            videos they see frames, whose mean counts; one with an attribute `whole_clip = True` sees the videos.
        timeout (`float`, *optional*): seconds that a reward may take.
        frame_stride (`int`, *optional*, defaults to 1): of videos every so many-th frame is scored, from the first.
    """

    def __init__(
        self, reward_functions: list[RewardFunction], timeout: float | None = None, frame_stride: int | None = None
    ):
        self.reward_functions, self.timeout, self.frame_stride = reward_functions, timeout, frame_stride or 1
        self.names = [get_callable_name(function) for function in reward_functions]

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[Any]):
        """
        Rewards (B, M) of images (B, 3, H, W), or videos (B, 3, F, H, W), in [0, 1], NaN where not scored, and metadata
        by reward.

        Raises:
            RuntimeError: a reward raised an error.
            TimeoutError: a reward took longer than `timeout`.
            ValueError: a reward's answer is unusable. Each names the reward.
        """
        return self.start(images, prompts, metadata)()

    def start(self, images: torch.Tensor, prompts: list[str], metadata: list[Any]) -> Callable:
        """
        Sends the images to the async functions, which work in a thread while the caller goes on. What is returned has
        to be called: it asks the other functions, waits for these, and returns and raises as `__call__` does.
        """
        images = images.detach()
        waiting = {i: f for i, f in enumerate(self.reward_functions) if is_async_callable(f)}

        async def gather():
            async def one(i, function):
                try:
                    return await asyncio.wait_for(self._ask(function, images, prompts, metadata), self.timeout)
                except Exception as error:
                    raise self._explained(i, error) from error

            return await asyncio.gather(*[one(i, function) for i, function in waiting.items()])

        # A thread of its own: the caller, a notebook for example, may already run an event loop.
        future = in_thread(lambda: asyncio.run(gather())) if waiting else None

        def finish():
            # The others stay on this thread: one that draws random numbers must draw the same ones in every run.
            answers = {
                i: self._in_time(i, images.device, lambda f=function: self._ask(f, images, prompts, metadata))
                for i, function in enumerate(self.reward_functions)
                if i not in waiting
            }
            if future is not None:
                try:
                    # A second more: a function that holds up the event loop cannot be cancelled in it.
                    results = future.result(None if self.timeout is None else self.timeout + 1)
                except TimeoutError as error:
                    if future.done():  # named already
                        raise
                    raise self._explained(min(waiting), error) from error
                answers |= dict(zip(waiting, results, strict=True))
            rewards, reward_metadata = images.new_zeros((len(images), len(self.names)), dtype=torch.float32), {}
            for i, name in enumerate(self.names):
                number = frames_seen(self.reward_functions[i], images, self.frame_stride)
                rewards[:, i], reward_metadata[name] = check_answer(name, answers[i], images, prompts, number)
            return rewards, reward_metadata

        return finish

    def _ask(self, function: RewardFunction, images: torch.Tensor, prompts: list[str], metadata: list[Any]) -> Any:
        """Each function gets images and lists of its own: what it does to them in place is nobody else's matter."""
        return ask(function, images.clone(), list(prompts), list(metadata), self.frame_stride)

    def _in_time(self, i: int, device: torch.device, call: Callable):
        try:
            with torch.no_grad(), noise_apart(device):
                if self.timeout is None:
                    return call()
                return in_thread(torch.no_grad()(call)).result(self.timeout)
        except Exception as error:
            raise self._explained(i, error) from error

    def _explained(self, i: int, error: Exception) -> Exception:
        if isinstance(error, TimeoutError) and self.timeout is not None:
            return TimeoutError(
                f"Reward function {self.names[i]!r} took longer than `reward_timeout` ({self.timeout} s)."
            )
        return RuntimeError(f"Reward function {self.names[i]!r} failed: {type(error).__name__}: {error}")


def reward_gradient(
    reward_function: RewardFunction,
    decode: Callable,
    latents: torch.Tensor,
    prompts: list[str],
    metadata: list[Any],
    frame_stride: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    A differentiable reward of `decode(latents)`, and its gradient in the latents: the direct path (ReFL, arXiv
    2304.05977, as DMDR uses it).

    Returns:
        Rewards (B,), and \\(D \nabla r\\) (B, ...) with D elements an image, the push for which the student's loss
        is minus the mean reward.

    Raises:
        RuntimeError: the reward raised an error.
        ValueError: the reward's answer has the wrong shape, is not finite or has no gradient. Each names the reward.
    """
    name = get_callable_name(reward_function)
    with torch.enable_grad():
        latents = latents.detach().float().requires_grad_(True)
        images = decode(latents)
        try:
            with noise_apart(latents.device):
                answer = ask(reward_function, images, prompts, metadata, frame_stride)
        except Exception as error:
            raise RuntimeError(f"Reward function {name!r} failed: {type(error).__name__}: {error}") from error
        rewards = answer[0] if isinstance(answer, tuple) and answer else answer
        if not isinstance(rewards, torch.Tensor) or not rewards.requires_grad:
            raise ValueError(
                f"Reward function {name!r} declares itself differentiable, but returned no tensor with a gradient."
            )
        number = frames_seen(reward_function, images, frame_stride)
        check_answer(name, rewards.detach(), latents, prompts, number)
        rewards = rewards.view(-1, number).mean(1)
        (gradient,) = torch.autograd.grad(rewards.sum(), latents)
    finite = gradient.flatten(1).isfinite().all(1)
    if not finite.all():
        prompt = prompts[(~finite).nonzero()[0].item()]
        raise ValueError(f"The gradient of reward function {name!r} is not finite for the prompt {prompt!r}.")
    return rewards.detach().float(), gradient * gradient[0].numel()
