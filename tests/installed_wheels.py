"""Run by ``nox -s wheels``: the installed wheels, and no sources, do a tiny job from apply to load."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import distributions
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import prefixkit
import prefixkit.testing

TARGET = Path(sys.argv[1])
SIZES = {"vocab_size": 40, "num_layers": 2, "num_heads": 2, "d_model": 16, "d_kv": 8, "d_ff": 32}
MODELS = {
    "prefixkit-gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, pad_token_id=1)
    ),
    "prefixkit-t5": lambda: T5ForConditionalGeneration(T5Config(**SIZES, decoder_start_token_id=0)),
    "no plugin": lambda: BertModel(
        BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    ),
}


def job(make, folder):
    """Apply, one step, save; a fresh base with what was saved gives the same."""
    model = make().eval()
    ids = torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    base = model(**inputs)[0]
    prefixkit.apply(model, method="prefix-tuning", num_virtual_tokens=3)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    model(**inputs)[0].square().sum().backward()
    optimizer.step()
    tuned = model(**inputs)[0]
    assert not torch.allclose(tuned, base, atol=1e-4)
    prefixkit.save(model, folder)
    prefixkit.remove(model)
    assert torch.equal(model(**inputs)[0], base)
    prefixkit.load(model, folder)
    torch.testing.assert_close(model(**inputs)[0], tuned, atol=1e-6, rtol=0)


assert TARGET in Path(prefixkit.__file__).parents, f"{prefixkit.__file__} is not what was installed"
plugins = {plugin.distribution: plugin for plugin in prefixkit.plugins()}
ours = {found.name: found for found in distributions(path=[str(TARGET)]) if found.name != "prefixkit"}
assert len(ours) > 6
for name, found in sorted(ours.items()):
    serves_types = found.entry_points.select(group="prefixkit")
    if serves_types:
        assert plugins[name].error is None, plugins[name]
    module = plugins[name].module if serves_types else name.replace("-", "_")
    assert TARGET in Path(importlib.import_module(module).__file__).parents, name
assert (TARGET / "prefixkit/py.typed").is_file()
for name, make in MODELS.items():
    torch.manual_seed(0)
    job(make, name)
    print(f"{name}: applied, trained, saved, removed, loaded")
