"""The conformance kit on a GPU: ``nox -s gpu``. Not run where there is none."""

from __future__ import annotations

import bert_adapter
import prefixkit_bart
import prefixkit_gpt2
import prefixkit_llama
import prefixkit_t5
import pytest
import tiny

from prefixkit.testing import Conformance, Deviation

pytestmark = pytest.mark.gpu


class OnGPU(Conformance):
    device = "cuda"


class LlamaLikeOnGPU(OnGPU):
    adapter = next(prefixkit_llama.prefixkit_adapters())


class TestGPT2OnGPU(OnGPU):
    adapter = next(prefixkit_gpt2.prefixkit_adapters())

    def make_model(self):
        return tiny.MAKERS["gpt2"]()


class TestLlamaOnGPU(LlamaLikeOnGPU):
    def make_model(self):
        return tiny.MAKERS["llama"]()


class TestT5OnGPU(OnGPU):
    adapter = next(prefixkit_t5.prefixkit_adapters())

    def make_model(self):
        return tiny.MAKERS["t5-deep-encoder"]()


class TestBARTOnGPU(OnGPU):
    adapter = next(prefixkit_bart.prefixkit_adapters())

    def make_model(self):
        return tiny.MAKERS["bart"]()


class TestMistralOnGPU(LlamaLikeOnGPU):
    def make_model(self):
        return tiny.MAKERS["mistral"]()


class TestGemma2OnGPU(LlamaLikeOnGPU):
    def make_model(self):
        return tiny.MAKERS["gemma2"]()


class TestGemma3OnGPU(LlamaLikeOnGPU):
    def make_model(self):
        return tiny.MAKERS["gemma3"]()


class TestQwen3OnGPU(LlamaLikeOnGPU):
    def make_model(self):
        return tiny.MAKERS["qwen3"]()


class TestGptOssOnGPU(LlamaLikeOnGPU):
    deviations = (
        Deviation(
            "transformers does not tell packed texts apart in gpt-oss, prefix or not",
            "test_packed_rows_equal_rows_apart",
            {"engine": "attention"},
        ),
    )

    def make_model(self):
        return tiny.MAKERS["gpt-oss"]()


class TestBertOnGPU(OnGPU):
    adapter = bert_adapter.ADAPTER

    def make_model(self):
        return tiny.MAKERS["bert"]()
