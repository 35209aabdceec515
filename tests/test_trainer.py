# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
import json

import pytest
import torch
from conftest import PROMPTS, logs_of, make_config, make_tiny_pipeline, make_trainer, redness
from datasets import Dataset
from diffusers import DiffusionPipeline, LCMScheduler, VQDiffusionScheduler
from peft import LoraConfig
from tiny_pipelines import make_sd3
from torch._dynamo.utils import counters
from transformers import TrainerCallback, ViTConfig, ViTImageProcessor, ViTModel

from rdm_trl import RdmDistillTrainer
from rdm_trl.method import policy
from rdm_trl.method.diffusion import NoiseProcess


def test_training_saves_a_checkpoint_that_plain_diffusers_loads(tmp_path):
    """With rank and alpha apart, so that a lost scale would show."""
    trainer = make_trainer(
        tmp_path, [redness], peft_config=LoraConfig(r=2, lora_alpha=6), learning_rate=0.05, log_images_steps=2
    )
    trainer.train()
    results = trainer.evaluate()
    trainer.save_model()
    folder = tmp_path / "run"
    for name in ("pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json", "README.md", "metrics.json"):
        assert (folder / name).is_file(), name
    assert (folder / "samples" / "step-000002.png").is_file()

    # The trainer's own rollout of the average weights, for known noise.
    prompts = ["a photo of a bag", "a coat"]
    noise = torch.randn(4, 2, 4, 4, 4, generator=torch.Generator().manual_seed(3)).transpose(0, 1)
    condition = trainer.encode(prompts)

    def predict(x_t, t, rows):
        chosen = {key: value[rows] for key, value in condition.items()}
        return trainer.predict_x0(trainer.model, "ema", x_t, t, chosen)

    ours = policy.rollout(predict, trainer.process, trainer.student_timesteps, noise, torch.tensor([3, 3]), True)
    ours = trainer.family.decode(ours.latents[:, -1])

    def draw(pipeline):
        pipeline.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
        generator = torch.Generator().manual_seed(3)
        return pipeline(
            prompts, num_inference_steps=4, guidance_scale=1.0, generator=generator, output_type="pt"
        ).images

    plain = make_tiny_pipeline()
    plain.load_lora_weights(folder)
    theirs = draw(plain)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    untrained = draw(make_tiny_pipeline())
    assert (untrained - theirs).abs().max() > 1e-2

    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["student"]["rewards"]["redness"] == pytest.approx(results["eval_redness"])
    assert metrics["cost"]["updates"] == 2 and metrics["cost"]["rollouts"] == 16
    assert metrics["cost"]["teacher_evaluations"] == 2 * 16  # guided: two an image
    assert metrics["settings"]["lora_alpha"] == 6
    card = (folder / "README.md").read_text()
    for line in (
        "pipeline_tag: text-to-image",
        "pipe.scheduler = LCMScheduler.from_pretrained(",
        "[999, 749, 499, 249]",
    ):
        assert line in card


def test_logged_metrics(tmp_path):
    trainer = make_trainer(tmp_path, [redness])
    trainer.train()
    logs = logs_of(trainer)
    for key in (
        "loss",
        "loss/student",
        "loss/fake",
        "grad_norm",
        "learning_rate",
        "fake_learning_rate",
        "reward",
        "reward_std",
        "rewards/redness/mean",
        "rewards/redness/std",
        "rewards/distribution_matching/mean",
        "rewards/distribution_matching/std",
        "dm/scale",
        "dm/direction",
        "x0/mean",
        "x0/std",
        "step_time",
        "samples_per_second",
    ):
        assert isinstance(logs[key], float), key


def test_only_the_adapters_learn(tmp_path):
    trainer = make_trainer(tmp_path)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert {name.split(".")[-2] for name in changed} == {"student", "fake", "ema"}


