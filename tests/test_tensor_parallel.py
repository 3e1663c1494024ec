"""Tensor parallel beyond the conformance kit: plans that leave heads whole, methods, heads, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import spread_jobs
import tiny
import torch
from spread_jobs import COLUMNS, ROWS
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaForSequenceClassification,
    Phi3Config,
    Phi3ForCausalLM,
)
from versions import since

import prefixkit
from prefixkit import tensor_parallel
from prefixkit.errors import EngineError
from prefixkit.testing import workers

bert = since("5.0", "BERT is off the attention interface")
by_plan = since("5.20", "transformers spreads weights invisibly before")

BART = {"q_proj": COLUMNS, "k_proj": COLUMNS, "v_proj": COLUMNS, "out_proj": ROWS}
BERT = {"query": COLUMNS, "key": COLUMNS, "value": COLUMNS, "attention.output.dense": ROWS}
T5 = {".q": COLUMNS, ".k": COLUMNS, ".v": COLUMNS, ".o": ROWS, "relative_attention_bias": COLUMNS}
LLAMA = {"q_proj": COLUMNS, "k_proj": COLUMNS, "v_proj": COLUMNS, "o_proj": ROWS}


def flat_prefix(model, name="default", **options):
    """A prefix with numbers as large as the model's own keys and values."""
    width = sum(site.width for site in prefixkit.sites(model))
    return {"num_virtual_tokens": 4, "name": name, "init": tiny.random_flat(width, 4), **options}


def compare(model, *, plan=None, first="spread", prefixes, inputs=None, tmp_path=None, rows=None, **options):
    """The step of both processes against that of this one."""
    inputs = inputs or tiny.inputs(model)
    if tmp_path is not None:
        model.save_pretrained(tmp_path / "base")
        options["base"] = str(tmp_path / "base")
    found = workers.run(
        spread_jobs.train, model, plan=plan, first=first, prefixes=prefixes, inputs=inputs, rows=rows, **options
    )
    outputs, gradients = spread_jobs.run(spread_jobs.with_prefixes(model, prefixes), inputs, rows)
    for there, their_gradients in found:
        torch.testing.assert_close(there, outputs, atol=1e-5, rtol=1e-5)
        assert their_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            size = float(gradient.abs().max())
            assert size > 0, f"no gradient of {name} to compare"
            torch.testing.assert_close(their_gradients[name], gradient, atol=1e-5 * size, rtol=1e-4)


@pytest.mark.parametrize("first", ["apply", "spread"])
@pytest.mark.parametrize(
    ("name", "plan"), [("bart", BART), pytest.param("bert", BERT, marks=bert), ("t5", T5), ("llama", LLAMA)]
)
def test_heads_that_torch_spreads(name, plan, first):
    model = tiny.make(name)
    compare(model, plan=plan, first=first, prefixes=[flat_prefix(model)])


def phi3():
    torch.manual_seed(0)
    return strong(Phi3ForCausalLM(Phi3Config(**tiny.llama_sizes())))


def deepseek():
    torch.manual_seed(0)
    latents = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    sizes = tiny.llama_sizes(num_key_value_heads=4, first_k_dense_replace=3)
    return strong(DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **latents)))


