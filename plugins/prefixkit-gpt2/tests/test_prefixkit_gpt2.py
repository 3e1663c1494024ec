"""The adapter passes the conformance kit."""

import prefixkit_gpt2
from transformers import GPT2Config, GPT2LMHeadModel

from prefixkit.testing import Conformance


class TestGPT2(Conformance):
    adapter = next(prefixkit_gpt2.prefixkit_adapters())

    def make_model(self):
        sizes = {"vocab_size": 64, "n_positions": 96, "n_embd": 32, "n_layer": 3, "n_head": 4}
        return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, pad_token_id=1))
