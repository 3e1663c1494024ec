"""What the comparison says of AdapterHub's prefix tuning; ``nox -s peers`` runs it.

``adapters`` 1.3.0 needs transformers 4.57.6, so it cannot be installed beside what the rest of the suite runs on.
The session lays both over the one torch; without them this module is skipped. Where nothing else is said, attention is
eager, since AdapterHub's mask under SDPA is wrong (the second test).
"""

from __future__ import annotations

from dataclasses import fields
from importlib.metadata import requires

import pytest
import tiny
import torch
from transformers import BertConfig, BertForTokenClassification

import prefixkit

adapters = pytest.importorskip("adapters", reason="adapters needs a transformers of its own: nox -s peers")

TOKENS = 5
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning")


def with_prefixes(model, *names, **options):
    """Prefixes of AdapterHub, the first of them active; flat, unless said otherwise."""
    adapters.init(model)
    torch.manual_seed(3)
    settings = {"flat": True, "prefix_length": TOKENS, "dropout": 0.0, **options}
    names = names or ("mine",)
    for name in names:
        model.add_adapter(name, config=adapters.PrefixTuningConfig(**settings))
    model.train_adapter(names[0])
    return model.eval()


def eager(name, **changes):
    return tiny.make(name, attention="eager", **changes)


def trained(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def tagger():
    torch.manual_seed(0)
    return BertForTokenClassification(BertConfig(**tiny.BERT, num_labels=3)).eval()


def everything(ids):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_it_needs_transformers_4():
    assert any(line.replace(" ", "").startswith("transformers~=4.57") for line in requires("adapters"))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sdpa_is_not_eager(name):
    ids = tiny.tokens(2, 7)
    bare = [tiny.logits(tiny.make(name, attention=attention), input_ids=ids) for attention in ("eager", "sdpa")]
    torch.testing.assert_close(*bare, atol=1e-4, rtol=1e-4)
    one, other = (
        tiny.logits(with_prefixes(tiny.make(name, attention=attention)), input_ids=ids)
        for attention in ("eager", "sdpa")
    )
    assert (one - other).abs().max() > 0.5


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_unpadded_forward_is_prefixkits_without_moved_positions(name):
    """Under a sliding window too, where the prefix stays in sight."""
    model, ours = with_prefixes(eager(name)), eager(name)
    (flat,) = trained(model).values()
    rows = flat.detach().view(TOKENS, -1)
    prefixkit.apply(ours, num_virtual_tokens=TOKENS, init=rows, positions="none", window="pinned")
    ids = tiny.tokens(2, 12)
    found, expected = (tiny.logits(each, input_ids=ids) for each in (model, ours))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_forward_of_padded_rows_is_wrong(name):
    rows = [tiny.tokens(3), tiny.tokens(9, seed=5)]
    ids, mask = tiny.left_pad(rows)
    model = with_prefixes(eager(name))
    padded = tiny.logits(model, input_ids=ids, attention_mask=mask)[0, 6:]
    assert (padded - tiny.logits(model, **everything(rows[0][None]))[0]).abs().max() > 0.5


def test_generate_of_padded_rows_is_right_on_gpt2():
    rows = [tiny.tokens(3), tiny.tokens(9, seed=5)]
    ids, mask = tiny.left_pad(rows)
    model = with_prefixes(eager("gpt2"))
    settings = {"max_new_tokens": 8, **GREEDY}
    padded = model.generate(input_ids=ids, attention_mask=mask, **settings)[0, 9:]
    assert torch.equal(padded, model.generate(**everything(rows[0][None]), **settings)[0, 3:])


@pytest.mark.parametrize(("name", "right"), [("gpt2", True), ("bart", True), ("llama", False), ("mistral", False)])
def test_generate_reads_its_cache_on_some_models(name, right):
    """LLaMA and Mistral hand ``past_key_values`` on under the name of an older transformers."""
    changes = {"encoder_attention_heads": 2} if name == "bart" else {}
    for model, expected in ((eager(name, **changes), True), (with_prefixes(eager(name, **changes)), right)):
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD}
        inputs = everything(tiny.tokens(2, 7))
        one, other = (model.generate(**inputs, use_cache=cache, **settings) for cache in (True, False))
        assert torch.equal(one, other) == expected


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"cache_implementation": "static"}])
def test_beams_and_static_caches_are_right_on_gpt2(way):
    model = with_prefixes(eager("gpt2"))
    inputs = {**everything(tiny.tokens(2, 4)), "max_new_tokens": 6, **GREEDY}
    beams = {"num_beams": way.get("num_beams", 1)}
    assert torch.equal(model.generate(**inputs, **way), model.generate(**inputs, **beams, use_cache=False))


