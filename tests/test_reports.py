# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""
What users of diffusers, peft, transformers and of other trainers bring, and what breaks there: here it works, equal to
something else, or is refused by name before anything is trained. Most name the report that they stand for.
"""

import functools
import importlib.util
import json
import sys
from decimal import Decimal
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from conftest import PROMPTS, make_config, make_tiny_pipeline, make_trainer, redness, save_style
from datasets import Dataset, Image
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from peft import AdaLoraConfig, LoraConfig
from PIL import Image as Picture
from tiny_pipelines import CASES, make
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback

from rdm_trl import RdmDistillTrainer, evaluation
from rdm_trl.method.diffusion import NoiseProcess, make_student_scheduler
from rdm_trl.models.pipelines import family_of
from rdm_trl.models.pipelines.changes import check_unchanged
from rdm_trl.optimizers import check_optimizers
from rdm_trl.prompts import check_prompts
from rdm_trl.rewards import Scorer
from rdm_trl.saving.pictures import comparison_grid, read_grid, save_grid


def student_of(folder, *rewards, **options) -> torch.Tensor:
    """The student's weights behind a short run."""
    trainer = make_trainer(folder, list(rewards), **options)
    trainer.train()
    return weights_of(trainer)


def weights_of(trainer, role="student") -> torch.Tensor:
    return torch.cat([value.flatten() for value in trainer.model.adapter_state(role).values()])


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return student_of(tmp_path_factory.mktemp("usual"))


# ----------------------------------------------------------------------------------------- pipelines that were changed


def compiled(pipeline):
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")


def cast(pipeline):
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def grouped(pipeline):
    cpu = torch.device("cpu")
    pipeline.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


@pytest.mark.parametrize(
    "change, message",
    [
        (compiled, "The unet of the StableDiffusionPipeline is compiled.*`torch_compile`"),  # peft #2957
        (lambda p: p.unet.mid_block.compile(backend="eager"), "The unet .* is compiled"),
        (lambda p: p.fuse_qkv_projections(), "unfuse_qkv_projections"),  # diffusers #11903
        (lambda p: p.enable_freeu(0.9, 0.2, 1.2, 1.4), "FreeU is on"),  # diffusers PR 5164
        (cast, "The unet of the StableDiffusionPipeline has a hook of diffusers"),  # diffusers #11648, peft PR 2353
        (grouped, "has a hook of diffusers"),
        (lambda p: cpu_offload_with_hook(p.unet, "cpu"), "The unet .* is moved between devices"),  # diffusers #3958
        (lambda p: cpu_offload(p.text_encoder, "cpu"), "The text_encoder .* is moved between devices"),
        (lambda p: p.to(torch.float16), "is in float16, where gradients under- and overflow"),  # SimpleTuner #211
    ],
)
def test_a_pipeline_that_no_student_can_be_trained_in(tmp_path, change, message):
    pipeline = make_tiny_pipeline()
    change(pipeline)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, pipeline=pipeline)


def test_a_pipeline_with_a_fused_lora(tmp_path):
    """diffusers #6510 and the like: the student of the sum is no student of the base that its card names."""
    pipeline = make_tiny_pipeline()
    pipeline.load_lora_weights(save_style(tmp_path / "style"))
    with pytest.raises(ValueError, match="has a LoRA loaded, which would be lost"):
        make_trainer(tmp_path, pipeline=pipeline)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    with pytest.raises(ValueError, match="The pipeline has a LoRA fused in, .*`pipeline.save_pretrained"):
        make_trainer(tmp_path, pipeline=pipeline)
    pipeline.save_pretrained(tmp_path / "fused")
    trainer = make_trainer(tmp_path, pipeline=str(tmp_path / "fused"))
    assert trainer.base_model == str(tmp_path / "fused")
    for ours, theirs in zip(trainer.model.frozen_parameters(), pipeline.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_fused_projections_of_a_transformer():
    pipeline = make(CASES["flux_dev"])
    check_unchanged(pipeline, "transformer")
    pipeline.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="The transformer of the FluxPipeline has fused projections"):
        check_unchanged(pipeline, "transformer")


