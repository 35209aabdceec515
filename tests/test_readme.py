# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The code blocks of README run as printed."""

import re
from pathlib import Path

from PIL import Image


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(block, namespace)
    assert isinstance(namespace["image"], Image.Image)
    assert (tmp_path / "my-4-step-model" / "README.md").is_file()


def test_files_it_points_to_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
