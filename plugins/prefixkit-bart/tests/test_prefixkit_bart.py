"""The adapter passes the conformance kit."""

import prefixkit_bart
from transformers import BartConfig, BartForConditionalGeneration

from prefixkit.testing import Conformance


class TestBART(Conformance):
    adapter = next(prefixkit_bart.prefixkit_adapters())

    def make_model(self):
        sizes = {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
        depths = {"encoder_layers": 2, "decoder_layers": 3, "max_position_embeddings": 96}
        quiet = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
        special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
        return BartForConditionalGeneration(BartConfig(**sizes, **heads, **depths, **quiet, **special))
