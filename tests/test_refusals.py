"""Modes that cannot be right end in a clear error; that all others are right is the conformance kit's matter."""

from __future__ import annotations

from dataclasses import replace

import bert_adapter
import prefixkit_llama
import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, EncoderDecoderCache

import prefixkit
from prefixkit.testing.subject import enable_checkpointing

TOKENS = 5


def with_prefix(name, engine="attention", **options):
    model = tiny.make(name, **options.pop("changes", {}))
    return prefixkit.apply(model, num_virtual_tokens=TOKENS, engine=engine, **options)


CHECKPOINTING = {
    "attention": "reentrant gradient checkpointing does not train every prefix (the graph of an MLP is gone when the "
    "second layer is recomputed); enable checkpointing with its keyword arguments set to {'use_reentrant': False}",
    "cache": "the cache engine cannot train under gradient checkpointing; use engine='attention'",
}


@pytest.mark.parametrize("engine", ["attention", "cache"])
def test_checkpointing(engine):
    model = with_prefix("gpt2", engine).train()
    enable_checkpointing(model, reentrant=True)
    with pytest.raises(prefixkit.EngineError) as error:
        model(**tiny.inputs(model))
    assert str(error.value) == CHECKPOINTING[engine]
    model.eval()
    model(**tiny.inputs(model))


def test_packed_rows_through_the_cache():
    model = with_prefix("gpt2", "cache")
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    message = (
        "^position_ids do not go on where the cache ends, as in packed rows; the cache engine cannot serve that; "
        "use engine='attention'$"
    )
    with pytest.raises(prefixkit.EngineError, match=message):
        model(input_ids=tiny.tokens(1, 5), position_ids=positions, use_cache=False)


def test_padding_under_a_window_through_the_cache():
    model = with_prefix("mistral", "cache", window="slide")
    ids, mask = tiny.left_pad([tiny.tokens(3), tiny.tokens(9)])
    message = "^the cache engine cannot pad rows under a sliding window; use engine='attention'$"
    with pytest.raises(prefixkit.EngineError, match=message):
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart-decoder"])
def test_several_turns_through_the_cache(name):
    """generate would take the virtual tokens in the cache for tokens of the text."""
    model = with_prefix(name, "cache")
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    out = model.generate(tiny.tokens(1, 6), return_dict_in_generate=True, **settings)
    second = torch.cat([out.sequences, tiny.tokens(1, 9, seed=9)], dim=1)
    message = (
        r"^a cache that holds a prefix, from generate\(\) or to_cache\(\), cannot start generate\(\) with the cache "
        r"engine, since generate\(\) counts its virtual tokens as text; use engine='attention'$"
    )
    with pytest.raises(prefixkit.EngineError, match=message):
        model.generate(second, past_key_values=out.past_key_values, **settings)
    fresh = model.generate(second, past_key_values=DynamicCache(config=model.config), **settings)
    assert torch.equal(fresh, model.generate(second, **settings))


def test_a_native_cache_starts_generate_of_the_bare_model():
    model = with_prefix("llama", "cache")
    ids, settings = tiny.tokens(1, 6), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    # generate() takes the tokens that the cache holds for read.
    read = torch.cat([torch.full((1, TOKENS), 3), ids], dim=1)
    cache = prefixkit.to_cache(model)
    with prefixkit.disabled(model):
        found = model.generate(read, past_key_values=cache, **settings)
    assert torch.equal(found[:, TOKENS:], expected)


def test_parts_of_a_prefix_are_not_saved(tmp_path):
    """FSDP1 leaves each process a flat part of every parameter, outside of its own calls."""
    model = with_prefix("gpt2")
    weight = model.prefixkit.default.embedding.weight
    weight.data = weight.data.reshape(-1)[:480]
    message = (
        r"^'embedding.weight' is \(480,\) of \(5, 192\): this process holds a part only, as under FSDP1 "
        r"\(FullyShardedDataParallel\); use fully_shard \(FSDP2\), or do this inside "
    )
    with pytest.raises(prefixkit.CheckpointError, match=message):
        prefixkit.save(model, tmp_path)
    with pytest.raises(prefixkit.CheckpointError, match=message):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(prefixkit.EngineError, match=message):
        prefixkit.to_cache(model)


