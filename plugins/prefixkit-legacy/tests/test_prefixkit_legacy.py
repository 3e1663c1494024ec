"""The adapters pass the conformance kit, each on a tiny model of its family."""

import prefixkit_legacy
import transformers

from prefixkit.testing import Conformance, Deviation

ADAPTERS = {name: adapter for adapter in prefixkit_legacy.prefixkit_adapters() for name in adapter.model_types}
SPECIAL = {"vocab_size": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
GPT = {"n_positions": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}
HIDDEN = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class TestBLOOM(Conformance):
    adapter = ADAPTERS["bloom"]

    def make_model(self):
        sizes = {"hidden_size": 32, "n_layer": 3, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0}
        return transformers.BloomForCausalLM(transformers.BloomConfig(**SPECIAL, **sizes))


class TestMPT(Conformance):
    adapter = ADAPTERS["mpt"]

    def make_model(self):
        sizes = {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128, "expansion_ratio": 2}
        return transformers.MptForCausalLM(transformers.MptConfig(**SPECIAL, **sizes))


class Falcon(Conformance):
    adapter = ADAPTERS["falcon"]

    @staticmethod
    def falcon(attention="sdpa", **shape):
        config = transformers.FalconConfig(**SPECIAL, **HIDDEN, **shape, max_position_embeddings=96)
        config._attn_implementation = attention  # transformers takes it for Falcon when a model is made, not later
        return transformers.FalconForCausalLM(config)


class TestFalcon(Falcon):
    """One head of keys for all queries."""

    def make_model(self):
        return self.falcon()


class TestFalconGroups(Falcon):
    """Groups of heads, which Falcon repeats before it caches them."""

    def make_model(self):
        return self.falcon("eager", new_decoder_architecture=True, num_kv_heads=2)


class TestFalconALiBi(Falcon):
    def make_model(self):
        return self.falcon(alibi=True, multi_query=False, parallel_attn=False, bias=True)


class TestGPTJ(Conformance):
    adapter = ADAPTERS["gptj"]

    def make_model(self):
        return transformers.GPTJForCausalLM(transformers.GPTJConfig(**SPECIAL, **GPT, **QUIET))


class TestCodeGen(Conformance):
    adapter = ADAPTERS["codegen"]

    def make_model(self):
        return transformers.CodeGenForCausalLM(transformers.CodeGenConfig(**SPECIAL, **GPT, **QUIET, n_ctx=96))


class TestGPTNeo(Conformance):
    adapter = ADAPTERS["gpt_neo"]

    def make_model(self):
        sizes = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 96}
        windows = {"attention_types": [[["global", "local"], 1], [["local"], 1]], "window_size": 4}
        return transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**SPECIAL, **sizes, **windows))


class TestGPTNeoXJapanese(Conformance):
    adapter = ADAPTERS["gpt_neox_japanese"]

    def make_model(self):
        sizes = {**HIDDEN, "intermediate_multiple_size": 2, "max_position_embeddings": 96}
        quiet = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
        config = transformers.GPTNeoXJapaneseConfig(**SPECIAL, **sizes, **quiet)
        return transformers.GPTNeoXJapaneseForCausalLM(config)


class TestXGLM(Conformance):
    adapter = ADAPTERS["xglm"]

    def make_model(self):
        sizes = {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4, "max_position_embeddings": 96}
        quiet = {"dropout": 0.0, "attention_dropout": 0.0}
        return transformers.XGLMForCausalLM(transformers.XGLMConfig(**SPECIAL, **sizes, **quiet))
