"""The generic adapter: what it finds, that it leaves no trace, and what it refuses."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import replace

import bert_adapter
import pytest
import tiny
import torch
import transformers
from accelerate import cpu_offload
from architectures.tiny_models import build
from test_checkpoint import assert_same, state
from torch import nn
from transformers import (
    AlbertForMultipleChoice,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    ResNetConfig,
    ResNetForImageClassification,
)
from versions import since

import prefixkit
from prefixkit.discovery import installed
from prefixkit.generic.stacks import watched_stacks
from prefixkit.prefix_state import find_state
from prefixkit.testing.subject import enable_checkpointing, strengthen

GENERIC = prefixkit.generic_adapter()


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "llama-mqa", "mistral", "gemma3", "gpt-oss", "bart", "bert", "roberta"]
)
def test_finds_what_the_plugins_say(name):
    model = tiny.MAKERS[name]()
    adapter = bert_adapter.ADAPTER if "bert" in name else installed().adapter_for(model.config.model_type)
    stated = [replace(stack, hands_down=True) for stack in adapter.stacks(model)]
    assert [(stack.name, stack.path, stack.positions, set(stack.sites)) for stack in watched_stacks(model)] == [
        (stack.name, stack.path, stack.positions, set(stack.sites)) for stack in stated
    ]


def test_t5_is_served_without_moving_positions():
    """What a relative bias is made of cannot be seen from outside: that takes a plugin."""
    model = prefixkit.apply(tiny.make("t5"), num_virtual_tokens=4, adapter=GENERIC)
    assert prefixkit.config(model).positions == "none"
    assert {site.stack for site in prefixkit.sites(model)} == {"encoder", "decoder", "cross"}


@pytest.mark.parametrize("name", ["llama", "bart", "gpt-oss", "bert"])
@pytest.mark.parametrize("training", [False, True])
def test_watching_leaves_no_trace(name, training):
    model = tiny.MAKERS[name]().train(training)
    next(model.modules()).register_buffer("counted", torch.zeros(1))
    before, attributes = state(model), [dict(vars(module)) for module in model.modules()]
    buffers = {name: (id(value), value.clone()) for name, value in model.named_buffers()}
    configs = [(module.config, copy.deepcopy(module.config)) for module in model.modules() if hasattr(module, "config")]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    watched_stacks(model)
    assert torch.equal(torch.rand(3), expected)
    assert_same(before, state(model))
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert all(id(value) == buffers[name][0] for name, value in model.named_buffers())
    assert all(torch.equal(value, buffers[name][1]) for name, value in model.named_buffers())
    assert all(config.to_dict() == earlier.to_dict() for config, earlier in configs)
    assert all(config._attn_implementation == earlier._attn_implementation for config, earlier in configs)


class Counting(nn.Module):
    """Counts its calls in a buffer, in an attribute, and in one that it makes itself."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0
        self.register_buffer("total", torch.zeros(1))

    def forward(self, *args, **kwargs):
        self.calls, self.last = self.calls + 1, args
        self.total += 1
        return self.inner(*args, **kwargs)


def test_what_a_forward_writes_is_put_back():
    model = tiny.make("llama")
    counting = model.model.embed_tokens = Counting(model.model.embed_tokens)
    watched_stacks(model)
    assert (counting.calls, counting.total.item(), hasattr(counting, "last")) == (0, 0.0, False)


def test_what_fails_in_the_middle_is_put_back():
    model = tiny.make("llama").train()
    before, name = state(model), model.config._attn_implementation
    handle = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(prefixkit.UnsupportedModelError, match="ZeroDivisionError: division by zero"):
        watched_stacks(model)
    handle.remove()
    assert_same(before, state(model))
    assert model.training
    assert model.config._attn_implementation == name
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())


