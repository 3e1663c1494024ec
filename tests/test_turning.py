"""A prefix turned from one position policy to the other gives the same numbers.

The oracles: the model's own logits under the other policy, which no turning has a hand in, and keys that the base
itself makes further on.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import rotary
import tiny
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    OPTConfig,
    OPTForCausalLM,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
)
from versions import since

import prefixkit
from prefixkit import turning
from prefixkit.errors import EngineError
from prefixkit.testing.subject import strengthen

TOKENS = 5
OTHER = {"none": "shift", "shift": "none"}


def under(model, positions, flat=None, tokens=TOKENS):
    """``model`` with this prefix, or with one as large as a model's own keys and values."""
    options = {} if flat is None else {"init": flat}
    prefixkit.apply(model, num_virtual_tokens=tokens, positions=positions, window="slide", **options)
    if flat is None:
        strengthen(model)
    return model


@pytest.mark.parametrize("tokens", [1, 23])
@pytest.mark.parametrize("positions", ["none", "shift"])
@pytest.mark.parametrize("name", rotary.MAKERS)
def test_both_policies_give_the_same_logits(name, positions, tokens):
    model = under(rotary.make(name), positions, tokens=tokens)
    ids, mask = tiny.left_pad([tiny.tokens(6), tiny.tokens(4, seed=2)])
    text, seen = {"input_ids": ids, "attention_mask": mask}, mask.bool()
    if model._prefixkit.attachment.engine.name == "cache":
        text, seen = {"input_ids": ids[:1]}, mask[:1].bool()
    expected, own = tiny.logits(model, **text), turning.turned(model, positions)

    flat = turning.turned(model, OTHER[positions])
    assert torch.equal(tiny.logits(model, **text), expected), "turned() leaves the model as it is"

    under(prefixkit.remove(model), OTHER[positions], own, tokens)
    assert (tiny.logits(model, **text) - expected)[seen].abs().max() > 1e-2, "the policies differ"

    under(prefixkit.remove(model), OTHER[positions], flat, tokens)
    torch.testing.assert_close(tiny.logits(model, **text)[seen], expected[seen], atol=2e-5, rtol=0)
    torch.testing.assert_close(turning.turned(model, positions), own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", rotary.MAKERS)
def test_turned_keys_are_those_of_the_same_text_further_on(name):
    """The base reads the text there itself; layer by layer its states are the same, since only distances count."""
    model, ids = rotary.make(name), tiny.tokens(1, 3)
    with torch.no_grad():
        further = model(ids, position_ids=torch.arange(3, 6)[None], past_key_values=DynamicCache()).past_key_values
    prefixkit.apply(model, num_virtual_tokens=3, positions="none", window="slide", init=prefixkit.TextInit(ids))
    pieces = prefixkit.Layout(prefixkit.sites(model)).split(turning.turned(model, "shift"))
    for layer, piece in zip(further.layers, pieces, strict=True):
        torch.testing.assert_close(piece.key, layer.keys[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(piece.value, layer.values[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", rotary.MAKERS)
def test_every_site_turns_as_its_own_code_does(name):
    model = under(rotary.make(name), "none")
    found = turning.rotations(model)
    assert list(found) == [site.path for site in prefixkit.sites(model)]
    assert [(one.style, one.first, 2 * len(one.angles)) for one in found.values()] == rotary.STYLES[name]


def test_two_rotations_in_one_model():
    slow, fast = (
        turning.rotations(under(rotary.make("gemma3"), "none"))[f"model.layers.{i}.self_attn"] for i in (1, 0)
    )
    assert (slow.angles < fast.angles).sum() == 3, "all but the first pair: the angles of full attention are smaller"
    torch.testing.assert_close(fast.angles, 5 * 10_000.0 ** -(torch.arange(4).double() / 4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "cohere", "gemma3"])
def test_coarse_numbers(name, dtype):
    """The angles are those of the same model in float32."""
    fine, coarse = (under(rotary.make(name).to(of), "none") for of in (torch.float32, dtype))
    for one, other in zip(turning.rotations(fine).values(), turning.rotations(coarse).values(), strict=True):
        assert (one.style, one.first) == (other.style, other.first)
        # A model that is cast has its table of frequencies cast as well.
        torch.testing.assert_close(one.angles, other.angles, rtol=5e-3, atol=0)


def test_float64():
    """The tables are of float32 in every model, and turn no more exactly than that."""
    model = under(rotary.make("llama").double(), "none")
    expected = tiny.logits(model, input_ids=tiny.tokens(1, 6))
    flat = turning.turned(model, "shift")
    found = tiny.logits(under(prefixkit.remove(model), "shift", flat), input_ids=tiny.tokens(1, 6))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama", "dynamic", "gptj"])
def test_looking_leaves_no_trace(name):
    model = under(rotary.make(name), "none").train()
    flags = [module.training for module in model.modules()]
    tables = {key: value.clone() for key, value in model.named_buffers()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    turning.turned(model, "shift")
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, tables[key]) for key, value in model.named_buffers())
    assert prefixkit.config(model).positions == "none"


def opt():
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(vocab_size=tiny.VOCAB, **sizes, word_embed_proj_dim=32, max_position_embeddings=96))


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=tiny.VOCAB, hidden_size=32, n_layer=2, n_head=4))


LEARNED = (
    r"of the 1 rotations that the tables in the model allow, none turns the key that '{}' makes at position 0 into "
    r"that of the same token behind the prefix; the closest is off by \d+%"
)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny.make("gpt2"), LEARNED.format("transformer.h.0.attn")),
        (opt, LEARNED.format("model.decoder.layers.0.self_attn")),
        pytest.param(
            lambda: tiny.make("bert"),
            LEARNED.format("bert.encoder.layer.0.attention.self"),
            marks=since("5.0", "BERT is off the interface"),
        ),
        pytest.param(
            bloom,
            r"its positions are no rotation of keys but a RelativeBias \('transformer'\)",
            marks=since("5.5", "BLOOM has the cache engine only, which refuses positions='none' itself"),
        ),
        (lambda: tiny.make("bart"), r"its positions are no rotation of keys but a PositionTable \('model.encoder'\)"),
    ],
)
def test_other_positions_cannot_be_turned(make, reason):
    model = under(make(), "none")
    message = f"^this model's keys cannot be turned: {reason}; apply the prefix under the policy you need$"
    with pytest.raises(EngineError, match=message):
        turning.turned(model, "shift")


