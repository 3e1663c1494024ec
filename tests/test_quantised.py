"""Quantised bases: which of them train a prefix, each with the packages that `nox -s quantised` lays over."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import tiny
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import prefixkit
from prefixkit.errors import EngineError
from prefixkit.testing.subject import enable_checkpointing

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
SIZES = {"hidden_size": 128, "intermediate_size": 256}
"""Groups of 32 to 128 numbers are quantised together."""
LOST = "^(nothing that the model gave out depends on|no gradient arrived at) the prefix of .model.layers.0.self_attn"


def bits(**settings):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: nox -s quantised")
    return transformers.BitsAndBytesConfig(**settings)


def torchao(name, **settings):
    pytest.importorskip("torchao", reason="needs torchao: nox -s quantised")
    configs = importlib.import_module("torchao.quantization")
    return transformers.TorchAoConfig(getattr(configs, name)(**settings))


def quanto(weights):
    pytest.importorskip("optimum.quanto", reason="needs optimum-quanto: nox -s quantised")
    return transformers.QuantoConfig(weights=weights)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
TRAIN = {
    "bitsandbytes nf4": partial(bits, **NF4),
    "bitsandbytes fp4": partial(bits, **{**NF4, "bnb_4bit_quant_type": "fp4"}),
    "bitsandbytes int8": partial(bits, load_in_8bit=True),
    "torchao Int8WeightOnlyConfig": partial(torchao, "Int8WeightOnlyConfig"),
    "torchao IntxWeightOnlyConfig int4": partial(torchao, "IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "quanto int8": partial(quanto, "int8"),
    "quanto int4": partial(quanto, "int4"),
}
DO_NOT = {
    "torchao Int8DynamicActivationInt8WeightConfig": partial(torchao, "Int8DynamicActivationInt8WeightConfig"),
    "torchao Int8DynamicActivationIntxWeightConfig int4": partial(
        torchao, "Int8DynamicActivationIntxWeightConfig", weight_dtype=torch.int4
    ),
}
COARSE = {"bitsandbytes int8": 0.05}
"""Where activations are quantised too: how far, relative to its size, a gradient is from that of the weights alone."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.make("llama", **SIZES).save_pretrained(folder)
    return folder


def load(base, settings):
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)


def dequantised(quantised, base):
    """The float model whose weights are those that the quantised one has in effect: what it makes of unit vectors."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    changed = 0
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                weight = quantised.get_submodule(name)(torch.eye(module.in_features)).T.float()
            changed += not torch.equal(weight, module.weight)
            module.weight.data.copy_(weight)
    assert changed >= 21, "seven matrices in each of three layers"
    return plain


def with_prefix(model, **options):
    width = sum(site.width for site in prefixkit.sites(model))
    return prefixkit.apply(model, **{"num_virtual_tokens": 4, "init": tiny.random_flat(width, 4), **options}).train()


def gradient(model):
    model.zero_grad()
    inputs = tiny.inputs(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return torch.cat([value.grad.flatten() for value in model.parameters() if value.requires_grad])


def assert_near(found, expected, share):
    assert expected.abs().max() > 0
    assert float((found - expected).norm() / expected.norm()) < share


@pytest.mark.parametrize("name", TRAIN)
def test_gradients_are_those_of_the_weights_in_effect(name, base, tmp_path):
    model = with_prefix(load(base, TRAIN[name]()))
    expected = gradient(with_prefix(dequantised(model, base)))
    share = COARSE.get(name, 1e-4)
    assert_near(gradient(model), expected, share)
    model.eval()
    with torch.no_grad():
        logits = model(**tiny.inputs(model)).logits
    ids = tiny.tokens(1, 4)
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert_near(gradient(model.train()), expected, share)
    enable_checkpointing(model)
    assert_near(gradient(model), expected, share)
    prefixkit.save(model, tmp_path)
    loaded = prefixkit.load(load(base, TRAIN[name]()), tmp_path).eval()
    assert torch.equal(tiny.logits(loaded, **tiny.inputs(model)), logits)
    again = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert torch.equal(again, tokens)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_gguf_is_dequantised_when_it_is_loaded(kind, tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs gguf: nox -s quantised")
    to_gguf = importlib.import_module("to_gguf")
    plain = tiny.make("llama", tie_word_embeddings=False, **SIZES)
    path = to_gguf.convert(plain, tmp_path / "base.gguf", quantised=kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    quantiser = gguf.GGMLQuantizationType[kind]
    for weight in plain.parameters():
        if weight.ndim == 2 and weight.shape[1] % to_gguf.BLOCK == 0:
            rounded = gguf.quantize(weight.detach().numpy(), quantiser)
            weight.data = torch.from_numpy(gguf.dequantize(rounded, quantiser))
    assert_near(gradient(with_prefix(model)), gradient(with_prefix(plain)), 1e-4)


@pytest.mark.parametrize("name", DO_NOT)
def test_bases_without_a_backward_pass_are_an_error(name, base):
    model = with_prefix(load(base, DO_NOT[name]()))
    with pytest.raises(EngineError, match=LOST) as caught:
        gradient(model)
    assert "(the base is quantised by torchao)" in str(caught.value)


def test_a_base_that_evaluation_repacks_is_an_error(base, monkeypatch):
    """On CPUs with AVX512-BF16 bitsandbytes packs 4-bit weights in eval mode, for a kernel without a backward pass."""
    model = with_prefix(load(base, TRAIN["bitsandbytes nf4"]()))
    functional = importlib.import_module("bitsandbytes.functional")
    kind = importlib.import_module("bitsandbytes.nn.modules").Linear4bit
    layers = [module for module in model.modules() if isinstance(module, kind)]
    with torch.no_grad():
        weights = {id(layer.weight.quant_state): layer(torch.eye(layer.in_features)).T for layer in layers}
    packed = []

    @torch.no_grad()
    def kernel(states, weight, out=None, state=None):
        packed.append(state)
        return nn.functional.linear(states, weights[id(state)])

    monkeypatch.setattr(functional, "gemv_4bit", kernel)
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    expected = gradient(model)
    with torch.no_grad():
        model(**tiny.inputs(model))  # in training mode
    assert_near(gradient(model), expected, 1e-6)
    assert not packed
    with torch.no_grad():
        model.eval()(**tiny.inputs(model))
    assert packed
    with pytest.raises(EngineError, match=LOST):
        gradient(model.train())
