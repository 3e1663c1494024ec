"""The prefix in llama.cpp: its files, read by a plain reader, and what llama.cpp makes of them.

Every way to lose or bend the prefix there that is known without a word of llama.cpp's is planted, and has to be found.
"""

from __future__ import annotations

import ctypes
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny
import to_gguf
import tokenizers
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

import prefixkit
from prefixkit.errors import CheckpointError, ConfigError, EngineError, VerificationError
from prefixkit.serving import llama_cpp as target
from prefixkit.serving.llama_cpp import gguf_file, running
from prefixkit.serving.llama_cpp.state_file import Layout
from prefixkit.serving.verdict import answers_of
from prefixkit.testing.subject import strengthen

pytest.importorskip("gguf", reason="a GGUF is read by the package gguf: nox -s llama_cpp")

TOKENS = 5
WINDOW = 4
PROMPT = (11, 12, 13, 14, 15, 16)
NEW = 8
LAYOUTS = [Layout(dtype, flash) for dtype in ("f32", "f16") for flash in (False, True)]
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
PAGE = Path(__file__).parents[1] / "docs/how-to/serve-llama-cpp.md"
BLOCKS = re.compile(r"<!-- not run: needs ([^\n]+) -->\n```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"\b\d+(\.\d+)?(e-?\d+)?\b")
DTYPES = {0: np.dtype("<f4"), 1: np.dtype("<f2")}


@pytest.fixture
def llama():
    """The program."""
    return pytest.importorskip("llama_cpp", reason="llama.cpp is run by llama-cpp-python: nox -s llama_cpp")


def make(name, **changes):
    if name == "qwen2":
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**tiny.llama_sizes(**changes))).eval()
    elif name == "gemma3":  # llama.cpp has every sixth layer without a window, whatever the file says
        kinds = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"]
        sizes = {"sliding_window": WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": kinds}
        rope = {"rope_theta": 1e6, "rope_type": "default"}, {"rope_theta": 1e4, "rope_type": "default"}
        sizes["rope_parameters"] = dict(zip(("full_attention", "sliding_attention"), rope, strict=True))
        config = tiny.Gemma3TextConfig(**{**tiny.llama_sizes(num_hidden_layers=7), **sizes, **changes})
        torch.manual_seed(0)
        model = tiny.Gemma3ForCausalLM(config).eval()
    else:
        return tiny.make(name, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)  # biases too
    return model


def with_prefix(model, **options):
    prefixkit.apply(model, **{"num_virtual_tokens": TOKENS, "window": "slide", **options})
    strengthen(model)
    return model


@pytest.fixture
def written(tmp_path):
    """A LLaMA with grouped queries and a prefix, its GGUF, and the folder for llama.cpp."""
    model = with_prefix(make("llama"))
    path = to_gguf.convert(model, tmp_path / "base.gguf")
    target.write(model, tmp_path / "out", gguf=path)
    return model, path, tmp_path / "out"


class Reader:
    """A state file, number by number."""

    def __init__(self, content):
        self.content, self.at = content, 0
        magic, version, count = self.take("3I")
        assert (magic.to_bytes(4, "big"), version) == (b"ggsq", 3)
        self.tokens = list(self.take(f"{count}i"))
        self.bodies = []
        while self.at < len(content):
            self.bodies.append(self.body())

    def take(self, kinds):
        values = struct.unpack_from("<" + kinds, self.content, self.at)
        self.at += struct.calcsize("<" + kinds)
        return values

    def block(self, kind, shape):
        dtype, count = DTYPES[kind], int(np.prod(shape))
        found = np.frombuffer(self.content, dtype, count, self.at).reshape(shape)
        self.at += count * dtype.itemsize
        return found.astype(np.float32)

    def body(self):
        (streams,) = self.take("I")
        (cells,) = self.take("I")
        places = []
        for _ in range(cells):
            place, sequences, _ = self.take("iIi")
            assert sequences == 1
            places.append(place)
        transposed, layers = self.take("II")
        keys = [self.rows(cells) for _ in range(layers)]
        values = [self.columns(cells) if transposed else self.rows(cells) for _ in range(layers)]
        assert self.take(f"{streams - 1}I") == (0,) * (streams - 1)
        return {"streams": streams, "places": places, "transposed": transposed, "keys": keys, "values": values}

    def rows(self, cells):
        kind, size = self.take("iQ")
        return kind, self.block(kind, (cells, size // DTYPES[kind].itemsize))

    def columns(self, cells):
        kind, size, count = self.take("iII")
        assert size == DTYPES[kind].itemsize
        return kind, self.block(kind, (count, cells)).T


def is_coarse(name, layout):
    """Whether llama.cpp computes with float16: in its cache, in flash attention, or in a table of GELU."""
    return layout.dtype == "f16" or layout.flash or name == "gemma3"


def read(folder, layout):
    return Reader((folder / layout.file).read_bytes())


def as_rows(part, *, neighbours):
    """``(kv_heads, P, dim)`` of the export file as ``(P, kv_heads × dim)``, number by number."""
    heads, tokens, dim = part.shape
    rows = np.empty((tokens, heads * dim), dtype=np.float32)
    for head in range(heads):
        for index in range(dim):
            place = 2 * (index % (dim // 2)) + index // (dim // 2) if neighbours else index
            rows[:, head * dim + place] = part[head, :, index]
    return rows


def exported(model, path):
    prefixkit.export(model, path, positions="shift")
    return load_file(path)


@pytest.mark.parametrize("positions", ["shift", "none"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.file)
@pytest.mark.parametrize("name", ["llama", "llama-mqa", "qwen2", "qwen3"])
def test_a_file_has_the_numbers_of_the_export(name, layout, positions, tmp_path):
    model = with_prefix(make(name), positions=positions)
    path = to_gguf.convert(model, tmp_path / "base.gguf")
    target.write(model, tmp_path / "out", gguf=path)
    found, wanted = read(tmp_path / "out", layout), exported(model, tmp_path / "p")
    (body,) = found.bodies
    assert (body["streams"], body["places"], body["transposed"]) == (1, list(range(TOKENS)), not layout.flash)
    kind = {"f32": 0, "f16": 1}[layout.dtype]
    assert len(body["keys"]) == len(body["values"]) == model.config.num_hidden_layers
    for layer, ((key_kind, key), (value_kind, value)) in enumerate(zip(body["keys"], body["values"], strict=True)):
        assert (key_kind, value_kind) == (kind, kind)
        ours = as_rows(wanted[f"decoder.{layer}.key"], neighbours=name.startswith("llama"))
        np.testing.assert_array_equal(key, ours.astype(DTYPES[kind]).astype(np.float32))
        ours = as_rows(wanted[f"decoder.{layer}.value"], neighbours=False)
        np.testing.assert_array_equal(value, ours.astype(DTYPES[kind]).astype(np.float32))


@pytest.mark.parametrize("tokens", [3, WINDOW, 9])
def test_layers_with_a_window_have_a_body_of_their_own(tokens, tmp_path):
    """It comes second, and has no more tokens than the window."""
    model = with_prefix(make("gemma3"), num_virtual_tokens=tokens)
    path = to_gguf.convert(model, tmp_path / "base.gguf")
    target.write(model, tmp_path / "out", gguf=path)
    wanted = exported(model, tmp_path / "p")
    whole, windowed = read(tmp_path / "out", Layout("f32", flash=True)).bodies
    assert whole["places"] == list(range(tokens))
    assert windowed["places"] == list(range(max(0, tokens - WINDOW), tokens))
    for layers, body in (([5], whole), ([0, 1, 2, 3, 4, 6], windowed)):
        for layer, (_, key), (_, value) in zip(layers, body["keys"], body["values"], strict=True):
            ours = as_rows(wanted[f"decoder.{layer}.key"], neighbours=False)
            np.testing.assert_array_equal(key, ours[-len(body["places"]) :])
            ours = as_rows(wanted[f"decoder.{layer}.value"], neighbours=False)
            np.testing.assert_array_equal(value, ours[-len(body["places"]) :])


@pytest.mark.parametrize("quantised", ["", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_order_of_keys_is_read_off_the_weights(name, permute, quantised, tmp_path):
    """Not off the model's name: a converter may do as it likes."""
    model = make(name)
    path = to_gguf.convert(model, tmp_path / "base.gguf", permute=permute, quantised=quantised)
    found = gguf_file.order_of(gguf_file.GgufFile(path), model, prefixkit.sites(model))
    assert found == ("neighbours" if permute else "halves")


def test_another_base_is_refused(tmp_path):
    path = to_gguf.convert(make("llama", seed=1), tmp_path / "base.gguf")
    with pytest.raises(EngineError, match="is not the model's key projection, in none of the orders halves, neighb"):
        target.write(with_prefix(make("llama")), tmp_path / "out", gguf=path)
    for changes, message in (
        ({"num_hidden_layers": 2}, "'base.gguf' has 3 layers, and the prefix 2"),
        ({"num_key_value_heads": 4}, r"is \(16, 32\), and the model's own key projection \(32, 32\)"),
    ):
        with pytest.raises(EngineError, match=message):
            target.write(with_prefix(make("llama", **changes)), tmp_path / "out", gguf=path)
    assert not (tmp_path / "out").exists()


def test_a_gguf_with_other_windows_is_refused(tmp_path):
    """llama.cpp reads this model without any window."""
    model = with_prefix(make("gemma3"))
    kinds, model.config.layer_types = model.config.layer_types, None
    path = to_gguf.convert(model, tmp_path / "base.gguf")
    model.config.layer_types = kinds
    with pytest.raises(EngineError, match=r"of no tokens in 'base.gguf', and of \[4\] in the model"):
        target.write(model, tmp_path / "out", gguf=path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "llama",
            {"gate": True, "positions": "none"},
            "a native cache holds keys and values only, no gate and no memory",
        ),
        ("llama", {"infix": True}, "cannot hide an infix"),
        ("llama", {"layers": [0, 2]}, "a prefix in every layer, of one length"),
        ("llama", {"layer_tokens": {1: 3}}, "a prefix in every layer, of one length"),
        ("gemma3", {"window": "pinned"}, "cannot keep a prefix in sight of a sliding window; apply the prefix with"),
        ("bart", {}, "this model has cross, encoder as well"),
        ("bart", {"stacks": ["decoder"]}, "this model has an encoder as well"),
        ("gpt2", {"positions": "none"}, "keys cannot be turned"),
        ("gpt2", {}, "has no 'blk.0.attn_k.weight'|has no key projection k_proj"),
    ],
)
def test_a_prefix_that_llama_cpp_cannot_hold(name, options, message, tmp_path):
    path = to_gguf.convert(make("gemma3" if name == "gemma3" else "llama"), tmp_path / "base.gguf")
    model = make(name)
    prefixkit.apply(model, num_virtual_tokens=TOKENS, **options)
    with pytest.raises(EngineError, match=message):
        target.write(model, tmp_path / "out", gguf=path)
    assert not (tmp_path / "out").exists()


def test_a_head_is_not_in_a_gguf(tmp_path):
    config = tiny.LlamaConfig(**tiny.llama_sizes(num_labels=3))
    model = tiny.transformers.LlamaForSequenceClassification(config).eval()
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    path = to_gguf.convert(make("llama"), tmp_path / "base.gguf")
    with pytest.raises(EngineError, match=r"^the head \(score\) trained with the prefix"):
        target.write(model, tmp_path / "out", gguf=path)


def test_wrong_options(written, tmp_path):
    model, path, _ = written
    for options, error, message in (
        ({"gguf": tmp_path / "none.gguf"}, CheckpointError, "there is no file"),
        ({"gguf": to_gguf.__file__}, CheckpointError, "is no whole GGUF"),
        ({"dtypes": []}, ConfigError, "dtypes is empty; possible: f32, f16"),
        ({"dtypes": ["q8_0"]}, ConfigError, "the type of a cache is 'q8_0'; possible: f32, f16"),
        ({"streams": 0}, ConfigError, "streams is 0"),
        ({"placeholders": [1, 2]}, ConfigError, "2 placeholders were given, and the prefix has 5 virtual tokens"),
    ):
        with pytest.raises(error, match=message):
            target.write(model, tmp_path / "new", **{"gguf": path, **options})
    with pytest.raises(CheckpointError, match="it is a file; name a folder"):
        target.write(model, path, gguf=path)
    assert not (tmp_path / "new").exists()


def test_a_number_that_float16_does_not_have(written, tmp_path):
    model, path, _ = written
    with torch.no_grad():
        next(model.prefixkit.parameters())[0, 0] = 7e4
    with pytest.raises(EngineError, match=r"as large as 7e\+04 is not finite in torch.float16; write dtypes"):
        target.write(model, tmp_path / "new", gguf=path)
    target.write(model, tmp_path / "new", gguf=path, dtypes=["f32"])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "llama_cpp.json", "prefix.f32.bin", "prefix.f32.flash.bin"
    ]  # fmt: skip


def test_placeholders(written, tmp_path):
    """Words, the same for the same prefix and others for another; or those that are given."""
    model, path, folder = written
    first = json.loads((folder / "llama_cpp.json").read_text())
    assert first["placeholders"] == read(folder, Layout()).tokens
    assert all(to_gguf.SPECIAL <= token < tiny.VOCAB for token in first["placeholders"])
    assert (first["text_starts_at"], first["order_of_keys"]) == (TOKENS, "neighbours")
    target.write(model, tmp_path / "again", gguf=path)
    assert json.loads((tmp_path / "again" / "llama_cpp.json").read_text()) == first
    with torch.no_grad():
        next(model.prefixkit.parameters())[0, 0] += 1
    target.write(model, tmp_path / "other", gguf=path)
    assert read(tmp_path / "other", Layout()).tokens != first["placeholders"]
    target.write(model, tmp_path / "given", gguf=path, placeholders=[7] * TOKENS)
    assert read(tmp_path / "given", Layout()).tokens == [7] * TOKENS


def test_streams(written, tmp_path):
    model, path, folder = written
    target.write(model, tmp_path / "four", gguf=path, streams=4)
    (body,) = read(tmp_path / "four", Layout()).bodies
    (alone,) = read(folder, Layout()).bodies
    assert (body["streams"], body["places"]) == (4, alone["places"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.file)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_is_what_llama_cpp_itself_saves(llama, name, layout, tmp_path):
    """A prefix that was read off a text is the state of a llama.cpp that has read the text."""
    model, text = make(name), [21, 22, 23, 24, 25]
    path = to_gguf.convert(model, tmp_path / "base.gguf")
    with torch.no_grad():
        cache = model(torch.tensor([text]), past_key_values=tiny.transformers.DynamicCache()).past_key_values
    prefixkit.apply(model, num_virtual_tokens=TOKENS, window="slide", init=cache)
    target.write(model, tmp_path / "out", gguf=path, placeholders=text)
    with running.started(path, layout, 64, 1) as program:
        program.eval(text)
        ids = (llama.llama_token * len(text))(*text)
        saved = str(tmp_path / "saved.bin").encode()
        assert llama.llama_state_seq_save_file(program.ctx, saved, 0, ids, len(text))
    content = (tmp_path / "saved.bin").read_bytes()
    assert len(content) == (tmp_path / "out" / layout.file).stat().st_size
    theirs, ours = Reader(content), read(tmp_path / "out", layout)
    assert (theirs.tokens, len(theirs.bodies)) == (ours.tokens, len(ours.bodies))
    for their, our in zip(theirs.bodies, ours.bodies, strict=True):
        for what in ("streams", "places", "transposed"):
            assert their[what] == our[what]
        for part in ("keys", "values"):
            for (their_kind, their_rows), (our_kind, our_rows) in zip(their[part], our[part], strict=True):
                assert their_kind == our_kind
                np.testing.assert_allclose(our_rows, their_rows, atol=2e-2 if is_coarse(name, layout) else 2e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.file)
@pytest.mark.parametrize("name", ["llama-mqa", *FAMILIES])
def test_llama_cpp_says_what_the_model_says(llama, name, layout, tmp_path):
    model = with_prefix(make(name))
    path = to_gguf.convert(model, tmp_path / "base.gguf", permute=name.startswith("llama"))
    target.write(model, tmp_path / "out", gguf=path)
    verdict = verified(model, path, tmp_path / "out", dtype=layout.dtype, flash=layout.flash)
    assert verdict.target == f"llama.cpp ({layout.file})"
    assert verdict.tokens == NEW
    if layout.dtype == "f32":
        assert verdict.equal == NEW
        assert verdict.with_prefix < (1e-2 if is_coarse(name, layout) else 1e-4) < verdict.effect


def verified(model, path, folder, **options):
    return target.verify(model, folder, PROMPT, NEW, gguf=path, **{"dtype": "f32", "threads": 1, **options})


def test_positions_none_and_a_long_prefix(llama, tmp_path):
    """Longer than the window, and turned to the place in front of the text."""
    for name, options in (("llama", {"positions": "none"}), ("gemma3", {"num_virtual_tokens": 40})):
        model = with_prefix(make(name), **options)
        path = to_gguf.convert(model, tmp_path / f"{name}.gguf")
        target.write(model, tmp_path / name, gguf=path)
        assert verified(model, path, tmp_path / name).equal == NEW


def test_a_quantised_base_takes_the_same_file(llama, written, tmp_path):
    model, _, folder = written
    path = to_gguf.convert(model, tmp_path / "small.gguf", quantised="Q8_0")
    verdict = verified(model, path, folder, dtype="f16")
    assert verdict.without_prefix > 1e-2  # the weights are off


def test_one_prompt_after_another(llama, written):
    """The prefix stays for the next prompt, and a reset loses it."""
    model, path, folder = written
    with running.started(path, Layout("f32"), 64, 1) as program:
        placeholders = target.restore(program, folder)
        for prompt in ([11, 12, 13, 14], [31, 32], [11, 12, 33]):
            ours, bare = answers_of(model, prompt, NEW)
            theirs = running.ask(program, [*placeholders, *prompt], NEW, [2])
            assert theirs.tokens == ours.tokens
            torch.testing.assert_close(theirs.logits, ours.logits, atol=1e-3, rtol=0)
            assert not torch.allclose(theirs.logits, bare.logits, atol=0.1)
        program.reset()
        theirs = running.ask(program, [*placeholders, *prompt], NEW, [2])
        assert not torch.allclose(theirs.logits, ours.logits, atol=0.1)


def test_completions_of_llama_cpp_python(llama, written):
    """As in the documentation: by the library's own call."""
    model, path, folder = written
    with running.started(path, Layout("f32"), 64, 1) as program:
        placeholders = target.restore(program, folder)
        wanted = program.detokenize(list(answers_of(model, PROMPT, NEW)[0].tokens)).decode()
        said = program.create_completion([*placeholders, *PROMPT], max_tokens=NEW, temperature=0, logit_bias={2: -1e9})
        assert said["choices"][0]["text"].strip() == wanted.strip()


def tokenizer_of(text):
    """A tokenizer whose words are those of ``text``."""
    words = sorted(set(text.split()))
    vocabulary = {"<s>": 0, "<unk>": 1, "</s>": 2, **{word: 3 + index for index, word in enumerate(words)}}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tiny.transformers.PreTrainedTokenizerFast(tokenizer_object=plain)


def test_the_page_of_the_documentation(llama, tmp_path, monkeypatch, capsys):
    """Its blocks, but for the server's, print what it says, whatever the numbers are on this machine."""
    page = PAGE.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    model = make("llama", vocab_size=40)
    model.save_pretrained("runs/base")
    tokenizer_of("name : Aromi | food : Chinese name : Zizzi | area : riverside").save_pretrained("runs/base")
    prefixkit.save(with_prefix(model, num_virtual_tokens=20), "runs/prefix")
    to_gguf.convert(model, tmp_path / "runs/base.gguf")
    namespace = {"__name__": "page"}
    for needs, code, text in BLOCKS.findall(page):
        if needs != "llama-server":
            exec(compile(code, str(PAGE), "exec"), namespace)
        printed = capsys.readouterr().out
        assert NUMBER.sub("N", printed) == NUMBER.sub("N", text), printed


def test_slots_with_a_cache_of_their_own(llama, written):
    """As in llama-server with --parallel 4: the file for four streams goes into any of them."""
    model, path, folder = written
    target.write(model, folder / "four", gguf=path, streams=4)
    with running.started(path, Layout("f32"), 64, 1) as program:
        settings = program.context_params
        settings.n_seq_max, settings.kv_unified = 4, False
        context = llama.llama_init_from_model(program.model, settings)
        ids, count = (llama.llama_token * TOKENS)(), ctypes.c_size_t(0)
        for slot in (2, 0):
            load = [str(folder / "four" / "prefix.f32.bin").encode(), slot, ids, TOKENS]
            assert llama.llama_state_seq_load_file(context, *load, ctypes.byref(count))
        memory = llama.llama_get_memory(context)
        assert [llama.llama_memory_seq_pos_max(memory, slot) for slot in range(4)] == [TOKENS - 1, -1, TOKENS - 1, -1]
        batch = llama.llama_batch_init(1, 0, 1)
        for place, token in enumerate(PROMPT, TOKENS):
            batch.n_tokens, batch.token[0], batch.pos[0] = 1, token, place
            batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, 2, 1
            assert llama.llama_decode(context, batch) == 0
        logits = torch.tensor(llama.llama_get_logits_ith(context, -1)[: tiny.VOCAB])
        torch.testing.assert_close(logits, answers_of(model, PROMPT, 1)[0].logits, atol=1e-4, rtol=0)
        llama.llama_batch_free(batch)
        llama.llama_free(context)


# Traps that llama.cpp falls into without a word


def test_trap_keys_in_the_models_order(llama, written, monkeypatch):
    model, path, folder = written
    monkeypatch.setitem(gguf_file.ORDERS, "neighbours", lambda key: key)
    monkeypatch.setattr(target, "order_of", lambda *_: "neighbours")
    target.write(model, folder, gguf=path)
    with pytest.raises(VerificationError, match="is not read as it should be"):
        verified(model, path, folder)


def test_trap_keys_that_are_not_turned(llama, tmp_path, monkeypatch):
    """The text stands behind the placeholders, and the prefix was trained for a text at 0."""
    model = with_prefix(make("llama"), positions="none")
    path = to_gguf.convert(model, tmp_path / "base.gguf")
    monkeypatch.setattr(target, "turned", lambda model, positions: model.prefixkit.default().detach())
    target.write(model, tmp_path / "out", gguf=path)
    with pytest.raises(VerificationError, match="is not read as it should be"):
        verified(model, path, tmp_path / "out")


@pytest.mark.parametrize("lose", ["reset", "clear", "no placeholders"])
def test_trap_a_state_that_is_lost(llama, written, monkeypatch, lose):
    """A cleared slot, and prompts without the ids."""
    model, path, folder = written

    def restore(program, folder):
        placeholders = running.restore(program, folder)
        if lose == "reset":
            program.reset()
        if lose == "clear":
            llama.llama_memory_clear(llama.llama_get_memory(program.ctx), True)
            program.n_tokens = 0
        return [] if lose == "no placeholders" else placeholders

    monkeypatch.setattr(target, "restore", restore)
    message = "the prefix is lost" if lose == "no placeholders" else "is not read as it should be"
    with pytest.raises(VerificationError, match=message):
        verified(model, path, folder)


def test_trap_another_converters_gguf(llama, written, tmp_path):
    """The very weights in another order: the file is read, and wrong."""
    model, _, folder = written
    path = to_gguf.convert(model, tmp_path / "other.gguf", permute=False)
    with pytest.raises(VerificationError):
        verified(model, path, folder)


def test_trap_the_prefix_of_a_window_that_llama_cpp_has_elsewhere(llama, tmp_path):
    """Windows in other layers than llama.cpp has them: as many caches, with other layers in them."""
    kinds = ["sliding_attention"] * 4 + ["full_attention"] + ["sliding_attention"] * 2
    model = with_prefix(make("gemma3", layer_types=kinds), num_virtual_tokens=9)
    path = to_gguf.convert(model, tmp_path / "base.gguf")
    target.write(model, tmp_path / "out", gguf=path)
    with pytest.raises(VerificationError):
        verified(model, path, tmp_path / "out")


def test_what_llama_cpp_refuses_has_its_reason(llama, written):
    """Each file is one for another llama.cpp."""
    model, path, folder = written
    target.write(model, folder / "four", gguf=path, streams=4)
    with running.started(path, Layout("f32"), 64, 1) as program:
        for name, reason in (
            ("prefix.f32.flash.bin", "incompatible V transposition"),
            ("prefix.f16.bin", "mismatched key type"),
            ("four/prefix.f32.bin", "n_stream mismatch"),
        ):
            with pytest.raises(EngineError, match=f"refuses .*, which has to fit its cache .*{reason}"):
                running.load_sequence(program, folder / name, read(folder, Layout()).tokens)
        target.restore(program, folder)


def test_a_file_that_is_not_the_described_one(llama, written, tmp_path):
    """llama.cpp would end the whole process."""
    model, path, folder = written
    kept = (folder / "prefix.f32.bin").read_bytes()
    (folder / "prefix.f32.bin").write_bytes(kept[:-8])
    with pytest.raises(CheckpointError, match="is not the file that llama_cpp.json describes"):
        verified(model, path, folder)


def test_tokens_or_places_that_are_others(llama, written):
    """Than those to which the prompt is put."""
    _, path, folder = written
    kept, ids = (folder / "prefix.f32.bin").read_bytes(), read(folder, Layout()).tokens
    place = 12 + 4 * TOKENS + 8 + 12 * (TOKENS - 1)
    assert struct.unpack_from("<i", kept, place) == (TOKENS - 1,)
    with running.started(path, Layout("f32"), 64, 1) as program:
        for start, number in ((12, 3), (place, TOKENS)):
            (folder / "other.bin").write_bytes(kept[:start] + struct.pack("<i", number) + kept[start + 4 :])
            with pytest.raises(EngineError, match=r"'other.bin' has the tokens .*, and the text goes behind"):
                running.load_sequence(program, folder / "other.bin", ids)


def test_running_with_wrong_arguments(llama, written, tmp_path):
    model, path, folder = written
    with pytest.raises(ConfigError, match="the prompt is empty"):
        target.verify(model, folder, [], gguf=path)
    with pytest.raises(CheckpointError, match="there is no file"):
        target.verify(model, folder, PROMPT, gguf=tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="has no llama_cpp.json"):
        target.verify(model, tmp_path, PROMPT, gguf=path)
    (folder / "prefix.f32.bin").unlink()
    with pytest.raises(CheckpointError, match="has no prefix.f32.bin, which this llama.cpp needs"):
        verified(model, path, folder)
    program = llama.Llama(str(path), n_ctx=64, verbose=False, type_k=0)
    with pytest.raises(ConfigError, match="type_k is 0 and type_v 1; a prefix is written for caches of one type, f32 "):
        target.restore(program, folder)
    program.close()
    description = json.loads((folder / "llama_cpp.json").read_text())
    (folder / "llama_cpp.json").write_text(json.dumps({**description, "format": 2}))
    with pytest.raises(CheckpointError, match="has format 2; this version reads 1"):
        verified(model, path, folder)
