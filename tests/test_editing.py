# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Pipelines that take an image with the prompt, against plain diffusers, on tiny random ones."""

import json
import pickle

import pytest
import torch
from conftest import load_script, logs_of, make_tiny_pipeline, record_steps
from datasets import Dataset, Features, Image, Value
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from PIL import Image as PILImage
from tiny_editing import (
    EDITING,
    ONE_BY_ONE,
    PROMPTS,
    dataset_of,
    make_editing_trainer,
    make_kontext,
    picture,
    shrink_qwen,
)
from tiny_pipelines import images_of, kept_activations, make, rollout_of, run_card

from rdm_trl import guidance
from rdm_trl.demo.page import export_space
from rdm_trl.method.diffusion import NoiseProcess
from rdm_trl.models.pipelines import family_of
from rdm_trl.prompts import PicturePrompt, check_prompts, draw_prompts, load_prompts, prompts_across, split_rows
from rdm_trl.saving.export import export
from rdm_trl.saving.pictures import read_grid


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Qwen-Image-Edit's call gives every image a million pixels."""
    shrink_qwen(monkeypatch)


def case_shape(case):
    height, width, *frames = case.size.values()
    return *frames, height, width


def family_for(name, pipeline=None):
    return family_of(pipeline or make(EDITING[name]), *EDITING[name].size.values())


# ------------------------------------------------------------------------------------------------------------- prompts


def test_a_prompt_is_its_words_and_its_image():
    prompt, other = PROMPTS
    same, elsewhere = PicturePrompt(str(prompt), picture(0)), PicturePrompt(str(prompt), other.image)
    assert prompt == same and not prompt != same and hash(prompt) == hash(same)
    assert prompt != elsewhere and prompt != str(prompt) and str(prompt) != prompt
    assert PicturePrompt("another", picture(0)) != prompt
    wide, high = (PicturePrompt("a", PILImage.new("RGB", size)) for size in ((4, 2), (2, 4)))
    assert wide != high  # of the same bytes
    sent = pickle.loads(pickle.dumps(elsewhere))
    assert sent == elsewhere and sent.image.tobytes() == elsewhere.image.tobytes()
    assert type(str(prompt)) is str and json.dumps([prompt]) == '["a photo of a bag"]'


