"""Attention in two parts against the plain formula in float64, and against the prefix in front of every row's keys."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, strategies as st

import prefixkit
from prefixkit import attention_engine, attention_in_parts as parts
from prefixkit.layout import KeyValue
from prefixkit.widening import additive

SIZES = st.integers(1, 5)


@pytest.fixture
def always(monkeypatch):
    """Two parts at every size; how often they were called."""
    calls = []
    attend = parts.attend

    def counting(*args, **kwargs):
        calls.append(args[0].shape)
        return attend(*args, **kwargs)

    monkeypatch.setattr(parts, "MANY_TOKENS", 0)
    monkeypatch.setattr(parts, "MANY_BYTES", 0)
    monkeypatch.setattr(attention_engine, "attend", counting)
    return calls


def written_out(query, key, value, prefix, hidden, scale):
    """Softmax over the prefix and the own keys of each row, as eager attention has it."""
    batch, heads, _, dim = query.shape
    groups = heads // key.shape[1]
    key = torch.cat([prefix.key.expand(batch, -1, -1, -1), key], dim=2).repeat_interleave(groups, dim=1)
    value = torch.cat([prefix.value.expand(batch, -1, -1, -1), value], dim=2).repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    front = torch.zeros(*hidden.shape[:-1], prefix.key.shape[1], dtype=torch.bool)
    return scores.masked_fill(torch.cat([front, hidden], dim=-1), -torch.inf).softmax(-1) @ value


@given(st.data())
def test_output_and_gradients_are_those_of_one_softmax(data):
    draw = data.draw
    batch, kv_heads, groups, queries, past, tokens = (draw(SIZES) for _ in range(6))
    masked = draw(st.sampled_from(["none", "causal", "by row", "by head", "of all rows"]))
    scale = draw(st.sampled_from([None, 0.3]))
    keys = queries if masked == "causal" else queries + past
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))

    def drawn(*shape):
        return torch.randn(*shape, 8, dtype=torch.float64, generator=generator).requires_grad_()

    query = drawn(batch, kv_heads * groups, queries)
    own = drawn(batch, kv_heads, keys), drawn(batch, kv_heads, keys)
    prefix = KeyValue(drawn(kv_heads, tokens), drawn(kv_heads, tokens))
    hidden, mask = torch.zeros(1, 1, queries, keys, dtype=torch.bool), None
    if masked == "causal":
        hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1)[None, None]
    elif masked != "none":
        heads = kv_heads * groups if masked == "by head" else 1
        rows = 1 if masked == "of all rows" else batch
        hidden = torch.rand(rows, heads, queries, keys, generator=generator) < 0.5
        hidden[0] = True  # a row of padding sees the prefix alone
        mask = additive(~hidden, torch.float64)
    output = parts.attend(query, *own, prefix, mask, causal=masked == "causal", scale=scale)
    expected = written_out(query, *own, prefix, hidden, scale)
    torch.testing.assert_close(output, expected)
    leaves = query, *own, *prefix
    grad = torch.randn(output.shape, dtype=torch.float64, generator=generator)
    theirs = torch.autograd.grad(expected, leaves, grad)
    torch.testing.assert_close(torch.autograd.grad(output, leaves, grad), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hides", [True, False])
def test_masks_of_any_kind_hide_the_same(dtype, hides):
    """Boolean, -inf and the least number; a row that sees nothing of its own is no NaN."""
    seen = torch.tensor([[False, False, not hides], [False, True, True]])[:, None, None]
    kinds = [seen] + [torch.zeros(seen.shape).masked_fill(~seen, low) for low in (-torch.inf, -3e38)]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, n, 8, generator=generator).to(dtype) for n in (1, 3, 3))
    front = KeyValue(*(torch.randn(2, 4, 8, generator=generator).to(dtype) for _ in range(2)))
    expected = written_out(
        *(x.double() for x in (query, key, value)), KeyValue(*map(torch.Tensor.double, front)), ~seen, None
    )
    for mask in kinds:
        output = parts.attend(query, key, value, front, additive(mask, dtype), causal=False, scale=None)
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=4e-7 if dtype == torch.float32 else 2e-2)


def one(tokens, batch, queries, keys):
    query = torch.zeros(batch, 4, queries, 16)
    return parts.pays(tokens, query, torch.zeros(batch, 2, keys, 16))


def test_size_alone_decides():
    assert one(256, 1, 2, 2)
    assert not one(20, 8, 128, 128)  # training with a short prefix
    assert not one(20, 1, 1, 30)  # a step of decoding: one short row
    assert one(1024, 16, 1, 30)
    assert one(20, 8, 1, 2000)  # the rows themselves are long


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 0.1},
        {"softcap": 30.0},
        {"s_aux": torch.zeros(4)},
        {"position_bias": torch.zeros(1, 4, 2, 3)},
    ],
)
def test_what_the_kernel_does_not_know_is_left_to_the_wrapped_function(change):
    query, key = torch.zeros(1, 4, 2, 16), torch.zeros(1, 2, 3, 16)
    assert parts.can_serve(query, key, key, None, {"scaling": 0.2, "sliding_window": 4})
    assert not parts.can_serve(query, key, key, None, change)
    assert not parts.can_serve(query, key, torch.zeros(1, 2, 3, 8), None, {})
    assert not parts.can_serve(query.bfloat16(), key, key, None, {})
    assert not parts.can_serve(query.to("meta"), key.to("meta"), key.to("meta"), None, {})
    assert not parts.can_serve(query, key, key, torch.zeros(1, 1, 2, 3, requires_grad=True), {})
    assert not parts.can_serve(query, key, key, torch.zeros(1, 1, 2, 2), {})


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bart", "bert"])
def test_a_model_gives_the_same_logits_and_gradients(name, always, monkeypatch):
    def run():
        model = prefixkit.apply(tiny.make(name).double(), num_virtual_tokens=3, init="random")
        with torch.no_grad():
            next(model.prefixkit.parameters()).normal_(generator=torch.Generator().manual_seed(0))
        inputs = tiny.inputs(model)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, :2] = 0
        output = model(**inputs)
        output[0].square().mean().backward()
        return output[0].detach(), next(model.prefixkit.parameters()).grad

    logits, grad = run()
    assert always
    always.clear()
    monkeypatch.setattr(parts, "MANY_TOKENS", 1 << 60)
    expected, of_rows = run()
    assert not always
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, of_rows)  # the prefix itself is float32


def test_decoding_gives_the_same_tokens(always, monkeypatch):
    model = prefixkit.apply(tiny.make("llama"), num_virtual_tokens=40, init="random")
    inputs = tiny.inputs(model)
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert any(shape[2] == 1 for shape in always)
    always.clear()
    monkeypatch.setattr(parts, "MANY_TOKENS", 1 << 60)
    monkeypatch.setattr(parts, "MANY_BYTES", 1 << 60)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), tokens)
    assert not always


def test_a_sdpa_of_somebody_elses_is_not_passed_over():
    """The kernel stands in for transformers' own function, and for no other that is registered as sdpa."""
    called = []

    def theirs(module, query, key, value, mask, **kwargs):
        called.append(key.shape[2])
        return query.transpose(1, 2), None

    wrapped = attention_engine.make_attention("sdpa", theirs)
    model = prefixkit.apply(tiny.make("llama"), num_virtual_tokens=300, init="random")
    attention = model.get_submodule(prefixkit.sites(model)[0].path)
    seen = []

    def look(module, args, kwargs):
        seen.append(kwargs["prefix_state"])

    attention.register_forward_pre_hook(look, with_kwargs=True)
    model(**tiny.inputs(model))
    site = prefixkit.sites(model)[0]
    query, key = torch.zeros(1, 4, 2, site.key_dim), torch.zeros(1, site.kv_heads, 2, site.key_dim)
    wrapped(attention, query, key, key, None, prefix_state=seen[0])
    assert called == [302]