def test_a_pipeline_that_computes_the_same_otherwise(tmp_path, usual):
    pipeline = make_tiny_pipeline()
    pipeline.enable_freeu(0.9, 0.2, 1.2, 1.4)
    pipeline.disable_freeu()
    pipeline.fuse_qkv_projections()
    pipeline.unfuse_qkv_projections()
    pipeline.enable_attention_slicing()
    pipeline.vae.enable_tiling()
    pipeline.unet.to(memory_format=torch.channels_last)
    torch.testing.assert_close(student_of(tmp_path, pipeline=pipeline), usual, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- schedulers


def with_shift(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_shift(shift)
    return scheduler


def pure_noise(prediction_type, by_hand=False):
    """Zero terminal SNR, as in scripts of before diffusers had the option: by betas, or only in the object."""
    betas = DDIMScheduler(rescale_betas_zero_snr=True).betas
    if not by_hand:
        return DDIMScheduler(prediction_type=prediction_type, trained_betas=betas.tolist())
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    scheduler.alphas_cumprod = (1 - betas).cumprod(0)
    return scheduler


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (
            lambda: with_shift(8.0),
            r"shift was set to 8.0, but .*says 3.0.*from_config\(.*shift=8.0",
        ),  # diffusers #8501
        (lambda: pure_noise("epsilon"), "starts at pure noise"),  # diffusers #4195, #5103
        (lambda: pure_noise("v_prediction", True), "are not those of its configuration"),  # InvokeAI #7601
        (lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "`invert_sigmas` counts noise from the other"),
        (
            lambda: UniPCMultistepScheduler(use_flow_sigmas=True),
            "has `use_flow_sigmas`, but prediction_type='epsilon'",
        ),
    ],
)
def test_a_scheduler_that_does_not_do_what_it_says(scheduler, message):
    with pytest.raises(ValueError, match=message):
        NoiseProcess(scheduler())


def test_what_such_schedulers_should_be():
    NoiseProcess(with_shift(3.0))
    scheduler = pure_noise("v_prediction")
    student = make_student_scheduler(scheduler, 4)
    assert (
        torch.equal(student.alphas_cumprod, NoiseProcess(scheduler).alphas_cumprod) and student.alphas_cumprod[-1] == 0
    )


@pytest.mark.parametrize(
    "name, scheduler, message",
    [
        (
            "sd3",
            DDIMScheduler,
            "StableDiffusion3Pipeline is of flow matching, and its scheduler, DDIMScheduler, is not",
        ),
        (
            "sd_epsilon",
            FlowMatchEulerDiscreteScheduler,
            "StableDiffusionPipeline cannot be called with a FlowMatchEuler",
        ),
    ],
)
def test_a_scheduler_of_another_process(name, scheduler, message):
    pipeline = make(CASES[name])
    pipeline.scheduler = scheduler()
    with pytest.raises(ValueError, match=message):
        family_of(pipeline).make_student_scheduler(4)


# ------------------------------------------------------------------------------------- optimizers, schedules, and runs


def test_an_optimizer_from_before_the_adapters(tmp_path):
    """transformers #18635: nothing would have been trained."""
    pipeline, rest = make_tiny_pipeline(), dict(train_dataset=Dataset.from_dict({"prompt": PROMPTS}))
    optimizer = torch.optim.SGD(pipeline.unet.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`optimizers` must be left out: .* set `trainer.optimizer`"):
        RdmDistillTrainer(make_config(tmp_path), sd_pipeline=pipeline, optimizers=(optimizer, None), **rest)
    trainer = make_trainer(tmp_path)
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match="`optimizers` must be left out"):
        check_optimizers(trainer)
    before, trainer.lr_scheduler, trainer.optimizer = weights_of(trainer), None, optimizer
    with pytest.raises(ValueError, match="`trainer.optimizer` must hold the student's parameters and no others"):
        trainer.train()
    assert torch.equal(weights_of(trainer), before)


