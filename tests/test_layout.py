"""The layout: flat prefix ⇄ K and V per site, exact both ways, for any shapes."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from hypothesis import given, strategies as st

import prefixkit
from prefixkit import ConfigError, KeyValue, Layout, PluginError, Site

sizes = st.integers(1, 5)


@st.composite
def site_lists(draw):
    count = draw(st.integers(1, 6))
    return [
        Site(
            path=f"layers.{index}",
            stack=draw(st.sampled_from(["encoder", "decoder", "cross"])),
            layer=draw(st.integers(0, 9)),
            kv_heads=draw(sizes),
            key_dim=draw(sizes),
            value_dim=draw(sizes),
        )
        for index in range(count)
    ]


@given(site_lists(), sizes)
def test_split_and_join_are_inverse(sites, rows):
    layout = Layout(sites)
    flat = torch.arange(rows * layout.width, dtype=torch.float64).reshape(rows, layout.width)
    assert torch.equal(layout.join(layout.split(flat)), flat)


@given(site_lists(), sizes)
def test_join_and_split_are_inverse(sites, rows):
    layout = Layout(sites)
    pieces = [
        KeyValue(torch.randn(site.kv_heads, rows, site.key_dim), torch.randn(site.kv_heads, rows, site.value_dim))
        for site in layout.sites
    ]
    for piece, back in zip(pieces, layout.split(layout.join(pieces)), strict=True):
        assert torch.equal(piece.key, back.key)
        assert torch.equal(piece.value, back.value)


@given(site_lists())
def test_order_is_encoder_decoder_cross_each_by_layer(sites):
    order = [(["encoder", "decoder", "cross"].index(site.stack), site.layer) for site in Layout(sites).sites]
    assert order == sorted(order)


def test_split_makes_views():
    layout = Layout([Site(path="a", stack="decoder", layer=0, kv_heads=2, key_dim=3, value_dim=4)])
    flat = torch.zeros(5, layout.width)
    for part in layout.split(flat)[0]:
        part.fill_(1)
    assert flat.eq(1).all()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_uniform_decoder_has_the_interchange_layout(name):
    """Slot 2l is K of layer l, slot 2l + 1 is V, each (kv_heads, head_dim) row-major, as in PEFT."""
    model = tiny.make(name)
    heads = model.config.num_attention_heads if name == "gpt2" else model.config.num_key_value_heads
    layers, dim = 3, 8
    layout = Layout(prefixkit.sites(model))
    assert layout.width == layers * 2 * heads * dim
    flat = torch.randn(5, layout.width)
    slots = flat.view(5, layers * 2, heads, dim).permute(1, 2, 0, 3)
    for layer, piece in enumerate(layout.split(flat)):
        assert torch.equal(piece.key, slots[2 * layer])
        assert torch.equal(piece.value, slots[2 * layer + 1])


def test_errors():
    site = Site(path="a", stack="decoder", layer=0, kv_heads=2, key_dim=3, value_dim=4)
    layout = Layout([site])
    cases = [
        (lambda: Layout([]), PluginError, "the adapter names no site"),
        (lambda: Layout([site, site]), PluginError, "the adapter names these sites twice: a"),
        (
            lambda: layout.split(torch.zeros(5, 13)),
            ConfigError,
            "a flat prefix for this model is (P, 14); got (5, 13)",
        ),
        (lambda: layout.join([]), ConfigError, "1 sites need as many pairs of K and V; got 0"),
        (
            lambda: layout.join([KeyValue(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3))]),
            ConfigError,
            "V of 'a' is (2, P, 4); got (2, 5, 3)",
        ),
        (
            lambda: Site(path="a", stack="middle", layer=0, kv_heads=2, key_dim=3, value_dim=4),
            PluginError,
            "site 'a': stack is 'middle'; possible: encoder, decoder, cross",
        ),
        (
            lambda: Site(path="a", stack="cross", layer=0, kv_heads=0, key_dim=3, value_dim=4),
            PluginError,
            "site 'a': kv_heads is 0; it must be 1 or more",
        ),
    ]
    for action, kind, message in cases:
        with pytest.raises(kind, match=f"^{re.escape(message)}$"):
            action()
