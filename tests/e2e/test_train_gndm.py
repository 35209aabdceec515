# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The example script, run as a user runs it, on the embedded teacher."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, load_script

from rdm_trl import RdmDistillConfig, RdmDistillTrainer
from rdm_trl.demo import DEMO_PROMPTS


SHORT = "--max_steps 2 --num_eval_images 8 --teacher_num_steps 2 --log_images_steps 0 --use_cpu".split()
SHORT += "--num_teacher_images 4 --per_device_train_batch_size 4".split()


def load_example(name: str = "train_gndm"):
    return load_script(f"examples/{name}.py")


def test_a_minute_of_training_brings_the_student_nearer_to_teacher_and_data(tmp_path):
    """
    From where every run starts, with few of the main job's updates, at three times its rate; measured in the
    classifier's features, which training does not look at, against the real test images and against the guided
    teacher's samples of other noise. How much nearer depends on the seed: this one ends at 0.82 and 0.83 of where it
    began, two others at 0.99 and 0.91, 0.87 and 0.96.
    """
    config = RdmDistillConfig(
        str(tmp_path),
        max_steps=24,
        learning_rate=1.5e-3,
        fake_learning_rate=1.5e-3,
        sample_guidance_scale=1.0,
        teacher_guidance_scale=1.75,
        teacher_num_steps=10,
        num_teacher_images=60,
        ema_decay=0.85,
        log_images_steps=0,
        save_strategy="no",
        per_device_eval_batch_size=120,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = RdmDistillTrainer(config)
    prompts = DEMO_PROMPTS * 4

    trainer.judge("teacher", trainer.sample("teacher", prompts, seed=99), prompts)

    def distances():
        figures = trainer.judge("student", trainer.sample("student", prompts, seed=50), prompts)
        return figures["fid"], figures["fid_teacher"]

    before = distances()
    trainer.train()
    after = distances()
    print(before, after)
    for start, end in zip(before, after, strict=True):
        assert end < 0.95 * start


def test_resuming_from_the_command_line(tmp_path):
    arguments = [*SHORT, "--output_dir", str(tmp_path), "--save_strategy", "steps", "--save_steps", "1"]
    with pytest.raises(ValueError, match="There is no complete checkpoint in .* to resume from"):
        load_example().main([*arguments, "--resume_from_checkpoint", "True"])
    load_example().main([*arguments, "--resume_from_checkpoint", "False"])
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()  # torn: step 2 is done again
    load_example().main([*arguments, "--resume_from_checkpoint", "True"])
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_command_line_overrides_the_config_file(tmp_path):
    (tmp_path / "c.yaml").write_text("max_steps: 7\nnum_generations: 2\nsample_guidance_scale: 3.0\n")
    example = load_example()
    parser = example.make_parser(example.ScriptArguments, RdmDistillConfig)
    arguments = ["--config", str(tmp_path / "c.yaml"), "--num_generations", "8", "--output_dir", str(tmp_path)]
    _, config = parser.parse_args_and_config(arguments)
    assert (config.max_steps, config.num_generations, config.sample_guidance_scale) == (7, 8, 3.0)
    assert config.ema_decay == RdmDistillConfig.ema_decay
    (tmp_path / "c.yaml").write_text("max_stepz: 7\n")
    with pytest.raises(ValueError, match="max_stepz"):
        parser.parse_args_and_config(["--config", str(tmp_path / "c.yaml")])


def test_help_shows_every_option_under_a_heading(capsys):
    with pytest.raises(SystemExit):
        load_example().main(["--help"])
    text = capsys.readouterr().out
    sections = dict(re.findall(r"^(Parameters [^\n]*):\n(.*?)(?=^\S|\Z)", text, re.M | re.S))
    for heading, options in {
        "Parameters that control the model and the prompts": ["model_name_or_path", "lora_r", "lora_alpha"],
        "Parameters that control sampling": ["sample_num_steps", "num_generations", "negative_prompts"],
        "Parameters that control distribution matching": ["dm_weight", "dm_normalization", "dm_timestep_range"],
        "Parameters that control the fake score": ["fake_updates", "fake_learning_rate"],
        "Parameters of TrainingArguments": ["learning_rate", "push_to_hub", "resume_from_checkpoint", "bf16"],
    }.items():
        for option in options:
            assert re.search(rf"^  --{option}\b", sections[heading], re.M), (heading, option)
    everything = "".join(sections.values())
    for name in RdmDistillConfig.__dataclass_fields__:
        if RdmDistillConfig.__dataclass_fields__[name].init:
            assert f"--{name}" in everything, name


def test_prompts_and_loras_by_name(tmp_path):
    """A styled teacher, then a continued student, each with prompts from another place."""
    example, style, files = load_example(), tmp_path / "style", ["--save_strategy", "no", *SHORT]
    (tmp_path / "prompts.txt").write_text("a coat\n\na bag\n")
    (tmp_path / "c.yaml").write_text("prompts:\n- 'a photo: a bag, a coat'\n- a dress\n")
    example.main(
        ["--output_dir", str(style), "--lora_r", "2", "--dataset_name", str(tmp_path / "prompts.txt"), *files]
    )
    example.main(["--output_dir", str(tmp_path / "second"), "--lora_r", "1", "--teacher_lora", str(style), *files])
    third = ["--output_dir", str(tmp_path / "third"), "--student_lora", str(tmp_path / "second"), *files]
    example.main(["--config", str(tmp_path / "c.yaml"), *third])
    settings = json.loads((tmp_path / "third" / "metrics.json").read_text())["settings"]
    assert settings["student_lora"] == str(tmp_path / "second") and settings["lora_r"] == 3
    assert "'a photo: a bag, a coat'" in (tmp_path / "third" / "README.md").read_text()
    for wrong, message in ((["--lora_r", "4"], "leave `peft_config` out"), (["--dataset_name", "x"], "not both")):
        with pytest.raises(ValueError, match=message):
            example.main(["--config", str(tmp_path / "c.yaml"), *third, *wrong])
    (tmp_path / "c.yaml").write_text("prompts:\n- a photo: a bag\n")
    with pytest.raises(ValueError, match="in quotes"):
        example.main(["--config", str(tmp_path / "c.yaml"), *third])


def test_accelerate_launch(tmp_path):
    """In a process of its own, as the README says; the embedded teacher needs no network."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    result = subprocess.run(
        [*command, str(ROOT / "examples" / "train_gndm.py"), *SHORT, "--output_dir", str(tmp_path / "out")],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for who in ("teacher", "base", "student"):
        for name in ("fid", "class_accuracy", "diversity"):
            assert isinstance(metrics[who][name], float)
    assert metrics["student"]["fid_teacher"] > 0
    assert "| student |" in result.stdout and result.stdout.rstrip().endswith("grid.png")


def test_evaluating_checkpoints(tmp_path, monkeypatch, capsys):
    """The script's figures, of images that plain diffusers draws, are those of the trainer's own samples."""
    config = RdmDistillConfig(
        str(tmp_path / "run"),
        max_steps=2,
        learning_rate=0.01,
        per_device_train_batch_size=8,
        teacher_num_steps=5,
        log_images_steps=0,
        num_teacher_images=0,
        save_strategy="no",
        use_cpu=True,
    )
    trainer = RdmDistillTrainer(config)
    trainer.train()
    trainer.save_model()
    prompts = [DEMO_PROMPTS[i % len(DEMO_PROMPTS)] for i in range(60)]
    expected = trainer.judge("student", trainer.sample("student", prompts), prompts)
    arguments = ["--num_images", "60", "--batch_size", "32", "--seed", str(config.seed)]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "run"), *arguments])
    monkeypatch.chdir(tmp_path)
    load_example("evaluate").main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    header, teacher, base, student = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    figures = dict(zip(header, student, strict=True))
    assert float(figures["class_accuracy"]) == pytest.approx(expected["class_accuracy"], rel=1e-3)
    assert float(figures["fid"]) == pytest.approx(expected["fid"], rel=1e-3)
    assert base[0] == "base, 4 steps" and student[0] == "run, 4 steps"
    assert (tmp_path / "outputs" / "evaluation" / "grid.png").is_file()