@pytest.mark.parametrize("level", ["image", "element"])
def test_the_student_is_trained_along_the_normalised_direction(tmp_path, level):
    """The gradient of one update, against a separate computation with plain modules."""
    options = dict(dm_centering="none", dm_timestep_sampling="uniform", dm_normalization_level=level)
    trainer = make_trainer(tmp_path, sample_guidance_scale=3.0, **options)
    torch.manual_seed(5)
    for name in ("student", "fake"):
        for parameter in trainer.model.adapter_parameters(name):
            torch.nn.init.normal_(parameter, std=0.1)
    trainer.create_optimizer()
    torch.manual_seed(7)
    inputs = trainer._prepare_inputs([{"prompt": p} for p in ("a dress", "a coat") for _ in range(4)])
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    found = [p.grad.clone() for p in trainer.model.adapter_parameters("student")]

    # Again with the same draws, by peft's public switches and the definitions of GNDM.
    unet, process = trainer.model.denoiser, NoiseProcess(trainer.sd_pipeline.scheduler)
    rollout = inputs["experience"].rollout
    embeds = trainer.family.encode_prompts(inputs["experience"].prompts)["prompt_embeds"]
    empty = trainer.family.encode_prompts([""])["prompt_embeds"].expand_as(embeds)
    torch.manual_seed(7)
    policy.draw_exit_steps(2, 4, 4)
    torch.randn(8, 4, 4, 4, 4)
    # Only noise levels that the next step, at t = 749, 499 or 249, can see; the whole range behind the last step.
    low = torch.tensor([0.749, 0.499, 0.249, 0.02])[rollout.exit_steps]
    fraction = low + (0.98 - low) * torch.rand(2, 4).flatten()
    noise = torch.randn(8, 4, 4, 4)
    t = (fraction * 1000).long()
    x_t = trainer.sd_pipeline.scheduler.add_noise(rollout.x0, noise, t)

    def x0_of(output):
        return process.to_x0(output, x_t, t)

    with torch.no_grad():
        unet.disable_adapters()
        conditional, unconditional = (x0_of(unet(x_t, t, e).sample) for e in (embeds, empty))
        teacher = unconditional + 3.0 * (conditional - unconditional)
        unet.enable_adapters()
        unet.set_adapter("fake")
        fake = x0_of(unet(x_t, t, embeds).sample)
        distance = (rollout.x0 - teacher).abs().view(2, 4, 4, 4, 4)
        scale = distance.mean(1) if level == "element" else distance.mean((1, 2, 3, 4)).view(2, 1, 1, 1)
        advantage = (teacher - fake) / (scale.repeat_interleave(4, 0) + 1e-6)
    unet.set_adapter("student")
    trainer.model.zero_grad()
    output = unet(rollout.exit_latents, rollout.exit_timesteps, embeds).sample
    x0 = process.to_x0(output, rollout.exit_latents, rollout.exit_timesteps)
    (-(advantage * x0).sum() / x0.numel()).backward()
    expected = [p.grad for p in trainer.model.adapter_parameters("student")]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("differentiable", [False, True])
def test_passes_of_the_student(tmp_path, monkeypatch, differentiable):
    """
    An update evaluates an image of exit step k at k + 1 states, the last of them with its graph; once more where a
    reward is differentiated, so that its graph and the student's are not in memory together.
    """
    passes = []

    def reddish(images, prompts, metadata):
        assert passes and not any(grad for *_, grad, _ in passes), "the student's graph is there already"
        return redness(images, prompts, metadata)

    reddish.differentiable = True
    trainer = make_trainer(tmp_path, [reddish] if differentiable else [])
    forward = trainer.model.forward

    def spy(role, x_t, *args, **kwargs):
        passes.append((role, torch.is_grad_enabled(), len(x_t)))
        return forward(role, x_t, *args, **kwargs)

    monkeypatch.setattr(trainer.model, "forward", spy)
    inputs = trainer._prepare_inputs([{"prompt": p} for p in ("a dress", "a coat") for _ in range(4)])
    trainer.compute_loss(trainer.model, inputs).backward()
    rollout = inputs["experience"].rollout
    student = {grad: sum(n for role, g, n in passes if (role, g) == ("student", grad)) for grad in (False, True)}
    assert student == {False: rollout.exit_steps.sum().item() + 8 * differentiable, True: 8}
    assert torch.equal(rollout.x0, inputs["x0"].detach())  # the ratio starts at 1


