# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
# /// script
# dependencies = ["rdm_trl"]
# ///
"""
What an update costs on this GPU, without a download: denoisers of the public configurations of Stable Diffusion 1.5,
XL, 3.5 medium and FLUX.1 with random weights, behind text encoders of the right width and one layer. Seconds of an
update by its parts, images a second, peak memory beside what `rdm-trl plan` would have said; then the main job. What
does not fit is said to, and the clock ends it. Without a GPU the same in tiny sizes, to see that it runs.

python examples/gpu_check.py                    # eight minutes; gpu_check.md and gpu_check.json in outputs/gpu_check
python examples/gpu_check.py --minutes 20 --models sdxl flux
"""

import argparse
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

import torch
from benchmark import time_updates
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from rdm_trl.demo import DEMO_PIPELINE
from rdm_trl.models.pipelines import family_of, load_pipeline
from rdm_trl.plan import GIB, memory_of


MAIN_JOB = Path(__file__).with_name("train_gndm.py")
MAIN_JOB_SECONDS = 150  # on one H100, where the small network waits for the CPU
HEADER = ["model", "pixels", "images", "settings", "s / update", "rollout", "teacher", "student", "fake score"]
HEADER += ["images / s", "peak GiB", "plan GiB"]


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
    Case("flux", 4),
    Case("sd15", 32, checkpointing=True),
    Case("sd35_medium", 4, bits=4),
    Case("sd15", 8, compiled=True),
]


def clip(width: int, cls=CLIPTextModel):
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_PIPELINE, subfolder="tokenizer", model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
    )
    return cls(config).eval(), tokenizer


def t5(width: int):
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    config = T5Config(vocab_size=3, d_model=width, d_kv=16, d_ff=16, num_layers=1, num_heads=1)
    return T5EncoderModel(config).eval(), tokenizer


def vae(channels: int, **options) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        latent_channels=channels,
        **options,
    )


def make_sd15(tiny: bool) -> DiffusionPipeline:
    width = 32 if tiny else 768
    small = dict(sample_size=8, block_out_channels=(32, 32, 32, 32), layers_per_block=1) if tiny else {}
    unet = UNet2DConditionModel(**{"sample_size": 64, "cross_attention_dim": width, "attention_head_dim": 8, **small})
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    return StableDiffusionPipeline(vae(4), *clip(width), unet, scheduler, None, None, requires_safety_checker=False)


def make_sdxl(tiny: bool) -> DiffusionPipeline:
    one, two = (32, 32) if tiny else (768, 1280)
    small = dict(sample_size=8, block_out_channels=(32, 32, 32), attention_head_dim=4) if tiny else {}
    options = dict(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1) if tiny else (1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=one + two,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=two + 6 * 256,
        use_linear_projection=True,
    )
    (encoder, tokenizer), (encoder_2, tokenizer_2) = clip(one), clip(two, CLIPTextModelWithProjection)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    unet = UNet2DConditionModel(**options | small)
    return StableDiffusionXLPipeline(vae(4), encoder, encoder_2, tokenizer, tokenizer_2, unet, scheduler)


def make_sd35_medium(tiny: bool) -> DiffusionPipeline:
    one, two, three = (16, 16, 64) if tiny else (768, 1280, 4096)
    small = dict(sample_size=8, num_layers=2, num_attention_heads=1, caption_projection_dim=64) if tiny else {}
    options = dict(
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        joint_attention_dim=three,
        caption_projection_dim=1536,
        pooled_projection_dim=one + two,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(1 if tiny else 13)),
        qk_norm="rms_norm",
    )
    (encoder, tokenizer), (encoder_2, tokenizer_2) = (clip(width, CLIPTextModelWithProjection) for width in (one, two))
    return StableDiffusion3Pipeline(
        SD3Transformer2DModel(**options | small),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(16, shift_factor=0.06),
        encoder,
        tokenizer,
        encoder_2,
        tokenizer_2,
        *t5(three),
    )