def test_a_second_turn_on_the_cache_is_right_on_gpt2():
    model = with_prefixes(eager("gpt2"))
    first = model.generate(**everything(tiny.tokens(1, 4)), max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    text = {**everything(torch.cat([first.sequences, tiny.tokens(1, 3, seed=9)], dim=1)), "max_new_tokens": 6}
    again = model.generate(**text, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(again, model.generate(**text, **GREEDY))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_checkpointing_gives_equal_gradients(name):
    found = []
    for checkpointing in (False, True):
        model = with_prefixes(eager(name)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = tiny.tokens(2, 7)
        model(**everything(ids), labels=ids).loss.backward()
        found.append(next(iter(trained(model).values())).grad)
    assert found[0].any()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_packed_rows_are_right_with_eager_attention(name, attention):
    rows = [tiny.tokens(4), tiny.tokens(6, seed=7)]
    packed = torch.cat(rows)[None]
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    model = with_prefixes(tiny.make(name, attention=attention))
    apart = torch.cat([tiny.logits(model, input_ids=row[None]) for row in rows], dim=1)
    found = tiny.logits(model, input_ids=packed, position_ids=places, use_cache=False)
    assert ((found - apart).abs().max() < 1e-4) == (attention == "eager")


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_has_three_prefixes(name):
    changes = {"num_layers": 3, "num_decoder_layers": 3, "d_kv": 8}
    if name == "bart":
        changes = {"encoder_attention_heads": 2}
    model = with_prefixes(eager(name, **changes))
    inputs = tiny.inputs(model)
    model(**inputs, labels=inputs["decoder_input_ids"]).loss.backward()
    parts = trained(model)
    assert {path.split(".")[-2] for path in parts} == {"encoder_prefix", "self_prefix", "cross_prefix"}
    assert all(value.grad.view(TOKENS, -1, 2, 32).any(0).any(1).any(1).all() for value in parts.values())


def test_a_head_of_token_classification_is_saved_and_loaded(tmp_path):
    model = with_prefixes(tagger())
    torch.nn.init.normal_(model.classifier.weight)
    assert model.classifier.weight.requires_grad
    model.save_adapter(tmp_path, "mine")
    again = tagger()
    adapters.init(again)
    again.load_adapter(str(tmp_path), set_active=True)
    inputs = everything(tiny.tokens(2, 7))
    assert torch.equal(tiny.logits(again, **inputs), tiny.logits(model, **inputs))


def test_no_start_but_random_numbers():
    names = {field.name for field in fields(adapters.PrefixTuningConfig)}
    assert {name for name in names if "init" in name} == {"init_weights_seed"}


@pytest.mark.parametrize("flat", [True, False])
def test_files_are_pickles_read_without_running_code(tmp_path, flat, monkeypatch):
    """Safetensors are refused, since modules share tensors."""
    model = with_prefixes(tiny.make("gpt2"), flat=flat)
    model.save_adapter(tmp_path / "pickled", "mine")
    assert "pytorch_adapter.bin" in {file.name for file in (tmp_path / "pickled").iterdir()}
    with pytest.raises(RuntimeError, match="share memory"):
        model.save_adapter(tmp_path / "safe", "mine", use_safetensors=True)
    asked = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **settings: asked.append(settings) or load(*args, **settings))
    again = tiny.make("gpt2")
    adapters.init(again)
    again.load_adapter(str(tmp_path / "pickled"))
    assert asked
    assert all(settings["weights_only"] for settings in asked)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_beside_the_prefix_stands_the_language_models_head(tmp_path, name):
    with_prefixes(tiny.make(name)).save_adapter(tmp_path, "mine")
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    numbers = sum(site.width for site in prefixkit.sites(tiny.make(name))) * TOKENS
    assert 4 * numbers < sizes["pytorch_adapter.bin"] < 4 * numbers + 4000
    assert sizes["pytorch_model_head.bin"] > 4 * tiny.VOCAB * 32


def test_an_mlp_is_saved_and_goes_on_training(tmp_path):
    model = with_prefixes(tiny.make("gpt2"), flat=False, bottleneck_size=16)
    model.save_adapter(tmp_path, "mine")
    again = tiny.make("gpt2")
    adapters.init(again)
    again.load_adapter(str(tmp_path))
    again.train_adapter("mine")
    assert trained(again).keys() == trained(model).keys()
    assert all(torch.equal(value, trained(model)[name]) for name, value in trained(again).items())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_folding_fails_where_heads_of_keys_are_shared(name):
    model = with_prefixes(eager(name), flat=False, bottleneck_size=16)
    inputs = everything(tiny.tokens(2, 4))
    expected = tiny.logits(model, **inputs)
    if name == "llama":
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            model.eject_prefix_tuning("mine")
    else:
        model.eject_prefix_tuning("mine")
        torch.testing.assert_close(tiny.logits(model, **inputs), expected)


@pytest.mark.parametrize("generate", [False, True])
def test_rows_with_prefixes_of_their_own(generate):
    model = with_prefixes(eager("gpt2"), "one", "other")
    inputs = everything(tiny.tokens(2, 7))

    def found(setup):
        model.set_active_adapters(setup)
        return model.generate(**inputs, max_new_tokens=5, **GREEDY) if generate else tiny.logits(model, **inputs)

    alone = found("one")[0], found("other")[1]
    both = found(adapters.composition.BatchSplit("one", "other", batch_sizes=[1, 1]))
    torch.testing.assert_close(both[0], alone[0])
    torch.testing.assert_close(both[1], alone[1])
