"""Ways in which a prefix was once lost, doubled or misplaced without a word."""

from __future__ import annotations

import copy
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from transformers import (
    BartForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
)

import prefixkit

TOKENS = 4


def strong(model, **options):
    prefixkit.apply(model, num_virtual_tokens=TOKENS, **options)
    with torch.no_grad():
        model.prefixkit.default.embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_forwards_in_several_threads(name):
    model = strong(tiny.make(name))
    cases = [tiny.inputs(model, batch=batch, length=length) for batch, length in [(1, 3), (2, 9), (3, 5), (2, 6)] * 6]
    expected = [tiny.logits(model, **case) for case in cases]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda case: tiny.logits(model, **case), cases))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("engine", ["attention", "cache"])
def test_a_failed_forward_leaves_nothing_behind(engine):
    model = tiny.make("bart")
    inputs = tiny.inputs(model)
    base = tiny.logits(model, **inputs)
    strong(model, engine=engine, stacks=["decoder", "cross"])
    for key in ("input_ids", "decoder_input_ids"):
        with pytest.raises(IndexError):
            model(**{**inputs, key: torch.full((2, 7), 10_000)})
        with prefixkit.disabled(model):
            assert torch.equal(tiny.logits(model, **inputs), base)


def test_one_body_takes_one_prefix():
    model = strong(tiny.make("llama"))
    with pytest.raises(prefixkit.AttachmentError, match="^the decoder of this LlamaModel already carries a prefix"):
        prefixkit.apply(model.model, num_virtual_tokens=TOKENS)
    prefixkit.remove(model)
    strong(model.model)
    with pytest.raises(prefixkit.AttachmentError, match="^the decoder of this LlamaForCausalLM already carries"):
        prefixkit.apply(model, num_virtual_tokens=TOKENS)


def test_cross_attention_of_a_decoder_alone():
    """The encoder's keys never end up in the cache of the decoder's own."""
    model = tiny.make("bart", encoder_layers=3, encoder_attention_heads=2)
    decoder = BartForCausalLM(model.config).eval()
    decoder.model.decoder.load_state_dict(model.model.decoder.state_dict())
    arguments = {"input_ids": tiny.tokens(2, 5), "encoder_hidden_states": torch.randn(2, 6, 32)}
    flat = tiny.random_flat(sum(site.width for site in prefixkit.sites(decoder)), TOKENS)
    results = []
    for engine in ("attention", "cache"):
        prefixkit.apply(decoder, num_virtual_tokens=TOKENS, init=flat, engine=engine)
        results.append(tiny.logits(decoder, **arguments))
        cache = EncoderDecoderCache(prefixkit.to_cache(decoder, batch_size=2), DynamicCache())
        prefixkit.remove(decoder)
    results.append(tiny.logits(decoder, **arguments, past_key_values=cache))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=0)


def test_gpt2_with_cross_attention_goes_on_from_its_own_cache():
    states = torch.randn(2, 6, 32)
    ids = tiny.tokens(2, 6)
    results = []
    model = tiny.make("gpt2", add_cross_attention=True)
    flat = tiny.random_flat(sum(site.width for site in prefixkit.sites(model)), TOKENS)
    for engine in ("attention", "cache"):
        prefixkit.apply(model, num_virtual_tokens=TOKENS, init=flat, engine=engine)
        whole = tiny.logits(model, input_ids=ids, encoder_hidden_states=states, use_cache=False)
        first = model(input_ids=ids[:, :4], encoder_hidden_states=states, use_cache=True)
        second = model(input_ids=ids[:, 4:], encoder_hidden_states=states, past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1).detach(), whole, atol=1e-5, rtol=0)
        results.append(whole)
        prefixkit.remove(model)
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


def test_a_cache_that_lost_its_prefix_is_refused():
    model = strong(tiny.make("llama"), engine="cache")
    ids = tiny.tokens(1, 7)
    for spoil, left in ((lambda cache: cache.reset(), 0), (lambda cache: cache.crop(-9), 2)):
        cache = model(input_ids=ids).past_key_values
        spoil(cache)
        if cache.get_seq_length() != left:
            continue  # older transformers: reset() keeps the length, of the base's caches too
        message = f"^the cache passed in was reset or cropped to {left} places and has lost its prefix of 4; start from"
        with pytest.raises(prefixkit.EngineError, match=message):
            model(input_ids=ids, past_key_values=cache)


