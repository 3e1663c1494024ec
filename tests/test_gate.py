"""A gate that starts shut: the base model bit for bit, and training opens it."""

from __future__ import annotations

import prefixkit_legacy
import prefixkit_llama
import pytest
import test_prefixkit_legacy
import tiny
import torch
from changed_adapters import with_each_site
from versions import since

import prefixkit
from prefixkit.errors import ConfigError, EngineError
from prefixkit.testing.recording import uncompiled
from prefixkit.testing.subject import enable_checkpointing

DOORS = {"num_virtual_tokens": 4, "positions": "none", "gate": True}


def inputs_of(architecture):
    ids = tiny.tokens(2, 7)
    if architecture in tiny.ENCODER_DECODERS:
        return {"input_ids": ids, "decoder_input_ids": tiny.tokens(2, 5)}
    return {"input_ids": ids}


def outputs(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


BERT = pytest.param("bert", marks=since("5.0", "it is not on the interface"))


@pytest.mark.parametrize("method", ["p-tuning-v2", "prefix-tuning"])
@pytest.mark.parametrize("architecture", [*tiny.EVERY, BERT, "qwen3"])
def test_a_shut_gate_is_the_base(architecture, method):
    model, inputs = tiny.make(architecture).eval().requires_grad_(False), inputs_of(architecture)
    base = outputs(model, inputs)
    prefixkit.apply(model, method, **DOORS)
    assert torch.equal(outputs(model, inputs), base)


def test_training_opens_the_gate_and_then_the_prefix_moves():
    model = prefixkit.apply(tiny.make("llama"), **DOORS)
    encoder = model.prefixkit.default
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1.0)
    before = encoder.embedding.weight.clone()
    for step in range(2):
        optimizer.zero_grad()
        ids = tiny.tokens(2, 7)
        model(input_ids=ids, labels=ids).loss.backward()
        assert (encoder.gate.grad != 0).all()
        assert (encoder.embedding.weight.grad.abs().sum() > 0) == (step > 0)
        optimizer.step()
    assert not torch.equal(encoder.embedding.weight, before)


def test_an_open_gate_against_float64_written_out():
    """Attention of the last layer of a LLaMA with two query heads for each head of keys."""
    torch.manual_seed(0)
    model = tiny.make("llama").double().eval()
    flat = torch.randn(4, sum(site.width for site in prefixkit.sites(model)))
    prefixkit.apply(model, init=flat, **DOORS)
    gate = torch.randn(len(model.prefixkit.default.gate)).double()
    module = model.model.layers[-1].self_attn
    seen = []
    module.register_forward_hook(lambda *call: seen.append(call[1:]), with_kwargs=True)
    with torch.no_grad():
        model.prefixkit.default.double().gate.copy_(gate)
        model(input_ids=tiny.tokens(1, 6))
    _, options, (found, _) = seen[0]
    states, (cos, sin) = options["hidden_states"], options["position_embeddings"]
    query, key, value = (
        one(states)[0].view(6, -1, 8).transpose(0, 1) for one in (module.q_proj, module.k_proj, module.v_proj)
    )

    def turned(part):
        half = torch.cat([-part[..., 4:], part[..., :4]], dim=-1)
        return part * cos[0] + half * sin[0]

    own_key, own_value = (half.view(4, 2, 8).transpose(0, 1) for half in flat.double()[:, -32:].chunk(2, 1))
    query, key = turned(query), turned(key)
    hidden = torch.full((6, 6), float("-inf"), dtype=torch.double).triu(1)
    heads = []
    for head in range(4):
        group = head // 2
        plain = (query[head] @ key[group].T / 8**0.5 + hidden).softmax(-1) @ value[group]
        prefix = (query[head] @ own_key[group].T / 8**0.5).softmax(-1) @ own_value[group]
        heads.append(plain + gate[-2:].tanh()[group] * prefix)
    expected = module.o_proj(torch.stack(heads, dim=1).flatten(1))
    torch.testing.assert_close(found[0], expected, atol=1e-9, rtol=1e-7)