# ---------------------------------------------------------------------------------------------- the pipelines' own way


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", EDITING)
def test_the_teachers_guidance_is_the_pipelines(name, scale, tmp_path):
    """What a plain call hands to its scheduler, at two of its steps, for two prompts and images."""
    case = EDITING[name]
    for negative in case.negative if scale > 1 else case.negative[:1]:
        base = make(case)
        seen, rows = record_steps(base.scheduler), [case.prompts]
        if name in ONE_BY_ONE:
            rows = [[prompt] for prompt in case.prompts]
        for prompts in rows:
            torch.manual_seed(5)
            base(**case.guided(prompts, scale, negative), num_inference_steps=2, output_type="latent")
        options = dict(sample_guidance_scale=scale, negative_prompts=negative)
        trainer = make_editing_trainer(name, tmp_path, make(case), **options)
        process = NoiseProcess(base.scheduler)
        for i, (output, t, sample) in enumerate(seen):
            prompts = rows[i // 2]
            t = t.expand(len(prompts))
            condition, expected = trainer.encode(list(prompts)), process.to_x0(output.float(), sample, t)
            found = trainer.predict_teacher(sample, t, condition)
            if name == "wan_ti2v":  # the first frame is given, whatever the network says of it
                expected[:, :, :1] = condition["reference"]
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
            others = [PicturePrompt(p, picture(9)) for p in prompts]
            other = trainer.predict_teacher(sample, t, trainer.encode(others))
            changed = (other - found)[:, :, 1:] if name == "wan_ti2v" else other - found
            assert changed.abs().flatten(1).amax(1).min() > 2e-4  # ten times as much


@pytest.mark.parametrize("name", EDITING)
def test_an_editing_student(name, tmp_path, monkeypatch):
    """
    Two updates with a reward that reads the image; then the model card's code, which is plain diffusers, draws the
    trainer's own rollout, and plain diffusers with the exported forms the student's own samples.
    """
    case, asked = EDITING[name], []
    make(case).save_pretrained(tmp_path / "base")

    def likeness(images, prompts, image, colour, **columns):
        for prompt, shown, of_row in zip(prompts, image, colour, strict=True):
            row = [str(p) for p in case.prompts].index(prompt)
            assert type(prompt) is str and of_row == "rb"[row]
            assert shown.tobytes() == trainer.family.fit(case.prompts[row].image).tobytes()
        asked.append(len(prompts))
        return images.mean((1, 2, 3)) - torch.tensor([sum(shown.getpixel((0, 0))) for shown in image])

    dataset = dataset_of(case.prompts).add_column("colour", ["r", "b"])
    trainer = make_editing_trainer(name, tmp_path, str(tmp_path / "base"), [likeness], dataset)
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    trainer.train()
    assert asked == [4 * (trainer.family.num_frames or 1)] * 2 and "rewards/likeness/mean" in logs_of(trainer)
    changed = {key for key, value in trainer.model.named_parameters() if not torch.equal(value, before[key])}
    assert {key.split(".")[-2] for key in changed} == {"student", "fake", "ema"}
    samples, ((images, prompts, metadata),) = trainer._generate_samples(iterations=1, batch_size=2)
    assert images.shape == (2, 3, *case_shape(case)) and len(samples[0]["prompt_ids"]) == 2
    assert [row["image"].tobytes() for row in metadata] == [prompt.image.tobytes() for prompt in prompts]

    trainer.save_model()
    ours = rollout_of(trainer, case, case.prompts[0], "ema")
    case.prompts[0].image.save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    theirs = run_card(tmp_path / "run" / "README.md")
    assert theirs.shape == ours.shape
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (rollout_of(trainer, case, case.prompts[0], "teacher") - theirs).abs().max() > 1e-4
    case.prompts[1].image.save(tmp_path / "picture.png")
    assert (run_card(tmp_path / "run" / "README.md") - theirs).abs().max() > 1e-4  # the image is seen
    kind = "video" if "wan" in name else "image"
    assert f"pipeline_tag: image-to-{kind}" in (tmp_path / "run" / "README.md").read_text()

    expected = trainer.sample("student", list(case.prompts))
    fused = export(tmp_path / "run", tmp_path / "fused", "diffusers")
    fused = DiffusionPipeline.from_pretrained(fused, dtype=torch.float32)
    file = export(tmp_path / "run", tmp_path / "comfy", "kohya")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded.load_lora_weights(file)
    for pipeline in (fused, loaded):
        pipeline.scheduler, seed = trainer.student_scheduler, trainer.args.seed
        pipeline.set_progress_bar_config(disable=True)
        rows, generators = [case.prompts], [torch.Generator().manual_seed(seed)]
        if name in ONE_BY_ONE:
            rows = [[prompt] for prompt in case.prompts]
            seeds = torch.randint(2**31, (2,), generator=generators[0]).tolist()
            generators = [torch.Generator().manual_seed(one) for one in seeds]
        found = []
        for prompts, generator in zip(rows, generators, strict=True):
            torch.manual_seed(generator.initial_seed() + 1)
            call = case.guided(prompts, trainer.family.student_guidance_scale, "")
            found.append(images_of(pipeline(**call, num_inference_steps=3, generator=generator, output_type="pt")))
        torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EDITING)