def test_an_optimizer_of_ones_own(tmp_path):
    """It acts as the one by name does; the first update, behind which the two fake scores differ."""
    trainer = make_trainer(tmp_path / "own", max_steps=1)
    trainer.optimizer = torch.optim.SGD(trainer.model.adapter_parameters("student"), lr=1e-3)
    before = weights_of(trainer)
    trainer.train()
    assert not torch.equal(weights_of(trainer), before)
    assert torch.equal(weights_of(trainer), student_of(tmp_path / "name", max_steps=1, optim="sgd"))


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(optim="schedule_free_adamw"), ValueError, "`optim` is 'schedule_free_adamw', but must be another"),
        (dict(optim="galore_adamw_layerwise"), ValueError, "`optim` is 'galore_adamw_layerwise', but must be another"),
        (
            dict(optim="lomo"),
            ValueError,
            "`optim` is 'lomo', but must be another: it updates all weights in the backward",
        ),
        (dict(lr_scheduler_type="cosine_with_min_lr"), ValueError, "One of min_lr or min_lr_rate"),
        (dict(lr_scheduler_type="warmup_stable_decay"), TypeError, "num_decay_steps"),
        (dict(seed=2**32), ValueError, "`seed` is 4294967296, but must be below"),  # SimpleTuner #97
    ],
)
def test_options_that_failed_only_behind_the_teachers_images(tmp_path, options, error, message):
    """kohya #1796 and the like; what is not installed, too, which transformers says."""
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, **options)


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def test_training_again(tmp_path):
    """
    A cell of a notebook that is run again, behind an error or a whole run. What the broken update has collected is no
    part of the next one; and the second run's fake score would have stood still, its schedule over.
    """
    calls, learned, rates = [], [], []

    def flaky(images, prompts, metadata):
        calls.append(None)
        if len(calls) == 2:
            raise ConnectionError("the server is gone")
        return images[:, 0].mean((1, 2))

    schedules = dict(fake_lr_scheduler_type="linear", lr_scheduler_type="linear")
    trainer = make_trainer(tmp_path, [flaky], gradient_accumulation_steps=2, fake_updates=1, **schedules)
    with pytest.raises(RuntimeError, match="the server is gone"):
        trainer.train()
    update = trainer.fake_score.update
    trainer.fake_score.update = lambda loss, batches: learned.append(len(batches)) or update(loss, batches)
    for _ in range(2):
        fake = weights_of(trainer, "fake")
        trainer.train()
        rates.append((logged(trainer, "fake_learning_rate"), logged(trainer, "learning_rate")))
        assert not torch.equal(weights_of(trainer, "fake"), fake)
    assert learned == [2] * 4 and rates[0] == rates[1] and len(rates[0][0]) == 2


def test_stopping_early(tmp_path):
    """GLiNER #140, #159: figures of evaluation stop the run, and its best student stays."""
    best = dict(metric_for_best_model="redness", load_best_model_at_end=True, save_strategy="steps", save_steps=1)
    each = dict(eval_strategy="steps", eval_steps=1, num_eval_images=4, max_steps=3)
    trainer = make_trainer(tmp_path, [redness], **best, **each)
    trainer.add_callback(EarlyStoppingCallback(1, early_stopping_threshold=10.0))
    trainer.train()
    assert (trainer.state.global_step, trainer.state.best_global_step) == (2, 1)


# ------------------------------------------------------------------------------------------------------ random numbers


class Seeding(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        torch.manual_seed(0)


def test_others_who_seed_the_generators(tmp_path):
    """FastVideo PR 610, kohya PR 1903: pictures drawn from one seed, and each update behind them from one noise."""

    def run(folder, act):
        def black_box(images, prompts, metadata):
            act()
            return redness(images, prompts, metadata)

        def direct(images, prompts, metadata):
            return black_box(images, prompts, metadata)

        direct.differentiable = True
        trainer, seen = make_trainer(folder, [black_box, direct], None), []
        trainer.image_samples_callback = lambda *args: act()
        if act is seed:
            trainer.add_callback(Seeding())
        draw = trainer.rollout
        trainer.rollout = lambda *a, **k: seen.append(torch.get_rng_state()) or draw(*a, **k)
        trainer.train()
        return seen, weights_of(trainer)

    def seed():
        torch.manual_seed(0)

    (noises, weights), (expected, others) = run(tmp_path / "seeding", seed), run(tmp_path / "not", lambda: None)
    assert all(torch.equal(*pair) for pair in zip(noises, expected, strict=True)) and torch.equal(weights, others)
    assert not torch.equal(*noises)


def test_a_reward_may_draw_random_numbers():
    """Others than the run's, and the same in each run."""

    def noisy(images, prompts, metadata):
        return torch.rand(len(images))

    torch.manual_seed(1)
    state, answers = torch.get_rng_state(), []
    for _ in range(2):
        answers.append(Scorer([noisy])(torch.zeros(3, 3, 4, 4), ["a"] * 3, [{}] * 3)[0][:, 0])
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*answers) and not torch.equal(answers[0], torch.rand(3))