@pytest.mark.parametrize("engine", ["attention", "cache"])
def test_positions_past_the_table(engine):
    model = with_prefix("gpt2", engine, changes={"n_positions": 10})
    assert tiny.logits(model, input_ids=tiny.tokens(1, 5)).shape[1] == 5
    message = (
        "^position 10 is past the model's 10 positions, of which the prefix takes 5; "
        "shorten the input or the prefix, or pass positions='none'$"
    )
    with pytest.raises(prefixkit.EngineError, match=message):
        model(input_ids=tiny.tokens(1, 6))
    # Padding takes no position.
    ids, mask = tiny.left_pad([tiny.tokens(5), tiny.tokens(3)])
    wider = torch.cat([torch.full((2, 4), tiny.PAD), ids], dim=1)
    tiny.logits(model, input_ids=wider, attention_mask=torch.cat([torch.zeros(2, 4, dtype=torch.long), mask], dim=1))


def test_heads_that_are_not_what_the_adapter_said():
    """As when a model's heads are spread over devices after ``apply``."""
    model = with_prefix("llama")
    site = prefixkit.sites(model)[0]
    attention = model.get_submodule(site.path)
    for name in ("k_proj", "v_proj"):
        weight = getattr(attention, name).weight
        weight.data = weight.data[: site.key_dim]
    attention.num_key_value_groups = 4
    message = (
        r"^'model.layers.0.self_attn' has 1 heads of keys \(8\) and values \(8\) here, and the prefix 2 of \(8\) and "
        r"\(8\); the adapter is wrong, or the heads are spread over devices \(tensor parallel\) in a way that the "
        r"weights do not show$"
    )
    with pytest.raises(prefixkit.EngineError, match=message):
        model(**tiny.inputs(model))


def test_flash_attention():
    model = with_prefix("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    message = (
        r"^the attention engine cannot wrap the attention implementation 'flash_attention_2'; possible: eager, sdpa, "
        r"flex_attention. Call model.set_attn_implementation\('sdpa'\), or pass engine='cache'$"
    )
    with pytest.raises(prefixkit.EngineError, match=message):
        model(**tiny.inputs(model))


def test_decoder_deeper_than_encoder():
    """transformers sizes T5's caches by the encoder and fails; with a cache that grows, generation works."""
    model = with_prefix("t5")
    ids = tiny.tokens(2, 6)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    found = model.generate(ids, past_key_values=cache, **settings)
    assert torch.equal(found, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("engine", ["auto", "attention"])
def test_attention_off_the_interface(engine):
    """BERT before transformers 5.0, T5 before 5.15: nothing of the prefix would reach the encoder."""
    for name, since in (("bert", "5.0"), ("t5", "5.15")):
        if Version(transformers.__version__) >= Version(since):
            continue
        model = tiny.make(name)
        adapter = bert_adapter.ADAPTER if name == "bert" else None
        message = (
            rf"does not go through transformers' attention interface \(in transformers {transformers.__version__}\)"
        )
        with pytest.raises(prefixkit.EngineError, match=message):
            prefixkit.apply(model, num_virtual_tokens=TOKENS, engine=engine, adapter=adapter)


def test_engine_of_a_decoder_off_the_interface():
    """The cache engine serves T5's decoder and cross-attention in every version."""
    model = tiny.make("t5")
    prefixkit.apply(model, num_virtual_tokens=TOKENS, stacks=("decoder", "cross"))
    old = Version(transformers.__version__) < Version("5.15")
    assert model._prefixkit.attachment.engine.name == ("cache" if old else "attention")


@pytest.mark.parametrize("training", [False, True])
def test_sites_that_never_call_attention_are_refused_at_the_first_call(training):
    right = next(prefixkit_llama.prefixkit_adapters())

    def stacks(model):
        for stack in right.stacks(model):
            wrong = (replace(site, path=site.path.replace("self_attn", "mlp")) for site in stack.sites)
            yield replace(stack, sites=tuple(wrong))

    model = tiny.make("llama").train(training)
    prefixkit.apply(model, num_virtual_tokens=4, adapter=replace(right, stacks=stacks))
    with pytest.raises(
        prefixkit.EngineError, match="^no attention of the stack 'model' asked for its prefix: its adapter names"
    ):
        model(torch.tensor([[3, 4, 5]]))


def test_a_stack_that_swallows_its_cache_is_refused_by_the_cache_engine(monkeypatch):
    """What ``**kwargs`` takes and nobody reads would be a prefix that is lost without a word."""
    model = tiny.make("gpt2")
    forward = model.transformer.forward
    monkeypatch.setattr(
        model.transformer, "forward", lambda input_ids=None, attention_mask=None, **_: forward(input_ids)
    )
    with pytest.raises(prefixkit.EngineError, match="^the stack 'transformer' has no parameter for a native cache"):
        prefixkit.apply(model, num_virtual_tokens=4, engine="cache")
