"""The right subjects: what is wrong is one change to one of these, and each has to pass on its own."""

from __future__ import annotations

from typing import Any, ClassVar

import bert_adapter
import prefixkit_bart
import prefixkit_gpt2
import prefixkit_llama
import prefixkit_t5
import pytest
import test_prefixkit_legacy
import tiny
from transformers import (
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5ForConditionalGeneration,
)

from prefixkit import Adapter
from prefixkit.errors import PrefixkitError
from prefixkit.testing import Conformance


class Subject(Conformance):
    """A conformance class that says which tests must fail.

    Attributes:
        caught_by: Tests that must fail, each for at least one set of parameters; by name, or by name and
            parameters where only those can.
        fails_with: The exceptions that count. Any other is a crash, and proves nothing.
    """

    caught_by: ClassVar[tuple[str, ...]] = ()
    fails_with: ClassVar[tuple[type[BaseException], ...]] = (AssertionError, pytest.fail.Exception, PrefixkitError)

    def __init_subclass__(cls, **options: Any) -> None:
        """Look at each model once; what is one change away from a right subject has its tests."""
        if "make_model" in cls.__dict__:
            super().__init_subclass__(**options)

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make the library wrong for the time of a test."""

    @pytest.fixture(autouse=True)
    def _planted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plant(monkeypatch)


def adapter_of(plugin: Any) -> Adapter:
    """The one adapter of a plugin."""
    return next(plugin.prefixkit_adapters())


class GPT2(Subject):
    adapter = adapter_of(prefixkit_gpt2)

    def make_model(self):
        return GPT2LMHeadModel(tiny.gpt2())


class Llama(Subject):
    adapter = adapter_of(prefixkit_llama)

    def make_model(self):
        return LlamaForCausalLM(LlamaConfig(**tiny.llama_sizes()))


class Qwen3(Subject):
    """Its heads are wider than hidden_size / heads."""

    adapter = adapter_of(prefixkit_llama)

    def make_model(self):
        return Qwen3ForCausalLM(Qwen3Config(**tiny.llama_sizes(head_dim=12)))


class Mistral(Subject):
    """A window in every layer."""

    adapter = adapter_of(prefixkit_llama)

    def make_model(self):
        return MistralForCausalLM(MistralConfig(**tiny.llama_sizes(sliding_window=4)))


class Gemma2(Subject):
    """A window in every second layer."""

    adapter = adapter_of(prefixkit_llama)

    def make_model(self):
        changes = {"sliding_window": 4, "head_dim": 8, "query_pre_attn_scalar": 8}
        return Gemma2ForCausalLM(Gemma2Config(**tiny.llama_sizes(**changes)))


class T5(Subject):
    """Relative positions; its encoder is deeper than its decoder."""

    adapter = adapter_of(prefixkit_t5)

    def make_model(self):
        return T5ForConditionalGeneration(tiny.t5(num_layers=3, num_decoder_layers=2))


class Bart(Subject):
    """Positions in a table; heads in its encoder and decoder differ."""

    adapter = adapter_of(prefixkit_bart)

    def make_model(self):
        return BartForConditionalGeneration(tiny.bart())


class BartDecoder(Subject):
    """BART's decoder alone."""

    adapter = adapter_of(prefixkit_bart)

    def make_model(self):
        return BartForCausalLM(tiny.bart(encoder_layers=3, is_decoder=True, is_encoder_decoder=False))


class Bert(Subject):
    adapter = bert_adapter.ADAPTER

    def make_model(self):
        sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": tiny.PAD}
        return BertForMaskedLM(BertConfig(**sizes, **quiet, num_attention_heads=4, max_position_embeddings=96))


class GptJ(Subject):
    """Its attention is not on the interface."""

    adapter = test_prefixkit_legacy.TestGPTJ.adapter

    def make_model(self):
        return test_prefixkit_legacy.TestGPTJ.make_model(self)


class GptNeo(Subject):
    """Nor is this one's, and it has windows."""

    adapter = test_prefixkit_legacy.TestGPTNeo.adapter

    def make_model(self):
        return test_prefixkit_legacy.TestGPTNeo.make_model(self)


class Bloom(Subject):
    """A linear bias."""

    adapter = test_prefixkit_legacy.TestBLOOM.adapter

    def make_model(self):
        return test_prefixkit_legacy.TestBLOOM.make_model(self)


class Mpt(Subject):
    """A linear bias that counts padding."""

    adapter = test_prefixkit_legacy.TestMPT.adapter

    def make_model(self):
        return test_prefixkit_legacy.TestMPT.make_model(self)
