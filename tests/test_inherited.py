# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Options of `TrainingArguments` and of accelerate's launcher: each does what it says, or is refused by name."""

import pytest
import torch
from conftest import load_script, make_config, make_trainer, redness
from transformers import TrainingArguments

from rdm_trl import evaluation
from rdm_trl.inherited import REFUSED, STEPS


@pytest.mark.parametrize("name", REFUSED)
def test_options_of_transformers_without_a_meaning_here(tmp_path, name):
    default = getattr(TrainingArguments("here"), name)
    default = None if name == "fsdp_config" else default  # which it fills in
    other = {bool: not default, float: 0.5, str: "all"}.get(type(default), 5)
    with pytest.raises(ValueError, match=f"`{name}` is .*, but must be left out: "):
        make_config(tmp_path, **{name: other})
    make_config(tmp_path, **{name: default})


def test_options_of_checkpointing(tmp_path):
    with pytest.raises(ValueError, match="not reentrant"):
        make_config(tmp_path, activation_checkpointing_kwargs={"use_reentrant": True})
    make_config(tmp_path, activation_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("MIXED_PRECISION", "fp16", "Use `bf16`"),
        ("MIXED_PRECISION", "fp8", "'no' or 'bf16'"),
        ("DYNAMO_BACKEND", "INDUCTOR", "`torch_compile`"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "say it in the config"),
        ("USE_MEGATRON_LM", "true", "Megatron-LM is not supported"),
        ("USE_PARALLELISM_CONFIG", "true", "model parallelism is not supported"),
        ("USE_FSDP", "true", "FSDP1 is not supported: .* Use FSDP2"),
        ("USE_DEEPSPEED", "true", "DeepSpeed is not supported"),
    ],
)
def test_what_the_launcher_says_is_not_silent(tmp_path, monkeypatch, name, value, message):
    """`accelerate launch` and its configuration file speak by these variables."""
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path)


def test_the_launchers_bf16_is_the_option(tmp_path, monkeypatch):
    assert not make_config(tmp_path).bf16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = make_config(tmp_path)
    assert config.bf16 and config.to_dict()["bf16"] and config.mixed_precision == "bf16"


@pytest.mark.parametrize(
    "accelerator", [dict(split_batches=True), dict(gradient_accumulation_kwargs=dict(num_steps=2))]
)
def test_accelerators_own_options(tmp_path, accelerator):
    with pytest.raises(ValueError, match="`accelerator_config` has"):
        make_config(tmp_path, accelerator_config=accelerator)


@pytest.mark.parametrize("name, strategy", STEPS.items())
def test_numbers_of_updates_that_no_strategy_reads(tmp_path, name, strategy):
    for other in ("no", "epoch"):
        with pytest.raises(ValueError, match=f"`{name}` is 3, but `{strategy}` is '{other}': it would be without"):
            make_config(tmp_path, **{name: 3, strategy: other})
    assert getattr(make_config(tmp_path, **{name: 3, strategy: "steps"}), name) == 3


@pytest.mark.parametrize("prefix", ["", "fake_"])
def test_a_warm_up_that_the_schedule_has_not(tmp_path, prefix):
    for schedule in ("constant_with_warmup", "linear"):
        make_config(tmp_path, **{f"{prefix}lr_scheduler_type": schedule, f"{prefix}warmup_steps": 2})
    with pytest.raises(ValueError, match=f"`{prefix}warmup_steps` is 2, but .* has no warm-up"):
        make_config(tmp_path, **{f"{prefix}lr_scheduler_type": "constant", f"{prefix}warmup_steps": 2})


def test_save_steps_of_the_command_line_and_of_a_file(tmp_path, monkeypatch):
    example = load_script("examples/train_gndm.py")
    monkeypatch.setattr(example, "RdmDistillTrainer", lambda config, **kwargs: configs.append(config) or 1 / 0)
    file, configs, run = tmp_path / "c.yaml", [], ["--output_dir", str(tmp_path / "run"), "--use_cpu"]

    def main(text, *arguments):
        file.write_text(text)
        with pytest.raises(ZeroDivisionError):
            example.main(["--config", str(file), *run, *arguments])
        return configs[-1].save_strategy, configs[-1].save_steps

    for text, arguments in (
        ('save_strategy: "no"\n', ["--save_steps", "3"]),
        ('save_strategy: "no"\nsave_steps: 3\n', []),
        ("seed: 1\n", ["--save_strategy", "no", "--save_steps=3"]),
        ("save_steps: 3\n", ["--save_strategy=epoch", "--save_steps", "4"]),
    ):
        with pytest.raises(ValueError, match="`save_steps` is .*, but `save_strategy` is"):
            main(text, *arguments)
    assert main("save_steps: 3\n", "--save_strategy", "no") == ("no", 500)
    assert main("save_steps: 3\n", "--save_strategy=no") == ("no", 500)
    assert main("save_steps: 3\n", "--save_strategy", "steps") == ("steps", 3)
    assert main('save_strategy: "no"\n', "--save_strategy", "steps", "--save_steps", "3") == ("steps", 3)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The student's weights behind a short run of the usual options."""
    return student_of(tmp_path_factory.mktemp("usual"))


