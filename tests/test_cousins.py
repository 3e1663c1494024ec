"""The models that LLaMA's plugin answers for hold what it says of them."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import prefixkit
from prefixkit.testing.recording import recorded_calls

PROVED = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt_oss")
"""These run the whole conformance kit, here and in the plugin's own tests."""
COUSINS = ("mixtral", "qwen2", "gemma", "granite", "olmo2", "phi3", "smollm3")
TOKENS = 4


def make(name):
    sizes = tiny.llama_sizes(head_dim=8)
    if name == "mixtral":
        sizes |= {"num_local_experts": 2, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(name, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def test_all_of_them_are_tried():
    infos = {info.distribution: info for info in prefixkit.plugins()}
    assert sorted(infos["prefixkit-llama"].model_types) == sorted(PROVED + COUSINS)


@pytest.mark.parametrize("name", COUSINS)
def test_cousin(name):
    model = make(name)
    ids, mask = tiny.left_pad([tiny.tokens(length, seed=length) for length in (3, 7)])
    with recorded_calls(model) as calls:
        tiny.logits(model, input_ids=ids)
    heads = {(call.path, call.key.shape[1], call.key.shape[3], call.value.shape[3]) for call in calls}
    assert heads == {(site.path, site.kv_heads, site.key_dim, site.value_dim) for site in prefixkit.sites(model)}

    prompt = tiny.tokens(TOKENS, seed=5)
    with torch.no_grad():
        cache = model(input_ids=prompt[None]).past_key_values
    pieces = [prefixkit.KeyValue(layer.keys[0], layer.values[0]) for layer in cache.layers]
    flat = prefixkit.Layout(prefixkit.sites(model)).join(pieces)
    text = tiny.tokens(2, 6)
    expected = tiny.logits(model, input_ids=torch.cat([prompt.expand(2, -1), text], dim=1))[:, TOKENS:]

    prefixkit.apply(model, num_virtual_tokens=TOKENS, init=flat, window="slide")
    torch.testing.assert_close(tiny.logits(model, input_ids=text), expected, atol=1e-4, rtol=0)

    padded = tiny.logits(model, input_ids=ids, attention_mask=mask)
    for row, length in enumerate((3, 7)):
        alone = tiny.logits(model, input_ids=ids[row : row + 1, -length:])
        torch.testing.assert_close(padded[row, -length:], alone[0], atol=1e-4, rtol=0)

    native = prefixkit.to_cache(model, batch_size=2)
    with prefixkit.disabled(model):
        found = tiny.logits(model, input_ids=text, past_key_values=native)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    model(input_ids=text).logits.square().sum().backward()
    gradient = model.prefixkit.default.embedding.weight.grad
    for piece in prefixkit.Layout(prefixkit.sites(model)).split(gradient):
        assert all(part.abs().amax((0, 2)).min() > 0 for part in piece)
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(text), "eos_token_id": None}
    assert torch.equal(
        model.generate(input_ids=text, **settings), model.generate(input_ids=text, use_cache=False, **settings)
    )
