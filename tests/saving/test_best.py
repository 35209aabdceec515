# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""`load_best_model_at_end`: of a run that got worse, the best student stays."""

import json
import shutil

import pytest
import torch
from conftest import make_config, make_trainer
from safetensors.torch import load_file

from rdm_trl.saving import checkpoint


SCORES = {2: 0.3, 4: 0.9, 6: 0.1}  # of the students of these updates
OPTIONS = dict(max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
OPTIONS |= dict(save_total_limit=2, load_best_model_at_end=True, log_images_steps=2)


def make_scored(folder, **options):
    def score(images, prompts, metadata):
        return torch.full((len(images),), SCORES.get(trainer.state.global_step, 0.0))

    trainer = make_trainer(folder, [score], **{**OPTIONS, "metric_for_best_model": "score", **options})
    return trainer


def test_the_best_student_stays(tmp_path):
    trainer, run = make_scored(tmp_path), tmp_path / "run"
    trainer.train()
    trainer.save_model()
    best, last = run / "checkpoint-4", run / "checkpoint-6"
    assert trainer.args.greater_is_better and best.is_dir()
    weights = load_file(run / "pytorch_lora_weights.safetensors")
    expected, other = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (best, last))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert not all(torch.equal(weights[key], other[key]) for key in other)
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["student"]["rewards"]["score"] == pytest.approx(0.9) and figures["cost"]["updates"] == 6
    assert "that of update 4, the best of the run by `score`" in figures["note"]
    assert figures["note"] in (run / "README.md").read_text()
    assert "update 4" not in json.loads((last / "metrics.json").read_text())["note"]  # its student is its own
    # The picture in the card is the student's that is saved, and not that of the last update.
    assert (run / "samples" / "grid.png").read_bytes() != (last / "samples" / "grid.png").read_bytes()


def test_a_best_checkpoint_that_is_gone_leaves_the_last(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(checkpoint.logger, "warning", warnings.append)
    trainer = make_scored(tmp_path)
    trainer.train()
    last = {key: value.clone() for key, value in trainer.model.adapter_state("ema").items()}
    shutil.rmtree(trainer.state.best_model_checkpoint)
    trainer._load_best_model()
    assert "there is no such folder" in warnings[-1]
    assert all(torch.equal(value, last[key]) for key, value in trainer.model.adapter_state("ema").items())


def test_what_best_means(tmp_path):
    config = make_config(tmp_path, **OPTIONS)
    assert (config.metric_for_best_model, config.greater_is_better) == ("fid_teacher", False)
    assert make_config(tmp_path, save_strategy="best", eval_strategy="steps", eval_steps=2).greater_is_better is False
    assert make_config(tmp_path).metric_for_best_model is None
    with pytest.raises(ValueError, match="`save_only_model`"):
        make_config(tmp_path, **OPTIONS, save_only_model=True)
    with pytest.raises(ValueError, match="`metric_for_best_model` is 'fid_teacher'.*`eval_feature_model`"):
        make_trainer(tmp_path, **OPTIONS)  # a pipeline that nobody has named features for
    with pytest.raises(ValueError, match="'sharpness', but evaluation measures score here"):
        make_scored(tmp_path, metric_for_best_model="sharpness")
