# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Tiny random text encoders and tokenizers, of which tiny pipelines are made."""

import torch
from conftest import make_text_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from rdm_trl.demo import DEMO_PIPELINE


def clip(seed: int = 0):
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_PIPELINE, subfolder="tokenizer")
    return CLIPTextModelWithProjection(make_text_config(tokenizer)).eval(), tokenizer


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, in place of SentencePiece's."""
    names = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "bag", "dress", "coat", "tench"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    tokenizer.chat_template = "a photo {{ messages[0]['content'] }}"
    return tokenizer


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=16, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def gemma() -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Gemma2Model(config).eval()


def qwen(model_class, config_class, num_layers: int):
    config = config_class(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return model_class(config).eval()
