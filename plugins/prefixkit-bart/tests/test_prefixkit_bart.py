"""The adapter passes the conformance kit."""

import prefixkit_bart
import transformers
from packaging.version import Version
from transformers import BartConfig, BartForConditionalGeneration

from prefixkit.testing import Conformance, Deviation

VERSION = Version(transformers.__version__)
DENSE = "BART before transformers 5.0 takes no 4-D masks, with which this test hides the text from its prompt"
BESIDE = (
    "BART hands no keyword arguments down before transformers 5.5; a state beside the call breaks torch.compile's "
    "graph, and the test asks for one graph"
)
COMPILED = (
    ("test_compiled_forward", {"engine": "attention"}),
    ("test_compiled_static_cache", {"engine": "attention"}),
    ("test_compiled_training_step", {}),
)


class TestBART(Conformance):
    adapter = next(prefixkit_bart.prefixkit_adapters())
    deviations = (
        *([Deviation(DENSE, "test_prefix_of_a_text_is_that_text_as_a_prompt")] if Version("5.0") > VERSION else []),
        *([Deviation(BESIDE, *test) for test in COMPILED] if Version("5.5") > VERSION else []),
    )

    def make_model(self):
        sizes = {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
        depths = {"encoder_layers": 2, "decoder_layers": 3, "max_position_embeddings": 96}
        quiet = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
        special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
        return BartForConditionalGeneration(BartConfig(**sizes, **heads, **depths, **quiet, **special))
