"""A tiny model of transformers as a GGUF, as llama.cpp's converter (convert_hf_to_gguf.py) makes it of a real one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="a GGUF is read by the package gguf: nox -s llama_cpp")

SPECIAL = 3
"""Ids of the vocabulary that are no words: beginning, unknown, end."""
BLOCK = 32
"""Numbers of a row that are quantised together."""


def rotated_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """``LlamaModel.permute`` of the converter."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def convert(model, path: Path, *, permute: bool | None = None, quantised: str = "") -> Path:
    """Write ``model`` as a GGUF in float32, or with its matrices quantised; ``permute``: as for LLaMA, if not given."""
    config = model.config
    family = config.model_type.removesuffix("_text")
    permute = family == "llama" if permute is None else permute
    writer = gguf.GGUFWriter(path, family)
    _describe(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, value in model.state_dict().items():
        if name.startswith("prefixkit") or (tied and name == "lm_head.weight"):
            continue
        weight = value.float()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            weight = rotated_rows(weight, heads) if permute and part in name else weight
        if family.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + 1
        whole = weight.ndim == 2 and weight.shape[1] % BLOCK == 0
        kind = gguf.GGMLQuantizationType[quantised] if quantised and whole else None
        data = weight.numpy().astype(np.float32)
        data = data if kind is None else gguf.quantize(data, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _describe(writer, config) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(_theta(config))
    if any(kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()):
        writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    words = ["<s>", "<unk>", "</s>", *(f"▁w{index}" for index in range(SPECIAL, config.vocab_size))]
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([3, 2, 3] + [1] * (len(words) - SPECIAL))
    writer.add_bos_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_eos_token_id(2)


def _theta(config) -> float:
    """The base of the rotation, of layers without a window where there are two."""
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    return float(rope.get("full_attention", rope)["rope_theta"])
