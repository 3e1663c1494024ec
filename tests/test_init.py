"""What a prefix starts with: the base's own keys and values, or numbers like them."""

from __future__ import annotations

import copy
import logging

import bert_adapter
import prefixkit_bart
import prefixkit_encoders
import prefixkit_gpt2
import prefixkit_llama
import prefixkit_t5
import pytest
import test_prefixkit_encoders
import test_prefixkit_legacy
import test_prefixkit_t5
import tiny
import torch
import trocr_adapter
from architectures.tiny_models import build
from changed_adapters import with_site_forward
from hypothesis import given, strategies as st
from test_checkpoint import assert_same, state
from torch import nn
from transformers import DynamicCache, StaticCache, ViTConfig, ViTForImageClassification
from versions import since

import prefixkit
from prefixkit.errors import ConfigError
from prefixkit.initialisation import start_from
from prefixkit.testing import Subject
from prefixkit.testing.prompt import Policies, PromptOracle
from prefixkit.testing.traits import traits_of

TOKENS = 5
LEGACY = test_prefixkit_legacy


def flat_of(model):
    with torch.no_grad():
        return model._prefixkit.attachment.flat().clone()


# Texts


@pytest.mark.parametrize("method", ["p-tuning-v2", "prefix-tuning"])
@pytest.mark.parametrize("name", [*tiny.DECODERS, "qwen3", "mistral"])
def test_a_prefix_of_a_text_is_that_text_as_a_prompt(name, method):
    """The whole way through apply, against prompt and text read together."""
    model = tiny.make(name)
    prompt, text = tiny.tokens(TOKENS + 3, seed=5), tiny.tokens(2, 7)
    slides = {"window": "slide"} if name == "mistral" else {}
    with torch.no_grad():
        expected = model(torch.cat([prompt[:TOKENS].expand(2, -1), text], dim=1)).logits[:, TOKENS:]
        prefixkit.apply(model, method, num_virtual_tokens=TOKENS, init=prefixkit.TextInit(prompt), **slides)
        torch.testing.assert_close(model(text).logits, expected, atol=1e-4, rtol=1e-4)


SUBJECTS = {
    "gpt2": (next(prefixkit_gpt2.prefixkit_adapters()), lambda: tiny.MAKERS["gpt2"]()),
    "llama": (next(prefixkit_llama.prefixkit_adapters()), lambda: tiny.MAKERS["llama"]()),
    "gemma3": (next(prefixkit_llama.prefixkit_adapters()), lambda: tiny.MAKERS["gemma3"]()),
    "bart": (next(prefixkit_bart.prefixkit_adapters()), lambda: tiny.MAKERS["bart"]()),
    "bloom": (LEGACY.TestBLOOM.adapter, LEGACY.TestBLOOM().make_model),
    "falcon": (LEGACY.TestFalcon.adapter, LEGACY.TestFalcon().make_model),
    "gpt-j": (LEGACY.TestGPTJ.adapter, LEGACY.TestGPTJ().make_model),
    "gpt-j through its cache": (with_site_forward(LEGACY.TestGPTJ.adapter, None), LEGACY.TestGPTJ().make_model),
    "trocr": (trocr_adapter.ADAPTER, lambda: build("causal", "trocr").model),
    "deberta-v2": (
        next(prefixkit_encoders.prefixkit_adapters()),
        lambda: test_prefixkit_encoders.TestDebertaV2().make_model(),
    ),
}
ENCODERS_FROM = {
    "t5": (next(prefixkit_t5.prefixkit_adapters()), lambda: test_prefixkit_t5.TestT5().make_model(), "5.15"),
    "bert": (bert_adapter.ADAPTER, lambda: tiny.MAKERS["bert"](), "5.0"),
    "roberta": (bert_adapter.ADAPTER, lambda: tiny.MAKERS["roberta"](), "5.0"),
}
READ = [
    *(pytest.param(*pair, id=name) for name, pair in SUBJECTS.items()),
    *(
        pytest.param(adapter, make, id=name, marks=since(version, "it is not on the interface"))
        for name, (adapter, make, version) in ENCODERS_FROM.items()
    ),
]