def opened(architecture="llama", **options):
    model = prefixkit.apply(tiny.make(architecture).eval(), **{**DOORS, **options})
    with torch.no_grad():
        model.prefixkit.default.gate.normal_()
    return model


def test_saved_folded_and_loaded_it_is_the_same(tmp_path):
    model, inputs = opened(method="prefix-tuning"), inputs_of("llama")
    expected = outputs(model, inputs)
    prefixkit.fold(model)
    torch.testing.assert_close(outputs(model, inputs), expected)
    prefixkit.save(model, tmp_path)
    again = prefixkit.load(tiny.make("llama").eval(), tmp_path)
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))
    assert prefixkit.config(again).gate


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bart"])
def test_generation_is_recomputation(architecture):
    model, ids = opened(architecture), tiny.tokens(2, 5)
    made = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    slow = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(made, slow)


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_implementations_agree(implementation):
    ids = tiny.tokens(2, 6)
    model = opened()
    expected = outputs(model, {"input_ids": ids})
    model.set_attn_implementation(implementation)
    with uncompiled():
        torch.testing.assert_close(outputs(model, {"input_ids": ids}), expected, atol=1e-5, rtol=1e-4)


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = opened().train()
        if checkpointing:
            enable_checkpointing(model)
        model(input_ids=tiny.tokens(2, 7)).logits.square().mean().backward()
        gradients.append(model.prefixkit.default.gate.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"positions": "shift"}, ConfigError, "^gate=True starts at the base model, .* pass positions='none'$"),
        ({"window": "slide"}, ConfigError, "use window='pinned'$"),
        ({"engine": "cache"}, EngineError, "^a native cache holds keys and values only, no gate"),
        ({"gate": "yes"}, ConfigError, "^gate is 'yes'; it must be a bool$"),
    ],
)
def test_what_a_gate_cannot_be(options, error, message):
    model = tiny.make("llama")
    with pytest.raises(error, match=message):
        prefixkit.apply(model, **{**DOORS, **options})
    assert not any("prefixkit" in name for name in model.state_dict())


def test_a_gate_leaves_the_library_by_no_cache():
    with pytest.raises(EngineError, match="^a native cache holds keys and values only, no gate"):
        prefixkit.to_cache(opened())


@pytest.mark.skipif(not prefixkit_legacy.transformers_is("5.5"), reason="the cache engine alone serves it here")
def test_attention_off_the_interface_takes_none():
    gptj = test_prefixkit_legacy.TestGPTJ
    with pytest.raises(EngineError, match="not on transformers' attention interface.* gate=True is not served here"):
        prefixkit.apply(gptj().make_model(), adapter=gptj.adapter, **DOORS)


def test_a_shut_gate_in_half_precision():
    """Products of large queries and keys overflow before they are scaled."""
    model = tiny.make("llama").half()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(120)
            layer.self_attn.k_proj.weight.mul_(120)
    ids = tiny.tokens(1, 6)
    base = outputs(model.requires_grad_(False), {"input_ids": ids})
    assert base.isfinite().all()
    prefixkit.apply(model, **DOORS)
    assert torch.equal(outputs(model, {"input_ids": ids}), base)


@pytest.mark.parametrize("options", [DOORS, {"method": "prefix-memory", "num_virtual_tokens": 1}])
def test_heads_that_are_not_the_adapters_are_refused(options):
    """Two heads of keys where the adapter says four, as on a device that has a part of them: broadcasting hides it."""
    right = next(prefixkit_llama.prefixkit_adapters())
    adapter = with_each_site(right, lambda model, site: {"kv_heads": 4, "key_dim": site.key_dim})
    model = prefixkit.apply(tiny.make("llama"), adapter=adapter, init="random", **options)
    with pytest.raises(EngineError, match="has 2 heads of keys .* and the prefix 4 of"):
        model(tiny.tokens(1, 4))