def test_other_images_are_other_conditions(name, tmp_path):
    """In memory, on disk, and among the teacher's images; in whatever order and batch."""
    words = str(PROMPTS[0])
    first, second = (PicturePrompt(words, image) for image in (picture(0), picture(1)))
    options = dict(sample_guidance_scale=3.0, prompt_cache_dir=str(tmp_path / "cache"))
    trainer = make_editing_trainer(name, tmp_path, make(EDITING[name]), **options)
    alone, both = trainer.encode([first]), trainer.encode([second, first, second])
    for key, value in both.items():
        if key not in ("pooled_prompt_embeds", "guidance") and "mask" not in key:
            seen = key in ("reference", "image_embeds") or "qwen" in name  # whose encoder sees it too
            assert torch.equal(value[0], value[2]) and torch.equal(value[1], alone[key][0])
            assert torch.equal(value[0], value[1]) is not seen, key
    files = [*(tmp_path / "cache").iterdir()]
    assert len(files) == 2
    trainer.encode.conditions.clear()
    trainer.family.encode_prompts = None  # what is on disk is found there
    assert torch.equal(trainer.encode([second])["reference"], both["reference"][:1])

    batches = [guidance.batches_of(trainer, [prompt], 3, 3.0, 0)[0][1] for prompt in (first, second, words)]
    assert len(set(batches)) == 3
    again = PicturePrompt(words, picture(0))
    assert guidance.batches_of(trainer, [again], 3, 3.0, 0)[0][1] == batches[0]


def test_the_autoencoder_has_files_of_its_own(tmp_path):
    """Conditions and the teacher's images are made with it too."""
    names, weights = [], []
    for scale in (1.0, 2.0):
        pipeline = make_kontext_of(0)
        pipeline.vae.encoder.conv_in.weight.data *= scale
        trainer = make_editing_trainer("kontext", tmp_path, pipeline, prompt_cache_dir=str(tmp_path / "c"))
        names.append(trainer.encode.name)
        weights.append(trainer.teacher_weights)
    assert names[0] != names[1] and weights[0] != weights[1]


def make_kontext_of(seed):
    torch.manual_seed(seed)
    return make_kontext()


# ------------------------------------------------------------------------------------ evaluation and absorbed guidance


@pytest.mark.parametrize("name", ["kontext", "qwen_edit"])
def test_guidance_is_absorbed_from_edits(name, tmp_path):
    """With an evaluation and a grid that shows the inputs; kept for the same images, and drawn again for others."""
    options = dict(num_teacher_images=6, teacher_guidance_scale=3.0, log_images_steps=2, num_eval_images=4)
    options |= dict(teacher_cache_dir=str(tmp_path / "cache"), num_log_images=3, max_steps=2)
    same = [PicturePrompt("a dress", picture(seed)) for seed in (0, 1, 2)]
    trainer = make_editing_trainer(name, tmp_path, make(EDITING[name]), dataset=dataset_of(same), **options)
    trainer.train()
    assert trainer.cost["teacher_images"] == 6 and trainer.target is not None
    figures = trainer.evaluate()
    assert {"eval_redness", "eval_base_redness", "eval_teacher_redness"} <= figures.keys()
    columns, rows = read_grid(tmp_path / "run" / "samples" / "grid.png")
    assert rows == ["a dress (1)", "a dress (2)", "a dress (3)"]
    assert [title.split(",")[0] for title in columns] == ["input", "teacher", "base", "student"]
    for prompt, (shown, *_) in zip(
        prompts_across(trainer.eval_dataset, trainer.family, 3), columns["input"], strict=True
    ):
        assert shown.tobytes() == prompt.image.resize((16, 8)).resize(shown.size).tobytes()

    images = guidance.GuidedImages(trainer)
    assert {prompt.fingerprint for prompt in images.prompts} == {
        PicturePrompt("a dress", trainer.family.fit(prompt.image)).fingerprint for prompt in same
    }
    drawn, new = images()
    assert new == 0
    # Two images of one prompt and one noise are not one: the second noise is that of the first.
    first, other = (images.prompts[i] for i in (0, 2))
    images.prompts = [first, other]
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(images.draw([0])[0], drawn[0], atol=1e-5, rtol=1e-5)
    images.prompts = [other]
    assert (images.draw([0])[0] - drawn[0]).abs().max() > 1e-4

    key = trainer.target_key
    changed = dataset_of([*same[:2], PicturePrompt("a dress", picture(7))])
    trainer = make_editing_trainer(name, tmp_path, make(EDITING[name]), dataset=changed, **options)
    trainer.absorb_guidance()
    assert trainer.target_key != key and 0 < trainer.cost["teacher_images"] < 6