@pytest.mark.parametrize(("adapter", "make"), READ)
def test_what_is_read_is_what_attention_gets(adapter, make):
    """Against the kit's records of the bare model: cross-attention, encoders, attention off the interface."""
    subject = Subject(adapter, make)
    subject.traits = traits_of(subject, accelerated=False)
    oracle = PromptOracle(subject, Policies(encoder=True, shift=True, pinned=True))
    model = subject.bare()
    target = oracle.target if model.config.is_encoder_decoder else None
    before = state(model)
    text = prefixkit.TextInit(oracle.source, target)
    window = {"window": "slide"} if any(site.window for stack in adapter.stacks(model) for site in stack.sites) else {}
    prefixkit.apply(model, num_virtual_tokens=oracle.source.shape[1], adapter=adapter, init=text, **window)
    expected = oracle.flat(prefixkit.sites(model))
    torch.testing.assert_close(flat_of(model), expected, atol=1e-5, rtol=1e-4)
    assert_same(before, state(prefixkit.remove(model)))


@since("5.0", "it is not on the interface")
def test_layers_that_share_a_module_are_read_in_turn():
    model = build("encoder", "albert").model
    prefixkit.apply(model, num_virtual_tokens=TOKENS, init=prefixkit.TextInit(tiny.tokens(TOKENS)))
    first, *others = (pair.key for pair in prefixkit.Layout(prefixkit.sites(model)).split(flat_of(model)))
    assert others
    assert all((first - other).abs().max() > 1e-3 for other in others)


def test_flex_attention_is_not_compiled_for_a_prompt():
    flats = []
    for attention in ("eager", "flex_attention"):
        model = tiny.make("llama", attention=attention)
        prefixkit.apply(model, num_virtual_tokens=TOKENS, init=prefixkit.TextInit(tiny.tokens(TOKENS)))
        assert model.config._attn_implementation == attention
        flats.append(flat_of(model))
    assert torch.equal(*flats)


def test_sites_that_are_left_out_are_not_read():
    ids, whole, part = tiny.tokens(TOKENS), tiny.make("gpt2"), tiny.make("gpt2")
    prefixkit.apply(whole, num_virtual_tokens=TOKENS, init=prefixkit.TextInit(ids))
    prefixkit.apply(part, num_virtual_tokens=TOKENS, init=prefixkit.TextInit(ids.tolist()), layers=[1])
    width = flat_of(part).shape[1]
    assert torch.equal(flat_of(part), flat_of(whole)[:, width : 2 * width])


@given(chunks=st.integers(2, 9), length=st.integers(1, 5), rest=st.integers(0, 4), data=st.data())
def test_chunks_are_whole_and_in_order(chunks, length, rest, data):
    tokens = data.draw(st.integers(1, chunks * length))
    text = torch.arange(chunks * length + min(rest, length - 1))
    taken = prefixkit.ChunksInit(text, length).sample(tokens)
    assert len(taken) == tokens
    starts = taken[::length].tolist()
    assert all(start % length == 0 for start in starts)
    assert starts == sorted(set(starts))
    assert taken.tolist() == [start + step for start in starts for step in range(length)][:tokens]


def test_chunks_are_read_as_one_text():
    text = tiny.tokens(6)
    inits = prefixkit.TextInit(text), prefixkit.ChunksInit(text, 2)  # all three of its chunks
    one, other = (prefixkit.apply(tiny.make("gpt2"), num_virtual_tokens=6, init=init) for init in inits)
    assert torch.equal(flat_of(one), flat_of(other))


# Caches


def cache_of(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=True, past_key_values=DynamicCache(config=model.config)).past_key_values


def test_a_cache_of_a_text_is_that_text():
    model, ids = tiny.make("llama"), tiny.tokens(1, TOKENS)
    cache = cache_of(model, ids)
    prefixkit.apply(model, num_virtual_tokens=TOKENS, init=cache)
    found = flat_of(model)
    prefixkit.apply(prefixkit.remove(model), num_virtual_tokens=TOKENS, init=prefixkit.TextInit(ids))
    torch.testing.assert_close(found, flat_of(model))


def test_what_leaves_as_a_cache_comes_back():
    model = prefixkit.apply(tiny.make("bart"), num_virtual_tokens=TOKENS, stacks=["decoder", "cross"])
    flat, cache = flat_of(model), prefixkit.to_cache(model)
    prefixkit.apply(
        prefixkit.remove(model), num_virtual_tokens=TOKENS, stacks=["decoder", "cross"], init=cache, engine="cache"
    )
    assert torch.equal(flat_of(model), flat)


# Numbers


