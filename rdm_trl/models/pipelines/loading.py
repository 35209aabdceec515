# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Pipelines from where people have them: folders and repositories, whole or in a variant alone, and single files."""

from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig
from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open


SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


class Base(NamedTuple):
    """
    How a base pipeline is loaded.

    Args:
        base_model (`str`, *optional*): folder, Hub id or single file; none where the pipeline was made in memory.
        variant (`str`, *optional*): of the weight files of a folder or repository, `"fp16"` for example.
        single_file_config (`str`, *optional*):
            Of a single file: folder or Hub id of a pipeline of the same kind, whose configuration it has.
    """

    base_model: str | None = None
    variant: str | None = None
    single_file_config: str | None = None

    def code(self, absent: str = "") -> tuple[str, str]:
        """Class method and arguments that load it by plain diffusers, for the model card."""
        if not is_single_file(self.base_model):
            variant = f", variant={self.variant!r}" if self.variant else ""
            return "from_pretrained", f"{self.base_model!r}{absent}{variant}"
        config = f", config={self.single_file_config!r}" if self.single_file_config else ""
        return "from_single_file", f"{self.base_model!r}{config}{absent}"


def base_of(pipeline: DiffusionPipeline) -> Base:
    """How `pipeline` was loaded, as far as it says so itself or `read_pipeline` has noted."""
    noted = getattr(pipeline, "loaded_by", None)
    return noted or Base(pipeline.config.get("_name_or_path") or pipeline.name_or_path)


def base_in(settings: dict) -> dict:
    """Arguments of `read_pipeline`, from the settings that a run has saved."""
    return {name: settings.get(name) for name in Base._fields}


def is_single_file(name_or_path: str | Path | None) -> bool:
    return str(name_or_path).lower().endswith(SINGLE_FILES)


def read_pipeline(
    base_model: str | Path,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    single_file_config: str | Path | None = None,
    **kwargs,
) -> DiffusionPipeline:
    """
    `DiffusionPipeline.from_pretrained`, told of what was saved without (Stable Diffusion 3 without T5), or
    `from_single_file` of the class that the file's configuration names. Arguments are those of `Base`.

    Raises:
        ValueError: an option of the other kind of base, or a file that is not safetensors.
        OSError: there is no such file, or no configuration for it.
    """
    if is_single_file(base_model):
        if variant is not None:
            raise ValueError("`variant` chooses among the files of a folder, and this is a single file.")
        pipeline = read_single_file(Path(base_model), dtype, single_file_config, **kwargs)
    else:
        if single_file_config is not None:
            raise ValueError("`single_file_config` is for a single .safetensors file: a folder has its configuration.")
        absent = absent_components(DiffusionPipeline.load_config(base_model))
        kwargs |= {"variant": variant} if variant is not None else {}
        pipeline = DiffusionPipeline.from_pretrained(base_model, dtype=dtype, **absent, **kwargs)
    config = str(single_file_config) if single_file_config is not None else None
    pipeline.loaded_by = Base(str(base_model), variant, config)
    return pipeline


def absent_components(index: dict) -> dict[str, None]:
    """What a `model_index.json` says is not there."""
    return {name: None for name, kind in index.items() if kind in ([None, None], (None, None))}


def read_single_file(file: Path, dtype: torch.dtype, config: str | Path | None = None, **kwargs) -> DiffusionPipeline:
    """The pipeline of a single file, whose kind diffusers tells by its tensors. Raises as `read_pipeline`."""
    folder = single_file_folder(file, config)
    index = DiffusionPipeline.load_config(folder)
    cls = getattr(diffusers, index["_class_name"])
    if not hasattr(cls, "from_single_file"):
        raise ValueError(f"diffusers loads no {cls.__name__} from a single file.")
    return cls.from_single_file(str(file), config=str(folder), dtype=dtype, **absent_components(index), **kwargs)


