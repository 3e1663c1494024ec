"""What ``apply`` refuses, in which words, and that it then leaves the model alone."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from test_checkpoint import assert_same, state
from transformers import GPT2Model

import prefixkit
from prefixkit import Adapter, ConfigError, EngineError, MethodError, PluginError, Site, Stack
from prefixkit.testing.subject import enable_checkpointing

CASES = [
    ({"method": "p-tuning"}, MethodError, "no method 'p-tuning' (did you mean 'p-tuning-v2'?); installed: "),
    (
        {"encoder_hiden_size": 3},
        MethodError,
        "method 'p-tuning-v2' has no option 'encoder_hiden_size' (did you mean 'encoder_hidden_size'?); "
        "possible: encoder_hidden_size, prefix_dropout, prefix_projection, share_key_value",
    ),
    (
        {"method": "prefix-tuning", "encoder_hidden_size": 0},
        MethodError,
        "encoder_hidden_size is 0; it must be a whole number of 1 or more",
    ),
    ({"prefix_projection": "yes"}, MethodError, "prefix_projection is 'yes'; it must be True or False"),
    ({"num_virtual_tokens": 0}, ConfigError, "num_virtual_tokens is 0; it must be a whole number of 1 or more"),
    ({"num_virtual_tokens": True}, ConfigError, "num_virtual_tokens is True; it must be a whole number of 1 or more"),
    ({"num_virtual_tokens": 2.0}, ConfigError, "num_virtual_tokens is 2.0; it must be a whole number of 1 or more"),
    ({"positions": "shfit"}, ConfigError, "positions is 'shfit' (did you mean 'shift'?); possible: shift, none"),
    ({"window": "open"}, ConfigError, "window is 'open'; possible: pinned, slide"),
    ({"engine": "steam"}, ConfigError, "engine is 'steam'; possible: auto, attention, cache"),
    ({"name": "a.b"}, ConfigError, "name is 'a.b'; it must be a Python identifier, since it becomes a module's name"),
    ({"prefix_dropout": 1.0}, ConfigError, "prefix_dropout is 1.0; it must be at least 0 and below 1"),
    ({"stacks": ["cross"]}, ConfigError, "stacks asks for ['cross'], and GPT2LMHeadModel has decoder"),
    ({"stacks": []}, ConfigError, "stacks asks for nothing, and GPT2LMHeadModel has decoder"),
    (
        {"stacks": ["decodr"]},
        ConfigError,
        "stacks is 'decodr' (did you mean 'decoder'?); possible: encoder, decoder, cross",
    ),
    ({"stacks": "decoder"}, ConfigError, "stacks is 'decoder'; pass a list of names"),
    ({"layers": [0, 7]}, ConfigError, "layers asks for [7], and GPT2LMHeadModel has 0, 1, 2"),
    ({"layers": 1}, ConfigError, "layers is 1; pass a list of layer numbers"),
    (
        {"init": "token"},
        ConfigError,
        "init is 'token' (did you mean 'tokens'?); possible: 'auto', 'tokens', 'matched', 'zeros', 'random', a tensor "
        "with the flat prefix, a transformers cache, prefixkit.TextInit, prefixkit.ChunksInit",
    ),
    (
        {"init": torch.zeros(4, 3)},
        ConfigError,
        "init is (4, 3) of torch.float32; the flat prefix of this model is (4, 192) of floating numbers (token ids go "
        "into prefixkit.TextInit)",
    ),
    (
        {"head": "score"},
        ConfigError,
        "head is 'score'; possible: 'auto', False, or a list of names of modules or parameters",
    ),
    (
        {"head": ["lm_haed"]},
        ConfigError,
        "head names 'lm_haed', which GPT2LMHeadModel does not have (did you mean 'lm_head'?)",
    ),
    (
        {"engine": "cache", "layers": [0]},
        EngineError,
        "a native cache needs a prefix in every layer, of one length; apply the prefix without layers= and "
        "layer_tokens=",
    ),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), CASES)
def test_refused(arguments, kind, message):
    model = tiny.make("gpt2")
    before = state(model)
    with pytest.raises(kind) as caught:
        prefixkit.apply(model, **{"num_virtual_tokens": 4, **arguments})
    if arguments.get("method") == "p-tuning":
        assert str(caught.value).startswith(message)  # other installed plugins may bring methods
    else:
        assert str(caught.value) == message
    assert_same(before, state(model))


def test_refused_for_the_model_at_hand():
    cases = [
        (
            "t5",
            {"engine": "cache"},
            "the cache engine gives an encoder no prefix, since encoders take no cache; use engine='attention', "
            "or pass stacks=('decoder', 'cross')",
        ),
        (
            "t5",
            {"engine": "cache", "stacks": ["decoder", "cross"], "positions": "none"},
            "positions='none' gives the prefix no relative-position bias, which a native cache cannot express; "
            "use engine='attention', or positions='shift'",
        ),
        (
            "mistral",
            {"engine": "cache"},
            "a native cache cannot keep a prefix in sight of a sliding window; use engine='attention', "
            "or apply the prefix with window='slide'",
        ),
    ]
    for name, arguments, message in cases:
        model = tiny.make(name)
        before = state(model)
        with pytest.raises(EngineError, match=f"^{re.escape(message)}$"):
            prefixkit.apply(model, num_virtual_tokens=4, **arguments)
        assert_same(before, state(model))


def test_not_a_model():
    with pytest.raises(prefixkit.UnsupportedModelError) as caught:
        prefixkit.apply(torch.nn.Linear(2, 2), num_virtual_tokens=4)
    assert str(caught.value) == (
        "expected a transformers model, got Linear; pass the PreTrainedModel itself, before it is wrapped or compiled"
    )


def test_second_prefix():
    model = prefixkit.apply(tiny.make("gpt2"), num_virtual_tokens=4)
    before = state(model)
    with pytest.raises(prefixkit.AttachmentError) as caught:
        prefixkit.apply(model, num_virtual_tokens=4)
    assert str(caught.value) == (
        "this model already has a prefix 'default'; pass another name=, or take that one off first, with "
        "prefixkit.remove(model, name='default')"
    )
    assert_same(before, state(model))


@pytest.mark.parametrize("action", [prefixkit.remove, prefixkit.fold, prefixkit.config, prefixkit.to_cache])
def test_no_prefix(action):
    with pytest.raises(prefixkit.AttachmentError) as caught:
        action(tiny.make("gpt2"))
    assert str(caught.value) == "this GPT2LMHeadModel has no prefix; call prefixkit.apply or prefixkit.load first"


def test_upcast_attention():
    with pytest.raises(prefixkit.UnsupportedModelError, match="^GPT-2 with reorder_and_upcast_attn=True computes"):
        prefixkit.apply(tiny.make("gpt2", reorder_and_upcast_attn=True), num_virtual_tokens=4)


def test_to_cache_refuses():
    cases = [
        ("gpt2", {"positions": "none"}, "a bare model counts positions from the length of its cache"),
        ("mistral", {}, "a native cache cannot keep a prefix in sight of a sliding window"),
        ("bart", {"stacks": ["encoder"]}, "this prefix has encoder sites only, and an encoder takes no cache"),
    ]
    for name, arguments, message in cases:
        model = prefixkit.apply(tiny.make(name), num_virtual_tokens=4, **arguments)
        with pytest.raises(EngineError, match=f"^{message}"):
            prefixkit.to_cache(model)
    with pytest.raises(ConfigError, match="^batch_size is 0; it must be 1 or more$"):
        prefixkit.to_cache(prefixkit.apply(tiny.make("gpt2"), num_virtual_tokens=4), batch_size=0)


def test_a_wrong_adapter():
    site = Site(path="h.9.attn", stack="decoder", layer=0, kv_heads=4, key_dim=8, value_dim=8)

    def stacks(model):
        yield Stack(name="decoder", path="", positions=prefixkit.PositionIds(), sites=(site,))

    model = GPT2Model(tiny.gpt2())
    with pytest.raises(PluginError, match="^the adapter for 'gpt2' names 'h.9.attn', which GPT2Model lacks$"):
        prefixkit.apply(model, num_virtual_tokens=4, adapter=Adapter(model_types=("gpt2",), stacks=stacks))


def test_apply_that_fails_half_way_is_undone(monkeypatch):
    model = tiny.make("bart")
    before = state(model)
    monkeypatch.setattr("prefixkit.prefixes.add_hooks", lambda model, prefixes: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prefixkit.apply(model, num_virtual_tokens=4)
    assert_same(before, state(model))


def test_prefix_projection_is_the_whole_difference():
    model = prefixkit.apply(tiny.make("gpt2"), method="prefix-tuning", prefix_projection=False, num_virtual_tokens=4)
    assert [tuple(value.shape) for value in model.prefixkit.parameters()] == [(4, 192)]
    prefixkit.remove(model)
    prefixkit.apply(model, prefix_projection=True, encoder_hidden_size=7, num_virtual_tokens=4)
    shapes = {name: tuple(value.shape) for name, value in model.prefixkit.default.named_parameters()}
    assert shapes == {
        "embedding.weight": (4, 32),
        "transform.0.weight": (7, 32),
        "transform.0.bias": (7,),
        "transform.2.weight": (192, 7),
        "transform.2.bias": (192,),
    }


def test_a_method_that_gives_another_shape(monkeypatch):
    class Short(torch.nn.Module):
        def forward(self):
            return torch.zeros(1, 3)

    method = prefixkit.Method(name="short", build=lambda shape, options: Short(), options={})
    monkeypatch.setattr("prefixkit.discovery.Registry.method", lambda self, name: method)
    with pytest.raises(MethodError) as caught:
        prefixkit.apply(tiny.make("gpt2"), method="short", num_virtual_tokens=4)
    assert str(caught.value) == "method 'short' gives a prefix of (1, 3); this model needs (4, 192)"


def test_a_model_without_the_landmark():
    def stacks(model):
        path = prefixkit.find_stack(model, "no.such")
        yield Stack(name="decoder", path=path, positions=prefixkit.PositionIds(), sites=())

    adapter = Adapter(model_types=("gpt2",), stacks=stacks)
    with pytest.raises(prefixkit.UnsupportedModelError, match="^the adapter for 'gpt2' finds no attention in this"):
        prefixkit.apply(tiny.make("gpt2"), num_virtual_tokens=4, adapter=adapter)
    with pytest.raises(PluginError, match="^stack '': name is 'middle'; possible: encoder, decoder$"):
        Stack(name="middle", path="", positions=prefixkit.PositionIds(), sites=())


def test_attention_off_the_interface_is_refused_before_the_first_forward(monkeypatch):
    model = tiny.make("gpt2")
    before = state(model)
    monkeypatch.delattr("transformers.models.gpt2.modeling_gpt2.ALL_ATTENTION_FUNCTIONS")
    with pytest.raises(EngineError, match="^the attention of 'transformer.h.0.attn', GPT2Attention, does not go"):
        prefixkit.apply(model, num_virtual_tokens=4, engine="attention")
    assert_same(before, state(model))
    prefixkit.apply(model, num_virtual_tokens=4, init="random")
    enable_checkpointing(model.train())
    with pytest.raises(EngineError, match="gradient checkpointing"):
        model(torch.tensor([[3, 4]]))


@pytest.mark.parametrize("method", ["p-tuning-v2", "prefix-tuning"])
def test_a_prefix_made_under_inference_mode_trains(method, tmp_path):
    """Of what is made there, autograd keeps no gradients: parts of a prefix stayed as they were, without a word."""
    bases = tiny.make("gpt2"), tiny.make("gpt2")
    with torch.inference_mode():
        prefixkit.save(prefixkit.apply(bases[0], method, num_virtual_tokens=3), tmp_path)
        prefixkit.load(bases[1], tmp_path, trainable=True)
    for model in bases:
        model(**tiny.inputs(model))[0].square().mean().backward()
        assert all(value.grad is not None and value.grad.any() for value in model.prefixkit.parameters())