def test_matched_numbers_have_the_mean_and_spread_of_the_models_own():
    model = tiny.make("gpt2")
    torch.manual_seed(0)
    with torch.no_grad():
        for block in model.transformer.h:  # keys and values with means and spreads that differ
            block.attn.c_attn.bias.normal_(std=10)
            block.attn.c_attn.weight.mul_(torch.logspace(-1, 1, block.attn.c_attn.weight.shape[1]))
    prefixkit.apply(model, num_virtual_tokens=400, init="matched", positions="none")
    found = flat_of(model)
    prefixkit.apply(prefixkit.remove(model), num_virtual_tokens=64, init="tokens", positions="none")
    own = flat_of(model)
    assert (found.mean(0) - own.mean(0)).abs().mean() < 0.2 * own.mean(0).std()
    assert (found.std(0) / own.std(0)).log().abs().mean() < 0.5 * own.std(0).log().std()
    assert (found[0] - found[1]).abs().max() > 0.1


@pytest.mark.parametrize("method", ["p-tuning-v2", "prefix-tuning"])
def test_zeros(method):
    model = prefixkit.apply(tiny.make("t5"), method, num_virtual_tokens=TOKENS, init="zeros")
    assert flat_of(model).abs().max() < 1e-6


def test_random_tokens_follow_the_seed_and_are_ordinary():
    model = tiny.make("gpt2")
    flats = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        prefixkit.apply(model, num_virtual_tokens=TOKENS, init="tokens")
        flats.append(flat_of(model))
        prefixkit.remove(model)
    assert torch.equal(flats[0], flats[1])
    assert not torch.equal(flats[1], flats[2])
    assert not set(tiny.SPECIAL.values()) & set(prefixkit.initialisation.random_ids(model, 1000).tolist())


def test_more_tokens_than_the_model_has_positions():
    """They are read in parts; the model's table has 96 rows."""
    model = prefixkit.apply(tiny.make("gpt2"), num_virtual_tokens=200, init="tokens", positions="none")
    assert flat_of(model).shape[0] == 200


def images():
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return ViTForImageClassification(config)


@since("5.0", "it is not on the interface")
def test_a_model_that_reads_no_text_starts_small():
    model = prefixkit.apply(images(), num_virtual_tokens=TOKENS)
    assert flat_of(model).std() < 0.05
    prefixkit.remove(model)
    before = state(model)
    with pytest.raises(ConfigError, match="reads no tokens; pass init='random', or a flat prefix$"):
        prefixkit.apply(model, num_virtual_tokens=TOKENS, init="tokens")
    assert_same(before, state(model))


@since("5.0", "it is not on the interface")
def test_a_model_that_reads_text_and_images_starts_small():
    """It has no token embeddings to its name, and no forward on tokens alone."""
    model = prefixkit.apply(build("vision", "clip").model, num_virtual_tokens=TOKENS)
    assert flat_of(model).std() < 0.05


def test_a_model_without_weights_starts_small():
    model = prefixkit.apply(tiny.make("llama").to("meta"), num_virtual_tokens=TOKENS)
    assert model.prefixkit.default.embedding.weight.std() < 0.05


def test_loading_reads_nothing(tmp_path, monkeypatch):
    prefixkit.save(prefixkit.apply(tiny.make("gpt2"), num_virtual_tokens=TOKENS), tmp_path)
    model = tiny.make("gpt2")
    monkeypatch.setattr(model.transformer, "forward", model.transformer.h[0].forward)
    prefixkit.load(model, tmp_path)


# Methods


def test_an_mlp_that_is_narrower_than_the_prefix_says_how_near_it_comes(caplog):
    with caplog.at_level(logging.WARNING, "prefixkit"):
        prefixkit.apply(tiny.make("gpt2"), "prefix-tuning", num_virtual_tokens=20, encoder_hidden_size=4, init="tokens")
    assert "relative error 0." in caplog.text


class Scaled(nn.Module):
    """A method's encoder that says nothing of how it starts."""

    def __init__(self, rows, width):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(rows, width))
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self):
        return (self.rows * self.scale).tanh() * 3


def test_a_method_that_says_nothing_is_fitted():
    torch.manual_seed(0)
    encoder, flat = Scaled(6, 40), torch.randn(6, 40) * torch.rand(40)
    start_from(encoder, flat)
    assert (encoder() - flat).norm() < 0.05 * flat.norm()
    assert all(value.grad is None for value in encoder.parameters())