def test_a_prefix_saved_with_the_plugin_is_loaded_without_it(tmp_path):
    model = prefixkit.apply(tiny.make("llama"), num_virtual_tokens=4)
    strengthen(model)
    prefixkit.save(model, tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    other = prefixkit.load(tiny.make("llama"), tmp_path, adapter=GENERIC)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


HEADS = {
    BertForSequenceClassification: (2, 7),
    BertForTokenClassification: (2, 7),
    BertForQuestionAnswering: (2, 7),
    BertForMultipleChoice: (2, 3, 7),
}


@pytest.mark.parametrize("cls", HEADS)
def test_task_heads_train_and_are_saved(cls, tmp_path):
    def make():
        torch.manual_seed(1)
        return cls(tiny.MAKERS["bert"]().config).eval()

    model = prefixkit.apply(make(), num_virtual_tokens=4)
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert any(not name.startswith("prefixkit.") for name in trained)
    assert all(name.startswith(("prefixkit.", "classifier.", "qa_outputs.")) for name in trained)
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).normal_()
    prefixkit.save(model, tmp_path)
    ids = torch.randint(5, 60, HEADS[cls], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids)[0]
        assert torch.equal(prefixkit.load(make(), tmp_path)(ids)[0], expected)
        assert not torch.equal(make()(ids)[0], expected)


class WithBareHead(BertForSequenceClassification):
    """A head that is a parameter of the task model itself."""

    def __init__(self, config):
        super().__init__(config)
        self.slope = nn.Parameter(torch.ones(2))

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        return replace(output, logits=output.logits * self.slope)


@pytest.mark.parametrize("head", ["auto", ["slope"]])
def test_a_head_without_a_module_trains_and_is_saved(head, tmp_path):
    config = tiny.MAKERS["bert"]().config
    model = prefixkit.apply(WithBareHead(config), num_virtual_tokens=4, head=head)
    assert "slope" in prefixkit.config(model).head
    assert model.slope.requires_grad
    with torch.no_grad():
        model.slope.fill_(3)
    prefixkit.save(model, tmp_path)
    assert prefixkit.load(WithBareHead(config), tmp_path).slope.tolist() == [3, 3]
    assert prefixkit.remove(model).slope.tolist() == [1, 1]


def test_layers_that_share_a_module_have_a_prefix_each():
    model = build("encoder", "albert").model
    prefixkit.apply(model, num_virtual_tokens=4, head=False)
    sites = prefixkit.sites(model)
    assert [(site.path, site.turn, site.layer) for site in sites] == [(sites[0].path, 0, 0), (sites[0].path, 1, 1)]
    model(torch.arange(10, 17)[None]).logits.square().mean().backward()
    halves = model.get_parameter("prefixkit.default.embedding.weight").grad.chunk(2, dim=1)
    assert not torch.allclose(*halves)


def test_turns_are_counted_again_where_layers_are_computed_again():
    """DiffLlama attends twice in every layer, to other values."""
    gradients = []
    for checkpoint in (False, True):
        model = build("causal", "diffllama").model.train()
        prefixkit.apply(model, num_virtual_tokens=4)
        assert [site.turn for site in prefixkit.sites(model)] == [0, 1, 0, 1]
        strengthen(model)
        if checkpoint:
            enable_checkpointing(model)
        model(torch.arange(10, 17)[None]).logits.square().mean().backward()
        gradients.append(model.get_parameter("prefixkit.default.embedding.weight").grad)
    torch.testing.assert_close(*gradients)


def test_turns_of_an_adapter_that_says_nothing_of_keywords_are_counted_the_same():
    """The sites tell it: an author need not know that turns are counted beside the call."""

    def adapter(hands_down):
        stacks = GENERIC.stacks(build("causal", "diffllama").model)
        stated = [replace(stack, hands_down=hands_down) for stack in stacks]
        return prefixkit.Adapter(model_types=(), stacks=lambda _: stated)

    gradients = []
    for hands_down in (False, True):
        model = build("causal", "diffllama").model.train()
        prefixkit.apply(model, num_virtual_tokens=4, adapter=adapter(hands_down))
        strengthen(model)
        enable_checkpointing(model)
        model(torch.arange(10, 17)[None]).logits.square().mean().backward()
        gradients.append(model.get_parameter("prefixkit.default.embedding.weight").grad)
    assert torch.equal(*gradients)


