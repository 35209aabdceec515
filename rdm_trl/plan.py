# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""How much memory a run needs, from the configuration files of a pipeline alone: no weight is read."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from unittest.mock import patch

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import snapshot_download
from peft import LoraConfig
from transformers import PreTrainedModel

from .method import adversarial
from .models.pipelines import PipelineFamily, family_of
from .models.pipelines.loading import is_single_file, single_file_folder
from .models.roles import Roles
from .models.sharding import blocks_of, encoders_for_shards
from .real_images import check_draws_images


GIB = 2**30
# What CUDA's context, the allocator's gaps and temporary tensors of the passes take, as a share: a rule of thumb.
RESERVE = 0.15


@dataclass
class Memory:
    """
    Bytes on the device.

    Args:
        denoiser, encoders, others: weights in bfloat16; `encoders` are 0 where they are offloaded, and `others` is the
            autoencoder. In shards both are the device's part, `denoiser` with the block that is whole while it runs.
        adapters: student, fake score, learned target and average in float32, with the gradients and AdamW states of
            all but the average; and the discriminator's head with its own, where there is one.
        activations: what the student's forward pass keeps for its backward pass, and the discriminator's pass, which
            runs meanwhile. Where what encoders take while they run is larger, offloaded or in shards, that: it is on
            the device before.
        base (`str`): how the denoiser is held, a key of `sizes_of_base`.
    """

    denoiser: int
    encoders: int
    others: int
    adapters: int
    activations: int
    base: str = "whole"

    @property
    def total(self) -> int:
        return self.rows()["in all"]

    def rows(self) -> dict[str, int]:
        """The parts by name, and their sum with the reserve."""
        parts = {
            "denoiser": self.denoiser,
            "text encoders": self.encoders,
            "autoencoder": self.others,
            "adapters, gradients, optimizers": self.adapters,
            "activations of the student's update": self.activations,
        }
        parts[f"reserve, {RESERVE:.0%}"] = int(sum(parts.values()) * RESERVE)
        return {**parts, "in all": sum(parts.values())}


def load_without_weights(
    model: str, dtype: torch.dtype = torch.bfloat16, single_file_config: str | None = None
) -> DiffusionPipeline:
    """
    The pipeline of a folder, Hub id or single file with its models on the meta device.

    Raises:
        OSError: there is no such pipeline.
    """
    folder = model
    if is_single_file(model):
        folder = single_file_folder(Path(model), single_file_config)
    elif not Path(model).is_dir():
        folder = snapshot_download(model, allow_patterns=["*.json", "*.txt", "*/tokenizer*", "*/spiece.model"])
    index = DiffusionPipeline.load_config(folder)
    components = {}
    for name, entry in index.items():
        if not isinstance(entry, (list, tuple)):
            continue
        library, class_name = entry
        if class_name is None:
            components[name] = None
            continue
        cls = getattr(importlib.import_module(library), class_name)
        if issubclass(cls, (ModelMixin, PreTrainedModel)):
            with torch.device("meta"):
                if issubclass(cls, ModelMixin):
                    module = cls.from_config(cls.load_config(folder, subfolder=name))
                else:
                    module = cls(cls.config_class.from_pretrained(folder, subfolder=name))
            components[name] = module.to(dtype)
        else:
            components[name] = cls.from_pretrained(folder, subfolder=name)
    settings = {k: v for k, v in index.items() if not k.startswith("_") and k not in components}
    return getattr(diffusers, index["_class_name"])(**components, **settings)