def test_a_cache_with_another_prefix_is_refused():
    one, other = (strong(tiny.make("llama"), engine="cache") for _ in range(2))
    with torch.no_grad():
        cache = one(input_ids=tiny.tokens(1, 3)).past_key_values
    assert copy.deepcopy(one)(input_ids=tiny.tokens(1, 2), past_key_values=copy.deepcopy(cache)).logits.shape[1] == 2
    with pytest.raises(prefixkit.EngineError, match="^the cache passed in holds another prefix; start from an empty"):
        other(input_ids=tiny.tokens(1, 2), past_key_values=cache)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_no_copies_while_disabled(duplicate):
    model = strong(tiny.make("gpt2"))
    with prefixkit.disabled(model), pytest.raises(prefixkit.AttachmentError, match="^copy or pickle the model outside"):
        duplicate(model)
    duplicate(model)


def test_tied_head_modules_are_swapped_once():
    model = tiny.make("gpt2")
    base = model.lm_head.weight.detach().clone()
    strong(model, head=["lm_head", "transformer.wte"])
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    with prefixkit.disabled(model):
        assert torch.equal(model.lm_head.weight, base)
    assert torch.equal(model.transformer.wte.weight, base + 1.0)
    prefixkit.remove(model)
    assert torch.equal(model.transformer.wte.weight, base)


@pytest.mark.parametrize("name", ["t5-deep-encoder", "bart"])
def test_left_padded_decoder_rows_with_a_static_cache(name):
    model = strong(tiny.make(name))
    source = tiny.tokens(2, 6)
    rows = [tiny.tokens(2, seed=3), tiny.tokens(5, seed=4)]
    ids, mask = tiny.left_pad(rows)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "disable_compile": True}

    def scores(rows, decoder_ids, decoder_mask, **more):
        decoder = {"decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask}
        out = model.generate(input_ids=source[rows], **decoder, **settings, **more)
        return torch.stack(out.logits, dim=1)

    found = scores([0, 1], ids, mask, cache_implementation="static")
    expected = scores([0, 1], ids, mask)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_multiple_choice_input():
    """GPT2DoubleHeadsModel takes (batch, choices, tokens)."""
    torch.manual_seed(0)
    model = GPT2DoubleHeadsModel(tiny.gpt2()).eval()
    ids = tiny.tokens(2, 3, 5)
    for engine in ("attention", "cache"):
        strong(model, engine=engine)
        found = tiny.logits(model, input_ids=ids)
        expected = tiny.logits(model, input_ids=ids.view(6, 1, 5)).view(2, 3, 5, -1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        prefixkit.remove(model)


def test_longrope_is_refused():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
    sizes = tiny.llama_sizes(original_max_position_embeddings=16)
    model = Phi3ForCausalLM(Phi3Config(**sizes, rope_parameters=rope))
    with pytest.raises(prefixkit.UnsupportedModelError, match="^longrope changes its rotation at a length"):
        prefixkit.apply(model, num_virtual_tokens=TOKENS)


def test_save_pretrained_never_replaces_base_weights(tmp_path):
    model = tiny.make("gpt2")
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = strong(GPT2LMHeadModel.from_pretrained(tmp_path))
    message = "holds a model of its own, whose weights save_pretrained would overwrite with the prefix; name another"
    for keep_config in (True, False):
        if not keep_config:
            (tmp_path / "config.json").unlink()
        with pytest.raises(prefixkit.CheckpointError, match=message):
            model.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").read_bytes() == before
    prefixkit.save(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    shutil.rmtree(tmp_path)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)


def test_wrapped_caches_remember_their_prefix():
    model = strong(tiny.make("llama"))
    wrapped = EncoderDecoderCache(prefixkit.to_cache(model), DynamicCache())
    with pytest.raises(prefixkit.EngineError, match="^the cache passed in already holds a prefix"):
        model(input_ids=tiny.tokens(1, 3), past_key_values=wrapped)


def test_overlapping_disabled_blocks():
    model = GPT2ForSequenceClassification(tiny.gpt2()).eval()
    ids = tiny.tokens(2, 5)
    base = tiny.logits(model, input_ids=ids)
    strong(model)
    with torch.no_grad():
        model.score.weight.add_(1.0)
    tuned = tiny.logits(model, input_ids=ids)
    first, second = prefixkit.disabled(model), prefixkit.disabled(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(tiny.logits(model, input_ids=ids), base)
    second.__exit__(None, None, None)
    assert torch.equal(tiny.logits(model, input_ids=ids), tuned)
