"""The base stays what it was: same object, same class, same numbers, same names."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny
import torch
from transformers import (
    BartForSequenceClassification,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    T5ForQuestionAnswering,
)

import prefixkit

TOKENS = 4


@pytest.mark.parametrize("engine", ["attention", "cache"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", tiny.EVERY)
def test_disabled_and_removed(name, attention, engine):
    model = tiny.make(name, attention=attention)
    inputs = tiny.inputs(model)
    cls, keys, config = type(model), list(model.state_dict()), model.config.to_dict()
    implementations = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    own = set(model.__dict__)
    next(model.parameters()).requires_grad_(False)
    trainable = {key: value.requires_grad for key, value in model.named_parameters()}
    base = tiny.logits(model, **inputs)
    stacks = ("decoder", "cross") if engine == "cache" and model.config.is_encoder_decoder else None
    assert prefixkit.apply(model, num_virtual_tokens=TOKENS, engine=engine, stacks=stacks) is model
    assert type(model) is cls
    assert [key for key in model.state_dict() if not key.startswith("prefixkit.")] == keys
    assert model.config.to_dict() == config
    with_prefix = tiny.logits(model, **inputs)
    assert not torch.equal(with_prefix, base)
    with prefixkit.disabled(model) as same:
        assert same is model
        with prefixkit.disabled(model):
            assert torch.equal(tiny.logits(model, **inputs), base)
        assert torch.equal(tiny.logits(model, **inputs), base)
    assert torch.equal(tiny.logits(model, **inputs), with_prefix)
    assert prefixkit.remove(model) is model
    assert torch.equal(tiny.logits(model, **inputs), base)
    assert list(model.state_dict()) == keys
    assert set(model.__dict__) == own
    assert {key: value.requires_grad for key, value in model.named_parameters()} == trainable
    now = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    assert now == implementations
    hooks = [hook for module in model.modules() for hook in (*module._forward_pre_hooks, *module._forward_hooks)]
    fresh = tiny.make(name)
    fresh(**inputs)
    assert len(hooks) == sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in fresh.modules())


def test_disabled_comes_back_after_an_error():
    model = tiny.make("gpt2")
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    expected = tiny.logits(model, **tiny.inputs(model))
    with pytest.raises(ZeroDivisionError), prefixkit.disabled(model):
        raise ZeroDivisionError
    assert torch.equal(tiny.logits(model, **tiny.inputs(model)), expected)


def test_a_model_with_the_same_config_object_is_not_touched():
    config = LlamaConfig(**tiny.llama_sizes())
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    inputs = tiny.inputs(other)
    base = tiny.logits(other, **inputs)
    prefixkit.apply(one, num_virtual_tokens=TOKENS)
    assert torch.equal(tiny.logits(other, **inputs), base)
    prefixkit.apply(other, num_virtual_tokens=TOKENS)
    with_prefix = tiny.logits(one, **inputs)
    prefixkit.remove(other)
    assert torch.equal(tiny.logits(one, **inputs), with_prefix)
    assert torch.equal(tiny.logits(other, **inputs), base)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_copies_and_pickles_are_whole_and_apart(name):
    model = tiny.make(name)
    inputs = tiny.inputs(model)
    base = tiny.logits(model, **inputs)
    prefixkit.apply(model, method="prefix-tuning", num_virtual_tokens=TOKENS)
    expected = tiny.logits(model, **inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tiny.logits(twin, **inputs), expected)
        with torch.no_grad():
            twin.prefixkit.default.embedding.weight.add_(1.0)
        assert not torch.equal(tiny.logits(twin, **inputs), expected)
        prefixkit.remove(twin)
        assert torch.equal(tiny.logits(twin, **inputs), base)
        assert torch.equal(tiny.logits(model, **inputs), expected)


def test_attention_implementation_can_change_afterwards():
    model = tiny.make("t5", attention="sdpa")
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    expected = tiny.logits(model, **tiny.inputs(model))
    model.set_attn_implementation("eager")
    torch.testing.assert_close(tiny.logits(model, **tiny.inputs(model)), expected, atol=1e-5, rtol=0)
    prefixkit.remove(model)
    assert model.config._attn_implementation == "eager"


def test_a_stack_that_is_not_called_as_a_module_raises():
    model = tiny.make("gpt2")
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    message = "^the prefix did not reach 'transformer.h.0.attn': its stack was not called as a module"
    with pytest.raises(prefixkit.EngineError, match=message):
        model.transformer.forward(tiny.tokens(1, 4))


def test_a_cache_with_a_prefix_is_not_given_it_twice():
    model = tiny.make("llama")
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    with pytest.raises(prefixkit.EngineError, match="^the cache passed in already holds a prefix"):
        model(input_ids=tiny.tokens(1, 4), past_key_values=prefixkit.to_cache(model))


def test_a_cache_read_without_the_prefix_is_refused_by_the_cache_engine():
    model = tiny.make("llama")
    cache = model(input_ids=tiny.tokens(1, 4)).past_key_values
    prefixkit.apply(model, num_virtual_tokens=TOKENS, engine="cache")
    with pytest.raises(prefixkit.EngineError, match="^the cache passed in holds 4 tokens that were read without"):
        model(input_ids=tiny.tokens(1, 4), past_key_values=cache)


HEADS = [
    (GPT2ForSequenceClassification, tiny.gpt2, ("score",)),
    (LlamaForTokenClassification, lambda: LlamaConfig(**tiny.llama_sizes()), ("score",)),
    (BartForSequenceClassification, tiny.bart, ("classification_head",)),
    (T5ForQuestionAnswering, tiny.t5, ("qa_outputs",)),
]


@pytest.mark.parametrize(("cls", "config", "head"), HEADS)
def test_new_heads_train_and_the_old_head_comes_back(cls, config, head):
    torch.manual_seed(0)
    model = cls(config()).eval()
    ids = tiny.tokens(2, 6)
    ids[:, -1] = 2  # BART reads its answer off the last </s>
    base = model(input_ids=ids)
    key = "start_logits" if cls is T5ForQuestionAnswering else "logits"
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    assert prefixkit.config(model).head == head
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name.split(".")[0] for name in trainable} == {"prefixkit", *head}
    with torch.no_grad():
        for value in model.get_submodule(head[0]).parameters():
            value.add_(1.0)
    changed = model(input_ids=ids)[key]
    with torch.no_grad(), prefixkit.disabled(model):
        torch.testing.assert_close(model(input_ids=ids)[key], base[key], atol=1e-6, rtol=0)
    assert torch.equal(model(input_ids=ids)[key], changed)
    prefixkit.remove(model)
    torch.testing.assert_close(model(input_ids=ids)[key], base[key], atol=1e-6, rtol=0)


def test_head_can_stay_frozen_or_be_named():
    model = GPT2ForSequenceClassification(tiny.gpt2())
    prefixkit.apply(model, num_virtual_tokens=TOKENS, head=False)
    assert not any(value.requires_grad for value in model.score.parameters())
    prefixkit.remove(model)
    prefixkit.apply(model, num_virtual_tokens=TOKENS, head=["transformer.ln_f"])
    assert model.transformer.ln_f.weight.requires_grad
    assert not model.score.weight.requires_grad


def test_the_body_is_never_taken_for_the_head():
    model = T5ForQuestionAnswering(tiny.t5())
    prefixkit.apply(model, num_virtual_tokens=TOKENS, engine="cache", stacks=["decoder", "cross"])
    assert prefixkit.config(model).head == ("qa_outputs",)


def test_saving_while_disabled_saves_the_tuned_head(tmp_path):
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(tiny.gpt2())
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    with torch.no_grad():
        model.score.weight.add_(1.0)
    tuned = model.score.weight.detach().clone()
    with prefixkit.disabled(model):
        prefixkit.save(model, tmp_path)
    prefixkit.load(prefixkit.remove(model), tmp_path)
    assert torch.equal(model.score.weight, tuned)


def test_removing_while_disabled_gives_the_base_back():
    model = GPT2ForSequenceClassification(tiny.gpt2())
    base = model.score.weight.detach().clone()
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    with torch.no_grad():
        model.score.weight.add_(1.0)
    message = "^add, activate and remove prefixes outside of prefixkit.disabled"
    with pytest.raises(prefixkit.AttachmentError, match=message), prefixkit.disabled(model):
        prefixkit.remove(model)
    prefixkit.remove(model)
    assert torch.equal(model.score.weight, base)


def test_a_tied_head_trains_under_its_own_name():
    model = tiny.make("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    prefixkit.apply(model, num_virtual_tokens=TOKENS, head=["lm_head"])
    assert model.lm_head.weight.requires_grad
    assert list(model._prefixkit.attachment.tensors(model)) == ["embedding.weight", "head.lm_head.weight"]
    base = model.transformer.wte.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert torch.equal(prefixkit.remove(model).lm_head.weight, base)
