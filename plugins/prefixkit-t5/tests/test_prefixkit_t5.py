"""The adapter passes the conformance kit."""

import prefixkit_t5
import transformers
from packaging.version import Version
from transformers import T5Config, T5ForConditionalGeneration

from prefixkit.testing import Conformance, Deviation

FLEX = "transformers gives T5's bias one row, and flex attention looks it up by row: batches fail, prefix or not"
VERSION = Version(transformers.__version__)
ON_INTERFACE = Version("5.15") <= VERSION
OLD = ON_INTERFACE and Version("5.21") > VERSION
ASSISTED = "transformers 5.15 to 5.20 fails in assisted decoding of T5, prefix or not"
CACHE = {"engine": "cache", "attention": "flex_attention"}
DENSE = "T5's cross-attention before transformers 5.0 takes no 4-D masks, with which this test hides text from a prompt"
PROMPT = ("test_prefix_of_a_text_is_that_text_as_a_prompt", {"positions": "shift"})
FLEX_TESTS = (
    ("test_prefix_of_a_text_is_that_text_as_a_prompt", {**CACHE, "positions": "shift"}),
    ("test_attention_implementations_agree", {"engine": "cache"}),
    ("test_padding_is_not_seen", CACHE),
)


class TestT5(Conformance):
    adapter = next(prefixkit_t5.prefixkit_adapters())
    deviations = (
        *([Deviation(ASSISTED, "test_assisted_decoding")] if OLD else []),
        *([Deviation(DENSE, *PROMPT)] if Version("5.0") > VERSION else []),
        *([Deviation(FLEX, *test) for test in FLEX_TESTS] if ON_INTERFACE else []),
    )

    if OLD:  # the same, but only for some texts
        test_prompt_lookup = None

    def make_model(self):
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 12, "num_heads": 4, "d_ff": 48, "dropout_rate": 0.0}
        # Few buckets, so that distances within a test fall into many of them.
        buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
        # transformers sizes T5's caches by the encoder: a deeper decoder fails in generate, prefix or not.
        depths = {"num_layers": 3, "num_decoder_layers": 2}
        special = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
        return T5ForConditionalGeneration(T5Config(**sizes, **buckets, **depths, **special))
