# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from conftest import make_tiny_pipeline
from peft import LoraConfig

from rdm_trl.models.pipelines.stable_diffusion import StableDiffusionFamily
from rdm_trl.models.roles import Roles


def make_roles(dtype=torch.float32) -> tuple[Roles, tuple]:
    pipeline = make_tiny_pipeline()
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=StableDiffusionFamily.lora_target_modules)
    roles = Roles(pipeline.unet.to(dtype), lora)  # adapters that already do something, each something else
    torch.manual_seed(1)
    for name in ("student", "fake", "ema"):
        for parameter in roles.adapter_parameters(name):
            torch.nn.init.normal_(parameter, std=0.3)
    inputs = (torch.randn(2, 4, 4, 4, dtype=dtype), torch.tensor([100, 700]), torch.randn(2, 16, 16, dtype=dtype))
    return roles, inputs


def gradients(roles, name):
    return [None if p.grad is None else p.grad.clone() for p in roles.adapter_parameters(name)]


def backward_of_student(roles, inputs, between=lambda roles, inputs: None):
    roles.zero_grad()
    loss = roles("student", *inputs).square().mean()
    between(roles, inputs)
    loss.backward()
    return gradients(roles, "student")


def switch_roles(roles, inputs):
    with torch.no_grad():
        roles("fake", *inputs)
        roles("teacher", *inputs)


def test_teacher_is_the_untouched_base_bit_for_bit():
    expected = make_tiny_pipeline().unet
    roles, inputs = make_roles()
    with torch.no_grad():
        expected = expected(*inputs).sample
        outputs = {name: roles(name, *inputs) for name in ("teacher", "student", "fake", "ema")}
    assert torch.equal(outputs["teacher"], expected)
    names = list(outputs)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not torch.allclose(outputs[first], outputs[second], atol=1e-3)


def test_an_update_changes_only_its_own_role():
    roles, inputs = make_roles()
    for name, others in (("student", ("fake", "ema")), ("fake", ("student", "ema"))):
        before = {p: value.clone() for p, value in roles.named_parameters()}
        optimizer = torch.optim.SGD(roles.adapter_parameters("student", "fake"), lr=0.1)
        optimizer.zero_grad()
        roles(name, *inputs).square().mean().backward()
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients(roles, name))
        optimizer.step()
        for key, value in roles.named_parameters():
            changed = not torch.equal(value, before[key])
            assert changed == (f".{name}." in key), key
        assert all(gradient is None for other in others for gradient in gradients(roles, other))


def test_student_forward_then_other_roles_then_backward_gives_the_true_gradient():
    """The order of every DMD step, and the one in which peft's own `set_adapter` silently yields zeros."""
    roles, inputs = make_roles()
    expected = backward_of_student(roles, inputs)
    assert sum(gradient.abs().sum() for gradient in expected) > 0
    for found, true in zip(backward_of_student(roles, inputs, switch_roles), expected, strict=True):
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize("between", [lambda roles, inputs: None, switch_roles])
def test_activation_checkpointing_gives_the_same_gradient(between):
    roles, inputs = make_roles()
    expected = backward_of_student(roles, inputs)
    recomputed = []
    roles.activation_checkpointing_enable()
    roles.denoiser.down_blocks[1].resnets[0].register_forward_pre_hook(lambda *_: recomputed.append(roles.role))
    found = backward_of_student(roles, inputs, between)
    assert recomputed[0] == recomputed[-1] == "student" and recomputed.count("student") == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_flags_are_still_those_of_peft():
    """Our switch sets two private attributes; this fails if peft renames them."""
    roles, inputs = make_roles()
    with torch.no_grad():
        found = roles("fake", *inputs)
        roles.denoiser.enable_adapters()
        roles.denoiser.set_adapter("fake")
        expected = roles.denoiser(*inputs).sample
    assert torch.equal(found, expected)


def test_ema_and_adapter_round_trip():
    roles, _ = make_roles()
    student, ema = roles.adapter_state("student"), roles.adapter_state("ema")
    roles.update_ema(0.9)
    for key, value in roles.adapter_state("ema").items():
        torch.testing.assert_close(value, 0.9 * ema[key] + 0.1 * student[key])
    roles.load_adapter("fake", student)
    for key, value in roles.adapter_state("fake").items():
        assert torch.equal(value, student[key])
    with pytest.raises(ValueError, match="do not fit the adapter 'fake'"):
        roles.load_adapter("fake", {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="Unknown role 'critic'"):
        with roles.use("critic"):
            pass


def test_half_precision_base_keeps_full_precision_adapters():
    roles, inputs = make_roles(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in roles.adapter_parameters("student", "fake", "ema"))
    assert all(p.dtype == torch.bfloat16 for n, p in roles.named_parameters() if "lora" not in n)
