# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Absorbed guidance: the guided teacher's images against plain diffusers, what is fitted to them, and what is kept."""

import json
import re
import shutil

import pytest
import torch
from conftest import PROMPTS, make_config, make_tiny_pipeline, make_trainer, redness, save_style
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_pipelines import CASES, images_of, make, make_family_trainer

from rdm_trl import evaluation, guidance
from rdm_trl.method import target
from rdm_trl.models.pipelines import family_of


def options_of(tmp_path, **options):
    defaults = dict(
        num_teacher_images=6,
        teacher_guidance_scale=3.0,
        sample_guidance_scale=1.0,
        teacher_cache_dir=str(tmp_path / "cache"),
        per_device_eval_batch_size=4,
    )
    return {**defaults, **options}


def absorbing(tmp_path, *args, pipeline=None, prompts=PROMPTS, peft_config=None, teacher_lora=None, **options):
    rest = dict(pipeline=pipeline, prompts=prompts, peft_config=peft_config, teacher_lora=teacher_lora)
    return make_trainer(tmp_path, *args, **rest, **options_of(tmp_path, **options))


def check_equal(first, second, names):
    for name in names:
        expected = second.model.adapter_state(name)
        for key, value in first.model.adapter_state(name).items():
            assert torch.equal(value, expected[key]), (name, key)


def files_of(tmp_path):
    return {file.name: file.read_bytes() for file in (tmp_path / "cache").rglob("*.safetensors")}


@pytest.mark.parametrize("name", CASES)
def test_every_family_absorbs_its_guidance(name, tmp_path):
    """The images are the pipeline's own, in the denoiser's form; what has no guidance skips the stage."""
    case = CASES[name]
    options = options_of(tmp_path, num_teacher_images=2, max_steps=1, negative_prompts=case.negative[-1], **case.size)
    trainer = make_family_trainer(case, tmp_path, make(case), rewards=(), **options)
    trainer.train()
    family = trainer.family
    if not trainer.absorbs_guidance:
        assert name in ("flux_schnell", "flux2_klein_distilled", "ddpm", "ddim") and not (tmp_path / "cache").exists()
        return
    images = guidance.GuidedImages(trainer)
    latents, drawn = images()
    assert latents.shape == (2, *family.latent_shape) and latents.dtype == torch.float32 and drawn == 0
    assert trainer.cost["teacher_images"] == 2

    # Another pipeline, whose own call decodes.
    plain = make(case)
    size = {name.removeprefix("sample_"): value for name, value in case.size.items()}
    arguments = case.guided(images.prompts, 3.0, case.negative[-1]) | size
    if name == "dit":
        arguments["class_labels"] = [int(prompt) for prompt in images.prompts]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    expected = images_of(plain(**arguments, num_inference_steps=3, generator=generators, output_type="pt"))
    torch.testing.assert_close(family.decode(latents), expected.float(), atol=1e-4, rtol=1e-4)

    # R_dm's teacher is the target, made of two outputs whose difference the pipeline's own guidance scales.
    condition, x_t = trainer.encode(list(case.prompts)), torch.randn(2, *family.latent_shape)
    timesteps = trainer.student_timesteps[1].expand(2)
    halves = guidance.predict_halves(trainer, x_t, timesteps, condition)
    assert not torch.equal(*halves[:2])
    least, most = guidance.range_of_guidance(family, 3.0)
    weights = trainer.target[0]
    assert least < most and ((least <= weights[0]) & (weights[0] <= most)).all()
    with torch.no_grad():
        torch.testing.assert_close(halves[0], trainer.predict_x0(trainer.model, "teacher", x_t, timesteps, condition))
        if family.embeds_guidance:  # by the way that evaluation and R_dm call it with a scale of their own
            plain = family.guide(trainer.denoise_as_teacher, x_t, timesteps, condition, {}, 1.0)
            torch.testing.assert_close(halves[1], trainer.process.to_x0(plain, x_t, timesteps))
        else:
            negative = trainer.encode_negative([case.negative[-1]])
            other = {key: value.expand(2, *value.shape[1:]) for key, value in negative.items()}
            torch.testing.assert_close(halves[1], trainer.predict_x0(trainer.model, "teacher", x_t, timesteps, other))
    trainer.target, fractions = weights[None], trainer.process.fractions(timesteps)
    found = trainer.predict_teacher(x_t, timesteps, condition)
    assert torch.equal(found, target.predict(halves[0], halves[0] - halves[1], fractions, weights))
    trainer.target = torch.zeros(1, 2, target.KNOTS)
    assert torch.equal(trainer.predict_teacher(x_t, timesteps, condition), halves[0])


