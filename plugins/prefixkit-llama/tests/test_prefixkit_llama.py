"""The adapter passes the conformance kit."""

import prefixkit_llama
from transformers import LlamaConfig, LlamaForCausalLM

from prefixkit.testing import Conformance


class TestLlama(Conformance):
    adapter = next(prefixkit_llama.prefixkit_adapters())

    def make_model(self):
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=96, pad_token_id=1))