# Frozen tokens


@pytest.mark.parametrize("method", ["p-tuning-v2", "prefix-tuning"])
def test_frozen_tokens_stay(method, tmp_path):
    text = prefixkit.TextInit(tiny.tokens(TOKENS))
    model = prefixkit.apply(tiny.make("gpt2"), method, num_virtual_tokens=TOKENS, init=text, num_frozen_tokens=2)
    before = flat_of(model)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1.0)
    model(tiny.tokens(2, 7)).logits.square().mean().backward()
    optimizer.step()
    after = flat_of(model)
    assert torch.equal(after[:2], before[:2])
    assert (after[2:] != before[2:]).any(dim=1).all()
    prefixkit.save(model, tmp_path)
    again = prefixkit.load(tiny.make("gpt2"), tmp_path, trainable=True)
    assert torch.equal(flat_of(again), after)
    prefixkit.fold(again)
    torch.testing.assert_close(flat_of(again), after)
    copied = copy.deepcopy(again)
    with torch.no_grad():
        copied.prefixkit.default.embedding.weight.zero_()
    assert torch.equal(flat_of(copied)[:2], flat_of(again)[:2])


# Errors


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (prefixkit.TextInit([3, 4]), "^input_ids has 2 tokens, and the prefix needs 5; pass more, or a shorter one$"),
        (prefixkit.TextInit(torch.zeros(2, 9).long()), r"^input_ids is \(2, 9\) of torch.int64; pass token ids"),
        (prefixkit.TextInit(torch.zeros(9)), r"^input_ids is \(9,\) of torch.float32; pass token ids"),
        (prefixkit.TextInit([3, 4, 5, 6, 9999]), "does not run with input_ids .*: IndexError"),
        (prefixkit.ChunksInit([3, 4, 5, 6, 7], 3), "^input_ids has 5 tokens, and the prefix needs 6"),
        (prefixkit.ChunksInit([3, 4], 0), "^chunk_length is 0; it must be a whole number of 1 or more$"),
        (DynamicCache(), "^the cache has no keys and values for 'transformer.h.0.attn'"),
        (
            cache_of(tiny.make("gpt2"), tiny.tokens(1, 4)),
            "^the cache holds 4 tokens, and the prefix num_virtual_tokens=5$",
        ),
        (cache_of(tiny.make("llama"), tiny.tokens(1, 5)), r"^the cache has 2 heads of \(8\) and \(8\) for"),
        ([3, 4], "^init is a list; possible: 'auto'"),
    ],
)
def test_what_cannot_be_started_from(init, message):
    model = tiny.make("gpt2")
    before = state(model)
    with pytest.raises(ConfigError, match=message):
        prefixkit.apply(model, num_virtual_tokens=TOKENS, init=init)
    assert_same(before, state(model))


@pytest.mark.parametrize("count", [-1, 5, 1.0, True])
def test_how_many_can_be_frozen(count):
    with pytest.raises(ConfigError, match="^num_frozen_tokens is .*; of 5 virtual tokens 0 to 4 can be frozen$"):
        prefixkit.apply(tiny.make("gpt2"), num_virtual_tokens=TOKENS, num_frozen_tokens=count)


def test_several_tokens_that_end_a_text():
    """As many configs have them."""
    model = tiny.make("llama", eos_token_id=[2, 3])
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    assert not {2, 3} & set(prefixkit.initialisation.random_ids(model, 1000).tolist())


def test_caches_of_other_kinds_are_refused():
    model = tiny.make("llama")
    static = StaticCache(config=model.config, max_cache_len=TOKENS)
    with torch.no_grad():
        model(tiny.tokens(1, 3), past_key_values=static)
    for cache in (cache_of(model, tiny.tokens(2, TOKENS)), static):
        with pytest.raises(ConfigError, match="^a prefix starts from a dynamic cache of one row"):
            prefixkit.apply(model, num_virtual_tokens=TOKENS, init=cache)


def test_a_cache_whose_window_has_slid_is_refused():
    model = tiny.make("mistral")
    cache = cache_of(model, tiny.tokens(1, 9))
    kept = cache.layers[0].keys.shape[2]
    assert kept < 9
    with pytest.raises(ConfigError, match=f"^the cache has read 9 tokens and keeps {kept} of"):
        prefixkit.apply(model, num_virtual_tokens=kept, init=cache, window="slide")
