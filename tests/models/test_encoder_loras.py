# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""LoRAs that reach the text encoders too, against pipelines that plain diffusers loads."""

from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, make_tiny_pipeline, make_trainer, save_style
from diffusers import DiffusionPipeline, LCMScheduler
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny_pipelines import ENCODERS, PIPELINES, save_lora

from rdm_trl.guidance import weights_of
from rdm_trl.saving.export import export


def plain(kind, lora=None, scheduler=None):
    pipeline = PIPELINES[kind]()
    if lora is not None:
        pipeline.load_lora_weights(lora)
    if scheduler is not None:
        pipeline.scheduler = LCMScheduler.from_pretrained(scheduler, subfolder="scheduler")
    return pipeline


def draw(pipeline, num_steps=4, guidance_scale=1.0):
    rest = dict(num_inference_steps=num_steps, guidance_scale=guidance_scale, output_type="pt")
    return pipeline(PROMPTS, generator=torch.Generator().manual_seed(42), **rest).images


def encode(pipeline):
    """What the last layers of the encoders say: the embeddings, or SDXL's pooled ones."""
    found = pipeline.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return found[2 if len(found) == 4 else 0].detach()


def conditions(trainer):
    found = trainer.encode(PROMPTS)
    return found.get("pooled_prompt_embeds", found["prompt_embeds"])


def close(ours, theirs, rtol=1e-5):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=rtol)


def styled(tmp_path, kind="sd", **options):
    return make_trainer(tmp_path, pipeline=PIPELINES[kind](), learning_rate=0.02, **options)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", PIPELINES)
def test_the_saved_folder_alone_gives_the_students_images(tmp_path, kind, form):
    lora = save_lora(tmp_path / "style", kind, form)
    trainer = styled(tmp_path, kind, teacher_lora=lora, negative_prompts="a coat")
    reference = plain(kind, lora)
    close(conditions(trainer), encode(reference))
    assert (encode(reference) - encode(plain(kind))).abs().max() > 0.1
    with trainer.model.use("teacher"):  # the whole pipeline, as the user's own call draws with this LoRA
        close(draw(trainer.sd_pipeline, 3, 1.75), draw(reference, 3, 1.75), rtol=1e-4)
    trainer.train()
    trainer.save_model()
    ours = trainer.sample("student", PROMPTS)
    alone = plain(kind, tmp_path / "run", tmp_path / "run")
    close(ours, draw(alone), rtol=1e-4)
    untrained = plain(kind, lora, tmp_path / "run")
    assert (ours - draw(untrained)).abs().max() > 1e-3
    for name in ENCODERS[kind]:
        for layer in getattr(alone, name).modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(False)
    assert (ours - draw(alone)).abs().max() > 1e-3


def test_other_programs_get_the_encoders_part_too(tmp_path):
    # As long as a layer's alpha is not another one's, plain diffusers reads kohya's form right.
    lora = LoraConfig(r=3, target_modules=["to_k"])
    trainer = styled(tmp_path, teacher_lora=save_lora(tmp_path / "style"), peft_config=lora)
    trainer.train()
    trainer.save_model()
    make_tiny_pipeline().save_pretrained(tmp_path / "base")
    expected = trainer.sample("student", PROMPTS)
    whole = DiffusionPipeline.from_pretrained(
        export(tmp_path / "run", tmp_path / "whole", "diffusers", str(tmp_path / "base"))
    )
    close(expected, draw(whole), rtol=1e-3)
    file = export(tmp_path / "run", tmp_path / "kohya", "kohya")
    close(expected, draw(plain("sd", file, tmp_path / "run")), rtol=1e-3)
    keys = load_file(file).keys()
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha" in keys
    saved = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors").keys()  # the names that ComfyUI knows
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight" in saved


def test_kept_prompts_are_not_another_encoders(tmp_path):
    lora, kept = save_lora(tmp_path / "style"), dict(prompt_cache_dir=str(tmp_path / "prompts"))
    unstyled = styled(tmp_path / "plain", **kept)
    close(conditions(unstyled), encode(plain("sd")))
    for _ in range(2):  # the second from the disk
        trainer = styled(tmp_path, teacher_lora=lora, **kept)
        close(conditions(trainer), encode(plain("sd", lora)))
    assert weights_of(trainer) != weights_of(unstyled)  # nor are the teacher's kept images