def student_of(folder, **options):
    trainer = make_trainer(folder, **{"optim": "adamw_torch", **options})
    trainer.train()
    return torch.cat([value.flatten() for value in trainer.model.adapter_state("student").values()])


@pytest.mark.parametrize(
    "options",
    [
        dict(adam_beta1=0.5),
        dict(adam_beta2=0.5),
        dict(adam_epsilon=0.1),
        dict(weight_decay=0.5),
        dict(max_grad_norm=1e-6, adam_epsilon=1e-3),
        dict(optim="sgd"),
        dict(optim="adafactor"),
        dict(warmup_steps=2, lr_scheduler_type="constant_with_warmup"),
        dict(seed=7),
    ],
    ids=str,
)
def test_options_of_the_optimizer_reach_the_student(tmp_path, usual, options):
    assert not torch.allclose(student_of(tmp_path, **options), usual, rtol=1e-3, atol=0)


def test_arguments_of_optimizer_and_schedule_count(tmp_path):
    for first, second in (
        (dict(optim="rmsprop"), dict(optim="rmsprop", optim_args="momentum=0.5")),
        (
            dict(lr_scheduler_type="polynomial"),
            dict(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": 4.0}),
        ),
    ):
        weights = [student_of(tmp_path, **options) for options in (first, second)]
        assert not torch.allclose(*weights, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        dict(dataloader_num_workers=1, dataloader_prefetch_factor=3),
        dict(dataloader_pin_memory=False, dataloader_in_order=False),
        dict(torch_empty_cache_steps=1, logging_nan_inf_filter=False, log_level="error"),
    ],
    ids=str,
)
def test_options_of_how_it_runs_change_no_weight(tmp_path, usual, options):
    assert torch.equal(student_of(tmp_path, **options), usual)


def steps_with(trainer, key):
    return [row["step"] for row in trainer.state.log_history if key in row]


@pytest.mark.parametrize(
    "options, key, steps",
    [
        (dict(logging_steps=2), "dm/scale", [2, 4]),
        (dict(logging_steps=9, logging_first_step=True), "dm/scale", [1]),
        (dict(logging_strategy="no"), "dm/scale", []),
        (dict(logging_strategy="epoch"), "dm/scale", [2, 4]),
        (dict(skip_memory_metrics=False), "train_mem_cpu_alloc_delta", [4]),
        (dict(eval_strategy="steps", eval_steps=2), "eval_redness", [2, 4]),
        (dict(eval_strategy="steps", eval_steps=2, eval_delay=3), "eval_redness", [4]),
        (dict(eval_strategy="epoch"), "eval_redness", [2, 4]),
        (dict(eval_on_start=True), "eval_redness", [0]),
    ],
    ids=str,
)
def test_when_it_logs_and_evaluates(tmp_path, options, key, steps):
    # Two updates are an epoch of four prompts.
    prompts = ["a", "b", "c", "d"]
    trainer = make_trainer(tmp_path, [redness], prompts=prompts, max_steps=4, num_eval_images=4, **options)
    trainer.train()
    assert steps_with(trainer, key) == steps


@pytest.mark.parametrize(
    "options, kept",
    [
        (dict(save_strategy="epoch"), [2, 4]),
        (dict(save_strategy="steps", save_steps=1, save_total_limit=2), [3, 4]),
        (dict(save_strategy="steps", save_steps=0.5), [2, 4]),
    ],
    ids=str,
)
def test_when_it_saves(tmp_path, options, kept):
    trainer = make_trainer(tmp_path, prompts=["a", "b", "c", "d"], max_steps=4, **options)
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [f"checkpoint-{n}" for n in kept]


def test_the_best_checkpoint_by_a_figure_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.Judge, "names", ["fid_teacher"])  # as where there are features
    best = dict(save_strategy="best", eval_strategy="steps", eval_steps=1, num_eval_images=4)
    trainer = make_trainer(tmp_path, max_steps=3, **best)
    figures = iter([3.0, 1.0, 2.0])

    def measure(trainer, dataset):
        trainer.metrics = {who: {"fid_teacher": 0.0, "rewards": {}} for who in ("teacher", "base")}
        trainer.metrics["student"] = {"fid_teacher": next(figures), "rewards": {}}

    monkeypatch.setattr(evaluation, "measure", measure)
    trainer.train()
    assert trainer.state.best_metric == 1.0 and trainer.state.best_global_step == 2
    assert not (tmp_path / "run" / "checkpoint-3").exists() and (tmp_path / "run" / "checkpoint-2").exists()


def test_a_checkpoint_of_the_model_alone(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, save_only_model=True)
    trainer.train()
    names = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert "pytorch_lora_weights.safetensors" in names and "optimizer.pt" not in names