@pytest.mark.parametrize("name", ["sd_epsilon", "sd3", "flux_dev", "qwen_image"])
def test_families_look_ahead_as_their_pipelines_guide(name, tmp_path, monkeypatch):
    """In as many guided passes as are needed, and above half of the noise alone; a resumed run does too."""
    case = CASES[name]
    monkeypatch.setattr(target, "AHEAD_ABOVE", -float("inf"))
    options = options_of(tmp_path, num_teacher_images=2, max_steps=1, save_strategy="steps", save_steps=1, **case.size)
    trainer = make_family_trainer(case, tmp_path, make(case), rewards=(), **options)
    trainer.train()
    assert trainer.target.shape == (2, 2, target.KNOTS)
    assert ((trainer.target[1, 0] >= 0) & (trainer.target[1, 0] <= 1)).all()
    condition, x_t = trainer.encode(list(case.prompts)), torch.randn(2, *trainer.family.latent_shape)
    # Two predictions to begin with, which the guided one is made of, or is another; and one or two for each step.
    for fraction, passes in ((0.4, 2), (0.9, 2 + 3 if trainer.family.embeds_guidance else 2 + 4)):
        before = trainer.cost["teacher_evaluations"]
        timesteps = trainer.process.timesteps_at(torch.full((2,), fraction))
        found = trainer.predict_teacher(x_t, timesteps, condition)
        assert found.isfinite().all() and trainer.cost["teacher_evaluations"] - before == 2 * passes
    # Each step's is what the pipeline draws with, whatever its formula.
    with torch.no_grad():
        guided = guidance.predict_halves(trainer, x_t, timesteps, condition)[2:]
        found = guidance.look_ahead(trainer, x_t, timesteps, condition, guided, noise=[])
        negative = trainer.encode_negative([""])
        output = trainer.family.guide(trainer.denoise_as_teacher, x_t, timesteps, condition, negative, 3.0)
    torch.testing.assert_close(found, trainer.process.to_x0(output, x_t, timesteps))
    trainer.save_model()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "with a look at where its sampler goes" in " ".join(card.split())
    monkeypatch.setattr(guidance, "fit_target", None)
    options = {**options, "max_steps": 2, "teacher_cache_dir": str(tmp_path / "other")}
    resumed = make_family_trainer(case, tmp_path, make(case), rewards=(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(resumed.target, trainer.target)


def test_the_fit_sees_no_noise_that_an_image_was_drawn_from(tmp_path, monkeypatch):
    """
    It would know where the image came from, as no student's does. Each image is seen at several levels, those of the
    other image of its prompt, from noise of its own: noise of both would be what they have in common.
    """
    seen, trainer = [], absorbing(tmp_path)
    latents, add_noise = guidance.GuidedImages(trainer)()[0], trainer.process.add_noise

    def watched(x0, noise, timesteps):
        rows = [[torch.equal(image, known) for known in latents].index(True) for image in x0]
        seen.extend(zip(rows, noise, timesteps.tolist(), strict=True))
        return add_noise(x0, noise, timesteps)

    said, encode = [], trainer.encode
    monkeypatch.setattr(trainer.process, "add_noise", watched)
    monkeypatch.setattr(trainer, "encode", lambda prompts: said.extend(prompts) or encode(prompts))
    trainer.absorb_guidance()
    assert said == [guidance.GuidedImages(trainer).prompts[row] for row, _, _ in seen]
    assert sorted(row for row, _, _ in seen) == [i for i in range(6) for _ in range(guidance.LEVELS)]
    begun = [torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    noises = torch.stack([*begun, *(noise for _, noise, _ in seen)]).flatten(1)
    distances = torch.cdist(noises, noises) + 100 * torch.eye(len(noises))
    assert distances.min() > 2  # of two draws of 64 numbers it is about 11
    levels = [sorted(level for row, _, level in seen if row == i) for i in range(6)]
    assert all(levels[i] == levels[i + 1] for i in (0, 2, 4)) and levels[0] != levels[2]
    assert min(map(min, levels)) < 100 and max(map(max, levels)) > 900


@pytest.mark.parametrize("name", ["sd_epsilon", "flux_dev", "sd_embedded_guidance"])
def test_what_stands_for_no_guidance_and_for_the_samplers(name):
    """Of outputs that are linear in the scale, as a sum of two halves is: those with it, and with a scale of 1."""
    family = family_of(make(CASES[name]))

    def output(scale):
        return 5.0 + 2.0 * scale

    called = family.student_guidance_scale if family.embeds_guidance else 1.0
    other = 1.0 if family.embeds_guidance else 0.0
    weights = guidance.range_of_guidance(family, 2.5)
    found = [output(called) + weight * (output(called) - output(other)) for weight in weights]
    assert found == pytest.approx([output(1.0), output(2.5)])


@pytest.mark.parametrize("full", [False, True])
def test_all_else_is_as_without(tmp_path, full):
    """Teacher, student and the run's noise are bit for bit those of a run that absorbs nothing."""
    pipeline, lora = make_tiny_pipeline(), False if full else None
    absorbed = absorbing(tmp_path, peft_config=lora)
    state = torch.get_rng_state()
    options = dict(sample_guidance_scale=1.0, teacher_guidance_scale=3.0, per_device_eval_batch_size=4)
    plain = make_trainer(tmp_path / "plain", peft_config=lora, **options)
    assert torch.equal(state, torch.get_rng_state())
    absorbed.absorb_guidance()
    assert torch.equal(state, torch.get_rng_state())
    check_equal(absorbed, plain, plain.model.adapters)
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([100, 700]), torch.randn(2, 16, 16)
    with torch.no_grad():
        assert torch.equal(absorbed.model("teacher", *inputs), pipeline.unet(*inputs).sample)
    assert torch.equal(absorbed.sample("teacher", PROMPTS), plain.sample("teacher", PROMPTS))


def test_what_is_saved_is_the_student(tmp_path):
    trainer = absorbing(tmp_path)
    trainer.train()
    trainer.save_model()
    state = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    student = trainer.model.adapter_state("ema")
    assert {key.removeprefix("unet.") for key in state} == set(student)
    pipeline = make_tiny_pipeline()
    pipeline.load_lora_weights(tmp_path / "run")
    pipeline.scheduler = trainer.student_scheduler
    trainer.evaluate()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["cost"]["teacher_images"] == 6 and metrics["cost"]["target_seconds"] > 0
    assert metrics["settings"]["num_teacher_images"] == 6


# -------------------------------------------------------------------------------------------------------- what is kept


def test_a_second_run_draws_and_fits_nothing(tmp_path, monkeypatch):
    first = absorbing(tmp_path, seed=1)
    first.absorb_guidance()
    kept = files_of(tmp_path)
    assert len(kept) == 7

    def fail(*args):
        raise AssertionError("this was on disk")

    monkeypatch.setattr(guidance.GuidedImages, "draw", fail)
    monkeypatch.setattr(guidance, "moments_of", fail)
    second = absorbing(
        tmp_path, [redness], seed=2, learning_rate=5e-3, max_steps=3, prompts=[*PROMPTS[::-1], "a coat"]
    )
    second.train()
    assert torch.equal(first.target, second.target) and second.cost["teacher_images"] == 0
    assert files_of(tmp_path) == kept


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """What a run has kept."""
    folder = tmp_path_factory.mktemp("drawn")
    absorbing(folder).absorb_guidance()
    return folder / "cache"


@pytest.mark.parametrize(
    "change",
    [
        dict(teacher_guidance_scale=2.0),
        dict(teacher_num_steps=4),
        dict(negative_prompts="a dress"),
        dict(prompts=["a dress"]),
        dict(sample_height=16, sample_width=16),
        dict(pipeline="other weights"),
        dict(pipeline="other scheduler"),
    ],
)
def test_another_teacher_draws_anew(tmp_path, drawn, change):
    shutil.copytree(drawn, tmp_path / "cache")
    if "pipeline" in change:
        pipeline = make_tiny_pipeline()
        if change["pipeline"] == "other weights":
            pipeline.text_encoder.final_layer_norm.weight.data[0] += 1e-3
        else:
            pipeline.scheduler.register_to_config(timestep_spacing="leading")
        change = dict(pipeline=pipeline)
    second = absorbing(tmp_path, **change)
    second.absorb_guidance()
    assert second.cost["teacher_images"] == 6 and len(files_of(tmp_path)) >= 7


def test_more_images_keep_those_there_are(tmp_path):
    first, second = absorbing(tmp_path), absorbing(tmp_path, num_teacher_images=12)
    first.absorb_guidance()
    second.absorb_guidance()
    assert second.cost["teacher_images"] == 6
    prompts = guidance.GuidedImages(second).prompts
    assert prompts[:6] == guidance.GuidedImages(first).prompts and prompts[::2] == prompts[1::2]
    assert {prompt: prompts.count(prompt) for prompt in PROMPTS} == dict.fromkeys(PROMPTS, 4)


@pytest.mark.parametrize("change", [dict(fake_learning_rate=1e-2), dict(peft_config=LoraConfig(r=3))])
def test_another_student_uses_the_same_target(tmp_path, change):
    absorbing(tmp_path).absorb_guidance()
    kept, other = files_of(tmp_path), absorbing(tmp_path, **change)
    other.absorb_guidance()
    assert other.cost["teacher_images"] == 0 and files_of(tmp_path) == kept


def test_a_teachers_lora_draws_too(tmp_path):
    style = save_style(tmp_path / "style")
    trainer = absorbing(tmp_path, teacher_lora=style)
    trainer.absorb_guidance()
    plain = make_tiny_pipeline()
    plain.load_lora_weights(style)
    images = guidance.GuidedImages(trainer)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    arguments = dict(num_inference_steps=3, guidance_scale=3.0, negative_prompt=["", ""], generator=generators)
    expected = plain(images.prompts[:2], **arguments, output_type="latent").images
    torch.testing.assert_close(images()[0][:2], expected, atol=1e-5, rtol=1e-5)
    assert images.key != guidance.GuidedImages(absorbing(tmp_path)).key


# ------------------------------------------------------------------------------------------------------ interruptions


def test_drawing_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    two = {"per_device_eval_batch_size": 2}
    whole = absorbing(tmp_path / "whole", **two)
    whole.absorb_guidance()
    draw, calls = guidance.GuidedImages.draw, []

    def interrupted(images, rows):
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(images, rows)

    monkeypatch.setattr(guidance.GuidedImages, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        absorbing(tmp_path, **two).train()
    assert len(files_of(tmp_path)) == 2
    trainer = absorbing(tmp_path, **two)
    trainer.absorb_guidance()
    assert calls == [[0, 1], [2, 3], [2, 3], [4, 5]] and trainer.cost["teacher_images"] == 4
    assert torch.equal(trainer.target, whole.target) and files_of(tmp_path) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("full", [False, True])
def test_a_resumed_run_has_its_target(tmp_path, full, monkeypatch):
    """2 + 2 updates are 4, to the last bit; without the cache too, since a checkpoint carries the target."""
    options = dict(save_strategy="steps", save_steps=2, peft_config=False if full else None)
    whole = absorbing(tmp_path / "whole", [redness], max_steps=4, **options)
    whole.train()
    absorbing(tmp_path, [redness], max_steps=2, **options).train()
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(guidance.GuidedImages, "draw", None)
    resumed = absorbing(tmp_path, [redness], max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    check_equal(resumed, whole, whole.model.adapters)
    assert (
        torch.equal(resumed.target, whole.target)
        and resumed.cost["teacher_images"] == 6
        and resumed.cost["rollouts"] == whole.cost["rollouts"]
    )


def test_resumed_from_before_targets_looked_ahead(tmp_path, monkeypatch):
    """Where the target would be another, it is said; else the run goes on as it would have."""
    absorbing(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    weights = load_file(tmp_path / "run" / "checkpoint-2" / "target.safetensors")["weights"]
    monkeypatch.setattr(guidance.checkpoint, "read_target", lambda folder: ("older", weights[0]))
    monkeypatch.setattr(target, "AHEAD_ABOVE", float("inf"))
    absorbing(tmp_path, max_steps=3).train(resume_from_checkpoint=True)
    monkeypatch.setattr(target, "AHEAD_ABOVE", -float("inf"))
    with pytest.raises(ValueError, match="before targets looked ahead"):
        absorbing(tmp_path, max_steps=3).train(resume_from_checkpoint=True)
    changed = absorbing(tmp_path, max_steps=3, resume_with_changes=True)
    changed.train(resume_from_checkpoint=True)
    assert len(changed.target) == 2


def test_resumed_with_other_guidance(tmp_path):
    options = dict(save_strategy="steps", save_steps=2)
    first = absorbing(tmp_path, **options)
    first.train()
    with pytest.raises(ValueError, match="`teacher_guidance_scale` was 3.0, is 5.0"):
        absorbing(tmp_path, max_steps=3, teacher_guidance_scale=5.0).train(resume_from_checkpoint=True)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # refused before anything was drawn
    changed = absorbing(tmp_path, max_steps=3, teacher_guidance_scale=5.0, resume_with_changes=True)
    changed.train(resume_from_checkpoint=True)
    assert changed.cost["teacher_images"] == 6
    assert not torch.equal(changed.target, first.target)
    # And from a run that absorbed nothing.
    plain = dict(sample_guidance_scale=1.0, teacher_guidance_scale=3.0, per_device_eval_batch_size=4, **options)
    make_trainer(tmp_path / "other", **plain).train()
    later = absorbing(tmp_path, max_steps=3, resume_with_changes=True)
    later.train(resume_from_checkpoint=str(tmp_path / "other" / "run" / "checkpoint-2"))
    assert torch.equal(later.target, first.target)


# --------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("name", CASES)
def test_what_evaluation_compares_is_drawn_once(name, tmp_path, monkeypatch):
    """It is what the pipeline draws by its own call; another run of the same teacher reads it and draws nothing."""
    case = CASES[name]
    prompts = [*case.prompts, case.prompts[0]]
    options = dict(teacher_guidance_scale=2.0, teacher_cache_dir=str(tmp_path / "cache"), per_device_eval_batch_size=2)
    trainer = make_family_trainer(case, tmp_path, make(case), rewards=(), **options, **case.size)
    family, scheduler = trainer.family, trainer.sd_pipeline.scheduler
    num_steps = trainer.args.teacher_num_steps, trainer.args.sample_num_steps
    for who, steps, scale in (("teacher", num_steps[0], 2.0), ("base", num_steps[1], family.student_guidance_scale)):
        images = trainer.sample(who, prompts, seed=5)
        with trainer.model.use("teacher"):
            expected = family.sample_in_batches(scheduler, prompts, steps, scale, "", 5, 2)
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    again = make_family_trainer(case, tmp_path / "again", make(case), rewards=(), seed=7, **options, **case.size)
    assert not torch.equal(again.sample("base", prompts, seed=6), images)  # other noise
    monkeypatch.setattr(type(family), "sample", lambda *args, **kwargs: pytest.fail("drawn again"))
    assert torch.equal(again.sample("base", prompts, seed=5), images)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_what_the_first_evaluation_costs_is_said(tmp_path, guidance_scale):
    """Counted in the denoiser itself: what is said before is what is done, and what is kept is not said again."""
    pipeline, rows = make_tiny_pipeline(), []
    options = dict(teacher_guidance_scale=guidance_scale, sample_num_steps=2, num_eval_images=6, num_generations=2)
    cache = dict(teacher_cache_dir=str(tmp_path / "cache"), per_device_eval_batch_size=4)
    trainer = make_trainer(tmp_path, pipeline=pipeline, **options, **cache)
    pipeline.unet.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))

    def said() -> int:
        return int(re.search(r"([\d,]+) passes", evaluation.cost_of_first(trainer))[1].replace(",", ""))

    promised = said()
    trainer.evaluate()
    assert promised == sum(rows) == 6 * (3 * (1 + (guidance_scale > 1)) + 2 + 2)
    assert said() == 6 * 2


def test_a_cache_that_cannot_be_written_costs_no_figures(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(guidance.logger, "warning_once", said.append)
    (tmp_path / "file").write_text("")
    trainer = make_trainer(tmp_path, teacher_cache_dir=str(tmp_path / "file"))
    assert trainer.sample("teacher", PROMPTS).shape == (3, 3, 8, 8)
    assert "Set `teacher_cache_dir`" in said[0]


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (300, 1.0, 1.75)),
        (dict(teacher_guidance_scale=7.5), (300, 1.0, 7.5)),
        (dict(num_teacher_images=40), (40, 1.0, 1.75)),
        # Guidance in R_dm, as before there was another way, and as in DDPO.
        (dict(num_teacher_images=0, teacher_guidance_scale=7.5), (0, 7.5, 7.5)),
        (dict(sample_guidance_scale=5.0), (0, 5.0, 5.0)),
        (dict(sample_guidance_scale=1.0, teacher_guidance_scale=1.75), (0, 1.0, 1.75)),
        (dict(teacher_guidance_scale=1.0), (0, 1.0, 1.0)),
    ],
)
def test_one_guidance_is_all_to_know(tmp_path, given, expected):
    config = make_config(tmp_path, **{"num_teacher_images": None, **given})
    assert (config.num_teacher_images, config.sample_guidance_scale, config.teacher_guidance_scale) == expected
    config.__post_init__()
    assert (config.num_teacher_images, config.sample_guidance_scale, config.teacher_guidance_scale) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_teacher_images=-1), "`num_teacher_images` is -1, but must be at least 0"),
        (dict(num_teacher_images=5), "`num_teacher_images` is 5, but must be even"),
        (dict(teacher_guidance_scale=1.0), "there is no guidance to absorb"),
        (dict(sample_guidance_scale=2.0), "guidance would act in R_dm twice"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options_of(tmp_path, **options))


def test_a_negative_prompt_where_there_is_none(tmp_path):
    case = CASES["flux_dev"]
    options = options_of(tmp_path, negative_prompts="a coat", **case.size)
    trainer = make_family_trainer(case, tmp_path, make(case), rewards=(), **options)
    with pytest.raises(ValueError, match="FluxPipeline has no negative prompts"):
        trainer.train()
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Set `teacher_cache_dir`"):
        absorbing(tmp_path, teacher_cache_dir=str(tmp_path / "file")).train()
