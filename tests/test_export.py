"""The export file, read with safetensors and nothing else."""

from __future__ import annotations

import json
import os

import pytest
import rotary
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import DynamicCache, GPT2ForSequenceClassification

import prefixkit
from prefixkit.errors import AttachmentError, CheckpointError, ConfigError, EngineError
from prefixkit.testing.subject import strengthen

TOKENS = 5
ROTARY = [name for name in rotary.MAKERS if name not in rotary.SCALED]


def with_prefix(model, **options):
    prefixkit.apply(model, **{"num_virtual_tokens": TOKENS, **options})
    strengthen(model)
    return model


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["prefixkit_export"])


def by_hand(path, batch, dtype=torch.float32):
    """A cache as another program would make it: from the tensors' names alone."""
    tensors, cache = load_file(path), DynamicCache()
    for layer in range(len(tensors) // 2):
        key, value = (tensors[f"decoder.{layer}.{part}"].to(dtype) for part in ("key", "value"))
        cache.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), layer)
    return cache


@pytest.mark.parametrize("method", ["p-tuning-v2", "prefix-tuning"])
@pytest.mark.parametrize("name", tiny.DECODERS)
def test_a_cache_made_by_hand(name, method, tmp_path):
    model = with_prefix(tiny.make(name), method=method)
    ids = tiny.tokens(2, 7)
    expected = tiny.logits(model, input_ids=ids)
    prefixkit.export(model, tmp_path / "prefix.safetensors")
    bare = tiny.make(name)
    found = tiny.logits(bare, input_ids=ids, past_key_values=by_hand(tmp_path / "prefix.safetensors", 2))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("exported", ["shift", "none"])
