"""The adapters pass the conformance kit, family by family."""

from __future__ import annotations

import prefixkit_encoders
import pytest
import transformers

from prefixkit.testing import Conformance, Deviation

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 98,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout_prob": 0.0,
}
XLM_SIZES = {
    "vocab_size": 64,
    "emb_dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 98,
    "pad_token_id": 1,
    "pad_index": 1,
    "bos_index": 0,
    "eos_index": 2,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
BREAKS = "a state beside the call breaks torch.compile's graph, and the test asks for one graph"
OFFLOADED = "accelerate does not bring back a table that DeBERTa reads outside of its own call, prefix or not"
CONVOLUTION = "ConvBERT's convolution reads the tokens beside its own, padding and prompt too, prefix or not"
PAST_HOOKS = "SqueezeBERT calls its layers past their hooks, and FSDP2 gathers no weights, prefix or not"
COMPILED = (Deviation(BREAKS, "test_compiled_forward"),)


class Encoder(Conformance):
    adapter = next(prefixkit_encoders.prefixkit_adapters())
    deviations = COMPILED


class TestDebertaV2(Encoder):
    """As the published models are: no table, buckets, shared projections."""

    deviations = (*COMPILED, Deviation(OFFLOADED, "test_offloaded_prefix_is_refused"))

    def make_model(self):
        distances = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
        shared = {"norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False}
        config = transformers.DebertaV2Config(**SIZES, **distances, **shared)
        return transformers.DebertaV2ForMaskedLM(config)


class TestDeberta(Encoder):
    deviations = TestDebertaV2.deviations

    def make_model(self):
        distances = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
        return transformers.DebertaForMaskedLM(transformers.DebertaConfig(**SIZES, **distances))


class TestMPNet(Encoder):
    def make_model(self):
        return transformers.MPNetForMaskedLM(transformers.MPNetConfig(**SIZES))


class TestRoFormer(Encoder):
    def make_model(self):
        return transformers.RoFormerForMaskedLM(transformers.RoFormerConfig(**SIZES, rotary_value=True))


class TestMegatronBert(Encoder):
    def make_model(self):
        return transformers.MegatronBertForMaskedLM(transformers.MegatronBertConfig(**SIZES))


class TestRemBert(Encoder):
    def make_model(self):
        sizes = {"input_embedding_size": 16, "output_embedding_size": 24}
        return transformers.RemBertForMaskedLM(transformers.RemBertConfig(**SIZES, **sizes))


class TestLuke(Encoder):
    def make_model(self):
        sizes = {"entity_vocab_size": 20, "entity_emb_size": 16}
        return transformers.LukeForMaskedLM(transformers.LukeConfig(**SIZES, **sizes))


class TestConvBert(Encoder):
    deviations = (
        *COMPILED,
        Deviation(CONVOLUTION, "test_padding_is_not_seen"),
        Deviation(CONVOLUTION, "test_padded_rows_equal_rows_alone"),
        Deviation(CONVOLUTION, "test_prefix_of_a_text_is_that_text_as_a_prompt", {"positions": "shift"}),
    )

    def make_model(self):
        sizes = {"embedding_size": 32, "conv_kernel_size": 3}
        return transformers.ConvBertForMaskedLM(transformers.ConvBertConfig(**SIZES, **sizes))


class TestSqueezeBert(Encoder):
    deviations = (
        *COMPILED,
        Deviation(PAST_HOOKS, "test_shards_give_the_gradients_of_one_process"),
        Deviation(PAST_HOOKS, "test_sharded_model_saves_the_whole_prefix"),
    )

    def make_model(self):
        return transformers.SqueezeBertForMaskedLM(transformers.SqueezeBertConfig(**SIZES, embedding_size=32))


class TestIBert(Encoder):
    def make_model(self):
        return transformers.IBertForMaskedLM(transformers.IBertConfig(**SIZES))


class TestXLM(Encoder):
    def make_model(self):
        return transformers.XLMWithLMHeadModel(transformers.XLMConfig(**XLM_SIZES))


class TestFlaubert(Encoder):
    def make_model(self):
        return transformers.FlaubertWithLMHeadModel(transformers.FlaubertConfig(**XLM_SIZES))


class TestBigBird(Encoder):
    def make_model(self):
        config = transformers.BigBirdConfig(**SIZES, attention_type="original_full", sep_token_id=3)
        return transformers.BigBirdForMaskedLM(config)


class TestLayoutLMv3(Encoder):
    def make_model(self):
        sizes = {"coordinate_size": 6, "shape_size": 4, "visual_embed": False}
        return transformers.LayoutLMv3Model(transformers.LayoutLMv3Config(**SIZES, **sizes))
