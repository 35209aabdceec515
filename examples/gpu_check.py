# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
# /// script
# dependencies = ["rdm_trl"]
# ///
"""
What an update costs on this GPU, without a download: denoisers of the public configurations of Stable Diffusion 1.5,
XL, 3.5 medium and FLUX.1 with random weights, behind text encoders of the right width and one layer. Seconds of an
update by its parts, the share outside the denoiser's passes, images a second, peak memory beside what `rdm-trl plan`
would have said; then the main job. What does not fit is said to, and the clock ends it. Without a GPU the same in tiny
sizes, to see that it runs.

python examples/gpu_check.py                    # eight minutes; gpu_check.md and gpu_check.json in outputs/gpu_check
python examples/gpu_check.py --minutes 20 --models sdxl flux
"""

import argparse
import copy
import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import memory_table
import torch
from benchmark import time_updates
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import logging
from tqdm import tqdm
from transformers import PreTrainedModel

from rdm_trl.models.pipelines import family_of, load_pipeline
from rdm_trl.plan import GIB, memory_of


MAIN_JOB = Path(__file__).with_name("train_gndm.py")
MAIN_JOB_SECONDS = 180  # it took 148 on one H100, where the small network waits for the CPU
COMPILE_SECONDS = 120  # graphs are made in the first update, which cannot be ended by the clock
HEADER = ["model", "pixels", "images", "settings", "s / update", "rollout", "teacher", "student", "fake score"]
HEADER += ["outside", "images / s", "peak GiB", "plan GiB"]


@dataclass
class Case:
    """One measurement: images a step, and how memory or time is saved."""

    model: str
    images: int
    checkpointing: bool = False
    compiled: bool = False
    bits: int | None = None

    @property
    def settings(self) -> str:
        names = {"checkpointing": self.checkpointing, "compiled": self.compiled, f"{self.bits} bits": self.bits}
        return ", ".join(name for name, on in names.items() if on) or "plain"


# In the order of what one would ask first: the clock may cut the list.
CASES = [
    Case("sd15", 8),
    Case("sdxl", 4),
    Case("sd35_medium", 4),
    Case("flux", 4, checkpointing=True),
    Case("sd15", 32),
    Case("sdxl", 8, checkpointing=True),
    Case("sd35_medium", 8, checkpointing=True),
    Case("sd15", 8, compiled=True),
    Case("flux", 4),
    Case("sd15", 32, checkpointing=True),
    Case("sd35_medium", 4, bits=4),
]