@pytest.mark.parametrize("trained", ["shift", "none"])
@pytest.mark.parametrize("name", ROTARY)
def test_either_policy(name, trained, exported, tmp_path):
    """The header says where the text starts; a bare model that is told so gives the same logits."""
    model = with_prefix(rotary.make(name), positions=trained, window="slide")
    ids = tiny.tokens(2, 3)  # within the window, since a cache made by hand knows of none
    expected = tiny.logits(model, input_ids=ids)
    path = tmp_path / "prefix.safetensors"
    prefixkit.export(model, path, positions=exported)
    prefixkit.remove(model)

    header = header_of(path)
    start = header["text_starts_at"]["decoder"]
    assert (header["positions"], start) == (exported, {"shift": TOKENS, "none": 0}[exported])
    places = torch.arange(start, start + 3)[None].expand(2, -1)
    found = tiny.logits(model, input_ids=ids, position_ids=places, past_key_values=by_hand(path, 2))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)

    first = {("none", "shift"): TOKENS, ("shift", "none"): -TOKENS}.get((trained, exported), 0)
    for site, (style, dim, dims) in zip(header["sites"], rotary.STYLES[name], strict=True):
        rotation = site["rotation"] or {"style": "", "first_dim": 0, "dims": 0, "angles": []}
        assert (rotation["style"], rotation["first_dim"], rotation["dims"]) == (style, dim, dims)
        assert (len(rotation["angles"]), site["rotated"]) == (dims // 2, bool(style))
        assert site["first_position"] == (first if style else None)


def test_everything_a_header_says(tmp_path):
    model = with_prefix(tiny.make("gemma3"), window="slide", layer_tokens={2: 3})
    model.config.name_or_path = "somewhere/gemma"
    prefixkit.export(model, tmp_path / "p.safetensors", dtype=torch.bfloat16)
    header, tensors = header_of(tmp_path / "p.safetensors"), load_file(tmp_path / "p.safetensors")
    sites = header.pop("sites")
    angles = sites[2]["rotation"].pop("angles")
    assert angles == pytest.approx([TOKENS * 10_000 ** (-pair / 4) for pair in range(4)])
    assert header == {
        "format": 1,
        "model_type": "gemma3_text",
        "base_model_name_or_path": prefixkit.config(model).base_model_name_or_path,
        "num_virtual_tokens": TOKENS,
        "positions": "shift",
        "window": "slide",
        "text_starts_at": {"decoder": TOKENS},
    }
    assert sites[2] == {
        "name": "decoder.2",
        "path": "model.layers.2.self_attn",
        "stack": "decoder",
        "layer": 2,
        "tokens": 3,
        "kv_heads": 2,
        "key_dim": 8,
        "value_dim": 8,
        "window": 4,
        "dtype": "bfloat16",
        "rotated": True,
        "rotation": {"style": "half", "first_dim": 0, "dims": 8},
        "first_position": 2,
    }
    assert [(site["tokens"], site["window"], site["first_position"]) for site in sites] == [
        (5, 4, 0), (5, None, 0), (3, 4, 2)
    ]  # fmt: skip
    assert {name: (value.shape, value.dtype) for name, value in tensors.items()} == {
        f"{site['name']}.{part}": ((2, site["tokens"], 8), torch.bfloat16)
        for site in sites
        for part in ("key", "value")
    }


@pytest.mark.parametrize("name", tiny.ENCODER_DECODERS)
def test_encoder_decoder(name, tmp_path):
    """All three prefixes, each where the layout has it."""
    model = with_prefix(tiny.make(name))
    prefixkit.export(model, tmp_path / "p.safetensors")
    tensors, header = load_file(tmp_path / "p.safetensors"), header_of(tmp_path / "p.safetensors")
    with torch.no_grad():
        pieces = prefixkit.Layout(prefixkit.sites(model)).split(model.prefixkit.default())
    assert len(tensors) == 2 * len(pieces)
    for site, piece in zip(prefixkit.sites(model), pieces, strict=True):
        assert torch.equal(tensors[f"{site.stack}.{site.layer}.key"], piece.key)
        assert torch.equal(tensors[f"{site.stack}.{site.layer}.value"], piece.value)
    assert header["text_starts_at"] == {"encoder": TOKENS, "decoder": TOKENS}
    assert {site["stack"]: site["rotated"] for site in header["sites"]} == {
        "encoder": None,
        "decoder": None,
        "cross": False,
    }


def test_a_prefix_in_cross_attention_alone_moves_no_text(tmp_path):
    prefixkit.export(with_prefix(tiny.make("bart"), stacks=["cross"]), tmp_path / "p", positions="none")
    assert header_of(tmp_path / "p")["text_starts_at"] == {"decoder": 0}


def test_what_a_prefix_of_embeddings_comes_to(tmp_path):
    """Virtual tokens as embeddings are exported as the keys and values that the base makes of them."""
    model = with_prefix(tiny.make("llama"), method="prompt-tuning")
    ids = tiny.tokens(2, 7)
    expected = tiny.logits(model, input_ids=ids)
    prefixkit.export(model, tmp_path / "p")
    prefixkit.remove(model)
    found = tiny.logits(model, input_ids=ids, past_key_values=by_hand(tmp_path / "p", 2))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_no_head_and_nothing_of_the_base(tmp_path):
    model = with_prefix(GPT2ForSequenceClassification(tiny.gpt2(num_labels=3)))
    assert prefixkit.config(model).head == ("score",)
    prefixkit.export(model, tmp_path / "p")
    assert sorted(load_file(tmp_path / "p")) == sorted(
        f"decoder.{i}.{part}" for i in range(3) for part in ("key", "value")
    )


def test_the_model_is_as_it_was(tmp_path):
    model = with_prefix(rotary.make("dynamic"), positions="none").train()
    before = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    prefixkit.export(model, tmp_path / "p", positions="shift")
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(module.training for module in model.modules())


def test_a_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    model, path = with_prefix(tiny.make("gpt2")), tmp_path / "deep" / "p.safetensors"
    prefixkit.export(model, path)
    old = path.read_bytes()
    strengthen(prefixkit.apply(prefixkit.remove(model), num_virtual_tokens=3))
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prefixkit.export(model, path)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_refusals(tmp_path):
    says = "an export holds keys and values only, and this prefix has {}; use prefixkit.save"
    cases = [
        ("llama", {"gate": True, "positions": "none"}, {}, says.format("a gate, or no keys and values")),
        (
            "llama",
            {"method": "prefix-memory", "positions": "none", "num_virtual_tokens": 1},
            {},
            says.format("a gate, or no keys and values"),
        ),
        ("llama", {"infix": True}, {}, says.format("an infix")),
        ("gpt2", {}, {"positions": "none"}, "this model's keys cannot be turned: of the 1 rotations that"),
        ("t5", {"stacks": ["decoder"], "engine": "cache"}, {"positions": "none"}, "this model's keys cannot be turned"),
    ]
    for name, options, arguments, message in cases:
        model = prefixkit.apply(tiny.make(name), **{"num_virtual_tokens": 4, **options})
        with pytest.raises(EngineError, match=f"^{message}"):
            prefixkit.export(model, tmp_path / "p", **arguments)
    model = prefixkit.apply(tiny.make("gpt2"), num_virtual_tokens=4)
    wrong = [
        (
            {"positions": "shfit"},
            ConfigError,
            r"positions is 'shfit' \(did you mean 'shift'\?\); possible: shift, none",
        ),
        ({"dtype": torch.int8}, ConfigError, "dtype is torch.int8; keys and values are floating numbers"),
    ]
    for arguments, error, message in wrong:
        with pytest.raises(error, match=f"^{message}$"):
            prefixkit.export(model, tmp_path / "p", **arguments)
    with pytest.raises(CheckpointError, match=r"^cannot export to '.*': it is a folder; name a file$"):
        prefixkit.export(model, tmp_path)
    with pytest.raises(AttachmentError, match="^this GPT2LMHeadModel has no prefix"):
        prefixkit.export(tiny.make("gpt2"), tmp_path / "p")
    assert not list(tmp_path.iterdir())
