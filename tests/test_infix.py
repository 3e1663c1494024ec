"""``[x; PREFIX; y]``: who sees the prefix, where positions move, and where y begins."""

from __future__ import annotations

import prefixkit_legacy
import pytest
import test_prefixkit_legacy
import tiny
import torch
from test_checkpoint import assert_same, state
from transformers import LlamaForSequenceClassification

import prefixkit
from prefixkit.errors import ConfigError, EngineError
from prefixkit.testing.subject import enable_checkpointing

TOKENS = 4
INFIX = {"num_virtual_tokens": TOKENS, "infix": True}


def labelled(x, y):
    """One row: labels for y but for its first token, which is the prompt's last."""
    ids = tiny.tokens(1, x + y)
    labels = ids.clone()
    labels[:, : x + 1] = -100
    return ids, labels


def gpt2_by_hand(model, ids, x, flat):
    """GPT-2 in float64 written out: keys of x, of the infix and of y, which stands TOKENS further."""
    body, length = model.transformer, ids.shape[1]
    places = torch.arange(length) + TOKENS * (torch.arange(length) >= x)
    states = body.wte(ids[0]) + body.wpe(places)
    hidden = torch.full((length, length), float("-inf"), dtype=torch.double).triu(1)
    front = torch.zeros(length, TOKENS, dtype=torch.double)
    front[:x] = float("-inf")
    for layer, block in enumerate(body.h):
        slot = flat.double()[:, layer * 64 : (layer + 1) * 64].view(TOKENS, 2, 4, 8)
        query, key, value = (
            part.view(length, 4, 8).transpose(0, 1) for part in block.attn.c_attn(block.ln_1(states)).split(32, dim=1)
        )
        key = torch.cat([slot[:, 0].transpose(0, 1), key], dim=1)
        value = torch.cat([slot[:, 1].transpose(0, 1), value], dim=1)
        weights = (query @ key.mT / 8**0.5 + torch.cat([front, hidden], dim=1)).softmax(-1)
        states = states + block.attn.c_proj((weights @ value).transpose(0, 1).flatten(1))
        states = states + block.mlp(block.ln_2(states))
    return model.lm_head(body.ln_f(states))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("x", [1, 3, 7])
def test_against_gpt2_written_out(x, attention):
    model = tiny.make("gpt2", attention=attention).double()
    ids, labels = labelled(x, 9 - x)
    flat = torch.randn(TOKENS, 192)
    with torch.no_grad():
        expected = gpt2_by_hand(model, ids, x, flat)
        prefixkit.apply(model, init=flat, **INFIX)
        torch.testing.assert_close(model(ids, labels=labels).logits[0], expected, atol=1e-8, rtol=1e-6)