def test_multiple_choice_of_shared_layers():
    config = build("encoder", "albert").model.config
    model = prefixkit.apply(AlbertForMultipleChoice(config).eval(), num_virtual_tokens=4)
    assert model(torch.randint(10, 60, (2, 3, 7))).logits.shape == (2, 3)


def test_inputs_of_a_model_that_wants_others():
    tiny_model = build("vision", "siglip2")
    with pytest.raises(prefixkit.UnsupportedModelError) as caught:
        prefixkit.apply(tiny_model.model, num_virtual_tokens=4)
    assert re.match(
        r"could not watch a forward pass of this Siglip2ForImageClassification \(forward needs: nothing\); tried "
        r"pixel_values: RuntimeError: .*Pass adapter=prefixkit\.generic_adapter\(inputs\) with inputs that it runs "
        r"with, or write an adapter: docs/extend/adapter\.md$",
        str(caught.value),
        re.DOTALL,
    )
    adapter = prefixkit.generic_adapter(tiny_model.inputs(batch=1))
    prefixkit.apply(tiny_model.model, num_virtual_tokens=4, adapter=adapter)
    assert {site.stack for site in prefixkit.sites(tiny_model.model)} == {"encoder"}


def test_positions_that_stand_for_places_of_keys_are_not_moved():
    """With blocks of keys longer than the text, the watched model itself sees nothing wrong."""
    if "minimax_m3_vl_text" not in transformers.CONFIG_MAPPING:
        pytest.skip("this version of transformers has no MiniMax-M3")
    model = build("causal", "minimax_m3_vl_text", index_block_size=128).model
    prefixkit.apply(model, num_virtual_tokens=4)
    assert prefixkit.config(model).positions == "none"


def test_a_model_with_attention_functions_of_its_own_is_refused():
    model = tiny.make("llama")
    own = dict.fromkeys(("eager", "sdpa"))
    model.model.layers[0].register_forward_pre_hook(lambda module, _: own[module.self_attn.config._attn_implementation])
    with pytest.raises(prefixkit.UnsupportedModelError, match=r"^no attention of this LlamaForCausalLM goes through"):
        watched_stacks(model)


def test_a_model_without_attention_is_refused():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_channels=3)
    model = ResNetForImageClassification(config)
    before = state(model)
    with pytest.raises(
        prefixkit.UnsupportedModelError,
        match=r"^no attention of this ResNetForImageClassification goes through transformers' attention interface",
    ):
        prefixkit.apply(model, num_virtual_tokens=4)
    assert_same(before, state(model))


LATENTS = since("5.15", "its cache keeps what its attention is given")


@pytest.mark.parametrize("name", [pytest.param("deepseek_v3", marks=LATENTS), "qwen3_next", "llama4"])
def test_a_cache_that_cannot_hold_a_prefix_is_refused(name):
    """Latents, layers of another kind, and chunks."""
    model = build("causal", name).model
    with pytest.raises(prefixkit.EngineError, match="native cache|from the length of its cache"):
        prefixkit.apply(model, num_virtual_tokens=4, engine="cache", window="slide")


def test_positions_that_a_cache_counts_by_itself_are_refused():
    model = build("seq2seq", "m2m_100").model
    with pytest.raises(prefixkit.EngineError, match="may count positions from the length of its cache"):
        prefixkit.apply(model, num_virtual_tokens=4, engine="cache", stacks=("decoder", "cross"))


