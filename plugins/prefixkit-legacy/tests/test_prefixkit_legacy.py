"""The adapters pass the conformance kit, each on a tiny model of its family."""

import prefixkit_legacy
import pytest
import transformers

from prefixkit.testing import Conformance, Deviation

ADAPTERS = {name: adapter for adapter in prefixkit_legacy.prefixkit_adapters() for name in adapter.model_types}
SPECIAL = {"vocab_size": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
GPT = {"n_positions": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}
HIDDEN = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

ONE_GRAPH = tuple(
    Deviation("a state beside the call breaks torch.compile's graph, and the test asks for one graph", test, parameters)
    for test, parameters in (
        ("test_compiled_forward", {"engine": "attention"}),
        ("test_compiled_static_cache", {"engine": "attention"}),
    )
)
UNPACKED = (
    Deviation(
        "transformers does not tell packed texts apart in this model, prefix or not",
        "test_packed_rows_equal_rows_apart",
        {"engine": "attention"},
    ),
)


class Legacy(Conformance):
    """Attention off the interface."""

    deviations = ONE_GRAPH


@pytest.mark.filterwarnings(
    "ignore:.*Function.* should not be instantiated:DeprecationWarning"
)  # Dynamo does, for GELU
class TestBLOOM(Legacy):
    adapter = ADAPTERS["bloom"]

    def make_model(self):
        sizes = {"hidden_size": 32, "n_layer": 3, "n_head": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0}
        return transformers.BloomForCausalLM(transformers.BloomConfig(**SPECIAL, **sizes))


@pytest.mark.rare
class TestMPT(Legacy):
    adapter = ADAPTERS["mpt"]

    def make_model(self):
        sizes = {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 128,
            "expansion_ratio": 2,
            "use_cache": True,
        }
        return transformers.MptForCausalLM(transformers.MptConfig(**SPECIAL, **sizes))


class Falcon(Legacy):
    adapter = ADAPTERS["falcon"]
    deviations = (*ONE_GRAPH, *UNPACKED)

    @staticmethod
    def falcon(attention="sdpa", **shape):
        config = transformers.FalconConfig(**SPECIAL, **HIDDEN, **shape, max_position_embeddings=96)
        config._attn_implementation = attention  # transformers takes it for Falcon when a model is made, not later
        return transformers.FalconForCausalLM(config)


class TestFalcon(Falcon):
    """One head of keys for all queries."""

    def make_model(self):
        return self.falcon()


LOADED = Deviation(
    "transformers loads a Falcon with sdpa, and the one here has eager attention, whose last bits differ",
    "test_base_saves_as_if_there_had_been_no_prefix",
)


@pytest.mark.rare
class TestFalconGroups(Falcon):
    """Groups of heads, which Falcon repeats before it caches them."""

    deviations = (*Falcon.deviations, LOADED)

    def make_model(self):
        return self.falcon("eager", new_decoder_architecture=True, num_kv_heads=2)


@pytest.mark.rare
class TestFalconALiBi(Falcon):
    deviations = (
        *Falcon.deviations,
        Deviation(UNPACKED[0].reason, UNPACKED[0].test, {"engine": "cache", "positions": "shift"}),
        Deviation(
            "transformers cannot make the linear bias of a Falcon with a static cache, prefix or not",
            "test_static_cache",
            {"engine": "attention"},
        ),
    )

    def make_model(self):
        return self.falcon(alibi=True, multi_query=False, parallel_attn=False, bias=True)


@pytest.mark.rare
class TestFalconALiBiEager(Falcon):
    """Its eager attention adds the bias twice."""

    deviations = (*TestFalconALiBi.deviations, LOADED)

    def make_model(self):
        return self.falcon("eager", alibi=True, multi_query=False, parallel_attn=False, bias=True)


class TestGPTJ(Legacy):
    adapter = ADAPTERS["gptj"]

    def make_model(self):
        return transformers.GPTJForCausalLM(transformers.GPTJConfig(**SPECIAL, **GPT, **QUIET))


@pytest.mark.rare
class TestCodeGen(Legacy):
    adapter = ADAPTERS["codegen"]

    def make_model(self):
        return transformers.CodeGenForCausalLM(transformers.CodeGenConfig(**SPECIAL, **GPT, **QUIET, n_ctx=96))


@pytest.mark.rare
class TestGPTNeo(Legacy):
    adapter = ADAPTERS["gpt_neo"]

    def make_model(self):
        sizes = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 96}
        windows = {"attention_types": [[["global", "local"], 1], [["local"], 1]], "window_size": 4}
        return transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**SPECIAL, **sizes, **windows))


@pytest.mark.rare
class TestGPTNeoXJapanese(Legacy):
    adapter = ADAPTERS["gpt_neox_japanese"]

    def make_model(self):
        sizes = {**HIDDEN, "intermediate_multiple_size": 2, "max_position_embeddings": 96}
        quiet = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
        config = transformers.GPTNeoXJapaneseConfig(**SPECIAL, **sizes, **quiet)
        return transformers.GPTNeoXJapaneseForCausalLM(config)


@pytest.mark.rare
class TestXGLM(Legacy):
    adapter = ADAPTERS["xglm"]
    deviations = (*ONE_GRAPH, *UNPACKED)

    def make_model(self):
        sizes = {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4, "max_position_embeddings": 96}
        quiet = {"dropout": 0.0, "attention_dropout": 0.0}
        return transformers.XGLMForCausalLM(transformers.XGLMConfig(**SPECIAL, **sizes, **quiet))
