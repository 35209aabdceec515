# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Where prompts and their images come from, DDPO's prompt function or a data set's rows, and their embeddings."""

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
from accelerate.utils import gather, set_seed
from datasets import Dataset, Image, Value, load_dataset
from PIL.Image import Image as Picture
from safetensors.torch import load_file, save_file

from ._trl import RepeatSampler


# Encoded prompts kept in memory, the oldest dropped first: with SD 1.5's 77 x 768 floats, half a gigabyte. Those of
# Qwen-Image-Edit, with an image in each, are fewer.
PROMPT_CACHE_SIZE = 2048
PROMPT_CACHE_BYTES = 8 * 2**30
# Formats of a data set whose rows are no dictionaries.
TABLES = ("pandas", "arrow", "polars")


class PicturePrompt(str):
    """
    A prompt of a pipeline that edits images, or lets one move: its words, with the image that they are about. Two are
    equal where words and pixels are.

    Args:
        words (`str`): the prompt.
        image (`PIL.Image.Image`): kept in RGB.

    Attributes:
        fingerprint (`str`): of the pixels.
    """

    def __new__(cls, words: str, image: Picture):
        prompt = super().__new__(cls, words)
        prompt.image = image.convert("RGB")
        prompt.fingerprint = hashlib.sha256(f"{image.size}".encode() + prompt.image.tobytes()).hexdigest()[:32]
        return prompt

    def __eq__(self, other):
        return isinstance(other, PicturePrompt) and prompt_key(self) == prompt_key(other)

    def __ne__(self, other):  # text has one of its own
        return not self == other

    def __hash__(self):
        return hash(prompt_key(self))

    def __reduce__(self):
        return PicturePrompt, (str(self), self.image)