# ----------------------------------------------------------------------------------------------- where images are from


def test_images_from_files(tmp_path, monkeypatch):
    """Paths that are relative to the file of prompts, and to the working directory; a folder of images."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for i, prompt in enumerate(PROMPTS):
        prompt.image.save(folder / "images" / f"{i}.png")
    rows = [{"prompt": str(prompt), "image": f"images/{i}.png"} for i, prompt in enumerate(PROMPTS)]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "images" / "metadata.csv").write_text("file_name,prompt\n0.png,a photo of a bag\n1.png,a dress\n")
    for name in ("p.jsonl", "images"):
        trainer = make_editing_trainer("kontext", tmp_path, make_kontext(), dataset=load_prompts(str(folder / name)))
        assert {*prompts_across(trainer.eval_dataset, trainer.family, 2)} == {
            PicturePrompt(prompt, trainer.family.fit(prompt.image)) for prompt in PROMPTS
        }
    make(EDITING["kontext"]).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    script = f"--model_name_or_path base --dataset_name data/p.jsonl --output_dir {tmp_path / 'script'}"
    script += " --max_steps 1 --num_eval_images 4 --teacher_num_steps 2 --log_images_steps 0 --use_cpu --lora_r 2"
    script += " --num_teacher_images 0 --save_strategy no --per_device_train_batch_size 4 --disable_tqdm True"
    script += " --sample_height 8 --sample_width 8 --reward_funcs jpeg_compressibility"
    load_script("examples/train_gndm.py").main(script.split())
    figures = json.loads((tmp_path / "script" / "metrics.json").read_text())
    assert figures["pipeline"] == "FluxKontextPipeline" and "jpeg_compressibility" in figures["student"]["rewards"]
    script = load_script("examples/evaluate.py")
    given = ["evaluate.py", "script", "--dataset_name", "data/p.jsonl", "--num_images", "2", "--output_dir", "out"]
    monkeypatch.setattr("sys.argv", given)
    script.main()
    assert (tmp_path / "out" / "evaluation.md").is_file()


@pytest.mark.parametrize("as_path", [False, True])
def test_images_from_a_prompt_function(as_path, tmp_path):
    PROMPTS[1].image.save(tmp_path / "p.png")
    image, asked = tmp_path / "p.png" if as_path else PROMPTS[1].image, []

    def reward(images, prompts, metadata):
        asked.extend(metadata)
        return [1.0] * len(images)

    trainer = make_editing_trainer(
        "kontext", tmp_path, make_kontext(), [reward], lambda: ("a dress", {"image": image, "size": 3}), max_steps=1
    )
    trainer.train()
    assert all(row == {"size": 3, "image": trainer.family.fit(PROMPTS[1].image)} for row in asked) and len(asked) == 4


def test_an_image_is_an_ordinary_column_elsewhere():
    """A path stays text, and a PIL image what `datasets` makes of it; prompts are words."""
    family, image = family_of(make_tiny_pipeline()), picture(0)
    rows = draw_prompts(lambda: ("a dress", {"image": "p.png"}), 2, 0)
    assert split_rows(list(rows), family) == (["a dress"] * 2, [{"image": "p.png"}] * 2)
    dataset = check_prompts(Dataset.from_dict({"prompt": ["a"], "image": [image]}), "train_dataset", family)
    (prompt,), (metadata,) = split_rows(list(dataset), family)
    assert type(prompt) is str and metadata["image"].tobytes() == image.tobytes()


# ---------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("name", EDITING)
def test_plan_counts_the_reference(name, tmp_path):
    family = family_for(name)
    example, real = family.example_condition(2), family.encode_prompts(list(PROMPTS))
    assert {key: value.shape for key, value in example.items()} == {k: v.shape for k, v in real.items()}
    real, planned = kept_activations(EDITING[name], tmp_path, 2)
    assert planned == pytest.approx(real, rel=0.1)


def test_sizes_of_the_real_models(monkeypatch):
    """Without the small rule: a million pixels in the run's aspect, which the pipeline leaves as they are."""
    monkeypatch.undo()
    for name in ("qwen_edit", "qwen_edit_plus"):
        for height, width in ((1024, 1024), (512, 512), (928, 1664), (1104, 1472), (832, 1248)):
            family = family_of(make(EDITING[name]), height, width)
            picture_height, picture_width = family.picture_size()
            found = family.dimensions.calculate_dimensions(1024 * 1024, picture_width / picture_height)[:2]
            assert found == (picture_width, picture_height)
            assert abs(picture_height * picture_width / 1024**2 - 1) < 0.05
            assert abs(picture_width / picture_height / (width / height) - 1) < 0.05
    assert family_of(make_kontext(), 512, 768).picture_size() == (512, 768)


