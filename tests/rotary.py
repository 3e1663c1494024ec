"""Tiny rotary models of every style: halves and neighbours, parts of a head, scaled, two at once, layers without."""

from __future__ import annotations

from typing import Any

import tiny
import torch
import transformers
from transformers import (
    CodeGenConfig,
    CodeGenForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

SIZES = {key: value for key, value in tiny.llama_sizes().items() if key != "num_key_value_heads"}
GPTJ = {"vocab_size": tiny.VOCAB, "n_positions": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, **tiny.SPECIAL}
SCALED = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def scaled(kind: str) -> Any:
    rope = {"rope_type": kind, **SCALED[kind]}
    if int(transformers.__version__.split(".")[0]) >= 5:
        return lambda: LlamaForCausalLM(LlamaConfig(**tiny.llama_sizes(rope_parameters={"rope_theta": 1e4, **rope})))
    return lambda: LlamaForCausalLM(LlamaConfig(**tiny.llama_sizes(rope_scaling=rope)))


MAKERS = {
    "llama": tiny.MAKERS["llama"],
    **{kind: scaled(kind) for kind in SCALED},
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, rotary_pct=0.5)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**GPTJ, rotary_dim=4)),
    "codegen": lambda: CodeGenForCausalLM(CodeGenConfig(**GPTJ, n_ctx=96, rotary_dim=4)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**tiny.llama_sizes(), logit_scale=1.0)),
    "gemma3": tiny.MAKERS["gemma3"],
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**tiny.llama_sizes(no_rope_layers=[1, 0, 1]))),
}
if hasattr(transformers, "NanoChatForCausalLM"):  # it turns its keys the other way round
    MAKERS["nanochat"] = lambda: transformers.NanoChatForCausalLM(transformers.NanoChatConfig(**tiny.llama_sizes()))
STYLES = {
    **dict.fromkeys(("llama", *SCALED, "gemma3", "nanochat"), [("half", 0, 8)] * 3),
    "gpt-neox": [("half", 0, 4)] * 3,
    **dict.fromkeys(("gptj", "codegen"), [("interleaved", 0, 4)] * 3),
    "cohere": [("interleaved", 0, 8)] * 3,
    "smollm3": [("half", 0, 8), ("", 0, 0), ("half", 0, 8)],
}
"""What the model's own code does, site by site: the pairs, the first number that turns, and how many do."""


def make(name: str) -> PreTrainedModel:
    """A tiny model in eval mode whose weights are large enough for attention to matter."""
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model