def prompt_key(prompt: str) -> str:
    """What stands for a prompt in keys and names of files: its words, and the fingerprint of its image."""
    return f"{prompt}\n{prompt.fingerprint}" if isinstance(prompt, PicturePrompt) else prompt


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
        device (`torch.device`): where the conditions are given.
        batch_size (`int`): prompts encoded at once.
        folder (`str` or `Path`, *optional*): keeps a file for each prompt, for later runs and other processes.
        name (`str`, *optional*): of what encodes; files of another name are not read.
        together (`bool`, *optional*, defaults to `False`): whether `encode` is one of all processes, in shards. Then
            they all call this together, and each encodes as many prompts as the one that lacks most.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], dict[str, torch.Tensor]],
        device: torch.device,
        batch_size: int,
        folder: str | Path | None = None,
        name: str = "",
        together: bool = False,
    ):
        self.encode, self.device, self.batch_size, self.name = encode, device, batch_size, name
        self.together = together
        self.folder = Path(folder) if folder is not None else None
        self.conditions = OrderedDict()

    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        keys = [prompt_key(prompt) for prompt in prompts]
        distinct = dict(zip(keys, prompts, strict=True))
        encoded = {key: self._remembered(key) for key in distinct}
        missing = [key for key, condition in encoded.items() if condition is None]
        if self.together:
            most = int(gather(torch.tensor([len(missing)], device=self.device)).max())
            missing += keys[:1] * (most - len(missing))
        for start in range(0, len(missing), self.batch_size):
            chunk = missing[start : start + self.batch_size]
            condition = self.encode([distinct[key] for key in chunk])
            for i, key in enumerate(chunk):
                if encoded[key] is not None:
                    continue
                encoded[key] = {name: value[i].cpu() for name, value in condition.items()}
                if self.folder is not None:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    write_tensors(self._file(key), encoded[key])
        self.conditions.update(encoded)
        each = sum(value.nbytes for value in encoded[keys[0]].values())  # one is as large as another
        while len(self.conditions) > min(PROMPT_CACHE_SIZE, PROMPT_CACHE_BYTES // max(each, 1)):
            self.conditions.popitem(last=False)
        return {name: torch.stack([encoded[k][name] for k in keys]).to(self.device) for name in encoded[keys[0]]}

    def _remembered(self, key: str) -> dict[str, torch.Tensor] | None:
        if key in self.conditions or self.folder is None:
            return self.conditions.get(key)
        file = self._file(key)
        return load_file(file) if file.exists() else None

    def _file(self, key: str) -> Path:
        digest = hashlib.sha256(f"{self.name}\n{key}".encode()).hexdigest()
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
    size = f"{family.height}x{family.width}"
    if family.takes_image and family.num_frames is not None:  # the given frame is encoded with the others' places
        size += f"x{family.num_frames}"
    name = f"{base_model} {size} {family.dtype} {family.prompt_limit}"
    if config.prompt_cache_dir is not None:  # a path or no name may stand for other encoders tomorrow
        name += f" {fingerprint(p for module in family.condition_modules() for p in module.parameters())}"
    # Where an encoder sees the image, the other half of guidance is each prompt's own.
    guided = config.sample_guidance_scale > 1 or config.num_teacher_images > 0
    against = config.negative_prompts if guided and family.takes_image else None

    def encode(prompts):
        with family.encoders_at_hand():
            own = {} if against is None else family.encode_own_negatives(prompts, against)
            return {**family.encode_prompts(prompts), **own}

    def encode_negative(prompts):
        with family.encoders_at_hand():
            return family.encode_negative_prompts(prompts)

    rest = config.device, config.per_device_eval_batch_size, config.prompt_cache_dir
    together = bool(family.sharded_encoders)
    return (
        PromptCache(encode, *rest, name if against is None else f"{name} against {against!r}", together),
        PromptCache(encode_negative, *rest, f"{name} negative", together),
    )


def load_prompts(name: str, split: str = "train", column: str = "prompt") -> Dataset:
    """
    Args:
        name (`str`):
            Hub id of a data set, or a file: `.txt`, a prompt a line, `.json`, `.jsonl`, `.csv` (with commas,
            semicolons or tabs), `.tsv`, `.parquet`; or a folder of images with their prompts in a `metadata.csv`.
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


def is_text(feature: Any) -> bool:
    """Whether a data set's column is one of texts, or of nothing."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "null")


def beside(dataset: Dataset, folder: Path) -> Dataset:
    """`dataset`, of a file in `folder`: paths in a column `image` that lead somewhere from there say so."""
    if not is_text(dataset.features.get("image")):
        return dataset
    paths = [str(folder / path) if path and (folder / path).is_file() else path for path in dataset["image"]]
    return dataset.remove_columns("image").add_column("image", paths)


def load_file_of_prompts(name: str) -> Dataset:
    """As `load_prompts`, of a file. Paths in a column `image` may be relative to it."""
    kind = Path(name).suffix[1:].lower()
    if kind == "txt":
        lines = [line.strip() for line in Path(name).read_text(encoding="utf-8-sig").splitlines()]
        return Dataset.from_dict({"prompt": [line for line in lines if line]})
    if kind in ("csv", "tsv"):
        with open(name, encoding="utf-8-sig") as file:  # spreadsheets begin with a byte-order mark
            header = file.readline()
        # By the names of the columns alone: prompts have commas and semicolons of their own.
        separator = "\t" if kind == "tsv" else max(",;\t", key=header.count)
        dataset = load_dataset("csv", data_files=name, split="train", sep=separator, encoding="utf-8-sig")
        return beside(dataset, Path(name).parent)
    if kind not in ("json", "jsonl", "parquet"):
        raise ValueError(f"{name} is no file of prompts: .txt, .json, .jsonl, .csv, .tsv or .parquet.")
    dataset = load_dataset("json" if kind == "jsonl" else kind, data_files=name, split="train")
    return beside(dataset, Path(name).parent)


def draw_prompts(prompt_function: Callable, number: int, seed: int, with_images: bool = False) -> Dataset:
    """
    Calls DDPO's `prompt_function` `number` times, the same on all processes, leaving Python's generators alone. With
    images, which the metadata have as `image`, these are a column of their own.

    Raises:
        ValueError: it returns no `(prompt, metadata)`, metadata of another form each time, or no image.
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
    rows = [{"prompt": prompt, "metadata": metadata} for prompt, metadata in rows]
    if with_images:
        for row in rows:
            if not isinstance(row["metadata"], dict) or row["metadata"].get("image") is None:
                raise ValueError(
                    f"`prompt_function` returned no image for {row['prompt']!r}, but this pipeline edits one: return "
                    '`(prompt, {"image": image})`, a PIL image or a path.'
                )
            image = row["metadata"]["image"]
            row["image"] = str(image) if isinstance(image, os.PathLike) else image
            row["metadata"] = {key: value for key, value in row["metadata"].items() if key != "image"}
    try:
        return Dataset.from_list(rows)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(
            "The metadata of `prompt_function` must be plain values (numbers, text, lists, dictionaries) of one form "
            f"for all prompts: {error}"
        ) from error


def training_prompts(
    prompt_function: Callable | None, dataset: Dataset | None, per_step: int, in_all: int, seed: int, family=None
) -> Dataset:
    """The run's prompts, at least one step's worth. Raises `ValueError` for two sources, and as `check_prompts`."""
    with_images = family is not None and family.takes_image
    if prompt_function is not None:
        if dataset is not None:
            raise ValueError("Give prompts by `prompt_function` or by `train_dataset`, not both.")
        dataset = draw_prompts(prompt_function, in_all, seed, with_images)
    dataset = check_prompts(dataset, "train_dataset", family)
    return dataset.repeat(-(-per_step // len(dataset))) if len(dataset) < per_step else dataset


def evaluation_prompts(dataset: Dataset | None, default: Dataset, family) -> Dataset:
    """The prompts of an evaluation: `default` where there are none of its own. Raises as `check_prompts`."""
    return default if dataset is None else check_prompts(dataset, "eval_dataset", family)


def check_prompts(dataset: Dataset | None, name: str, family=None) -> Dataset:
    """
    `dataset`, if it has prompts, and images where the pipeline of `family` takes them. Raises `ValueError` if it is
    missing, no `Dataset`, empty, or not of text, or as `check_images`.
    """
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
    return check_images(dataset, name, family) if family is not None and family.takes_image else dataset


def check_images(dataset: Dataset, name: str, family) -> Dataset:
    """
    `dataset`, with its column `image`, of images or their paths, read as images.

    Raises:
        ValueError: there is no such column, one of another kind, a row without an image, or a path that leads nowhere.
    """
    pipeline = type(family.pipeline).__name__
    if "image" not in dataset.column_names:
        raise ValueError(
            f"{pipeline} takes images, and `{name}` has none: it needs a column `image` beside `prompt`, of images or "
            f"of their paths; it has {', '.join(dataset.column_names)}."
        )
    kind, missing = dataset.features["image"], []
    if isinstance(kind, Image):
        if dataset.data.column("image").null_count:
            images = dataset.cast_column("image", Image(decode=False))["image"]
            missing = [i for i, image in enumerate(images) if image is None]
    elif is_text(kind):
        missing = [i for i, path in enumerate(dataset["image"]) if path is None or not Path(path).is_file()]
    else:
        raise ValueError(f"`image` of `{name}` must be images or their paths, but is a {type(kind).__name__}.")
    if missing:
        path = dataset[missing[0]]["image"]
        what = "is missing" if path is None else f"is {path!r}, and there is no such file"
        raise ValueError(
            f"`image` of row {missing[0]} of `{name}` {what}: {pipeline} takes images, and every prompt needs one."
        )
    return dataset.cast_column("image", Image())


def check_captions(captions: Iterable[Any], name: str):
    """Raises `ValueError` for a caption of the data set `name` that is no text."""
    for i, prompt in enumerate(captions):
        if not isinstance(prompt, str):
            raise ValueError(f"`prompt` of row {i} of `{name}` is {prompt!r}, but must be text.")


def split_rows(rows: list[dict[str, Any]], family) -> tuple[list[str], list[Any]]:
    """
    Prompts and metadata of data set rows: DDPO's `metadata` column, or all columns but the prompt. Where the pipeline
    of `family` takes images, both have the image as the pipeline is given it.
    """
    prompts = [row["prompt"] for row in rows]
    metadata = [row.get("metadata", {key: value for key, value in row.items() if key != "prompt"}) for row in rows]
    if family.takes_image:
        images = [family.fit(row["image"]) for row in rows]
        prompts = [PicturePrompt(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
        metadata = [
            {**of_row, "image": image} if isinstance(of_row, dict) else of_row
            for of_row, image in zip(metadata, images, strict=True)
        ]
    return prompts, metadata


def prompts_across(dataset: Dataset, family, count: int) -> list[str]:
    """`count` different prompts from all over `dataset`, or all where there are fewer."""
    rows = range(len(dataset))
    if not family.takes_image:
        first = {}
        for row, prompt in enumerate(dataset["prompt"]):
            first.setdefault(prompt, row)
        rows = list(first.values())
    count, found = min(count, len(rows)), {}
    for i in (*(i * len(rows) // count for i in range(count)), *range(len(rows))):  # a small set comes repeated
        if len(found) < count:
            found[split_rows([dataset[rows[i]]], family)[0][0]] = None
    return list(found)