def make_flux(tiny: bool) -> DiffusionPipeline:
    one, two = (16, 64) if tiny else (768, 4096)
    small = dict(num_layers=1, num_single_layers=1, num_attention_heads=1) if tiny else {}
    transformer = FluxTransformer2DModel(
        guidance_embeds=True, pooled_projection_dim=one, joint_attention_dim=two, **small
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline = FluxPipeline(scheduler, vae(16, shift_factor=0.1), *clip(one), *t5(two), transformer)
    if tiny:
        pipeline.default_sample_size = 8
    return pipeline


# How each is made, and the guidance scale of its teacher.
MODELS: dict[str, tuple[Callable[[bool], DiffusionPipeline], float]] = {
    "sd15": (make_sd15, 7.5),
    "sdxl": (make_sdxl, 7.0),
    "sd35_medium": (make_sd35_medium, 4.5),
    "flux": (make_flux, 3.5),
}


def make(model: str, tiny: bool, device: str, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline with weights made on `device` at once, in `dtype`."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            pipeline = MODELS[model][0](tiny)
    finally:
        torch.set_default_dtype(default)
    return pipeline.to(dtype=dtype)


def measure(case: Case, tiny: bool, updates: int) -> dict:
    """
    Seconds an update and its parts, images a second, and GiB at the peak and as planned.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    planned = memory_of(make(case.model, tiny, "meta", torch.bfloat16), case.images, case.checkpointing)
    pipeline = make(case.model, tiny, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        if case.bits is not None:
            pipeline.save_pretrained(folder)
            pipeline = load_pipeline(folder, dtype, case.bits)
        pixels = family_of(pipeline).height
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        found = time_updates(
            pipeline,
            updates,
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
    return {
        **asdict(case),
        **found,
        "pixels": pixels,
        "images_per_second": case.images / found["seconds"],
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
        "planned_gib": planned.total / GIB,
    }


def try_case(case: Case, tiny: bool, updates: int) -> dict:
    """`measure`, or what stood in its way; either way the memory is free again."""
    try:
        return measure(case, tiny, updates)
    except torch.OutOfMemoryError:
        return {**asdict(case), "failed": "does not fit"}
    except Exception as error:  # the other cases are still worth having
        return {**asdict(case), "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run_main_job(folder: Path, *options: str) -> dict:
    """The first command of the README, on this machine."""
    start = time.perf_counter()
    subprocess.run([sys.executable, str(MAIN_JOB), "--output_dir", str(folder), *options], check=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    figures = {name: metrics["student"][name] for name in ("fid", "fid_teacher", "class_accuracy")}
    return {"seconds": time.perf_counter() - start, "training_seconds": metrics["cost"]["seconds"], **figures}


def report(results: list[dict], main_job: dict | None, machine: str) -> str:
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    for found in results:
        cells = [found["model"], str(found.get("pixels", "")), str(found["images"]), Case(**found["case"]).settings]
        if "failed" in found:
            cells += [found["failed"], *[""] * 7]
        else:
            parts = found["parts"]
            student = parts["student, forward"] + parts["student, backward"]
            fake = parts["fake score's judgement"] + parts["fake score's updates"]
            times = (found["seconds"], parts["rollout"], parts["teacher"], student, fake)
            cells += [f"{seconds:.3f}" for seconds in times] + [f"{found['images_per_second']:.2f}"]
            cells += ["" if found["peak_gib"] is None else f"{found['peak_gib']:.1f}", f"{found['planned_gib']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", machine]
    if main_job is not None:
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
    end = time.monotonic() + 60 * args.minutes
    on_gpu = torch.cuda.is_available()
    machine = f"{torch.cuda.get_device_name() if on_gpu else 'No GPU: tiny sizes'}, torch {torch.__version__}"
    tqdm.write(f"{machine}.", file=sys.stderr)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    end -= 0 if args.skip_main_job else MAIN_JOB_SECONDS
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
        if time.monotonic() > end:
            tqdm.write(f"Out of time: {len(cases) - len(results)} cases left out.", file=sys.stderr)
            break
        results.append({"case": asdict(case), **try_case(case, not on_gpu, args.updates)})
        write()  # as it comes: whatever ends this, the figures so far stay
    if not args.skip_main_job:
        main_job = run_main_job(args.output_dir / "main_job")
    print(f"\n{write()}\n{args.output_dir}")


if __name__ == "__main__":
    main()
