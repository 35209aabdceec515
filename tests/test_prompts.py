# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from conftest import PROMPTS as TRAINED
from conftest import make_tiny_pipeline, make_trainer
from datasets import Dataset

from rdm_trl.prompts import PromptCache, load_prompts


PROMPTS = ["a coat, red", 'a "bag"', "un manteau doré"]


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_files_with_columns(tmp_path, kind):
    dataset, file = Dataset.from_dict({"prompt": PROMPTS, "colour": ["r", "g", "b"]}), str(tmp_path / f"p.{kind}")
    if kind in ("json", "jsonl"):
        dataset.to_json(file)
    else:
        getattr(dataset, f"to_{kind}")(file)
    loaded = load_prompts(file)
    assert loaded["prompt"][:] == PROMPTS and loaded["colour"][:] == ["r", "g", "b"]


def test_a_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join([*PROMPTS, "", "  "]), encoding="utf-8")
    assert load_prompts(str(tmp_path / "p.txt"))["prompt"][:] == PROMPTS


def test_what_is_no_file_of_prompts(tmp_path):
    (tmp_path / "p.docx").write_text("x")
    with pytest.raises(ValueError, match="is no file of prompts"):
        load_prompts(str(tmp_path / "p.docx"))


def test_prompts_are_encoded_once_for_all_runs(tmp_path):
    asked = []

    def encode(prompts):
        asked.extend(prompts)
        return {"prompt_embeds": torch.tensor([[float(len(p)), 1.0] for p in prompts]).bfloat16()}

    def cache(name="a"):
        return PromptCache(encode, torch.nn.Linear(1, 1), 2, tmp_path / "cache", name)

    first = cache()
    expected = {"prompt_embeds": torch.tensor([[11.0, 1.0], [7.0, 1.0], [11.0, 1.0]]).bfloat16()}
    for _ in range(2):
        found = first([PROMPTS[0], PROMPTS[1][:7], PROMPTS[0]])
        assert torch.equal(found["prompt_embeds"], expected["prompt_embeds"])
    assert asked == [PROMPTS[0], PROMPTS[1][:7]]
    again = cache()([PROMPTS[0], "new", PROMPTS[0]])
    assert asked[2:] == ["new"] and torch.equal(again["prompt_embeds"][0], expected["prompt_embeds"][0])
    cache("b")([PROMPTS[0]])  # another model's
    assert asked[3:] == [PROMPTS[0]]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".safetensors"]


def test_a_run_from_cached_prompts_is_the_same(tmp_path):
    runs = []
    for name in ("none", "first", "second"):
        folder = None if name == "none" else str(tmp_path / "cache")
        trainer = make_trainer(tmp_path / name, prompt_cache_dir=folder)
        if name == "second":
            trainer.family.pipeline.encode_prompt = None  # nothing is left to encode
        trainer.train()
        runs.append(trainer.model.adapter_state("student"))
    assert len(list((tmp_path / "cache").iterdir())) == len(set(TRAINED)) + 1
    for key, value in runs[0].items():
        assert torch.equal(value, runs[1][key]) and torch.equal(value, runs[2][key])


def test_other_encoders_have_files_of_their_own(tmp_path):
    """The tiny pipelines have no name that would tell them apart."""
    conditions = []
    for seed in (0, 1):
        trainer = make_trainer(tmp_path, pipeline=make_tiny_pipeline(seed=seed), prompt_cache_dir=str(tmp_path / "c"))
        conditions.append(trainer.encode(["a bag"])["prompt_embeds"])
        torch.testing.assert_close(conditions[-1], trainer.family.encode_prompts(["a bag"])["prompt_embeds"])
    assert not torch.equal(*conditions)
