# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
import pytest
from datasets import Dataset

from rdm_trl.prompts import load_prompts


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
