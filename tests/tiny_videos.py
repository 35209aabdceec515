# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""A tiny random pipeline of every family of videos."""

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny_encoders import t5, words
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel


def wan_transformer(**options):
    return WanTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 8,
            "ffn_dim": 16,
            "num_layers": 1,
            "rope_max_seq_len": 32,
            **options,
        }
    )


def wan_vae(**options):
    return AutoencoderKLWan(
        **{
            "base_dim": 4,
            "z_dim": 4,
            "dim_mult": [1, 1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [True, True],
            "latents_mean": [0.1, 0.2, 0.3, 0.4],
            "latents_std": [1.1, 0.9, 0.8, 0.7],
            "scale_factor_spatial": 4,
            **options,
        }
    )


def make_wan(**options):
    transformer, vae = wan_transformer(), wan_vae()
    config = UMT5Config(vocab_size=16, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    scheduler = UniPCMultistepScheduler(
        **{"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, **options}
    )
    return WanPipeline(words(), UMT5EncoderModel(config).eval(), vae, scheduler, transformer)


def make_wan_image_to_video(expand_timesteps=False):
    """As Wan 2.1, with an image encoder; or with `expand_timesteps` as 2.2 TI2V 5B."""
    parts = make_wan().components
    del parts["transformer_2"]
    if expand_timesteps:
        channels = dict(in_channels=12, out_channels=12)
        parts["vae"] = wan_vae(is_residual=True, patch_size=2, scale_factor_spatial=8, **channels)
    parts["vae"].encoder.conv_out.weight.data *= 30  # what another image changes is far above rounding
    if expand_timesteps:
        return WanImageToVideoPipeline(**parts, expand_timesteps=True)
    parts["transformer"] = wan_transformer(in_channels=12, image_dim=16, added_kv_proj_dim=24)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return WanImageToVideoPipeline(**parts, image_encoder=CLIPVisionModel(config), image_processor=processor)


def make_ltx(vae_options=None, **options):
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=32,
    )
    vae = AutoencoderKLLTXVideo(
        **{
            "latent_channels": 4,
            "block_out_channels": (4, 4),
            "down_block_types": ("LTXVideoDownBlock3D",) * 2,
            "decoder_block_out_channels": (4, 4),
            "layers_per_block": (1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1),
            "spatio_temporal_scaling": (True, True),
            "decoder_spatio_temporal_scaling": (True, True),
            "decoder_inject_noise": (False, False, False),
            "downsample_type": ("conv", "conv"),
            "upsample_residual": (False, False),
            "upsample_factor": (1, 1),
            "patch_size": 2,
            "scaling_factor": 0.8,
            **(vae_options or {}),
        }
    )
    torch.nn.init.uniform_(vae.latents_mean)
    torch.nn.init.uniform_(vae.latents_std, 0.5, 1.0)
    scheduler = FlowMatchEulerDiscreteScheduler(
        **{"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1, **options}
    )
    return LTXPipeline(scheduler, vae, t5(), words(), transformer)
