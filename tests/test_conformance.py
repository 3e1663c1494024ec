"""The conformance kit on further models: windows, soft caps, sinks, norms on queries and keys, an encoder."""

from __future__ import annotations

import bert_adapter
import prefixkit_bart
import prefixkit_llama
import tiny
import transformers
from packaging.version import Version

from prefixkit.testing import Conformance, Deviation

OLD = Version(transformers.__version__) < Version("5.19")
NOT_CROPPED = (
    "transformers before 5.19 cannot crop a sliding cache that was filled before its first use; it ends in torch's "
    "error about sizes"
)


class LlamaLike(Conformance):
    adapter = next(prefixkit_llama.prefixkit_adapters())


class Windowed(LlamaLike):
    deviations = tuple(
        Deviation(NOT_CROPPED, test, {"engine": "cache"})
        for test in ("test_prompt_lookup", "test_assisted_decoding")
        if OLD
    )


class TestMistral(Windowed):
    def make_model(self):
        return tiny.MAKERS["mistral"]()


class TestGemma2(Windowed):
    def make_model(self):
        return tiny.MAKERS["gemma2"]()


class TestGemma3(Windowed):
    def make_model(self):
        return tiny.MAKERS["gemma3"]()


class TestQwen3(LlamaLike):
    def make_model(self):
        return tiny.MAKERS["qwen3"]()


class TestGptOss(Windowed):
    deviations = (
        *Windowed.deviations,
        Deviation(
            "transformers does not tell packed texts apart in gpt-oss, prefix or not",
            "test_packed_rows_equal_rows_apart",
            {"engine": "attention"},
        ),
    )

    def make_model(self):
        return tiny.MAKERS["gpt-oss"]()


class TestBARTDecoder(Conformance):
    """A decoder alone with a position table."""

    adapter = next(prefixkit_bart.prefixkit_adapters())

    def make_model(self):
        return tiny.MAKERS["bart-decoder"]()


class TestBERT(Conformance):
    adapter = bert_adapter.ADAPTER

    def make_model(self):
        return tiny.MAKERS["bert"]()


class TestRoBERTa(Conformance):
    """Position ids that start behind that of the padding."""

    adapter = bert_adapter.ADAPTER

    def make_model(self):
        return tiny.MAKERS["roberta"]()
