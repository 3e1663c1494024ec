"""The conformance kit on a GPU: ``nox -s gpu``. Not run where there is none."""

from __future__ import annotations

import pytest
import test_conformance
import test_prefixkit_bart
import test_prefixkit_gpt2
import test_prefixkit_llama
import test_prefixkit_t5

pytestmark = pytest.mark.gpu


class TestGPT2OnGPU(test_prefixkit_gpt2.TestGPT2):
    device = "cuda"


class TestLlamaOnGPU(test_prefixkit_llama.TestLlama):
    device = "cuda"


class TestT5OnGPU(test_prefixkit_t5.TestT5):
    device = "cuda"


class TestBARTOnGPU(test_prefixkit_bart.TestBART):
    device = "cuda"


class TestMistralOnGPU(test_conformance.TestMistral):
    device = "cuda"


class TestGemma2OnGPU(test_conformance.TestGemma2):
    device = "cuda"


class TestGemma3OnGPU(test_conformance.TestGemma3):
    device = "cuda"


class TestQwen3OnGPU(test_conformance.TestQwen3):
    device = "cuda"


class TestGptOssOnGPU(test_conformance.TestGptOss):
    device = "cuda"


class TestBARTDecoderOnGPU(test_conformance.TestBARTDecoder):
    device = "cuda"


class TestBERTOnGPU(test_conformance.TestBERT):
    device = "cuda"


class TestRoBERTaOnGPU(test_conformance.TestRoBERTa):
    device = "cuda"
