"""PEFT's files both ways, with PEFT itself as the oracle."""

from __future__ import annotations

import copy
import json
import re

import pytest
import safetensors.torch
import tiny
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from test_checkpoint import assert_same, state
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2ForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import prefixkit
from prefixkit import CheckpointError

TOKENS = 5
OPT = {"ffn_dim": 48, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": 32}
OPT |= {"vocab_size": tiny.VOCAB, "max_position_embeddings": 96, "dropout": 0.0, **tiny.SPECIAL}
DECODERS = {
    "gpt2": lambda: tiny.make("gpt2"),
    "llama": lambda: tiny.make("llama"),
    "llama-mqa": lambda: tiny.make("llama-mqa"),
    "mistral": lambda: tiny.make("mistral"),
    "qwen2": lambda: made(Qwen2ForCausalLM(Qwen2Config(**tiny.llama_sizes()))),
    "opt": lambda: made(OPTForCausalLM(OPTConfig(**OPT))),
}
SEQ2SEQ = {
    "t5": lambda: tiny.make("t5", d_kv=8, num_layers=3),
    "t5-even": lambda: tiny.make("t5", d_kv=8, num_layers=4, num_decoder_layers=4),
    "t5-deep-encoder": lambda: tiny.make("t5-deep-encoder", d_kv=8),
    "bart": lambda: tiny.make("bart", encoder_layers=3, encoder_attention_heads=2),
    "bart-even": lambda: tiny.make("bart", encoder_attention_heads=2, decoder_layers=2),
}
TASKS = {
    "bert-sentences": (lambda: made(BertForSequenceClassification(bert())), "SEQ_CLS"),
    "bert-tokens": (lambda: made(BertForTokenClassification(bert())), "TOKEN_CLS"),
    "bert-answers": (lambda: made(BertForQuestionAnswering(BertConfig(**tiny.BERT))), "QUESTION_ANS"),
    "bert-words": (lambda: tiny.make("bert"), "FEATURE_EXTRACTION"),
    "bert-body": (lambda: made(BertModel(bert())), "FEATURE_EXTRACTION"),
    "roberta-sentences": (
        lambda: made(RobertaForSequenceClassification(RobertaConfig(**tiny.BERT, num_labels=3))),
        "SEQ_CLS",
    ),
    "gpt2-sentences": (lambda: made(GPT2ForSequenceClassification(tiny.gpt2(num_labels=3))), "SEQ_CLS"),
}
EVERY = {
    **{name: (make, "CAUSAL_LM") for name, make in DECODERS.items()},
    **{name: (make, "SEQ_2_SEQ_LM") for name, make in SEQ2SEQ.items()},
    **TASKS,
}
KINDS = ("flat", "projection", "cartridge")
# PEFT calls what transformers deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore:Could not find a config file:UserWarning"
)


def bert():
    return BertConfig(**tiny.BERT, num_labels=3)


def made(model):
    """The same weights on every call, large enough for attention to matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=generator)
    return model.eval()


def peft_config(kind, task):
    if kind == "cartridge":
        return CartridgeConfig(task_type=task, num_virtual_tokens=TOKENS, num_frozen_tokens=2)
    projection = {"prefix_projection": True, "encoder_hidden_size": 12} if kind == "projection" else {}
    return PrefixTuningConfig(task_type=task, num_virtual_tokens=TOKENS, **projection)


def trained(name, kind="flat", dtype=torch.float32):
    """A PEFT model whose prefix and head are not what they start from."""
    make, task = EVERY[name]
    model = get_peft_model(make().to(dtype), peft_config(kind, task)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(generator=generator)
        for path, parameter in model.named_parameters():
            if "modules_to_save" in path:
                parameter.normal_(generator=generator)
    return model


def numbers(model, **inputs):
    """All float outputs that both libraries name, in one row."""
    with torch.no_grad():
        output = model(**inputs)
    names = [name for name in ("logits", "start_logits", "end_logits", "last_hidden_state") if name in output]
    assert names
    return torch.cat([output[name].flatten() for name in names])


def assert_equal(found, expected):
    tolerance = {"atol": 2e-6, "rtol": 1e-5} if found.dtype == torch.float32 else {"atol": 0.06, "rtol": 0.02}
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EVERY)
def test_there_and_back(name, kind, dtype, tmp_path):
    """PEFT's folder, loaded here, gives PEFT's logits; saved for PEFT again, PEFT gives them too."""
    peft = trained(name, kind, dtype)
    peft.save_pretrained(tmp_path / "theirs")
    model = EVERY[name][0]().to(dtype)
    inputs = tiny.inputs(model)
    expected = numbers(peft, **inputs)
    assert_different(numbers(model, **inputs), expected)
    assert prefixkit.load(model, tmp_path / "theirs") is model
    assert not any(value.requires_grad for value in model.parameters())
    assert_equal(numbers(model, **inputs), expected)
    config = prefixkit.config(model)
    assert (config.positions, config.window, config.num_virtual_tokens) == ("shift", "slide", TOKENS)
    assert config.num_frozen_tokens == (2 if kind == "cartridge" else 0)
    assert (config.method, config.folded) == (
        ("prefix-tuning", True) if kind == "projection" else ("p-tuning-v2", False)
    )
    prefixkit.save(model, tmp_path / "again", format="peft")
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    back = PeftModel.from_pretrained(EVERY[name][0]().to(dtype), tmp_path / "again").eval()
    assert torch.equal(numbers(back, **inputs), expected)
    assert back.peft_config["default"].peft_type.value == ("CARTRIDGE" if kind == "cartridge" else "PREFIX_TUNING")


def assert_different(found, expected):
    assert found.shape != expected.shape or not torch.allclose(found.float(), expected.float(), atol=1e-3)
