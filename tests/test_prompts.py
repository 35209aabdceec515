# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
import csv

import pytest
import torch
from conftest import PROMPTS as TRAINED
from conftest import make_tiny_pipeline, make_trainer
from datasets import Dataset

from rdm_trl.prompts import PromptCache, check_prompts, load_prompts


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


@pytest.mark.parametrize(
    "name, separator", [("p.csv", ","), ("p.csv", ";"), ("p.csv", "\t"), ("p.tsv", "\t"), ("p.tsv", None)]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_what_spreadsheets_save(tmp_path, name, separator, encoding):
    """Against Python's own csv writer; `None`: the prompts' column alone."""
    with open(tmp_path / name, "w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=separator or "\t")
        writer.writerow(["caption", "colour"][: 2 if separator else 1])
        writer.writerows([p, "r"][: 2 if separator else 1] for p in PROMPTS)
    loaded = load_prompts(str(tmp_path / name), column="caption")
    assert loaded["prompt"][:] == PROMPTS and loaded.column_names == ["prompt", "colour"][: 2 if separator else 1]
    with pytest.raises(ValueError, match="no column 'text'; it has caption"):
        load_prompts(str(tmp_path / name), column="text")


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS), encoding="utf-8-sig")
    assert load_prompts(str(tmp_path / "p.txt"))["prompt"][:] == PROMPTS


def test_another_column_takes_the_place_of_prompts(tmp_path):
    file = str(tmp_path / "p.json")
    Dataset.from_dict({"prompt": ["x"] * 3, "text": PROMPTS}).to_json(file)
    assert load_prompts(file, column="text")["prompt"][:] == PROMPTS


def test_streamed_prompts_are_refused_with_the_reason(tmp_path):
    dataset = Dataset.from_dict({"prompt": TRAINED}).to_iterable_dataset()
    with pytest.raises(ValueError, match="not streamed.*length must be known"):
        check_prompts(dataset, "train_dataset")


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
        return PromptCache(encode, torch.device("cpu"), 2, tmp_path / "cache", name)

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