def test_an_exit_steps_images_are_matched_only_where_the_next_step_sees_them(tmp_path):
    seen = policy.seen_noise(torch.tensor([3, 0, 1, 2]), torch.tensor([999, 749, 499, 249]), 1000)
    torch.testing.assert_close(seen, torch.tensor([0.0, 0.749, 0.499, 0.249]))

    # Both scores are evaluated there only: no call below an image's level.
    for subintervals, lowest in ((True, [749, 499, 249, 0]), (False, [0, 0, 0, 0])):
        options = dict(dm_centering="none", dm_timestep_sampling="uniform", per_device_train_batch_size=32)
        trainer = make_trainer(tmp_path, dm_subintervals=subintervals, **options)
        found = [trainer._prepare_inputs([{"prompt": "a"}] * 32)["experience"] for _ in range(8)]
        for step, low in enumerate(lowest):
            levels = torch.cat([e.timesteps[e.rollout.exit_steps == step] for e in found])
            assert levels.min() >= low and levels.min() < low + 100

    # The fake score is trained there too, the images of a prompt each in a quarter of its own of these levels.
    trainer = make_trainer(tmp_path)
    levels = []
    denoise = trainer.family.denoise

    def spy(denoiser, x_t, timesteps, condition):
        levels.append(timesteps)
        return denoise(denoiser, x_t, timesteps, condition)

    trainer._fake_batches.append((torch.zeros(8, 4, 4, 4), trainer.encode(["a"] * 8), seen.repeat(2), ["a"] * 8))
    trainer.family.denoise = spy
    trainer.args.fake_updates = 20
    trainer.create_optimizer()
    trainer.update_fake()
    levels = torch.stack(levels).view(-1, 4)
    lowest = levels.amin(0)
    assert (lowest >= (seen * 1000).long()).all() and lowest[0] < 249
    quarters = ((levels / 1000 - seen) / (1 - seen)).sort(1).values - torch.arange(4) / 4
    assert (quarters > -0.01).all() and (quarters < 0.26).all() and (quarters.std(0) > 0.03).all()


def reddish(images, prompts, metadata):
    return redness(images, prompts, metadata)


reddish.differentiable = True


