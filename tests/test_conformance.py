"""The conformance kit on further models: windows, soft caps, sinks, norms on queries and keys, an encoder."""

from __future__ import annotations

from dataclasses import replace

import bert_adapter
import prefixkit_bart
import prefixkit_llama
import prefixkit_t5
import pytest
import test_prefixkit_bart
import test_prefixkit_legacy
import test_prefixkit_t5
import tiny
import trocr_adapter
from architectures.tiny_models import build
from changed_adapters import with_site_forward
from test_prefixkit_bart import BESIDE, COMPILED
from versions import within

from prefixkit import attention_in_parts
from prefixkit.testing import Conformance, Deviation

ON_INTERFACE_BERT = not within("4", "5.0")
"""Before, an encoder alone is served by neither engine: test_refusals has the error."""
CROPS = ("test_prompt_lookup", "test_assisted_decoding")
NOT_CROPPED = (
    "transformers 5.15 to 5.18 cannot crop a sliding cache that was filled before its first use; it ends in torch's "
    "error about sizes"
)
NEVER_CROPPED = "transformers 5.0 cannot crop a sliding cache once it is full, prefix or not"
NOT_COMPILED = "transformers before 5.5 has a gpt-oss that torch.compile cannot have in one graph, prefix or not"
EXPERTS = "transformers 5.0 generates with no gpt-oss whose class FSDP2 has renamed, prefix or not"
FLEX_CACHE = "transformers 4 gives BART with a cache a block mask of the wrong size under flex attention, prefix or not"
FLEX_CACHE_TESTS = (
    ("test_attention_implementations_agree", {"engine": "cache"}),
    ("test_padding_is_not_seen", {"engine": "cache", "attention": "flex_attention"}),
    ("test_a_later_token_changes_no_earlier_output", {"engine": "cache", "attention": "flex_attention"}),
    ("test_prefix_of_a_text_is_that_text_as_a_prompt", {"engine": "cache", "attention": "flex_attention"}),
)


def beside(adapter):
    """An adapter that says of its stacks that they hand nothing down."""

    def stacks(model):
        return [replace(stack, hands_down=False) for stack in adapter.stacks(model)]

    return replace(adapter, stacks=stacks)


class LlamaLike(Conformance):
    adapter = next(prefixkit_llama.prefixkit_adapters())


class Windowed(LlamaLike):
    deviations = (
        *(Deviation(NOT_CROPPED, test, {"engine": "cache"}) for test in CROPS if within("5.15", "5.19")),
        *(Deviation(NEVER_CROPPED, test) for test in CROPS if within("5.0", "5.5")),
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
        *([Deviation(NOT_COMPILED, "test_compiled_forward", {"engine": "attention"})] if within("4", "5.5") else []),
        *([Deviation(NOT_COMPILED, "test_compiled_forward", {"engine": "cache"})] if within("5.0", "5.5") else []),
        *([Deviation(EXPERTS, "test_sharded_model_generates")] if within("5.0", "5.5") else []),
    )

    def make_model(self):
        return tiny.MAKERS["gpt-oss"]()


class TestBARTDecoder(Conformance):
    """A decoder alone with a position table."""

    adapter = next(prefixkit_bart.prefixkit_adapters())
    deviations = (
        *([Deviation(BESIDE, *test) for test in COMPILED] if within("4", "5.5") else []),
        *([Deviation(FLEX_CACHE, *test) for test in FLEX_CACHE_TESTS] if within("4", "5.0") else []),
    )

    def make_model(self):
        return tiny.MAKERS["bart-decoder"]()


if ON_INTERFACE_BERT:

    class TestBERT(Conformance):
        adapter = bert_adapter.ADAPTER

        def make_model(self):
            return tiny.MAKERS["bert"]()

    class TestRoBERTa(Conformance):
        """Position ids that start behind that of the padding."""

        adapter = bert_adapter.ADAPTER

        def make_model(self):
            return tiny.MAKERS["roberta"]()


class TestGPTJThroughTheCache(Conformance):
    """An adapter that brings no attention for a model off the interface: the cache engine alone."""

    adapter = with_site_forward(test_prefixkit_legacy.TestGPTJ.adapter, None)

    def make_model(self):
        return test_prefixkit_legacy.TestGPTJ.make_model(self)


class TestLlamaBeside(LlamaLike):
    """The prefix travels beside the call, as for stacks that hand no keyword arguments down."""

    adapter = beside(next(prefixkit_llama.prefixkit_adapters()))
    deviations = tuple(
        Deviation(
            "a state beside the call breaks torch.compile's graph, and the test asks for one graph", test, parameters
        )
        for test, parameters in (
            ("test_compiled_forward", {"engine": "attention"}),
            ("test_compiled_static_cache", {"engine": "attention"}),
        )
    )

    def make_model(self):
        return tiny.MAKERS["llama"]()


class TestT5Beside(Conformance):
    """The same in two stacks, with a bias."""

    adapter = beside(next(prefixkit_t5.prefixkit_adapters()))
    deviations = (*test_prefixkit_t5.TestT5.deviations, *TestLlamaBeside.deviations)

    def make_model(self):
        return test_prefixkit_t5.TestT5.make_model(self)


@pytest.fixture
def in_parts(monkeypatch):
    """Attention in two parts, however small they are."""
    monkeypatch.setattr(attention_in_parts, "MANY_TOKENS", 0)
    monkeypatch.setattr(attention_in_parts, "MANY_BYTES", 0)


@pytest.mark.rare
@pytest.mark.usefixtures("in_parts")
class TestLlamaInParts(LlamaLike):
    """Attention to the prefix apart from attention to each row's own keys, with heads that share keys."""

    adapter = next(prefixkit_llama.prefixkit_adapters())

    def make_model(self):
        return tiny.MAKERS["llama"]()


@pytest.mark.rare
@pytest.mark.usefixtures("in_parts")
class TestBartInParts(Conformance):
    """The same in an encoder, a decoder and cross-attention."""

    adapter = next(prefixkit_bart.prefixkit_adapters())
    deviations = test_prefixkit_bart.TestBART.deviations

    def make_model(self):
        return test_prefixkit_bart.TestBART.make_model(self)


@pytest.mark.rare
class TestTrOCR(Conformance):
    """A table of positions, off the interface."""

    adapter = trocr_adapter.ADAPTER
    deviations = TestLlamaBeside.deviations

    def make_model(self):
        return build("causal", "trocr").model
