# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Where prompts come from, DDPO's prompt function or the rows of a data set, and their embeddings."""

import hashlib
import os
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import set_seed
from datasets import Dataset, load_dataset
from safetensors.torch import load_file, save_file
from torch import nn

from ._trl import RepeatSampler


# Encoded prompts kept in memory, the oldest dropped first: with SD 1.5's 77 x 768 floats, half a gigabyte.
PROMPT_CACHE_SIZE = 2048
# Formats of a data set whose rows are no dictionaries.
TABLES = ("pandas", "arrow", "polars")


class PromptSampler(RepeatSampler):
    """
    TRL's sampler, in an order that the seed and the epoch alone decide: a run that is resumed in a later epoch sees
    the prompts that it would have seen.

    Args:
        data_source: the prompts.
        epoch (`Callable`): `() -> int`, the epoch that begins.
        **kwargs: of `RepeatSampler`, with its seed.
    """

    def __init__(self, data_source: Dataset, epoch: Callable[[], int], **kwargs):
        super().__init__(data_source, **kwargs)
        self.epoch = epoch

    def __iter__(self):
        # The order that TRL's would have come to after as many epochs.
        self.generator.manual_seed(self.seed)
        for _ in range(self.epoch()):
            torch.randperm(self.num_samples, generator=self.generator)
        yield from super().__iter__()


class PromptCache:
    """
    `cache(prompts)` gives the denoiser's conditions for `prompts`, each prompt encoded once and remembered: in the
    computer's memory, not the accelerator's, and in a folder if there is one.

    Args:
        encode (`Callable`): `prompts -> conditions`, a dictionary of tensors (B, ...).
        denoiser (`nn.Module`): the conditions are given on its device.
        batch_size (`int`): prompts encoded at once.
        folder (`str` or `Path`, *optional*): keeps a file for each prompt, for later runs and other processes.
        name (`str`, *optional*): of what encodes; files of another name are not read.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], dict[str, torch.Tensor]],
        denoiser: nn.Module,
        batch_size: int,
        folder: str | Path | None = None,
        name: str = "",
    ):
        self.encode, self.denoiser, self.batch_size, self.name = encode, denoiser, batch_size, name
        self.folder = Path(folder) if folder is not None else None
        self.conditions = OrderedDict()

    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        encoded = {prompt: self._remembered(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, condition in encoded.items() if condition is None]
        for start in range(0, len(missing), self.batch_size):
            chunk = missing[start : start + self.batch_size]
            condition = self.encode(chunk)
            for i, prompt in enumerate(chunk):
                encoded[prompt] = {key: value[i].cpu() for key, value in condition.items()}
                if self.folder is not None:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    write_tensors(self._file(prompt), encoded[prompt])
        self.conditions.update(encoded)
        while len(self.conditions) > PROMPT_CACHE_SIZE:
            self.conditions.popitem(last=False)
        device = next(self.denoiser.parameters()).device
        return {key: torch.stack([encoded[p][key] for p in prompts]).to(device) for key in encoded[prompts[0]]}

    def _remembered(self, prompt: str) -> dict[str, torch.Tensor] | None:
        if prompt in self.conditions or self.folder is None:
            return self.conditions.get(prompt)
        file = self._file(prompt)
        return load_file(file) if file.exists() else None

    def _file(self, prompt: str) -> Path:
        digest = hashlib.sha256(f"{self.name}\n{prompt}".encode()).hexdigest()
        return self.folder / f"{digest[:32]}.safetensors"


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]):
    """A safetensors file, under another name at first: another process may look for it, and this one be killed."""
    unfinished = file.with_suffix(f".{os.getpid()}")
    save_file({key: value.contiguous() for key, value in tensors.items()}, unfinished)
    unfinished.replace(file)


def fingerprint(parameters: Iterable[torch.Tensor]) -> str:
    """Of weights, so that what was made with them is not taken for what others would make."""
    sums = (p.sum(dtype=torch.float64) + 2 * p.abs().sum(dtype=torch.float64) for p in parameters)
    # In shards, called by all processes, the sum of all of them.
    parts = ((total.full_tensor() if hasattr(total, "full_tensor") else total).item() for total in sums)
    # Rounded: another device adds in another order.
    return f"{sum((i + 1) * part for i, part in enumerate(parts)):.10g}"


def prompt_caches(family, config, base_model: str) -> tuple[PromptCache, PromptCache]:
    """Of prompts and of negative prompts, for a family of pipelines and a run's config."""
    name = f"{base_model} {family.height}x{family.width} {family.dtype} {family.prompt_limit}"
    if config.prompt_cache_dir is not None:  # a path or no name may stand for other encoders tomorrow
        name += f" {fingerprint(p for module in family.encoders() for p in module.parameters())}"

    def encode(prompts):
        with family.encoders_at_hand():
            return family.encode_prompts(prompts)

    def encode_negative(prompts):
        with family.encoders_at_hand():
            return family.encode_negative_prompts(prompts)

    rest = family.denoiser, config.per_device_eval_batch_size, config.prompt_cache_dir
    return (
        PromptCache(encode, *rest, name),
        PromptCache(encode_negative, *rest, f"{name} negative"),
    )