def tensors_of(*modules: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of floating point: tables of positions may be as large as a network's layers."""
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def size_of(*modules: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(*modules))


def shard_size(denoiser: torch.nn.Module, num_gpus: int) -> int:
    """
    Bytes that a process holds of the parameters of `denoiser`, which has no adapters, where they are in shards: parts
    of their first dimensions, here the first process's, which are the largest.
    """
    rows = [(-(-len(p) // num_gpus), p.nbytes // len(p)) for p in denoiser.parameters()]
    return sum(number * size for number, size in rows)


def gathered_size(denoiser: torch.nn.Module) -> int:
    """
    Bytes of parameters in shards that are whole while a block runs: those outside of all blocks, the block's and those
    of what it stands in, and once more as much for the next one, which is fetched meanwhile.
    """
    blocks = {*blocks_of(denoiser)}

    def sizes(module: torch.nn.Module) -> tuple[int, int]:
        """Of its own, and the largest of what the blocks in it gather."""
        own, below = sum(p.nbytes for p in module.parameters(recurse=False)), 0
        for child in module.children():
            size, deeper = sizes(child)
            own, below = (own, max(below, size + deeper)) if child in blocks else (own + size, max(below, deeper))
        return own, below

    own, below = sizes(denoiser)
    return own + 2 * below


def encoders_in_shards(family: PipelineFamily, num_gpus: int) -> tuple[int, int]:
    """Bytes on a device of the text encoders where the base is in shards, and what is gathered while one runs."""
    encoders = encoders_for_shards(family)
    whole = size_of(*family.encoders()) - sum(p.nbytes for e in encoders for p in e.parameters())
    return whole + sum(shard_size(e, num_gpus) for e in encoders), max(map(gathered_size, encoders), default=0)


def sizes_of_base(denoiser: torch.nn.Module, num_gpus: int = 1) -> dict[str, int]:
    """Bytes on a device of `denoiser`, in bfloat16 and without adapters, by how it is held: what costs least first."""
    whole = size_of(denoiser)
    sizes = {"whole": whole}
    if num_gpus > 1:
        buffers = whole - sum(p.nbytes for p in denoiser.parameters())
        with suppress(ValueError):  # its class names no blocks
            sizes["shards"] = buffers + shard_size(denoiser, num_gpus) + gathered_size(denoiser)
    linear = sum(m.weight.numel() for m in denoiser.modules() if isinstance(m, torch.nn.Linear))
    sizes["8 bits"] = whole - linear
    sizes["4 bits"] = whole - int((2 - 0.5 - 4 / 64) * linear)  # NF4, and a float32 for each 64 weights
    return sizes


class FlashAttention(torch.autograd.Function):
    """Stands for the fused attention of an accelerator: a shape, and what its backward pass needs."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("Only memory is counted.")


def flash_attention(query, key, value, *args, **kwargs):
    return FlashAttention.apply(query, key, value)


@contextmanager
def counted(*modules: torch.nn.Module):
    """
    Inside the block, what graphs keep is found in the list that it is given, as storages; weights of `modules` are not
    counted.
    """
    weights = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
    kept, found = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in kept:
            kept[storage._cdata] = storage  # kept alive, so that its address is not used again
            found.append(storage)
        return tensor

    attention = torch.nn.functional.scaled_dot_product_attention
    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    # Without weights PyTorch would take the attention that keeps whole matrices.
    with keeping, patch.object(torch.nn.functional, attention.__name__, flash_attention):
        yield found


def example_batch(family: PipelineFamily, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Noisy images, timesteps and conditions, as `family.denoise` takes them."""
    device = family.denoiser.device
    x_t = torch.randn(batch_size, *family.latent_shape, device=device)
    return x_t, torch.full((batch_size,), 500.0, device=device), family.example_condition(batch_size)


def saved_activations(family: PipelineFamily, roles: Roles, batch_size: int) -> int:
    """Bytes that the student's forward pass of `batch_size` images keeps, weights not counted."""
    batch = example_batch(family, batch_size)
    with counted(roles) as kept:
        output = family.denoise(lambda *a, **k: roles("student", *a, **k), *batch)
    if not output.requires_grad:
        raise RuntimeError("No gradient reached the student: its adapter covers no layer of this denoiser.")
    return sum(storage.nbytes() for storage in kept)


def discriminator_sizes(family: PipelineFamily, roles: Roles, batch_size: int, stop: bool) -> tuple[int, int]:
    """
    Bytes of the discriminator's head, and what its pass of `batch_size` images keeps, which the gradient in the images
    needs; with `stop` it ends behind the last block that is looked at.

    Raises:
        ValueError: as [`Adversary`].
    """
    x_t, *rest = example_batch(family, batch_size)
    with roles.use("fake"), torch.device(x_t.device):

        def run(x_t):
            family.denoise(lambda *a, **k: family.denoiser(*a, **k, return_dict=False)[0], x_t, *rest)

        blocks, widths = adversarial.blocks_that_see(adversarial.feature_blocks(roles.network("fake")), run, x_t)
        head = adversarial.Head(widths)
        with counted(roles, head) as kept:
            with adversarial.capture(blocks, stop) as features:
                run(x_t.requires_grad_(True))
            head(features)
    return size_of(head), sum(storage.nbytes() for storage in kept)


def memory_of(
    pipeline: DiffusionPipeline,
    batch_size: int,
    activation_checkpointing: bool,
    lora_r: int = 32,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    with_discriminator: bool = False,
    learn_target: bool = False,
    in_shards: bool = False,
) -> Memory:
    """
    Args:
        pipeline: of `load_without_weights`; it gets adapters.
        batch_size (`int`): `per_device_train_batch_size`, images.
        activation_checkpointing (`bool`): as in `RdmDistillConfig`.
        height, width (`int`, *optional*): of the images in pixels.
        num_frames (`int`, *optional*): of videos.
        with_discriminator (`bool`, *optional*, defaults to `False`): count what `adversarial_weight` asks for.
        learn_target (`bool`, *optional*, defaults to `False`): as in `RdmDistillConfig`.
        in_shards (`bool`, *optional*, defaults to `False`): its passes go to the denoiser's end, as in shards.

    Raises:
        ValueError: the pipeline cannot have a discriminator, or that size.
    """
    family = family_of(pipeline, height, width, num_frames)
    if with_discriminator:
        check_draws_images(family)
    denoiser, encoders = size_of(family.denoiser), size_of(*family.encoders())
    models = [module for module in pipeline.components.values() if isinstance(module, torch.nn.Module)]
    others = size_of(*models) - denoiser - encoders
    with torch.device("meta"):
        roles = Roles(
            family.denoiser,
            LoraConfig(r=lora_r, lora_alpha=lora_r, target_modules=family.lora_target_modules),
            learn_target=learn_target,
        )
    if activation_checkpointing:
        roles.activation_checkpointing_enable()
    one = (size_of(roles) - denoiser) // len(roles.adapters)
    # Weights of all; a gradient and two moments of each but the average.
    adapters = one * (len(roles.adapters) + 3 * (len(roles.adapters) - 1))
    activations = saved_activations(family, roles, batch_size)
    if with_discriminator:
        head, seen = discriminator_sizes(family, roles, batch_size, not (activation_checkpointing or in_shards))
        adapters, activations = adapters + 4 * head, activations + seen
    return Memory(denoiser, encoders, others, adapters, activations)


def choose(
    load: Callable[[], DiffusionPipeline], gpu_memory: float, num_gpus: int = 1, **options
) -> tuple[Memory, dict, bool]:
    """
    What the first settings need that fit, from fast to frugal, and the settings; or those that need least, where none
    does; and whether they fit.

    Args:
        load (`Callable`): gives the pipeline without its weights, a new one each time.
        gpu_memory (`float`): of each device, in GiB.
        num_gpus (`int`, *optional*, defaults to 1): processes that train together, and may share the base.
        **options: `lora_r`, `height`, `width`, `num_frames`, `with_discriminator` and `learn_target` of `memory_of`.
    """
    family = family_of(load())
    bases, (part, gathered) = sizes_of_base(family.denoiser, num_gpus), encoders_in_shards(family, num_gpus)

    @cache
    def of_four(checkpointing: bool, in_shards: bool) -> Memory:
        return memory_of(load(), 4, checkpointing, in_shards=in_shards, **options)

    def candidates() -> Iterator[tuple[Memory, int, bool, bool]]:
        batch_sizes = [size for size in (32, 16, 8) if size * num_gpus <= 32] + [4]
        # Encoders are moved only where nothing else helps, and the base is held otherwise where that does not either.
        for base, offload, batch_size, checkpointing in product(bases, (False, True), batch_sizes, (False, True)):
            four = of_four(checkpointing, base == "shards" and options.get("with_discriminator", False))
            encoders, activations = four.encoders, four.activations * batch_size // 4
            if offload:
                encoders, activations = 0, max(activations, encoders)
            elif base == "shards":
                encoders, activations = part, max(activations, gathered)
            held = dict(denoiser=bases[base], encoders=encoders, activations=activations, base=base)
            yield replace(four, **held), batch_size, checkpointing, offload

    found = next((candidate for candidate in candidates() if candidate[0].total <= gpu_memory * GIB), None)
    memory, batch_size, checkpointing, offload = found or min(candidates(), key=lambda candidate: candidate[0].total)
    settings = {
        "per_device_train_batch_size": batch_size,
        "num_generations": 4,
        "gradient_accumulation_steps": max(1, 32 // (batch_size * num_gpus)),
        "activation_checkpointing": checkpointing,
        "offload_encoders": offload,
        "bf16": True,
    }
    if memory.base in ("8 bits", "4 bits"):
        settings[f"load_in_{memory.base[0]}bit"] = True
    if options.get("learn_target"):
        settings["learn_target"] = True
    return memory, settings, found is not None


def plan(model: str, gpu_memory: float, num_gpus: int = 1, single_file_config: str | None = None, **options) -> str:
    """
    The settings that would fit, and what they need, as text.

    Args:
        model (`str`): folder or Hub id of a pipeline, or a single .safetensors file.
        single_file_config (`str`, *optional*): as in [`models.pipelines.Base`].
        gpu_memory, num_gpus, **options: of `choose`.
    """

    def load():
        return load_without_weights(model, single_file_config=single_file_config)

    memory, settings, fits = choose(load, gpu_memory, num_gpus, **options)
    lines = [f"{name:<40}{size / GIB:8.2f} GiB" for name, size in memory.rows().items()]
    if fits:
        lines += ["", *(f"{name}: {str(value).lower()}" for name, value in settings.items())]
        if num_gpus > 1:
            config = "--config_file examples/accelerate_configs/fsdp2.yaml " * (memory.base == "shards")
            lines += ["", f"accelerate launch {config}--num_processes {num_gpus}"]
    else:
        lines.append(
            f"\nDoes not fit in {gpu_memory:g} GiB with {settings['per_device_train_batch_size']} images a step, not "
            "even with a base in 4 bits. Take fewer pixels or frames, a larger device, or more of them (`--num-gpus`)."
        )
    return "\n".join(lines)