def test_in_half_precision_and_with_encoders_that_come_and_go(tmp_path):
    lora = save_lora(tmp_path / "style")
    reference = plain("sd", lora).to(torch.bfloat16)
    pipeline = make_tiny_pipeline().to(torch.bfloat16)
    trainer = make_trainer(tmp_path, pipeline=pipeline, teacher_lora=lora, bf16=True, offload_encoders=True)
    assert {p.dtype for p in pipeline.text_encoder.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in pipeline.text_encoder.parameters())
    # The same but for rounding, and the saved folder exactly.
    effect = (encode(plain("sd")) - encode(reference)).abs().mean()
    assert (conditions(trainer) - encode(reference)).abs().mean() < 0.02 * effect
    trainer.save_model()
    assert torch.equal(conditions(trainer), encode(plain("sd", tmp_path / "run").to(torch.bfloat16)))


def test_a_run_is_resumed(tmp_path):
    options = dict(teacher_lora=save_lora(tmp_path / "style"), save_strategy="steps", save_steps=1)
    whole = styled(tmp_path / "whole", **options)
    whole.train()
    again = styled(tmp_path / "whole", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / "checkpoint-1"))
    for key, value in whole.model.adapter_state("ema").items():
        assert torch.equal(again.model.adapter_state("ema")[key], value)
    assert torch.equal(again.sample("student", PROMPTS), whole.sample("student", PROMPTS))


def test_a_student_with_an_encoders_part_is_continued(tmp_path):
    lora = save_lora(tmp_path / "style")
    first = styled(tmp_path / "first", teacher_lora=lora)
    first.train()
    first.save_model()
    run, expected = tmp_path / "first" / "run", first.sample("student", PROMPTS)
    for teacher in (lora, None):
        second = styled(tmp_path / f"second {teacher is None}", student_lora=run, teacher_lora=teacher)
        close(second.sample("student", PROMPTS), expected, rtol=1e-4)
    second.train()
    second.save_model()
    folder = Path(second.args.output_dir)
    close(second.sample("student", PROMPTS), draw(plain("sd", folder, folder)), rtol=1e-4)
    # A student without such a part under a teacher with one is carried on in the teacher's words.
    student = styled(tmp_path / "third", student_lora=save_style(tmp_path / "unet alone"), teacher_lora=lora)
    close(conditions(student), encode(plain("sd", lora)))
    for other in (save_style(tmp_path / "no encoder"), save_lora(tmp_path / "other", size=0.1)):
        with pytest.raises(ValueError, match="changes the text encoders, and not as `teacher_lora` does"):
            styled(tmp_path / "fourth", student_lora=run, teacher_lora=other)


def test_each_layers_own_alpha_in_kohyas_form(tmp_path):
    """Added to the weights by kohya's formula, `alpha / rank * up @ down`."""
    lora = save_lora(tmp_path / "style", form="kohya", alpha=lambda i: i + 1)
    expected, state = make_tiny_pipeline(), load_file(lora)
    for prefix, network in (("lora_te_text_model", expected.text_encoder), ("lora_unet", expected.unet)):
        for name, layer in network.named_modules():
            key = f"{prefix}_{name.replace('.', '_')}"
            if f"{key}.alpha" in state:
                scale = state.pop(f"{key}.alpha") / 3
                layer.weight.data += scale * state[f"{key}.lora_up.weight"] @ state[f"{key}.lora_down.weight"]
    assert not any(key.endswith(".alpha") for key in state)
    trainer = styled(tmp_path, teacher_lora=lora)
    close(conditions(trainer), encode(expected))
    with trainer.model.use("teacher"):
        close(draw(trainer.sd_pipeline), draw(expected), rtol=1e-3)
    trainer.save_model()
    close(draw(plain("sd", tmp_path / "run")), draw(expected), rtol=1e-3)


def test_what_is_read_in_part_is_refused(tmp_path):
    lora = save_lora(tmp_path / "style", form="kohya", layers=["q_proj", "fc1"])
    with pytest.raises(ValueError, match="of its 4 tensors for the text_encoder diffusers reads 2"):
        styled(tmp_path, teacher_lora=lora)
    pipeline = plain("sd", save_lora(tmp_path / "whole"))
    pipeline.unet.delete_adapters("default_0")
    with pytest.raises(ValueError, match="has a LoRA loaded"):
        make_trainer(tmp_path, pipeline=pipeline)
