"""The models: random weights from configs, no dropout, so that only shapes matter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
)

Model = TypeVar("Model", bound=torch.nn.Module)


def llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, *, vocab: int = 32000) -> Any:
    """A function that makes the config of a LLaMA of these sizes."""
    return lambda: LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=16384,
    )


def gpt2(hidden: int, layers: int, heads: int, *, vocab: int = 50257) -> Any:
    """The same of a GPT-2."""
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": vocab, "n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": 2048}
    return lambda: GPT2Config(**sizes, **no_dropout)


def t5(hidden: int, layers: int, heads: int, inner: int, *, vocab: int = 32128) -> Any:
    """The same of a T5."""
    sizes = {"vocab_size": vocab, "d_model": hidden, "d_kv": hidden // heads, "d_ff": inner, "num_heads": heads}
    return lambda: T5Config(**sizes, num_layers=layers, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)


SHAPES: dict[str, Callable[[], Any]] = {
    "llama-25m": llama(512, 6, 8, 2, 1376),
    "gpt2-124m": gpt2(768, 12, 12),
    "t5-small": t5(512, 6, 8, 2048),
    # As many layers as real models have, and no wider vocabulary: in eight billion weights logits are a few percent.
    "deep-llama": llama(512, 24, 8, 2, 1376, vocab=4000),
    # So narrow between its layers that what an MLP of the prefix costs stands out.
    "narrow-gpt2": gpt2(512, 12, 8, vocab=1000),
    "llama-1b": llama(2048, 16, 32, 8, 8192, vocab=128256),
    "llama-8b": llama(4096, 32, 32, 8, 14336, vocab=128256),
    "tiny-llama": llama(32, 2, 4, 2, 48, vocab=100),
    "tiny-gpt2": gpt2(32, 2, 4, vocab=100),
    "tiny-t5": t5(32, 2, 2, 48, vocab=100),
}


def make(shape: str, attention: str = "", device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A model with frozen random weights, the same ones at every call."""
    torch.manual_seed(0)
    config = SHAPES[shape]()
    config._attn_implementation = attention or None  # what attn_implementation= of from_pretrained sets
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device(device):
        model: PreTrainedModel = kind.from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def twin(model: Model) -> Model:
    """Another model object with the very same weights in memory."""
    return copy.deepcopy(model, {id(value): value for value in (*model.parameters(), *model.buffers())})
