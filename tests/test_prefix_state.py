"""The state beside the call: threads, failures, compiling."""

from __future__ import annotations

import threading
from dataclasses import replace

import prefixkit_llama
import pytest
import tiny
import torch

import prefixkit
from prefixkit.prefix_state import find_state
from prefixkit.testing.subject import enable_checkpointing, strengthen

LLAMA = next(prefixkit_llama.prefixkit_adapters())
BESIDE = replace(LLAMA, stacks=lambda model: [replace(stack, hands_down=False) for stack in LLAMA.stacks(model)])


def model_with(adapter, *, seed=0):
    torch.manual_seed(0)
    model = tiny.MAKERS["llama"]().eval()
    prefixkit.apply(model, num_virtual_tokens=4, adapter=adapter)
    strengthen(model)
    return model


@pytest.fixture
def ids():
    return torch.arange(3, 10)[None]


def test_both_ways_give_the_same_numbers(ids):
    with torch.no_grad():
        assert torch.equal(model_with(BESIDE)(ids).logits, model_with(LLAMA)(ids).logits)


def test_nothing_stays_behind_a_call_that_fails(ids):
    model = model_with(BESIDE)
    site = model.get_submodule(prefixkit.sites(model)[0].path)
    layers = model.model.layers
    handle = layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids)
    handle.remove()
    with pytest.raises(prefixkit.EngineError, match="the prefix did not reach 'model.layers.0.self_attn'"):
        find_state(site, {})


def test_a_layer_called_by_itself_raises(ids):
    model = model_with(BESIDE)
    model(ids)
    states = torch.zeros(1, 3, 32)
    rotation = model.model.rotary_emb(states, torch.arange(3)[None])
    with pytest.raises(prefixkit.EngineError, match="its stack was not called as a module"):
        model.model.layers[0](states, position_embeddings=rotation)


def test_threads_do_not_see_each_other(ids):
    models = [model_with(BESIDE) for _ in range(4)]
    for index, model in enumerate(models):
        with torch.no_grad():
            model.get_parameter("prefixkit.default.embedding.weight").mul_(index + 1)
    with torch.no_grad():
        expected = [model(ids).logits for model in models]
    wrong = []

    def run(index):
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(models[index](ids).logits, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_prefixes_before_one_backward_under_checkpointing(ids):
    """Layers are computed again with the state that they were first computed with."""
    gradients = []
    for checkpoint in (False, True):
        model = model_with(BESIDE).train()
        if checkpoint:
            enable_checkpointing(model)
        weight = model.get_parameter("prefixkit.default.embedding.weight")
        first = model(ids).logits.square().mean()
        weight.data = weight.data * -1.5
        second = model(ids).logits.square().mean()
        (first + 2 * second).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


def test_checkpoint_functions_are_given_back(ids):
    model = model_with(BESIDE).train()
    enable_checkpointing(model)
    before = [layer._gradient_checkpointing_func for layer in model.model.layers]
    model(ids).logits.sum().backward()
    prefixkit.remove(model)
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == before


def test_reentrant_checkpointing_is_refused_the_second_time_too(ids):
    model = model_with(BESIDE).train()
    enable_checkpointing(model, reentrant=True)
    for _ in range(2):
        with pytest.raises(prefixkit.EngineError, match="reentrant"):
            model(ids)
        enable_checkpointing(model)
        model(ids)
        enable_checkpointing(model, reentrant=True)


def test_compiled_with_breaks_in_the_graph(ids):
    model = model_with(BESIDE)
    with torch.no_grad():
        expected = model(ids).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(ids).logits, expected)
        with torch.no_grad():
            model.get_parameter("prefixkit.default.embedding.weight").mul_(-2)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
        with prefixkit.disabled(model):
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
