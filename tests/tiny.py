"""Tiny random models from configs, and inputs for them. No network, no files."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)
from versions import within

VOCAB = 62
PAD = 1
DECODERS = ("gpt2", "llama", "llama-mqa")
ENCODER_DECODERS = ("t5", "t5-deep-encoder", "bart")
EVERY = DECODERS + ENCODER_DECODERS
ARCHITECTURES = ("gpt2", "llama", "t5", "bart")

SPECIAL = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2}


def gpt2(**changes: Any) -> GPT2Config:
    sizes = {"vocab_size": VOCAB, "n_positions": 96, "n_embd": 32, "n_layer": 3, "n_head": 4}
    return GPT2Config(**{**sizes, **SPECIAL, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, **changes})


def llama_sizes(**changes: Any) -> dict[str, Any]:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}
    return {**sizes, **heads, **SPECIAL, **changes}


def t5(**changes: Any) -> T5Config:
    # d_kv × heads ≠ d_model, and few buckets, so that distances within a test fall into many of them.
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 12, "num_heads": 4, "d_ff": 48}
    depths = {"num_layers": 2, "num_decoder_layers": 3}
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
    special = {"pad_token_id": PAD, "eos_token_id": 2, "decoder_start_token_id": 0}
    return T5Config(**{**sizes, **depths, **buckets, **special, "dropout_rate": 0.0, **changes})


def bart(**changes: Any) -> BartConfig:
    sizes = {"vocab_size": VOCAB, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    depths = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 2}
    special = {**SPECIAL, "decoder_start_token_id": 2, "forced_eos_token_id": None, "forced_bos_token_id": None}
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return BartConfig(**{**sizes, **depths, **special, **quiet, "max_position_embeddings": 96, **changes})


BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 98,
    "pad_token_id": PAD,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
WINDOWED = llama_sizes(sliding_window=4, head_dim=8)
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}

MAKERS = {
    "gpt2": lambda **changes: GPT2LMHeadModel(gpt2(**changes)),
    "llama": lambda **changes: LlamaForCausalLM(LlamaConfig(**llama_sizes(**changes))),
    "llama-mqa": lambda **changes: LlamaForCausalLM(LlamaConfig(**llama_sizes(num_key_value_heads=1, **changes))),
    "mistral": lambda **changes: MistralForCausalLM(MistralConfig(**llama_sizes(**{"sliding_window": 4, **changes}))),
    "t5": lambda **changes: T5ForConditionalGeneration(t5(**changes)),
    "t5-deep-encoder": lambda **changes: T5ForConditionalGeneration(
        t5(**{"num_layers": 3, "num_decoder_layers": 2, **changes})
    ),
    "bart": lambda **changes: BartForConditionalGeneration(bart(**changes)),
    "bart-decoder": lambda **changes: BartForCausalLM(bart(encoder_layers=3, is_decoder=True, **changes)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**llama_sizes(head_dim=8))),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**WINDOWED, query_pre_attn_scalar=8)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**WINDOWED, query_pre_attn_scalar=8, layer_types=ALTERNATING)),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**WINDOWED, **EXPERTS)),
    "bert": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**BERT)),
}


def make(name: str, *, seed: int = 0, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """A tiny model in eval mode whose weights are large enough for attention to matter."""
    torch.manual_seed(seed)
    model = MAKERS[name](**changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.set_attn_implementation(attention)
    return model


def encoder(task: str, **changes: Any) -> PreTrainedModel:
    """BERT for ``task``; where BERT is off the attention interface, LayoutLM, whose modules are named alike."""
    name = "LayoutLM" if within("4", "5.0") else "Bert"
    config = getattr(transformers, f"{name}Config")(**BERT, **changes)
    return getattr(transformers, f"{name}For{task}")(config)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, shape, generator=generator)


def inputs(model: PreTrainedModel, batch: int = 2, length: int = 7, targets: int = 5) -> dict[str, torch.Tensor]:
    """Unpadded inputs of a forward."""
    ids = tokens(batch, length)
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    decoder_ids = tokens(batch, targets, seed=2)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": decoder_ids}


def logits(model: PreTrainedModel, **arguments: Any) -> torch.Tensor:
    """Logits without a graph."""
    with torch.no_grad():
        return model(**arguments).logits


def random_flat(width: int, rows: int, seed: int = 3) -> torch.Tensor:
    """A flat prefix whose keys and values are as large as a model's own."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def left_pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as one batch ``(rows, longest)``, with its mask."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return ids, mask