# ------------------------------------------------------------------------------------------------------------- rewards


class Module(nn.Module):
    """In DDPO's style; trl PR 3372 asks for the other one, by keywords."""

    def forward(self, images, prompts, metadata):
        return redness(images, prompts, [row["number"] for row in metadata])


class ByKeywords(nn.Module):
    def forward(self, images, prompts, number, **columns):
        return redness(images, prompts, number)


class Server:
    async def __call__(self, images, prompts, metadata):
        return redness(images, prompts, metadata).bfloat16()


def test_rewards_of_every_make():
    """trl #2644, PR 1391: modules, methods, and numbers of any type."""
    images, rows = torch.rand(4, 3, 8, 8), [{"number": i} for i in range(4)]
    for reward in (
        Module(),
        ByKeywords(),
        Module().forward,
        functools.partial(redness),
        Server(),
        lambda *args: list(redness(*args)),
        lambda *args: redness(*args).numpy().astype(object),
        torch.inference_mode()(lambda *args: [Decimal(value) for value in redness(*args).tolist()]),
    ):
        rewards, _ = Scorer([reward])(images, PROMPTS + ["a"], rows)
        torch.testing.assert_close(rewards[:, 0], redness(images, None, None), atol=2e-3, rtol=0)


# ----------------------------------------------------------------------------------------------- prompts and data sets


PARAGRAPHS = "A photo of a bag.\n\nIt stands on a table.\r\n" + "Its leather is worn. " * 300


def test_prompts_of_captioning_models(tmp_path):
    """Several paragraphs, hundreds of words: the grid failed, and the run with it. Or no words at all."""
    prompts = [PARAGRAPHS, "", "  ", "一只猫 👩‍👩‍👧", "a\x00b"]
    trainer = make_trainer(tmp_path, prompts=prompts, max_steps=1, log_images_steps=1, num_log_images=5)
    trainer.train()
    trainer.save_model()
    columns, shown = read_grid(tmp_path / "run" / "samples" / "grid.png")
    assert shown == prompts and len(columns) == 3
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_a_grid_is_not_as_wide_as_its_prompts(tmp_path):
    columns = {"teacher, 3 steps": [[Picture.new("RGB", (64, 64))]]}
    short, long = (comparison_grid(columns, [prompt]) for prompt in ("x" * 80, PARAGRAPHS))
    assert long.width < 1.2 * short.width
    save_grid(long, tmp_path / "grid.png")
    assert read_grid(tmp_path / "grid.png")[1] == [PARAGRAPHS]


def test_a_data_set_in_another_form(tmp_path):
    dataset = Dataset.from_dict({"prompt": PROMPTS, "number": [1, 2, 3]})
    for form in ("pandas", "arrow"):  # whose rows are tables
        assert check_prompts(dataset.with_format(form), "train_dataset")[1] == {"prompt": PROMPTS[1], "number": 2}
    for form in ("numpy", "torch"):
        assert check_prompts(dataset.with_format(form), "train_dataset")[1]["number"].ndim == 0


def test_evaluation_reads_only_the_rows_that_it_draws(tmp_path, monkeypatch):
    """Prompts come with pictures of megabytes each (SimpleTuner #105): decoding all of them took all memory."""
    decoded, decode = [], Image.decode_example
    monkeypatch.setattr(Image, "decode_example", lambda *args, **kwargs: decoded.append(0) or decode(*args, **kwargs))
    pictures = [Picture.new("RGB", (4, 4))] * 9
    dataset = Dataset.from_dict({"prompt": [f"a {i}" for i in range(9)], "image": pictures})
    trainer = make_trainer(tmp_path, num_eval_images=8)
    decoded.clear()
    prompts, metadata = evaluation.drawn_rows(trainer, dataset)
    assert prompts == ["a 0"] * 4 + ["a 1"] * 4 and metadata[0]["image"].size == (4, 4) and len(decoded) == 2