def single_file_folder(file: Path, config: str | Path | None = None) -> Path:
    """The folder with the configuration of a single file. Raises as `read_pipeline`."""
    if not file.is_file():
        raise OSError(f"there is no file {file}")
    if file.suffix.lower() != ".safetensors":
        raise ValueError(
            f"a {file.suffix} file is not loaded, since it may run code of its own or holds no whole pipeline: "
            "convert it to .safetensors"
        )
    if config is not None and Path(config).is_dir():
        return Path(config)
    kind = "as `single_file_config` says"
    if config is None:
        try:
            with safe_open(file, "pt") as tensors:  # their shapes alone
                shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}
        except SafetensorError as error:
            raise OSError(f"it is not a whole .safetensors file: {error}") from error
        tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        kind, config = f"of the kind {infer_diffusers_model_type(tensors)!r}", fetch_diffusers_config(tensors)
        config = config["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(str(config), allow_patterns=["*.json", "*.txt", "*.model"]))
    except Exception as error:
        raise OSError(
            f"it is {kind}, and the configuration of {str(config)!r} is neither in the Hub's cache nor can it be "
            "fetched. Pass `--single_file_config FOLDER` (`single_file_config=` of `load_pipeline`), a folder with "
            f"`model_index.json` and the components' `config.json` and tokenizer of such a pipeline: {error}"
        ) from error


def load_pipeline(
    base_model: str | Path,
    dtype: torch.dtype,
    bits: int | None = None,
    variant: str | None = None,
    single_file_config: str | Path | None = None,
) -> DiffusionPipeline:
    """
    The pipeline of a path or Hub id.

    Args:
        bits (`int`, *optional*): 8 or 4, the denoiser's frozen weights by bitsandbytes in LLM.int8 or NF4.
        variant, single_file_config: as in [`Base`].

    Raises:
        OSError: there is no such pipeline; the message names it.
        RuntimeError: bitsandbytes, or a device that it can use, is missing.
        ValueError: a single file is asked for in 8 or 4 bits.
    """
    kwargs = {}
    if bits is not None and is_single_file(base_model):
        raise ValueError(
            "A single file cannot be loaded in 8 or 4 bits: save it as a folder first, by diffusers' "
            "`from_single_file(...).save_pretrained(...)`."
        )
    try:
        if bits is not None:
            index = DiffusionPipeline.load_config(base_model)
            name = "transformer" if "transformer" in index else "unet"
            kwargs["quantization_config"] = PipelineQuantizationConfig(quant_mapping={name: bnb_config(bits, dtype)})
        return read_pipeline(base_model, dtype, variant, single_file_config, **kwargs)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if bits is not None and isinstance(error, ImportError | RuntimeError):
            raise RuntimeError(
                f"The denoiser of {str(base_model)!r} cannot be loaded in {bits} bits: {error} This needs a GPU and "
                '`pip install "rdm_trl[quantization]"`; docs/performance.md says what else is smaller.'
            ) from error
        found = variants_of(base_model)
        if found and variant not in found:
            raise OSError(
                f"`sd_pipeline` {str(base_model)!r} holds weights of the variant {' and '.join(found)} alone"
                f"{f', none of {variant!r}' if variant else ''}: give `--variant {found[0]}` "
                f"(`sd_pipeline=load_pipeline(..., variant={found[0]!r})`)."
            ) from error
        raise OSError(
            f"`sd_pipeline` {str(base_model)!r} cannot be loaded; it must be a pipeline, a folder with a "
            f"`model_index.json`, a single .safetensors file or an id of the Hub: {error}"
        ) from error


def variants_of(base_model: str | Path) -> list[str]:
    """The variants of a folder, or of a repository in the Hub's cache, that has a component in variants alone."""
    try:
        folder = Path(str(base_model))
        if not folder.is_dir():
            folder = Path(snapshot_download(str(base_model), local_files_only=True))
    except Exception:  # not there, or neither a path nor an id of the Hub
        return []
    variants = set()
    for component in {file.parent for file in folder.glob("*/*.safetensors")}:
        # `model.safetensors`, `model-00001-of-00002.safetensors`, `model.fp16.safetensors`, ...
        parts = [file.name.removesuffix(".safetensors").split(".") for file in component.glob("*.safetensors")]
        if all(len(part) > 1 for part in parts):
            variants |= {part[1].split("-")[0] for part in parts}
    return sorted(variants)


def bnb_config(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What diffusers quantizes a denoiser by, computing in `dtype`."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