# ----------------------------------------------------------------------------------------------------- what is refused


ROWS = {"prompt": ["a", "b"]}


@pytest.mark.parametrize(
    "dataset, message",
    [
        (Dataset.from_dict(ROWS), "FluxKontextPipeline takes images, and `train_dataset` has none: it needs a column"),
        (Dataset.from_dict({**ROWS, "image": [picture(0), None]}), "`image` of row 1 of `train_dataset` is missing"),
        (
            Dataset.from_dict({**ROWS, "image": [None, "x.png"]}, Features(prompt=Value("string"), image=Image())),
            "`image` of row 0 of `train_dataset` is missing",
        ),
        (Dataset.from_dict({**ROWS, "image": ["none.png", "x.png"]}), "is 'none.png', and there is no such file"),
        (Dataset.from_dict({**ROWS, "image": [1, 2]}), "`image` of `train_dataset` must be images or their paths"),
        (lambda: ("a", {}), "`prompt_function` returned no image for 'a'"),
        (lambda: ("a", None), "`prompt_function` returned no image for 'a'"),
    ],
)
def test_every_prompt_needs_an_image(dataset, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_editing_trainer("kontext", tmp_path, make_kontext(), dataset=dataset)


def test_what_is_not_for_editing(tmp_path):
    with pytest.raises(ValueError, match="FluxKontextPipeline takes images: real ones are not made"):
        make_editing_trainer("kontext", tmp_path, make_kontext(), adversarial_weight=0.1, image_dataset="x")
    with pytest.raises(ValueError, match="`max_sequence_length` is without effect on QwenImageEditPipeline"):
        make_editing_trainer("qwen_edit", tmp_path, make(EDITING["qwen_edit"]), max_sequence_length=64)
    trainer = make_editing_trainer("kontext", tmp_path, make_kontext(), negative_prompts="a dog")
    with pytest.raises(ValueError, match="has no negative prompts"):
        trainer.train()
    with pytest.raises(ValueError, match="the prompt 'a dress' has none: give `rdm_trl.prompts.PicturePrompt"):
        trainer.sample("student", ["a dress"])
    with pytest.raises(ValueError, match="`image` of row 0 of `eval_dataset` is missing"):
        trainer.evaluate(Dataset.from_dict({"prompt": ["a"], "image": [None]}))
    long = PicturePrompt("a " * 600, picture(0))
    with pytest.raises(ValueError, match="is longer than 512 tokens"):
        family_for("qwen_edit").encode_prompts([long])


def test_no_demo_of_edits(tmp_path):
    make(EDITING["kontext"]).save_pretrained(tmp_path / "base")
    trainer = make_editing_trainer("kontext", tmp_path, str(tmp_path / "base"))
    trainer.save_model()
    with pytest.raises(ValueError, match="FluxKontextPipeline takes images, and the demo"):
        export_space(tmp_path / "run", tmp_path / "space")


def test_controlnets_are_refused_by_name():
    pipeline = make_tiny_pipeline()
    controlnet = ControlNetModel.from_unet(pipeline.unet)
    controlled = StableDiffusionControlNetPipeline(**pipeline.components, controlnet=controlnet)
    with pytest.raises(
        ValueError, match="StableDiffusionControlNetPipeline .* ControlNet its image. Distil the pipeline"
    ):
        family_of(controlled)