# --------------------------------------------------------------------------------------------------------------- LoRAs


@pytest.mark.parametrize(
    "config, error, message",
    [
        (
            LoraConfig(r=2, lora_dropout=0.1),
            ValueError,
            "`lora_dropout=0.1`, but dropout is off",
        ),  # diffusion-pipe #261
        (
            LoraConfig(r=2, lora_alpha=0),
            ValueError,
            "`peft_config` has an alpha of 0 at .*, where the adapter would never",
        ),
        (LoraConfig(r=2, alpha_pattern={"to_q": 0}), ValueError, "an alpha of 0 at .*to_q"),
        (LoraConfig(r=2, rank_pattern={"to_qq": 4}), ValueError, "`rank_pattern` for 'to_qq', but no layer"),
        (AdaLoraConfig(total_step=9), TypeError, "must be a `LoraConfig`, or `False`"),
    ],
)
@pytest.mark.filterwarnings("ignore:The following rank_pattern")
def test_a_lora_that_would_not_be_what_it_says(tmp_path, config, error, message):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, peft_config=config)


@pytest.mark.parametrize(
    "left_out", [dict(exclude_modules=["to_v"]), dict(exclude_modules=r".*up_blocks.*"), dict(layers_to_transform=[0])]
)
def test_layers_that_are_left_out_keep_the_teachers_style(tmp_path, left_out):
    """peft #2044, diffusers #11874: the student began without the style where its own layers were left out."""
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "to_k"], **left_out)
    trainer = make_trainer(tmp_path, peft_config=config, teacher_lora=save_style(tmp_path / "style"))
    own = {key.split(".lora_")[0] for key in trainer.model.adapter_state("student") if "to_k" in key}
    if left_out == dict(exclude_modules=r".*up_blocks.*"):
        assert own and not any("up_blocks" in key for key in own)
    x_t, timesteps, condition = torch.randn(2, 4, 4, 4), torch.tensor([400, 900]), trainer.encode(PROMPTS[:2])
    with torch.no_grad():
        teacher, student = (
            trainer.predict_x0(trainer.model, role, x_t, timesteps, condition) for role in ("teacher", "student")
        )
    torch.testing.assert_close(student, teacher)


# --------------------------------------------------------------------------------------------- machines and precisions


def test_windows(monkeypatch):
    """YOLOX #17 and many others: there is no module `resource`."""
    monkeypatch.setitem(sys.modules, "resource", None)
    spec = importlib.util.spec_from_file_location("rdm_trl.evaluation_there", evaluation.__file__)
    there = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(there)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(psutil.Process, "memory_info", lambda process: SimpleNamespace(peak_wset=3 * 2**20))
    assert there.peak_memory_mb() == 3.0 or torch.cuda.is_available()


def test_defaults_of_pytorch(tmp_path, monkeypatch):
    """transformers #31833: generators of the CPU beside a default device."""
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    with pytest.raises(ValueError, match="PyTorch's default device is cuda.*leave out `torch.set_default_device`"):
        make_config(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    with pytest.raises(ValueError, match="PyTorch's default type is torch.bfloat16.*`torch.set_default_dtype`"):
        make_config(tmp_path)


def with_full(pipeline, *names):
    pipeline.to(torch.bfloat16)
    for name in names:
        pipeline.components[name].float()
    return pipeline


def test_components_of_several_precisions(tmp_path):
    """diffusers #9476, SimpleTuner #356: failed at the first validation, or at the end."""
    for name in ("text_encoder", "vae"):
        with pytest.raises(ValueError, match="several precisions, and cannot draw with them: .*unet in bfloat16"):
            make_trainer(tmp_path, pipeline=with_full(make_tiny_pipeline(), name))
    trainer = make_trainer(tmp_path, pipeline=with_full(make_tiny_pipeline(), "vae"), bf16=True)
    assert trainer.sample("student", PROMPTS).isfinite().all()
