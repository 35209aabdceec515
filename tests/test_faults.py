# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""
What a user does wrong: the error names it and says what to do, comes before a weight moves, and leaves the disk as it
was. Mistakes that belong to one feature stand in that feature's tests.
"""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROMPTS, make_config, make_tiny_pipeline, make_trainer, redness
from datasets import Dataset, DatasetDict
from diffusers import DDIMScheduler, VQDiffusionScheduler
from peft import LoraConfig

from rdm_trl import RdmDistillConfig, RdmDistillTrainer
from rdm_trl._trl import make_parser
from rdm_trl.rewards import resolve_reward
from rdm_trl.rewards.panel import RewardPanel


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def refused(error: type, message: str, folder: Path, trainer: RdmDistillTrainer | None = None):
    """The block raises `error`; no file of `folder` and no weight of `trainer` changes."""
    (folder / "kept.txt").write_text("an earlier result")
    before = contents(folder)
    weights = {name: p.clone() for name, p in trainer.model.named_parameters()} if trainer else {}
    with pytest.raises(error, match=message):
        yield
    assert contents(folder) == before
    for name, weight in weights.items():
        assert torch.equal(trainer.model.get_parameter(name), weight), name
    if trainer:
        assert trainer.state.global_step == 0


# ------------------------------------------------------------------------------------------------------------- options

NAN = float("nan")


@pytest.mark.parametrize(
    "options, error, message",
    [
        # of the wrong type
        (dict(num_generations=4.0), TypeError, "`num_generations` is 4.0, but must be an integer"),
        (dict(num_generations="4"), TypeError, "`num_generations` is '4', but must be an integer"),
        (dict(sample_num_steps=True), TypeError, "`sample_num_steps` is True, but must be an integer"),
        (dict(max_steps=2.5), TypeError, "`max_steps` is 2.5, but must be an integer"),
        (dict(max_steps=None), TypeError, "`max_steps` is None, but must be an integer"),
        (dict(learning_rate="1e-3"), TypeError, "`learning_rate` is '1e-3', but must be a number"),
        (dict(reward_gradients="no"), TypeError, "`reward_gradients` is 'no', but must be True or False"),
        (dict(bf16="yes"), TypeError, "`bf16` is 'yes', but must be True or False"),
        (dict(negative_prompts=None), TypeError, "`negative_prompts` is None, but must be text"),
        (dict(seed="a"), TypeError, "`seed` is 'a', but must be an integer"),
        (dict(reward_funcs="ocr"), TypeError, r"`reward_funcs` is 'ocr', but must be a list: \['ocr'\]"),
        (dict(reward_weights=1.0), TypeError, r"`reward_weights` is 1.0, but must be a list: \[1.0\]"),
        (dict(reward_weights=["a"]), TypeError, "`reward_weights` is 'a', but must be a number"),
        (dict(dm_timestep_range=0.5), TypeError, "`dm_timestep_range` is 0.5, but must be a list"),
        (dict(dm_timestep_range="0.1,0.9"), TypeError, "`dm_timestep_range` is '0.1,0.9', but must be a list"),
        # not finite
        (dict(learning_rate=NAN), ValueError, "`learning_rate` is nan, but must be finite"),
        (dict(dm_weight=NAN), ValueError, "`dm_weight` is nan, but must be finite"),
        (dict(reward_weights=[float("inf")]), ValueError, "`reward_weights` is inf, but must be finite"),
        (dict(dm_timestep_range=[NAN, 1.0]), ValueError, "`dm_timestep_range` is nan, but must be finite"),
        (dict(max_grad_norm=NAN), ValueError, "`max_grad_norm` is nan, but must be finite"),
        # out of range
        (dict(learning_rate=-1.0), ValueError, "`learning_rate` is -1.0, but must be at least 0"),
        (dict(fake_learning_rate=-1e-4), ValueError, "`fake_learning_rate` is -0.0001, but must be at least 0"),
        (dict(max_grad_norm=-1.0), ValueError, "`max_grad_norm` is -1.0, but must be at least 0"),
        (dict(max_steps=-1), ValueError, "`max_steps` is -1, but must be at least 1"),
        (dict(max_steps=0), ValueError, "`max_steps` is 0, but must be at least 1"),
        (
            dict(per_device_train_batch_size=0),
            ValueError,
            "`per_device_train_batch_size` is 0, but must be at least 1",
        ),
        (dict(per_device_eval_batch_size=0), ValueError, "`per_device_eval_batch_size` is 0, but must be at least 1"),
        (dict(gradient_accumulation_steps=0), ValueError, "`gradient_accumulation_steps` is 0, but must be at least"),
        (dict(seed=-1), ValueError, "`seed` is -1, but must be at least 0"),
        (dict(num_generations=-4), ValueError, "`num_generations` is -4, but must be at least 1"),
        (dict(reward_warmup=-1), ValueError, "`reward_warmup` is -1, but must be at least 0"),
        (dict(reward_timeout=0.0), ValueError, "`reward_timeout` is 0.0, but must be positive"),
        (dict(save_strategy="steps", save_steps=0), ValueError, "`save_steps` is 0, but must be positive"),
        (dict(dm_timestep_range=[0.5, 1.5]), ValueError, r"is \[0.5, 1.5\], but must be two rising fractions"),
        (dict(per_device_train_batch_size=6), ValueError, r"\(6\) must be divisible by `num_generations` \(4\)"),
        # unknown names
        (dict(fake_lr_scheduler_type="cosin"), ValueError, "`fake_lr_scheduler_type` is 'cosin', but must be one of"),
        (dict(fake_lr_scheduler_type="reduce_lr_on_plateau"), ValueError, "but must be one of linear, cosine"),
        (dict(scale_rewards=True), TypeError, "`scale_rewards` is True, but must be text"),
        # of no use here
        (dict(auto_find_batch_size=True), ValueError, "`auto_find_batch_size` must stay off: a smaller batch"),
        (
            dict(enable_jit_checkpoint=True),
            ValueError,
            "`enable_jit_checkpoint` must stay off: it saves in the middle",
        ),
        (dict(fsdp="full_shard"), ValueError, "`fsdp` must be left out: shards are switched on by .*fsdp2.yaml"),
        (dict(deepspeed={"zero_optimization": {"stage": 2}}), ValueError, "DeepSpeed is not supported: .* Use DDP"),
        (dict(output_dir=f"{__file__}/run"), ValueError, "`output_dir` is in a file, .*test_faults.py"),
    ],
)
def test_options(tmp_path, options, error, message):
    with refused(error, message, tmp_path):
        make_config(tmp_path, **options)


def test_a_folder_that_is_not_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with refused(ValueError, f"`output_dir` is .*, but {tmp_path} is not writable", tmp_path):
        make_config(tmp_path)


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("dm_normalisation: group", ValueError, "Unknown arguments from config file.*dm_normalisation"),
        ("num_generations: 4.0", TypeError, "`num_generations` is 4.0, but must be an integer"),
        ("num_generations: four", SystemExit, "2"),  # argparse: invalid int value: 'four'
        ("dm_timestep_range: 0.1", TypeError, "`dm_timestep_range` is 0.1, but must be a list"),
        ("dm_timestep_range: [a, b]", TypeError, "`dm_timestep_range` is 'a', but must be a number"),
        ("reward_funcs: clip_score", TypeError, "`reward_funcs` is 'clip_score', but must be a list"),
        ("max_steps:", TypeError, "`max_steps` is None, but must be an integer"),
        ("negative_prompts: 3", TypeError, "`negative_prompts` is 3, but must be text"),
        ("dm_normalization: mean", ValueError, "`dm_normalization` is 'mean', but must be one of"),
        (
            "dm_normalization: sample\ndm_normalization_level: element",
            ValueError,
            "`dm_normalization_level='element'` is averaged over images",
        ),
        ("- max_steps", ValueError, "must contain a YAML mapping"),
    ],
)
def test_yaml(tmp_path, capsys, text, error, message):
    (tmp_path / "config.yaml").write_text(text + "\n")
    arguments = ["--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / "run"), "--use_cpu", "True"]
    with refused(error, message, tmp_path):
        make_parser(RdmDistillConfig).parse_args_and_config(arguments)
    assert (
        error is not SystemExit
        or "--num_generations: invalid int value: 'four'" in capsys.readouterr().err.replace("/--num-generations", "")
    )


# ------------------------------------------------------------------------------------------------------------- prompts


def rows(**columns) -> Dataset:
    return Dataset.from_dict(columns)


@pytest.mark.parametrize(
    "dataset, message",
    [
        (["a dress"], "`train_dataset` is a list, but must be a `datasets.Dataset`"),
        (DatasetDict(train=rows(prompt=["a"])), "`train_dataset` is a DatasetDict, .* one split, not streamed"),
        (rows(prompt=["a"]).to_iterable_dataset(), "`train_dataset` is a IterableDataset, .* one split, not streamed"),
        (rows(caption=["a"], id=[1]), "`train_dataset` needs a `prompt` column; it has caption, id"),
        (rows(prompt=[1, 2]), "`prompt` of row 0 of `train_dataset` is 1, but must be text"),
        (rows(prompt=[["a"], ["b"]]), r"`prompt` of row 0 of `train_dataset` is \['a'\], but must be text"),
    ],
)
def test_data_sets(tmp_path, dataset, message):
    with refused(ValueError, message, tmp_path):
        RdmDistillTrainer(make_config(tmp_path), sd_pipeline=make_tiny_pipeline(), train_dataset=dataset)


def raising():
    raise LookupError("no more prompts")


@pytest.mark.parametrize(
    "prompt_function, error, message",
    [
        (lambda: "a dress", ValueError, "`prompt_function` returned 'a dress', but must return a text and its"),
        (lambda: ("a dress", {}, 1), ValueError, "but must return a text and its metadata"),
        (lambda: (None, {}), ValueError, r"`prompt_function` returned \(None, {}\), but must return a text"),
        (lambda: None, ValueError, "`prompt_function` returned None, but must return a text and its metadata"),
        (lambda: ("a", {"x": object()}), ValueError, "The metadata of `prompt_function` must be plain values"),
        ("a dress", ValueError, "`prompt_function` is 'a dress', but must be a function"),
        (raising, LookupError, "no more prompts"),
    ],
)
def test_prompt_functions(tmp_path, prompt_function, error, message):
    with refused(error, message, tmp_path):
        make_trainer(tmp_path, None, prompt_function, prompts=None)


def test_metadata_of_another_form_each_time(tmp_path):
    metadata = iter([1, "one"] * 99)
    with refused(ValueError, "The metadata of `prompt_function` must be plain values .* of one form", tmp_path):
        make_trainer(tmp_path, None, lambda: ("a dress", next(metadata)), prompts=None)


def test_fewer_prompts_than_a_batch_are_repeated(tmp_path):
    trainer = make_trainer(tmp_path, prompts=["a dress"], max_steps=1, per_device_train_batch_size=12)
    trainer.train()
    assert trainer.state.global_step == 1


# ----------------------------------------------------------------------------------------- pipelines, schedulers, LoRA


def inpainting():
    pipeline = make_tiny_pipeline()
    pipeline.unet.register_to_config(in_channels=9)
    return pipeline


def without(component):
    pipeline = make_tiny_pipeline()
    setattr(pipeline, component, None)
    return pipeline


def scheduled(scheduler):
    pipeline = make_tiny_pipeline()
    pipeline.scheduler = scheduler
    return pipeline


@pytest.mark.parametrize(
    "pipeline, error, message",
    [
        (
            lambda: "/no/such/folder",
            OSError,
            "`sd_pipeline` '/no/such/folder' cannot be loaded; it must be a pipeline",
        ),
        (lambda: str(Path(__file__).parent), OSError, "`sd_pipeline` .* cannot be loaded.*model_index.json"),
        (lambda: 7, OSError, "`sd_pipeline` '7' cannot be loaded"),
        (lambda: make_tiny_pipeline().unet, OSError, "`sd_pipeline` .* cannot be loaded; it must be a pipeline"),
        (lambda: without("unet"), ValueError, "The pipeline has no unet: load it with all of its components"),
        (lambda: without("tokenizer"), ValueError, "The pipeline has no tokenizer"),
        (inpainting, ValueError, "maps 9 channels to 4, its VAE has 4: inpainting and editing models are not"),
        (lambda: scheduled(VQDiffusionScheduler(num_vec_classes=4)), ValueError, "it needs `alphas_cumprod`"),
        (lambda: scheduled(DDIMScheduler(rescale_betas_zero_snr=True)), ValueError, "starts at pure noise"),
        (
            lambda: scheduled(DDIMScheduler(prediction_type="x")),
            ValueError,
            "prediction_type='x'; the student can use",
        ),
    ],
)
def test_pipelines(offline, tmp_path, pipeline, error, message):
    pipeline = pipeline()
    with refused(error, message, tmp_path):
        make_trainer(tmp_path, pipeline=pipeline)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(target_modules=["to_z"]), "Target modules {'to_z'} not found in the base model"),
        (dict(r=0), "`r` should be a positive integer value but the value passed is 0"),
    ],
)
def test_adapters(tmp_path, options, message):
    with refused(ValueError, message, tmp_path):
        make_trainer(tmp_path, peft_config=LoraConfig(**options))


def test_what_is_no_lora(tmp_path):
    with refused(TypeError, "`peft_config` is {'r': 4}, but must be a `LoraConfig`", tmp_path):
        make_trainer(tmp_path, peft_config={"r": 4})


def test_a_pipeline_serves_one_trainer(tmp_path):
    pipeline = make_tiny_pipeline()
    make_trainer(tmp_path, pipeline=pipeline)
    with refused(ValueError, "The pipeline already has a student, of another trainer: load it again", tmp_path):
        make_trainer(tmp_path, pipeline=pipeline)


def test_a_feature_model_that_cannot_be_loaded(tmp_path):
    with refused(OSError, "`eval_feature_model` '/no/such/model' cannot be loaded", tmp_path):
        make_trainer(tmp_path, eval_feature_model="/no/such/model")


# ------------------------------------------------------------------------------------------------------------- rewards


@pytest.fixture
def modules(tmp_path, monkeypatch):
    (tmp_path / "broken_on_import.py").write_text("1 / 0\n")
    (tmp_path / "broken_syntax.py").write_text("def reward(:\n")
    (tmp_path / "needs_more.py").write_text("import not_installed\n")
    (tmp_path / "plain_values.py").write_text("number = 3\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "reward, message",
    [
        ("clip_scor", "There is no reward 'clip_scor'. Built in are aesthetic, classifier, clip_score"),
        ("no_such_module:reward", "cannot be found: No module named 'no_such_module'"),
        ("plain_values:reward", "cannot be found: plain_values has no function 'reward'"),
        ("plain_values:number", "cannot be found: plain_values has no function 'number'"),
        ("sys:no_such_name", "cannot be found: sys has no function 'no_such_name'"),
        ("broken_on_import:reward", "cannot be imported: broken_on_import raised ZeroDivisionError: division by zero"),
        ("broken_syntax:reward", "cannot be imported: broken_syntax raised SyntaxError"),
        ("needs_more:reward", "cannot be found: No module named 'not_installed'"),
        (":reward", "The reward ':reward' cannot be imported"),
        ("jpeg_compressibility:95", "The reward 'jpeg_compressibility' has no model to choose"),
        (None, "A reward is a function or a name, but None is a NoneType"),
    ],
)
def test_reward_names(tmp_path, modules, reward, message):
    with pytest.raises(ValueError, match=message):
        resolve_reward(reward)


@pytest.mark.parametrize(
    "rewards, options, message",
    [
        ([redness, redness], {}, "Two rewards have the same name: redness, redness. Set their `__name__`"),
        ([redness], dict(reward_weights=[]), "`reward_weights` has 0 values for 1 reward functions"),
        ([], dict(reward_weights=[1.0]), "`reward_weights` has 1 values for 0 reward functions"),
        (
            [redness],
            dict(num_generations=1, dm_centering="none", dm_normalization="sample"),
            "'redness' is compared between the images",
        ),
    ],
)
def test_panels(tmp_path, rewards, options, message):
    with pytest.raises(ValueError, match=message):
        RewardPanel(rewards, make_config(tmp_path, **options))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("faults"))


def number(size):
    return [0.5] * size


ANSWERS = [
    (lambda images: 0.5, ValueError, "'bad' returned 0.5, but must return one number an image"),
    (lambda images: None, ValueError, "'bad' returned None, but must return one number an image"),
    (lambda images: "a" * len(images), ValueError, "'bad' returned 'aaaaaaaa', but must return one number"),
    (lambda images: bytes(len(images)), ValueError, "'bad' returned b.*, but must return one number an image"),
    (lambda images: (0.5 for _ in images), ValueError, "'bad' returned <generator .*, but must return one number"),
    (lambda images: dict.fromkeys(range(len(images)), 0.5), ValueError, "'bad' returned {0: .*, but must return one"),
    (lambda images: set(range(len(images))), ValueError, "'bad' returned {0, .*, but must return one number"),
    (lambda images: tuple(number(len(images))), ValueError, r"'bad' returned \(0.5, .*, but must return one number"),
    (lambda images: (), ValueError, r"'bad' returned \(\), but must return one number"),
    (lambda images: torch.zeros(len(images), 1), ValueError, r"'bad' returned an array of shape \(8, 1\)"),
    (lambda images: np.zeros((len(images), 3)), ValueError, r"'bad' returned an array of shape \(8, 3\)"),
    (lambda images: torch.tensor(0.5), ValueError, r"'bad' returned an array of shape \(\)"),
    (lambda images: number(7), ValueError, "'bad' returned 7 rewards for 8 images"),
    (lambda images: [*number(7), "0.5"], ValueError, "'bad' returned '0.5' for the prompt 'a"),
    (lambda images: [*number(7), [0.5]], ValueError, r"'bad' returned \[0.5\] for the prompt 'a"),
    (lambda images: [*number(7), 1j], ValueError, "'bad' returned 1j for the prompt 'a"),
    (lambda images: [*number(7), 10**400], ValueError, "'bad' returned 1000.* for the prompt 'a"),
    (lambda images: [*number(7), 1e39], ValueError, "'bad' returned inf for the prompt 'a"),
    (lambda images: [*number(7), NAN], ValueError, "'bad' returned nan for the prompt 'a"),
    (lambda images: images.no_such_method(), RuntimeError, "'bad' failed: AttributeError: 'Tensor' object has no"),
    (lambda images: images[:, 9], RuntimeError, "'bad' failed: IndexError"),
]


@pytest.mark.parametrize("answer, error, message", ANSWERS)
def test_reward_answers(trainer, answer, error, message):
    def bad(images, prompts, metadata):
        return answer(images)

    trainer.rewards = RewardPanel([bad], trainer.args)
    with refused(error, f"Reward function {message}", Path(trainer.args.output_dir), trainer):
        trainer.train()


def two_arguments(images, prompts):
    return images.mean((1, 2, 3))


def differentiable(function):
    def steep(images, prompts, metadata):
        return function(images)

    steep.differentiable = True
    return steep


@pytest.mark.parametrize(
    "reward, error, message",
    [
        (two_arguments, RuntimeError, "'two_arguments' failed: TypeError: .* takes 2 positional arguments but 3 were"),
        (max, RuntimeError, "'max' failed: ValueError: no signature found"),
        (differentiable(lambda images: images[:, 9]), RuntimeError, "'steep' failed: IndexError"),
        (
            differentiable(lambda images: images.mean((2, 3))),
            ValueError,
            r"'steep' returned an array of shape \(8, 3\)",
        ),
        (differentiable(lambda images: images.detach().mean((1, 2, 3))), ValueError, "'steep' declares itself diff"),
        (differentiable(lambda images: images.mean((1, 2, 3)) / 0), ValueError, "'steep' returned inf for the prompt"),
        (resolve_reward("clip_score:/no/such/model"), RuntimeError, "cannot load '/no/such/model'"),
    ],
)
def test_reward_functions(trainer, reward, error, message):
    trainer.rewards = RewardPanel([reward], trainer.args)
    with refused(error, message, Path(trainer.args.output_dir), trainer):
        trainer.train()


def test_a_column_that_is_an_argument_of_rewards(tmp_path):
    def keyworded(images, prompts, **columns):
        return images.mean((1, 2, 3))

    trainer = RdmDistillTrainer(
        make_config(tmp_path),
        keyworded,
        sd_pipeline=make_tiny_pipeline(),
        train_dataset=rows(prompt=PROMPTS, images=[1, 2, 3]),
        peft_config=LoraConfig(r=2),
    )
    with refused(RuntimeError, "'keyworded' failed: TypeError: .* multiple values for keyword .*'images'", tmp_path):
        trainer.train()


def test_a_reward_may_do_what_it_likes_to_its_input():
    """The next reward sees the images, prompts and rows as they were drawn."""
    seen = []

    def spoils(images, prompts, metadata):
        images.zero_()
        prompts.clear()
        metadata.clear()
        return [0.0] * len(images)

    def watches(images, prompts, metadata):
        seen.append((images.clone(), list(prompts), list(metadata)))
        return [0.0] * len(images)

    class Config:
        reward_timeout = reward_weights = target_dm = reward_frame_stride = None
        reward_gradients, reward_mixing, num_generations, dm_weight, sample_num_steps = True, "sum", 3, 1.0, 4
        adversarial_weight = 0.0

    images = torch.rand(3, 3, 8, 8)
    score = RewardPanel([spoils, watches], Config()).score
    score(images, ["a", "b", "c"], [1, 2, 3])
    assert torch.equal(seen[0][0], images) and images.abs().sum() > 0
    assert seen[0][1:] == (["a", "b", "c"], [1, 2, 3])


def test_a_reward_that_scores_nothing_says_so(trainer, monkeypatch):
    def silent(images, prompts, metadata):
        return [None] * len(images)

    warnings = []
    monkeypatch.setattr("rdm_trl.rewards.panel.logger.warning_once", warnings.append)
    trainer.rewards = RewardPanel([silent], trainer.args)
    feedback = trainer._prepare_inputs([{"prompt": "a"}] * 8)["feedback"]
    assert (feedback.advantage == 0).all() and feedback.direction.isfinite().all()
    assert warnings and "'silent' does not tell the images of a prompt apart" in warnings[0]


def test_a_time_out_of_the_reward_itself_is_not_ours(trainer):
    def remote(images, prompts, metadata):
        raise TimeoutError("the server does not answer")

    trainer.rewards = RewardPanel([remote], trainer.args)
    with refused(
        RuntimeError,
        "'remote' failed: TimeoutError: the server does not answer",
        Path(trainer.args.output_dir),
        trainer,
    ):
        trainer.train()


# ------------------------------------------------------------------------------------------------------------ training


def test_a_hook_that_raises(tmp_path):
    def hook(pairs, global_step, tracker):
        raise LookupError("no such window")

    trainer = make_trainer(tmp_path, None, None)
    trainer.image_samples_callback = hook
    with refused(LookupError, "no such window", tmp_path, trainer):
        trainer.train()


@pytest.mark.parametrize(
    "role, message", [("student", "The student's gradient"), ("fake", "The fake score's gradient")]
)
def test_a_gradient_that_is_not_finite(tmp_path, role, message):
    trainer = make_trainer(tmp_path)
    trainer.model.adapter_parameters(role)[0].register_hook(lambda gradient: gradient * NAN)
    with refused(FloatingPointError, f"{message} is n", tmp_path, trainer):
        trainer.train()


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path):
    trainer = make_trainer(
        tmp_path, learning_rate=1e-3, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=1
    )

    def explode(args, state, control, optimizer, **kwargs):
        if state.global_step == 1:
            optimizer.param_groups[0]["lr"] = 1e39

    trainer.callback_handler.callbacks[0].on_step_begin = explode
    with pytest.raises(FloatingPointError, match="The run has diverged: the adapter 'student' is not finite"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


def test_settings_can_be_written(tmp_path):
    """What a checkpoint remembers of a run is JSON, whatever was given."""
    trainer = make_trainer(tmp_path, [redness], learning_rate=np.float32(1e-3), max_steps=1)
    trainer.save_model()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["settings"]["reward_funcs"] == ["redness"]
