# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""
The frozen base in shards, and the text encoders: each process holds a part of every weight, and gathers a block's
weights while it runs.

By PyTorch's `fully_shard`, switched on by accelerate's FSDP2 configuration. The adapters stay whole in every process,
so that training, average, saving and resuming are as under DDP. What differs: a pass of the denoiser, or of an
encoder, is collective. All processes have to make the same number of them, whatever their batches.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import gather, is_torch_version, parse_flag_from_env
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .pipelines.base import PipelineFamily
from .roles import NetworkRoles, Roles


USE_FSDP = "ACCELERATE_USE_FSDP"
FSDP2 = "`accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml`, which docs/scaling.md explains"


def is_asked_for() -> bool:
    """Whether `accelerate launch` or its configuration file asks for FSDP."""
    return parse_flag_from_env(USE_FSDP)


def check_launcher(torch_compile: bool):
    """Raises `ValueError` for what accelerate's configuration says of FSDP and cannot be had, or would be ignored."""
    if not is_asked_for():
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"FSDP{version} is not supported: it would wrap the adapters with the base. Use FSDP2, by {FSDP2}."
        )
    if not is_torch_version(">=", "2.7"):
        raise ValueError("FSDP2 needs PyTorch 2.7 here: `fully_shard` must leave the adapters alone.")
    if torch_compile:
        raise ValueError("`torch_compile` cannot be had with FSDP: leave one of them out.")
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP") != "TRANSFORMER_BASED_WRAP":
        raise ValueError("accelerate's `fsdp_auto_wrap_policy` must be 'TRANSFORMER_BASED_WRAP': the model's blocks.")
    for name, needed, reason in (
        ("RESHARD_AFTER_FORWARD", True, "gathered weights that stay would be the whole base"),
        ("CPU_RAM_EFFICIENT_LOADING", False, "each process reads the base itself"),
        ("ACTIVATION_CHECKPOINTING", False, "use the option `activation_checkpointing`, which knows of roles"),
        ("TRANSFORMER_CLS_TO_WRAP", False, "which blocks are wrapped, the model says"),
        ("IGNORED_MODULES", False, "the whole base is in shards, and no adapter is"),
    ):
        value = os.environ.get(f"FSDP_{name}", str(needed)).lower()
        if (value not in ("false", "none", "")) != needed:
            option = name.replace("_CLS_", "_layer_cls_").lower()
            needs = "must be true" if needed else "must be false or left out"
            raise ValueError(f"accelerate's `fsdp_{option}` {needs}: {reason}.")


@contextmanager
def hidden_from_accelerate():
    """Inside the block accelerate makes an `Accelerator` for DDP: its own FSDP would shard the adapters too."""
    with patch.dict(os.environ, {USE_FSDP: "false"}):
        yield


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """
    The blocks whose weights are gathered one after the other, inner ones first, as the model's class names them.

    Raises:
        ValueError: it names none.
    """
    blocks = named_blocks(denoiser)
    if not blocks:
        raise ValueError(
            f"{type(denoiser).__name__} cannot be in shards: its class names no blocks (`_no_split_modules`)."
        )
    return blocks


def named_blocks(network: nn.Module) -> list[nn.Module]:
    """As `blocks_of`, and none where the class names none."""
    names = {name for kind in ("_repeated_blocks", "_no_split_modules") for name in getattr(network, kind, None) or ()}
    return [module for module in network.modules() if type(module).__name__ in names and module is not network][::-1]


def encoders_for_shards(family: PipelineFamily) -> list[nn.Module]:
    """The text encoders that can be in shards; the others, whose classes name no blocks, or quantized, stay whole."""
    return [e for e in family.encoders() if named_blocks(e) and not getattr(e, "is_quantized", False)]


def shard(roles: NetworkRoles, family: PipelineFamily, device: torch.device, with_encoders: bool):
    """
    Moves the base of `roles`, which is on the CPU, to `device` in shards over all processes, block after block: no
    device ever holds more than one of them beside its shards. So it does `with_encoders` the text encoders of
    `family`. With accelerate's `fsdp_offload_params` the shards stay in the computer's memory. Called by all
    processes.

    Raises:
        ValueError: whole networks are trained, the base is quantized, or there is but one process.
    """
    # Here, since not every build of PyTorch has it.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    denoiser = roles.denoiser
    if not isinstance(roles, Roles):
        raise ValueError("`peft_config=False` (`full_finetuning`) cannot be in shards: only a frozen base can.")
    if getattr(denoiser, "is_quantized", False):  # diffusers sets it only where it is so
        raise ValueError("A quantized denoiser cannot be in shards: load it as it is, or launch without FSDP.")
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        raise ValueError("One process has nobody to share the base with: launch without FSDP, or more processes.")
    adapters = roles.lora_parameters()
    offloads = parse_flag_from_env("FSDP_OFFLOAD_PARAMS")
    networks = {denoiser: blocks_of(denoiser)}
    if with_encoders:
        family.sharded_encoders = encoders_for_shards(family)
        networks |= {encoder: named_blocks(encoder) for encoder in family.sharded_encoders}
    options = dict(
        mesh=init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
        reshard_after_forward=True,
        offload_policy=CPUOffloadPolicy(pin_memory=device.type != "cpu") if offloads else OffloadPolicy(),
        ignored_params=set(adapters),
    )
    for parameter in adapters:
        parameter.data = parameter.data.to(device)
    # Pipelines ask a network where to compute, and its parameters would answer: on the CPU.
    properties = {"device": property(lambda self: device)} if offloads else {}
    for network, blocks in networks.items():
        own = type(network)
        for module in (*blocks, network):
            fully_shard(module, **options)
        # Under its own name, by which transformers knows what its class can put out.
        name = {"__module__": own.__module__, "__qualname__": own.__qualname__}
        network.__class__ = type(own.__name__, (type(network),), name | properties)
    kept_whole = {id(parameter) for parameter in adapters}
    names = [name for name, parameter in roles.named_parameters() if id(parameter) not in kept_whole]
    roles._ddp_params_and_buffers_to_ignore += names
    roles.sharded = True


def wrap(trainer, roles: Roles) -> DistributedDataParallel:
    """What accelerate makes of a model under DDP, which it refuses for one that is partly in shards."""
    accelerator = trainer.accelerator
    roles = accelerator.prepare_model(roles, device_placement=False, evaluation_mode=True)  # only its autocast
    kwargs = accelerator.ddp_handler.to_kwargs() if accelerator.ddp_handler is not None else {}
    return DistributedDataParallel(roles, **kwargs)


def gather_outer_weights(roles: Roles):
    """
    Makes the weights outside of all blocks whole until the end of the next backward pass, which begins inside of the
    denoiser: one from its output would gather them by itself. Called by all processes.
    """
    roles.denoiser.unshard()


@torch.no_grad()
def keep_company(passes: int, make_pass: Callable):
    """Calls `make_pass` until this process, which has made `passes` of them, has made as many as any other."""
    most = int(gather(torch.tensor([passes], device=PartialState().device)).max())
    for _ in range(most - passes):
        make_pass()