@pytest.mark.parametrize(
    ("options", "rewards", "step", "mirrored"),
    [
        ({}, [], 1, True),
        ({"num_generations": 8}, [], 1, True),
        ({"num_generations": 2}, [], 1, False),
        ({"num_generations": 5}, [], 1, False),
        ({"dm_centering": "none"}, [], 1, False),
        ({}, [redness], 1, False),
        ({}, [reddish], 1, True),
        ({"reward_warmup": 2}, [redness], 0, True),
        ({"reward_warmup": 2}, [redness], 1, True),
        ({"reward_warmup": 2}, [redness], 2, False),
    ],
    ids=["default", "eight", "two", "five", "DMD", "black box", "differentiable", "first", "warm-up", "behind it"],
)
def test_the_images_of_a_prompt_are_drawn_in_mirrored_pairs(tmp_path, monkeypatch, options, rewards, step, mirrored):
    """All noise of a trajectory and R_dm's, where the group centres by pairs and no black box has a baseline."""
    draws = []
    rollout = policy.rollout
    monkeypatch.setattr(policy, "rollout", lambda *args: draws.append(args[3]) or rollout(*args))
    size = 2 * options.get("num_generations", 4)
    trainer = make_trainer(tmp_path, rewards, per_device_train_batch_size=size, **options)
    trainer.state.global_step = step
    rows = [{"prompt": "a dress" if i < size // 2 else "a coat"} for i in range(size)]
    experience = trainer._prepare_inputs(rows)["experience"]
    for noise in (draws[0], experience.noise):
        pairs = noise.unflatten(0, (-1, 2))
        assert torch.equal(pairs[:, 0], -pairs[:, 1]) == mirrored
        assert (pairs[0] - pairs[1]).abs().min() > 0 and noise.std().sub(1).abs() < 0.15
    assert experience.rollout.mirrored == mirrored
    samples, _ = trainer._generate_samples(1, 3)  # DDPO's, of any prompts and number
    latents = samples[0]["latents"]
    assert len(latents) == 3 and not torch.equal(latents[0, 0], -latents[1, 0])


def test_activation_checkpointing_changes_nothing(tmp_path):
    states = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, activation_checkpointing=checkpointing)
        trainer.train()
        states.append({**trainer.model.adapter_state("student"), **trainer.model.adapter_state("fake")})
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "reuse",
    [
        {},  # 3 updates an epoch: the stop is within the second
        dict(num_iterations=4, steps_per_generation=2),  # the stop is between two uses of a rollout
        dict(num_iterations=4, target_kl=1e-9),  # and behind the point where its use has ended early
        dict(num_iterations=3, gradient_accumulation_steps=2, activation_checkpointing=True),
    ],
)
def test_resume_continues_the_run(tmp_path, reuse):
    """3 updates from the checkpoint of step 5 are the last of 8, with the mixing's statistics and multiplier."""
    prompts = [f"a {i}" for i in range(7)]
    options = dict(max_steps=8, fake_updates=1, save_strategy="steps", save_steps=5, **reuse)
    options |= dict(reward_mixing="constrained", target_dm=0.1, prompts=prompts)

    def bright(images, prompts, metadata):
        return images.mean((1, 2, 3))

    bright.differentiable = True
    trainer = make_trainer(tmp_path / "whole", [redness, bright], **options)
    trainer.train()
    resumed = make_trainer(tmp_path / "rest", [redness, bright], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / "checkpoint-5"))
    for name in ("student", "fake", "ema"):
        state = resumed.model.adapter_state(name)
        for key, value in trainer.model.adapter_state(name).items():
            assert torch.equal(state[key], value), (name, key)
    assert resumed.cost["rollouts"] == trainer.cost["rollouts"]


def test_half_precision(tmp_path):
    """A base in bfloat16: adapters and optimizers stay in float32, and the update is float32's up to rounding."""
    moved = {}
    for bf16 in (True, False):
        make_tiny_pipeline().save_pretrained(tmp_path / "base")
        trainer = make_trainer(tmp_path, pipeline=str(tmp_path / "base"), bf16=bf16, optim="sgd", max_steps=1)
        assert {p.dtype for p in trainer.model.adapter_parameters("student", "fake", "ema")} == {torch.float32}
        base = trainer.model.denoiser.conv_in.weight
        assert base.dtype == (torch.bfloat16 if bf16 else torch.float32)
        before = trainer.model.adapter_state("student")
        trainer.train()
        after = trainer.model.adapter_state("student")
        moved[bf16] = torch.cat([(after[key] - before[key]).flatten() for key in before])
        trainer.save_model()
        assert trainer.sample("student", PROMPTS).isfinite().all()
    assert torch.cosine_similarity(moved[True], moved[False], dim=0) > 0.9
    assert 0.8 < moved[True].norm() / moved[False].norm() < 1.25


def test_encoders_wait_elsewhere_and_change_nothing(tmp_path):
    images = []
    for offload in (False, True):
        pipeline, calls = make_tiny_pipeline(), []
        encoder = pipeline.text_encoder
        move, encode = encoder.to, encoder.forward
        encoder.to = lambda *args, move=move, calls=calls, **kwargs: calls.append(args[0]) or move(*args, **kwargs)
        encoder.forward = lambda *a, encode=encode, calls=calls, **k: calls.append("encodes") or encode(*a, **k)
        trainer = make_trainer(tmp_path, pipeline=pipeline, offload_encoders=offload)
        calls.clear()
        trainer.train()
        assert calls.count("encodes") > 0
        if offload:  # brought to the denoiser's device, a `torch.device`, before each use and taken away behind it
            uses = [i for i, call in enumerate(calls) if call == "encodes"]
            assert all(isinstance(calls[i - 1], torch.device) or calls[i - 1] == "encodes" for i in uses)
            assert all(calls[i + 1] in ("cpu", "encodes") for i in uses) and calls[-1] == "cpu"
        images.append(trainer.sample("student", PROMPTS))
    assert torch.equal(*images)


