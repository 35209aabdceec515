# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The configs are read by the script as they are, and the table's architectures are those of the models."""

import pytest
from conftest import ROOT, load_script

from rdm_trl import RdmDistillConfig
from rdm_trl._trl import make_parser
from rdm_trl.models.pipelines import family_of
from rdm_trl.rewards.builtin import __all__ as builtin_rewards


CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
# Billions of parameters of the denoiser, as published (for Stable Diffusion as measured by others).
SIZES = {
    "sd15": 0.86,
    "sdxl": 2.57,
    "sd35_medium": 2.47,
    "flux1_dev": 11.9,
    "z_image": 6.15,
    "qwen_image": 20.4,
    "wan21_1_3b": 1.42,
    "wan21_i2v_14b": 16.4,
    "ltx_video": 1.92,
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs(path, tmp_path):
    parser = make_parser(load_script("examples/train_gndm.py").ScriptArguments, RdmDistillConfig)
    script, config = parser.parse_args_and_config(["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu"])
    assert config.num_generations == 4
    if script.model_name_or_path is not None:
        assert "not run on a GPU" in path.read_text().splitlines()[0]
        assert f"configs/{path.name}`" in (ROOT / "docs" / "recipes.md").read_text()
        # A reward in the comments is one that there is.
        named = path.read_text().split("# reward_funcs: [")[1].split("]")[0].split(", ")
        assert set(named) <= set(builtin_rewards)


@pytest.mark.parametrize("name", SIZES)
def test_architectures(name):
    table = load_script("examples/memory_table.py")
    pipeline = table.without_weights(getattr(table, name))
    assert table.billions(family_of(pipeline).denoiser) == pytest.approx(SIZES[name], rel=0.03)