def test_what_is_nearly_a_rotation_is_refused():
    """A rotary module that scales what it turns, more for later tokens."""
    model = rotary.make("llama")
    rotary_module = model.model.rotary_emb
    forward = rotary_module.forward

    def growing(states, position_ids):
        return tuple(part * (1 + 0.01 * position_ids[..., None]) for part in forward(states, position_ids))

    rotary_module.forward = growing
    under(model, "none")
    with pytest.raises(EngineError, match="none turns the key that 'model.layers.0.self_attn' makes at position 0"):
        turning.turned(model, "shift")


def test_a_prefix_in_cross_attention_alone_moves_nothing():
    model = tiny.make("bart")
    prefixkit.apply(model, num_virtual_tokens=TOKENS, positions="none", stacks=["cross"])
    assert torch.equal(turning.turned(model, "shift"), turning.turned(model, "none"))


def t5gemma():
    part = T5GemmaModuleConfig(**tiny.llama_sizes(head_dim=8, sliding_window=4), query_pre_attn_scalar=8)
    torch.manual_seed(0)
    config = T5GemmaConfig(encoder=part, decoder=part, vocab_size=tiny.VOCAB, **tiny.SPECIAL)
    model = T5GemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def encoder_stands_still(model):
    for stack in prefixkit.generic_adapter().stacks(model):
        yield replace(stack, positions=None) if stack.name == "encoder" else stack


@pytest.mark.parametrize("still", [False, True], ids=["both move", "the encoder stands still"])
def test_an_encoder_and_a_decoder(still):
    """A stack whose positions cannot be moved has the same numbers under either policy, so its keys stay."""
    model = t5gemma()
    options = {"num_virtual_tokens": TOKENS}
    if still:
        options["adapter"] = prefixkit.Adapter(model_types=("t5gemma",), stacks=encoder_stands_still)
    inputs = tiny.inputs(model)
    strengthen(prefixkit.apply(model, positions="none", **options))
    expected, own, flat = tiny.logits(model, **inputs), turning.turned(model, "none"), turning.turned(model, "shift")
    prefixkit.apply(prefixkit.remove(model), init=own, **options)
    assert (tiny.logits(model, **inputs) - expected).abs().max() > 1e-2
    prefixkit.apply(prefixkit.remove(model), init=flat, **options)
    torch.testing.assert_close(tiny.logits(model, **inputs), expected, atol=2e-5, rtol=0)
    pieces = [prefixkit.Layout(prefixkit.sites(model)).split(part) for part in (own, flat)]
    stay = {
        site.stack
        for site, one, other in zip(prefixkit.sites(model), *pieces, strict=True)
        if torch.equal(one.key, other.key)
    }
    assert stay == ({"encoder", "cross"} if still else {"cross"})


def test_positions_that_cannot_be_moved_at_all():
    model = tiny.make("llama")
    adapter = prefixkit.Adapter(
        model_types=("llama",),
        stacks=lambda of: (replace(s, positions=None) for s in prefixkit.generic_adapter().stacks(of)),
    )
    prefixkit.apply(model, num_virtual_tokens=TOKENS, adapter=adapter, positions="none")
    with pytest.raises(EngineError, match="^this model's keys cannot be turned: positions of the stack 'model' cannot"):
        turning.turned(model, "shift")