def load_prompts(name: str, split: str = "train", column: str = "prompt") -> Dataset:
    """
    Args:
        name (`str`):
            Hub id of a data set, or a file: `.txt`, a prompt a line, `.json`, `.jsonl`, `.csv` (with commas,
            semicolons or tabs), `.tsv`, `.parquet`.
        split (`str`): of a data set on the Hub.
        column (`str`): the prompts' column, which is named `prompt` in what is returned.

    Raises:
        ValueError: there is no such column, or a file of another kind.
    """
    dataset = load_file_of_prompts(name) if Path(name).is_file() else load_dataset(name, split=split)
    if column == "prompt":
        return dataset
    if column not in dataset.column_names:
        raise ValueError(f"{name} has no column {column!r}; it has {', '.join(dataset.column_names)}.")
    if "prompt" in dataset.column_names:
        dataset = dataset.remove_columns("prompt")
    return dataset.rename_column(column, "prompt")


def load_file_of_prompts(name: str) -> Dataset:
    """As `load_prompts`, of a file."""
    kind = Path(name).suffix[1:].lower()
    if kind == "txt":
        lines = [line.strip() for line in Path(name).read_text(encoding="utf-8-sig").splitlines()]
        return Dataset.from_dict({"prompt": [line for line in lines if line]})
    if kind in ("csv", "tsv"):
        with open(name, encoding="utf-8-sig") as file:  # spreadsheets begin with a byte-order mark
            header = file.readline()
        # By the names of the columns alone: prompts have commas and semicolons of their own.
        separator = "\t" if kind == "tsv" else max(",;\t", key=header.count)
        return load_dataset("csv", data_files=name, split="train", sep=separator, encoding="utf-8-sig")
    if kind not in ("json", "jsonl", "parquet"):
        raise ValueError(f"{name} is no file of prompts: .txt, .json, .jsonl, .csv, .tsv or .parquet.")
    return load_dataset("json" if kind == "jsonl" else kind, data_files=name, split="train")


def draw_prompts(prompt_function: Callable, number: int, seed: int) -> Dataset:
    """
    Calls DDPO's `prompt_function` `number` times, the same on all processes, leaving Python's generators alone.

    Raises:
        ValueError: it returns no `(prompt, metadata)`, or metadata of another form each time.
    """
    if not callable(prompt_function):
        raise ValueError(
            f"`prompt_function` is {prompt_function!r}, but must be a function: () -> (prompt, metadata)."
        )
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    set_seed(seed)
    rows = [prompt_function() for _ in range(number)]
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)
    for row in rows:
        if not isinstance(row, tuple | list) or len(row) != 2 or not isinstance(row[0], str):
            raise ValueError(f"`prompt_function` returned {row!r}, but must return a text and its metadata.")
    try:
        return Dataset.from_list([{"prompt": prompt, "metadata": metadata} for prompt, metadata in rows])
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(
            "The metadata of `prompt_function` must be plain values (numbers, text, lists, dictionaries) of one form "
            f"for all prompts: {error}"
        ) from error


def training_prompts(
    prompt_function: Callable | None, dataset: Dataset | None, per_step: int, in_all: int, seed: int
) -> Dataset:
    """The run's prompts, at least one step's worth. Raises `ValueError` for two sources, and as `check_prompts`."""
    if prompt_function is not None:
        if dataset is not None:
            raise ValueError("Give prompts by `prompt_function` or by `train_dataset`, not both.")
        dataset = draw_prompts(prompt_function, in_all, seed)
    dataset = check_prompts(dataset, "train_dataset")
    return dataset.repeat(-(-per_step // len(dataset))) if len(dataset) < per_step else dataset


def check_prompts(dataset: Dataset | None, name: str) -> Dataset:
    """`dataset`, if it has prompts. Raises `ValueError` if it is missing, no `Dataset`, empty, or not of text."""
    if dataset is None:
        raise ValueError(
            "There are no prompts: give `train_dataset` with a `prompt` column, or `prompt_function`. Only the "
            "embedded pipeline brings its own."
        )
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__}, but must be a `datasets.Dataset`: one split, not streamed. "
            "All processes, and a resumed run, draw the same order of it, for which its length must be known: "
            "`Dataset.from_list(list(streamed.take(100_000)))` makes one."
        )
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"`{name}` needs a `prompt` column; it has {', '.join(dataset.column_names) or 'none'}."
            " Rename one, or name it by `--prompt_column`."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty.")
    if dataset.format["type"] in TABLES:
        dataset = dataset.with_format(None)
    check_captions(dataset["prompt"], name)
    return dataset


def check_captions(captions: Iterable[Any], name: str):
    """Raises `ValueError` for a caption of the data set `name` that is no text."""
    for i, prompt in enumerate(captions):
        if not isinstance(prompt, str):
            raise ValueError(f"`prompt` of row {i} of `{name}` is {prompt!r}, but must be text.")


def split_rows(rows: list[dict[str, Any]]) -> tuple[list[str], list[Any]]:
    """Prompts and metadata of data set rows: DDPO's `metadata` column, or all columns but the prompt."""
    prompts = [row["prompt"] for row in rows]
    metadata = [row.get("metadata", {key: value for key, value in row.items() if key != "prompt"}) for row in rows]
    return prompts, metadata
