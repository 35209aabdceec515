# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Weights in their authors' own formats, by the names that transformers has for them."""

import re

import torch


CLIP_NAMES = (
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
)
BLIP_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "post_layernorm."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
)


def clip_state_dict(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of transformers' `CLIPModel` from that of open_clip's."""
    state = {}
    for key, value in weights.items():
        key = renamed(key, CLIP_NAMES)
        if key in ("text_projection.weight", "visual_projection.weight"):
            state[key] = value.T
        elif ".in_proj_" in key:
            for name, part in zip(("q_proj.", "k_proj.", "v_proj."), value.chunk(3), strict=True):
                state[key.replace("in_proj_", name)] = part
        else:
            state[key] = value
    return state


def blip_state_dict(weights: dict[str, torch.Tensor], device: torch.device) -> tuple[dict, dict, list]:
    """From ImageReward's: states of transformers' `BlipVisionModel` and `BlipTextModel`, and the head's layers."""
    vision = {renamed(k, BLIP_VISION_NAMES): v for k, v in part(weights, "blip.visual_encoder.").items()}
    text = {k: v for k, v in part(weights, "blip.text_encoder.").items() if not k.endswith("position_ids")}
    return vision, text, head_of(weights, "mlp.layers.", device)


def head_of(weights: dict[str, torch.Tensor], prefix: str, device: torch.device) -> list[tuple]:
    """Weight and bias of each linear layer of a `Sequential`, in order; what lies between has no weights."""
    layers = part(weights, prefix)
    numbers = sorted({int(key.split(".")[0]) for key in layers})
    return [(layers[f"{i}.weight"].float().to(device), layers[f"{i}.bias"].float().to(device)) for i in numbers]


def part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries below `prefix`, without it."""
    return {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}


def renamed(key: str, rules: tuple) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
