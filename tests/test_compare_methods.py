# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
import json

import pytest
from conftest import load_script


pytest.importorskip("matplotlib").use("Agg")

SMALL = "per_device_train_batch_size=8 fake_updates=1 teacher_num_steps=2 max_steps=2 use_cpu=true disable_tqdm=true"


@pytest.mark.parametrize(
    ("budget", "changes", "updates"),
    [
        ("updates", "num_iterations=2", 2),
        ("rollouts", "num_iterations=2", 4),
        ("teacher_evaluations", "sample_guidance_scale=2.0", 1),
    ],
)
def test_methods_get_equal_budgets(tmp_path, monkeypatch, budget, changes, updates):
    """What the trainer itself counted is equal, whatever an update costs; and a second call trains nothing again."""
    script = load_script("examples/compare_methods.py")
    command = f"compare --methods gndm gndm,{changes} --seeds 0 --num_images 8 --eval_steps 1 --budget {budget}"
    command = [*command.split(), "--output_dir", str(tmp_path), "--set", *SMALL.split()]
    monkeypatch.setattr("sys.argv", command)
    script.main()
    results = json.loads((tmp_path / "embedded" / "results.json").read_text())
    one, other = (results[f"{method}-0"]["curve"][-1] for method in ("gndm", f"gndm,{changes}"))
    assert (one["step"], other["step"]) == (2, updates)
    if budget != "updates":
        assert one[budget] == other[budget] == 16
    monkeypatch.setattr(script, "run", None)
    script.main()
    assert f"gndm,{changes} − gndm" in (tmp_path / "embedded" / "table.md").read_text()