SMALL_UNET = dict(block_out_channels=(32, 32), layers_per_block=1)
SMALL_UNET |= dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"))
SMALL_UNET |= dict(up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
# The outline of each, the guidance scale of its teacher, and what makes its denoiser tiny.
MODELS: dict[str, tuple[Callable[[], DiffusionPipeline], float, dict]] = {
    "sd15": (memory_table.sd15, 7.5, dict(sample_size=8, attention_head_dim=8, **SMALL_UNET)),
    "sdxl": (memory_table.sdxl, 7.0, dict(transformer_layers_per_block=1, attention_head_dim=4, **SMALL_UNET)),
    "sd35_medium": (
        memory_table.sd35_medium,
        4.5,
        dict(num_layers=2, num_attention_heads=1, caption_projection_dim=64, dual_attention_layers=(0,)),
    ),
    "flux": (memory_table.flux1_dev, 3.5, dict(num_layers=1, num_single_layers=1, num_attention_heads=1)),
}
# An update needs encoders only to have prompts, and no autoencoder: all are one layer, of the real width.
SMALL_ENCODER = dict(vocab_size=len(memory_table.TOKENIZER), num_hidden_layers=1, num_layers=1)
SMALL_ENCODER |= dict(intermediate_size=16, d_ff=16, d_kv=16, num_heads=1)
SMALL_VAE = dict(block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2)


def make(model: str, tiny: bool, device: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline with weights made on `device` at once, in `dtype`: 12 B would wait for a CPU long."""
    outline, _, small = MODELS[model]
    pipeline = memory_table.without_weights(outline)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            for name, module in pipeline.components.items():
                if isinstance(module, PreTrainedModel):
                    config = copy.deepcopy(module.config)
                    config.update(SMALL_ENCODER)
                    pipeline.register_modules(**{name: type(module)(config).eval()})
                elif isinstance(module, ModelMixin):
                    changes = SMALL_VAE if name == "vae" else small if tiny else {}
                    pipeline.register_modules(**{name: type(module).from_config(module.config, **changes)})
    finally:
        torch.set_default_dtype(default)
    # The outline's tables of noise levels have no values.
    pipeline.register_modules(scheduler=pipeline.scheduler.from_config(pipeline.scheduler.config))
    if tiny:
        pipeline.default_sample_size = 8
    return pipeline.to(dtype=dtype)


def measure(case: Case, tiny: bool, updates: int, end: float) -> dict:
    """
    Seconds an update and its parts, images a second, and GiB at the peak.

    Args:
        end (`float`): on the monotonic clock; no update begins behind it.

    Raises:
        torch.OutOfMemoryError: it does not fit.
        TimeoutError: `end` came before an update was measured.
    """
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    pipeline = make(case.model, tiny, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        if case.bits is not None:
            pipeline.save_pretrained(folder)
            pipeline = load_pipeline(folder, dtype, case.bits)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        found = time_updates(
            pipeline,
            updates,
            end=end,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            per_device_train_batch_size=case.images,
            num_generations=4,
            activation_checkpointing=case.checkpointing,
            torch_compile=case.compiled,
            sample_guidance_scale=MODELS[case.model][1],
            fake_updates=1,
            disable_tqdm=True,
        )
    peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
    return {**found, "images_per_second": case.images / found["seconds"], "peak_gib": peak}


def try_case(case: Case, tiny: bool, updates: int, end: float) -> dict:
    """What `plan` says of a case, and its `measure` or what stood in its way; the memory is free again."""
    found = {"case": asdict(case)}
    start = time.monotonic()
    try:
        outline = make(case.model, tiny, "meta", torch.bfloat16)
        found["pixels"] = family_of(outline).height
        if case.bits is None:  # `plan` knows of no others
            found["planned_gib"] = memory_of(outline, case.images, case.checkpointing).total / GIB
        found |= measure(case, tiny, updates, end)
    except torch.OutOfMemoryError:
        found["failed"] = "does not fit"
    except TimeoutError as error:
        found["failed"] = str(error)
    except Exception as error:  # the other cases are still worth having
        found["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    torch._dynamo.reset()  # compiled code holds the denoiser
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**found, "wall_seconds": time.monotonic() - start}


def run_main_job(folder: Path, end: float, *options: str) -> dict:
    """The first command of the README, on this machine; ended at `end` of the monotonic clock."""
    start = time.monotonic()
    command = [sys.executable, str(MAIN_JOB), "--output_dir", str(folder), *options]
    try:
        subprocess.run(command, check=True, timeout=max(0, end - start))
    except subprocess.TimeoutExpired:
        return {"failed": "out of time"}
    except subprocess.CalledProcessError as error:
        return {"failed": str(error)}
    metrics = json.loads((folder / "metrics.json").read_text())
    figures = {name: metrics["student"][name] for name in ("fid", "fid_teacher", "class_accuracy")}
    return {"seconds": time.monotonic() - start, "training_seconds": metrics["cost"]["seconds"], **figures}


def row(found: dict) -> list[str]:
    case = Case(**found["case"])
    cells = [case.model, str(found.get("pixels", "")), str(case.images), case.settings]
    if "failed" in found:
        cells += [found["failed"], *[""] * 6]
    else:
        parts = found["parts"]
        student = parts["student, forward"] + parts["student, backward"]
        fake = parts["fake score's judgement"] + parts["fake score's updates"]
        times = (found["seconds"], parts["rollout"], parts["teacher"], student, fake)
        cells += [f"{seconds:.3f}" for seconds in times]
        cells += [f"{1 - parts['networks'] / found['seconds']:.0%}", f"{found['images_per_second']:.2f}"]
    peak, planned = found.get("peak_gib"), found.get("planned_gib")
    return cells + ["" if gib is None else f"{gib:.1f}" for gib in (peak, planned)]


def report(results: list[dict], main_job: dict | None, machine: str) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEADER, *map(row, results))]
    lines[1:1] = ["|---" * len(HEADER) + "|"]
    lines += ["", machine]
    if main_job is not None and "failed" in main_job:
        lines += ["", f"The main job: {main_job['failed']}."]
    elif main_job is not None:
        figures = ", ".join(f"{name} {value:.3f}" for name, value in main_job.items() if "seconds" not in name)
        lines += [
            "",
            f"The main job: {main_job['seconds']:.0f} s in all, {main_job['training_seconds']:.0f} s of them updates; "
            f"{figures}.",
        ]
    return "\n".join(lines)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--updates", type=int, default=3, help="measured updates of each case, behind two others")
    parser.add_argument("--minutes", type=float, default=8.0, help="when it should be done")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu_check"))
    parser.add_argument("--skip_main_job", action="store_true")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    end = time.monotonic() + 60 * args.minutes
    on_gpu = torch.cuda.is_available()
    machine = f"{torch.cuda.get_device_name() if on_gpu else 'No GPU: tiny sizes'}, torch {torch.__version__}"
    tqdm.write(f"{machine}.", file=sys.stderr)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    cases_end = end - (0 if args.skip_main_job else MAIN_JOB_SECONDS)
    results, main_job = [], None

    def write() -> str:
        text = report(results, main_job, machine)
        found = {"machine": machine, "cases": results, "main_job": main_job}
        (args.output_dir / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.output_dir / "gpu_check.md").write_text(text + "\n")
        return text

    has_bits = on_gpu and importlib.util.find_spec("bitsandbytes") is not None
    cases = [case for case in CASES if case.model in args.models]
    cases = [case for case in cases if (case.bits is None or has_bits) and (on_gpu or not case.compiled)]
    for case in tqdm(cases, desc="cases"):
        if time.monotonic() + case.compiled * COMPILE_SECONDS > cases_end:
            results.append({"case": asdict(case), "failed": "out of time"})
        else:
            results.append(try_case(case, not on_gpu, args.updates, cases_end))
        write()  # as it comes: whatever ends this, the figures so far stay
    if not args.skip_main_job:
        main_job = run_main_job(args.output_dir / "main_job", end)
    print(f"\n{write()}\n{args.output_dir}")


if __name__ == "__main__":
    main()