def test_v_prediction_and_single_step(tmp_path):
    make_trainer(tmp_path, pipeline=make_tiny_pipeline("v_prediction")).train()
    make_trainer(tmp_path, [redness], sample_num_steps=1, num_generations=2).train()


def test_a_pipeline_from_a_folder(tmp_path):
    make_tiny_pipeline("v_prediction").save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path, pipeline=str(tmp_path / "base"))
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"DiffusionPipeline.from_pretrained({str(tmp_path / 'base')!r}" in card
    code = card.split("```python\n")[1].split("```")[0]
    exec(code.replace('"image.png"', repr(str(tmp_path / "image.png"))), {})
    assert (tmp_path / "image.png").is_file()
    assert trainer.process.prediction_type == "v_prediction"


def test_features_of_any_image_model(tmp_path):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=4
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    results = make_trainer(tmp_path, eval_feature_model=str(tmp_path / "vit")).evaluate()
    assert results["eval_fid_teacher"] >= 0 and results["eval_diversity"] > 0
    assert "eval_fid" not in results


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_generations=1), "`dm_normalization='group'` needs `num_generations` of at least 2"),
        (dict(num_generations=3), r"`per_device_train_batch_size` \(8\) must be divisible by `num_generations` \(3\)"),
        (dict(num_generations=1, dm_normalization="sample"), "`dm_centering='group'` .*`num_generations` is 1"),
        (dict(dm_timestep_sampling="uniform"), "`dm_centering='group'` .*`dm_timestep_sampling` is 'uniform'"),
        (dict(dm_estimator="policy_gradient"), "`dm_centering='group'` .*`dm_estimator` is 'policy_gradient'"),
        (dict(dm_centering="batch"), "`dm_centering` is 'batch', but must be one of group, none"),
        (dict(dm_normalization="mean"), "`dm_normalization` is 'mean', but must be one of group, sample, batch, none"),
        (dict(reward_mixing="product"), "`reward_mixing` is 'product', but must be one of sum, adaptive, constrained"),
        (dict(reward_mixing="constrained"), "`target_dm` is the budget of `reward_mixing='constrained'`"),
        (dict(target_dm=0.1), "`target_dm` is the budget of `reward_mixing='constrained'`"),
        (dict(reward_mixing="constrained", target_dm=0.0), "`target_dm` is 0.0, but must be positive"),
        (dict(dm_timestep_sampling="x"), "`dm_timestep_sampling` is 'x', but must be one of"),
        (dict(dm_timestep_range=[0.9, 0.1]), "must be two rising fractions"),
        (dict(dm_timestep_range=[0.1]), "must be two rising fractions"),
        (dict(sample_num_steps=0), "`sample_num_steps` is 0, but must be at least 1"),
        (dict(fake_updates=0), "`fake_updates` is 0, but must be at least 1"),
        (dict(sample_guidance_scale=0.5), "`sample_guidance_scale` is 0.5, but must be at least 1"),
        (dict(ema_decay=1.0), r"`ema_decay` is 1.0, but must be in \[0, 1\)"),
        (dict(epsilon=0.0), "`epsilon` is 0.0, but must be positive"),
        (dict(fp16=True), "Use `bf16`"),
        (dict(remove_unused_columns=True), "`remove_unused_columns` must stay off"),
        (dict(output_dir=__file__), "`output_dir` is a file"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


def test_unknown_option(tmp_path):
    with pytest.raises(TypeError, match="dm_normalisation"):
        make_config(tmp_path, dm_normalisation="group")


def test_bad_prompts(tmp_path):
    with pytest.raises(ValueError, match="There are no prompts: give `train_dataset` with a `prompt` column"):
        make_trainer(tmp_path, prompts=None)
    for rows, message in (
        ({"text": ["a"]}, "`train_dataset` needs a `prompt` column; it has text"),
        ({"prompt": []}, "`train_dataset` is empty"),
        ({"prompt": ["a", None]}, "`prompt` of row 1 of `train_dataset` is None, but must be text"),
    ):
        with pytest.raises(ValueError, match=message):
            RdmDistillTrainer(
                make_config(tmp_path), sd_pipeline=make_tiny_pipeline(), train_dataset=Dataset.from_dict(rows)
            )
    with pytest.raises(ValueError, match="not both"):
        make_trainer(tmp_path, None, lambda: ("a", {}))


def test_unsupported_pipeline_and_scheduler(tmp_path):
    class OtherPipeline(DiffusionPipeline):
        def __init__(self):
            super().__init__()

    with pytest.raises(ValueError, match="OtherPipeline is not supported yet. Supported pipelines: StableDiffusion"):
        make_trainer(tmp_path, pipeline=OtherPipeline())
    pipeline = make_tiny_pipeline()
    pipeline.scheduler = VQDiffusionScheduler(num_vec_classes=4)
    with pytest.raises(ValueError, match="VQDiffusionScheduler is not a scheduler the student can use"):
        make_trainer(tmp_path, pipeline=pipeline)


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda images: [float("nan")] * len(images), "'bad' returned nan for the prompt 'a"),
        (lambda images: torch.full((len(images),), torch.inf), "'bad' returned inf for the prompt 'a"),
        (lambda images: [0.0], "'bad' returned 1 rewards for 8 images"),
    ],
)
def test_bad_rewards_stop_before_anything_changes(tmp_path, answer, message):
    def bad(images, prompts, metadata):
        return answer(images)

    trainer = make_trainer(tmp_path, [bad])
    before = trainer.model.adapter_state("student")
    with pytest.raises(ValueError, match=message):
        trainer.train()
    for key, value in trainer.model.adapter_state("student").items():
        assert torch.equal(value, before[key])


