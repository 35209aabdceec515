# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""A base in 8 or 4 bits."""

import pytest
import torch
from conftest import load_script, make_trainer
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, TorchAoConfig

from rdm_trl.demo import DEMO_PIPELINE
from rdm_trl.models.pipelines import load_pipeline


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
@pytest.mark.parametrize("bits", [8, 4])
def test_without_its_backend_there_is_a_clear_error(offline, bits):
    with pytest.raises(RuntimeError, match=rf"cannot be loaded in {bits} bits: .*rdm_trl\[quantization\]"):
        load_pipeline(DEMO_PIPELINE, torch.float32, bits)
    with pytest.raises(OSError, match="'no/pipeline' cannot be loaded"):
        load_pipeline("no/pipeline", torch.float32, bits)


def test_the_scripts_options(tmp_path):
    main = load_script("examples/train_gndm.py").main
    for given in (["--load_in_4bit"], ["--load_in_4bit", "--load_in_8bit", "--model_name_or_path", DEMO_PIPELINE]):
        with pytest.raises(ValueError, match="Give one of `load_in_8bit` and `load_in_4bit`"):
            main(["--output_dir", str(tmp_path), *given])


@pytest.mark.parametrize("bits", [8, 4])
def test_the_script_asks_for_the_bits_it_was_given(tmp_path, monkeypatch, bits):
    script = load_script("examples/train_gndm.py")
    asked = []
    monkeypatch.setattr(script, "load_pipeline", lambda *args, **files: asked.append((*args, files)))
    monkeypatch.setattr(script, "RdmDistillTrainer", lambda config, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.main(["--output_dir", str(tmp_path), "--model_name_or_path", "my/model", f"--load_in_{bits}bit"])
    assert asked == [("my/model", torch.float32, bits, {"variant": None, "single_file_config": None})]


def load_int8() -> DiffusionPipeline:
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return DiffusionPipeline.from_pretrained(
        DEMO_PIPELINE,
        quantization_config=PipelineQuantizationConfig(quant_mapping={"unet": config}),
        dtype=torch.float32,
    )


def test_a_student_of_an_8_bit_base(tmp_path):
    """The same run as with the base in full: the linear layers are rounded, and so little else changes."""
    pipelines = {"int8": load_int8(), "full": DiffusionPipeline.from_pretrained(DEMO_PIPELINE, dtype=torch.float32)}
    weights = {name: dict(pipeline.unet.named_parameters()) for name, pipeline in pipelines.items()}
    key = "mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"
    assert type(weights["int8"][key]) is not type(weights["full"][key])
    logs, images = {}, {}
    for name, pipeline in pipelines.items():
        trainer = make_trainer(tmp_path / name, pipeline=pipeline, max_steps=3, learning_rate=1e-3)
        trainer.train()
        logs[name] = [entry for entry in trainer.state.log_history if "dm/scale" in entry]
        images[name] = trainer.sample("student", ["a photo of a sneaker"] * 4)
        assert all(p.grad is None for n, p in trainer.model.named_parameters() if ".student." not in n)
    for int8, full in zip(logs["int8"], logs["full"], strict=True):
        assert int8["dm/scale"] == pytest.approx(full["dm/scale"], rel=0.02)
        assert int8["loss/fake"] == pytest.approx(full["loss/fake"], rel=0.05)
    assert 0 < (images["int8"] - images["full"]).abs().mean() < 0.02
    trainer = make_trainer(tmp_path, pipeline=load_int8(), max_steps=1)
    trainer.save_model()
    plain = DiffusionPipeline.from_pretrained(DEMO_PIPELINE, dtype=torch.float32)
    plain.load_lora_weights(tmp_path / "run")
    with pytest.raises(ValueError, match="must not be quantized"):
        make_trainer(tmp_path, pipeline=load_int8(), peft_config=False)