@pytest.mark.parametrize("name", ["deepseek_v32", "hy_v4", "minimax_m3_vl_text"])
def test_sparse_attention_stays_sparse(name):
    """Some models ask for the name of their attention before they hide what they did not choose."""
    model = build("causal", name).model.requires_grad_(False)
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        expected = model(ids).logits
        prefixkit.apply(model, num_virtual_tokens=4)
        with prefixkit.disabled(model):
            assert torch.equal(model(ids).logits, expected)


def test_compressed_blocks_see_no_later_token():
    model = prefixkit.apply(build("causal", "deepseek_v4").model, num_virtual_tokens=4)
    strengthen(model)
    assert prefixkit.config(model).positions == "none"
    ids = torch.arange(10, 40)[None]
    other = ids.clone()
    other[0, -1] = 9
    with torch.no_grad():
        assert torch.allclose(model(ids).logits[:, :-1], model(other).logits[:, :-1], atol=1e-5)


def test_a_quantized_model_is_watched():
    model = tiny.MAKERS["llama"]().eval()
    expected = watched_stacks(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert watched_stacks(quantized) == expected
    prefixkit.apply(quantized, num_virtual_tokens=4, adapter=GENERIC)
    strengthen(quantized)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        with_prefix = quantized(ids).logits
        with prefixkit.disabled(quantized):
            assert not torch.allclose(quantized(ids).logits, with_prefix)


def test_a_dispatched_model_is_watched():
    model = tiny.MAKERS["llama"]()
    expected = watched_stacks(model)
    cpu_offload(model, execution_device="cpu", offload_buffers=False)
    assert watched_stacks(model) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_watched(dtype):
    for name in ("llama", "bart"):
        assert watched_stacks(tiny.MAKERS[name]().to(dtype)) == watched_stacks(tiny.MAKERS[name]())


def test_a_state_that_begins_at_position_0_keeps_its_positions():
    """Moved ids never are 0, and one request would begin with the state of the last."""
    model = prefixkit.apply(build("causal", "recurrent_gemma").model, num_virtual_tokens=4)
    assert prefixkit.config(model).positions == "none"
    assert watched_stacks(build("causal", "qwen3_next").model)[0].positions is not None


def test_ids_that_a_module_around_the_stack_counts_are_not_the_callers():
    """Gemma 3 with images counts 0, 1, 2, … around its language model, whatever the mask says."""
    model = prefixkit.apply(build("causal", "gemma3").model.eval(), num_virtual_tokens=4, engine="attention")
    strengthen(model)
    ids = torch.tensor([[11, 12, 13, 14, 15]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], dim=1)
    with torch.no_grad():
        alone = model(ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", [(0,), (1,)])
def test_layers_of_a_shared_module_are_counted_without_a_prefix_too(layers):
    """A prefix of zeros for the other layer is no prefix: keys of zeros take part in the softmax."""
    model = prefixkit.apply(build("encoder", "albert").model, num_virtual_tokens=4, layers=layers)
    seen = []
    module = model.get_submodule(prefixkit.sites(model)[0].path)
    handle = module.register_forward_pre_hook(
        lambda *_: seen.append(find_state(module, {}, looks=True) is not None), prepend=True
    )
    model(torch.tensor([[11, 12, 13]]))
    handle.remove()
    assert seen == [layer in layers for layer in (0, 1)]


def test_disabled_layers_are_computed_again_without_a_prefix():
    model = prefixkit.apply(build("causal", "diffllama").model.train(), num_virtual_tokens=4)
    enable_checkpointing(model)
    states = model.get_input_embeddings()(torch.tensor([[11, 12, 13]])).requires_grad_()
    with prefixkit.disabled(model):
        model(inputs_embeds=states).logits.sum().backward()
    assert model.get_parameter("prefixkit.default.embedding.weight").grad is None


def test_modules_that_a_short_text_swaps_are_put_back():
    model = build("seq2seq", "bigbird_pegasus").model
    before = [type(module) for module in model.modules()]
    watched_stacks(model)
    assert [type(module) for module in model.modules()] == before