def strong(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval()


@by_plan
@pytest.mark.parametrize("make", [phi3, deepseek])
def test_plans_that_leave_every_head_everywhere(make, tmp_path):
    """Phi-3 gathers the heads, DeepSeek leaves attention alone: adding up gradients would count them twice."""
    model = make()
    compare(model, prefixes=[flat_prefix(model)], tmp_path=tmp_path)


METHODS = [
    {"method": "prompt-tuning", "init": "random"},
    {"method": "prefix-memory", "num_virtual_tokens": 1, "init": "auto", "positions": "none"},
    {"gate": True, "positions": "none"},
    {"num_frozen_tokens": 2},
    {"layer_tokens": {0: 2}},
]


@by_plan
@pytest.mark.parametrize("options", METHODS, ids=lambda options: next(iter(options.values())))
def test_methods(options, tmp_path):
    model = tiny.make("llama")
    compare(model, prefixes=[flat_prefix(model, **options)], tmp_path=tmp_path)


@by_plan
def test_rows_with_prefixes_of_their_own(tmp_path):
    model = tiny.make("llama")
    prefixes = [flat_prefix(model, name="one"), flat_prefix(model, name="two")]
    compare(model, prefixes=prefixes, rows=["two", None], tmp_path=tmp_path)


@by_plan
def test_a_head_that_trains_with_the_prefix(tmp_path):
    """All of a classifier's states are everywhere, so its head has the whole gradient already."""
    torch.manual_seed(0)
    model = strong(LlamaForSequenceClassification(tiny.make("llama").config))
    compare(model, prefixes=[flat_prefix(model)], tmp_path=tmp_path)


@by_plan
def test_a_head_that_is_spread_itself(tmp_path):
    model = tiny.make("llama")
    folder = tmp_path / "prefix"
    prefixes = [flat_prefix(model, head=["lm_head"])]
    compare(model, prefixes=prefixes, tmp_path=tmp_path, folder=str(folder))
    loaded = prefixkit.load(tiny.make("llama"), folder)
    assert torch.equal(tiny.logits(loaded, **tiny.inputs(model)), tiny.logits(model, **tiny.inputs(model)))


@by_plan
def test_checkpointing(tmp_path):
    model = tiny.make("llama")
    compare(model, prefixes=[flat_prefix(model)], tmp_path=tmp_path, checkpointing=True)


@by_plan
def test_a_model_that_no_plugin_serves(tmp_path):
    """What is watched here would be the heads of one process."""
    model = tiny.make("llama")
    compare(model, prefixes=[flat_prefix(model)], tmp_path=tmp_path, watched=True)


def test_a_cache_of_spread_heads_is_refused():
    model = tiny.make("llama")
    with pytest.raises(EngineError, match="a native cache with the prefix would hold all of them"):
        workers.run(spread_jobs.ask_for_a_cache, model, plan=LLAMA, prefixes=[flat_prefix(model)])


def mesh(size, rank):
    return SimpleNamespace(ndim=1, size=lambda: size, get_local_rank=lambda: rank)


def site(kv_heads):
    return prefixkit.Site(path="layer", stack="decoder", layer=0, kv_heads=kv_heads, key_dim=4, value_dim=4)


@pytest.mark.parametrize(
    ("kv_heads", "here", "size", "expected"),
    [(8, 2, 4, [0, 2, 4, 6]), (2, 1, 2, [0, 1]), (2, 1, 8, [0, 0, 0, 0, 1, 1, 1, 1]), (8, 8, 4, [0, 0, 0, 0])],
)
def test_which_heads_a_process_has(kv_heads, here, size, expected):
    assert [tensor_parallel._first(site(kv_heads), here, mesh(size, rank)) for rank in range(size)] == expected


def test_uneven_heads_are_refused():
    message = "4 processes do not share the 6 heads of 'layer' evenly: this one has 2 of them"
    with pytest.raises(EngineError, match=message):
        tensor_parallel._first(site(6), 2, mesh(4, 0))


def test_what_cannot_be_told_apart_is_refused(monkeypatch):
    """All heads of keys, on weights that are spread: without the queries' heads nobody knows who has what gradient."""
    monkeypatch.setattr(tensor_parallel.placement, "tensor_mesh", lambda module: mesh(2, 0))
    monkeypatch.setattr(tensor_parallel.placement, "is_sharded", lambda value: False)
    key = torch.zeros(1, 2, 3, 4)
    module = nn.Linear(2, 2)
    module.num_key_value_groups = 2
    query = torch.zeros(1, 4, 3, 4)
    assert tensor_parallel.heads_here(module, site(2), key, key, query) is tensor_parallel.ALL
    with pytest.raises(EngineError, match=r"its queries have \? heads here, and by its config and module \[4\] in all"):
        tensor_parallel.heads_here(module, site(2), key, key)
    with torch.no_grad():
        assert tensor_parallel.heads_here(module, site(2), key, key).count == 2