def applied(name="llama", **options):
    return prefixkit.apply(tiny.make(name), init="tokens", **{**INFIX, **options})


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_generation_is_what_labels_say(name):
    """The first new token is predicted by the last of the prompt, the first of y."""
    model, prompt = applied(name), tiny.tokens(2, 6)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    made = model.generate(prompt, **settings, return_dict_in_generate=True, output_logits=True)
    slow = model.generate(prompt, **settings, use_cache=False)
    assert torch.equal(made.sequences, slow)
    labels = made.sequences.clone()
    labels[:, :6] = -100
    with torch.no_grad():
        whole = model(made.sequences, labels=labels).logits[:, 5:-1]
    torch.testing.assert_close(torch.stack(made.logits, dim=1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_are_the_rows_alone(side):
    model = applied("gpt2")
    rows = [labelled(2, 5), labelled(6, 3)]
    batch = torch.full((3, 2, 9), tiny.PAD)
    batch[1], batch[2] = -100, 0
    for index, (ids, labels) in enumerate(rows):
        place = slice(9 - ids.shape[1], 9) if side == "left" else slice(ids.shape[1])
        batch[:, index, place] = torch.cat([ids, labels, torch.ones_like(ids)])
    with torch.no_grad():
        together = model(batch[0], labels=batch[1], attention_mask=batch[2]).logits
        for index, (ids, labels) in enumerate(rows):
            alone = model(ids, labels=labels).logits[0]
            torch.testing.assert_close(together[index][batch[2, index].bool()], alone, atol=1e-4, rtol=1e-4)


def test_a_text_without_continuation_sees_nothing():
    model, ids = tiny.make("llama").requires_grad_(False), tiny.tokens(1, 6)
    base = model(ids).logits
    applied_model = prefixkit.apply(model, init="tokens", **INFIX)
    found = applied_model(ids, labels=torch.full_like(ids, -100)).logits
    torch.testing.assert_close(found, base, atol=1e-5, rtol=1e-4)


def test_gradients_under_checkpointing():
    gradients = []
    ids, labels = labelled(4, 5)
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = applied().train()
        if checkpointing:
            enable_checkpointing(model)
        model(ids, labels=labels).loss.backward()
        gradients.append(model.prefixkit.default.embedding.weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_saved_and_loaded(tmp_path):
    model = applied()
    ids, labels = labelled(4, 5)
    prefixkit.save(model, tmp_path)
    again = prefixkit.load(tiny.make("llama"), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids, labels=labels).logits, model(ids, labels=labels).logits)
    assert "generate" not in prefixkit.remove(again).__dict__


def test_nothing_says_where_the_continuation_begins():
    model = applied()
    model.generate(tiny.tokens(1, 4), max_new_tokens=2, do_sample=False)
    ids, labels = labelled(4, 5)
    model(ids, labels=labels)
    with pytest.raises(EngineError, match="nothing says where that begins: pass labels.* or call generate()"):
        model(ids)
    with prefixkit.disabled(model):
        model(ids)
    with pytest.raises(EngineError, match="needs a prompt"):
        model.generate(max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("t5", {}, ConfigError, "^infix=True is for models that are a decoder and nothing else.*cross, decoder, enc"),
        ("llama", {"engine": "cache"}, EngineError, "^a native cache cannot hide an infix"),
        ("llama", {"gate": True, "positions": "none"}, ConfigError, "^infix=True goes with neither gate=True"),
        ("mistral", {"window": "slide"}, ConfigError, "nor window='slide'$"),
        ("llama", {"infix": 1}, ConfigError, "^infix is 1; it must be a bool$"),
    ],
)
def test_what_it_does_not_go_with(name, options, error, message):
    model = tiny.make(name)
    before = state(model)
    with pytest.raises(error, match=message):
        prefixkit.apply(model, **{**INFIX, **options})
    assert_same(before, state(model))


def test_an_infix_leaves_by_no_cache():
    with pytest.raises(EngineError, match="^a native cache cannot hide an infix"):
        prefixkit.to_cache(applied())


def test_packed_texts_are_refused():
    model = applied()
    ids, labels = labelled(4, 4)
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(EngineError, match="takes one text in a row; these position_ids begin anew"):
        model(ids, labels=labels, position_ids=places)


def test_a_second_turn_on_a_cache_is_refused():
    model = applied()
    made = model.generate(tiny.tokens(1, 4), max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(EngineError, match="a cache that holds a text cannot start generate"):
        model.generate(made.sequences, past_key_values=made.past_key_values, max_new_tokens=2)


def test_embeddings_for_a_prompt():
    model, ids = applied(), tiny.tokens(1, 5)
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    embedded = model.get_input_embeddings()(ids)
    expected = model.generate(ids, **settings).logits
    for more in ({}, {"input_ids": ids[:, :0]}):
        found = model.generate(inputs_embeds=embedded, **more, **settings).logits
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_nothing_is_left_of_a_call_that_was_stopped():
    """Nor does one model's call say anything to another's."""
    model, other = applied(), applied("gpt2")
    ids, labels = labelled(4, 5)

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[0].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(ids, labels=labels)
    handle.remove()
    for called in (model, other):
        with pytest.raises(EngineError, match="nothing says where that begins"):
            called(ids)
    asked = []

    def ask(*_):
        with pytest.raises(EngineError, match="nothing says where that begins"):
            other(ids)
        asked.append(True)

    model.model.register_forward_pre_hook(ask)
    model(ids, labels=labels)
    assert asked


def test_an_own_generate_is_still_called():
    model = tiny.make("llama")
    model.generate = lambda *args, **options: "own"
    prefixkit.apply(model, **INFIX)
    assert model.generate(tiny.tokens(1, 4)) == "own"
    assert prefixkit.remove(model).generate() == "own"


def test_labels_of_another_task():
    config = tiny.make("llama").config
    model = prefixkit.apply(LlamaForSequenceClassification(config), **INFIX)
    with pytest.raises(EngineError, match=r"^infix=True needs a label for each token; these are \(2,\)$"):
        model(tiny.tokens(2, 5), labels=torch.tensor([0, 1]))


@pytest.mark.skipif(not prefixkit_legacy.transformers_is("5.5"), reason="the cache engine alone serves it here")
def test_off_the_interface_it_is_refused_at_once():
    family = test_prefixkit_legacy.TestGPTJ
    with pytest.raises(EngineError, match="not on transformers' attention interface; infix=True is not served"):
        prefixkit.apply(family().make_model(), adapter=family.adapter, **INFIX)