def test_reward_weights_must_match(tmp_path):
    with pytest.raises(ValueError, match="`reward_weights` has 2 values for 1 reward functions"):
        make_trainer(tmp_path, [redness], reward_weights=[1.0, 2.0])


def test_a_broken_denoiser_is_named_before_an_update(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.denoiser.conv_out.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite for the prompt 'a .*' at step 0; no weight was changed"):
        trainer.train()


def test_compiled_for_every_role(tmp_path):
    """Traced in the first update: all roles, with gradients and without, and nothing later. The result is the same."""
    graphs, weights = [], {}
    for backend in (None, "eager"):
        torch._dynamo.reset()
        counters.clear()
        compiled = {"torch_compile": True, "torch_compile_backend": backend} if backend else {}
        options = {"learning_rate": 1e-2, "max_steps": 3, "activation_checkpointing": True, **compiled}
        # As many prompts as steps: then every update has all exit steps, and the rollout's batches the same sizes.
        lora = LoraConfig(r=2, target_modules=["to_q", "proj_out"])  # each layer is traced for each role
        pipeline = make_sd3(num_layers=1)
        trainer = make_trainer(
            tmp_path / str(backend), pipeline=pipeline, num_generations=2, peft_config=lora, **options
        )

        class CountGraphs(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                graphs.append(counters["stats"]["unique_graphs"])

        trainer.add_callback(CountGraphs())
        trainer.train()
        trainer.sample("student", ["a dress"] * 3)
        graphs.append(counters["stats"]["unique_graphs"])
        weights[backend] = torch.cat([p.detach().flatten() for p in trainer.model.adapter_parameters("student")])
    assert graphs == [0] * 4 + [graphs[4]] * 4 and graphs[4] >= 5
    assert not counters["graph_break"]
    assert torch.equal(weights["eager"], weights[None])
