"""What is written for vLLM, and what a request is made of; vLLM is not needed."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import prefixkit_vllm
import pytest
import tiny
import tokenizers
import torch
from prefixkit_vllm.by_model_name import ByModelName
from prefixkit_vllm.folder import check_apart, described, tensors
from prefixkit_vllm.texts import Texts
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import prefixkit
from prefixkit.errors import CheckpointError, ConfigError, EngineError
from prefixkit.testing.subject import strengthen

TOKENS, BLOCK = 5, 4
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
FIRST, SECOND = (11, 12, 13, 14, 15), (11, 12, 13, 24, 25, 26)


def with_prefix(name="llama", **options):
    model = tiny.make(name)
    prefixkit.apply(model, **{"num_virtual_tokens": TOKENS, **options})
    strengthen(model)
    return model


@pytest.fixture
def written(tmp_path):
    model = with_prefix()
    prefixkit_vllm.write(model, tmp_path / "out")
    return model, tmp_path / "out"


@pytest.fixture(scope="module")
def tokenizer():
    found = AutoTokenizer.from_pretrained("examples/gpt2-e2e-base")
    found.chat_template = CHAT
    return found


def write_by_hand(folder, placeholders):
    """A folder whose placeholders are these."""
    folder.mkdir()
    told = {"format": 1, "model_type": "llama", "hidden_size": 8, "vocab_size": 99, "placeholders": placeholders}
    told |= {"eos_token_ids": [], "sha256": "", "text_starts_at": len(placeholders)}
    (folder / "vllm.json").write_text(json.dumps(told))
    return folder


# Writing


@pytest.mark.parametrize("name", ["llama", "llama-mqa", "qwen3"])
@pytest.mark.parametrize("positions", ["shift", "none"])
def test_the_numbers_are_those_of_the_bare_models_cache(name, positions, tmp_path):
    """Which transformers takes in front of a text that starts at P."""
    model = with_prefix(name, positions=positions)
    prefixkit_vllm.write(model, tmp_path)
    found = load_file(tmp_path / "prefix.safetensors")
    cache = prefixkit.to_cache(model, kind="tuple")
    assert len(found) == 2 * len(cache)
    for layer, (key, value) in enumerate(cache):
        torch.testing.assert_close(found[f"decoder.{layer}.key"], key[0], atol=0, rtol=0)
        torch.testing.assert_close(found[f"decoder.{layer}.value"], value[0], atol=0, rtol=0)
    assert described(tmp_path).model_type == model.config.model_type
    assert tensors(tmp_path, described(tmp_path)).keys() == found.keys()


def test_a_prefix_read_off_a_text_is_the_text(tmp_path):
    """Its keys are those that the base makes at positions 0 to P - 1."""
    model, text = tiny.make("llama"), [21, 22, 23, 24, 25]
    with torch.no_grad():
        cache = model(torch.tensor([text]), use_cache=True).past_key_values
    wanted = [(layer.keys[0].clone(), layer.values[0].clone()) for layer in cache.layers]
    prefixkit.apply(model, num_virtual_tokens=TOKENS, init=cache)
    prefixkit_vllm.write(model, tmp_path)
    found = load_file(tmp_path / "prefix.safetensors")
    for layer, (key, value) in enumerate(wanted):
        torch.testing.assert_close(found[f"decoder.{layer}.key"], key, atol=1e-6, rtol=0)
        torch.testing.assert_close(found[f"decoder.{layer}.value"], value, atol=1e-6, rtol=0)


def test_placeholders(written, tmp_path):
    """No special tokens, the same for the same prefix and others for another; or those that are given."""
    model, folder = written
    first = described(folder).placeholders
    assert len(first) == TOKENS
    assert not {0, 1, 2} & set(first)
    prefixkit_vllm.write(model, tmp_path / "again")
    assert described(tmp_path / "again").placeholders == first
    with torch.no_grad():
        next(model.prefixkit.parameters())[0, 0] += 1
    prefixkit_vllm.write(model, tmp_path / "other")
    assert described(tmp_path / "other").placeholders != first
    prefixkit_vllm.write(model, tmp_path / "given", placeholders=[7] * TOKENS)
    assert described(tmp_path / "given").placeholders == (7,) * TOKENS


def test_placeholders_that_a_tokenizer_reads_back(tokenizer, tmp_path):
    """Whatever stands beside them: the words of a vocabulary of pieces."""
    model = tiny.make("llama", vocab_size=len(tokenizer))
    for tokens in (40, 60):
        prefixkit.apply(model, num_virtual_tokens=tokens)
        prefixkit_vllm.write(model, tmp_path, tokenizer=tokenizer)
        prefixkit.remove(model)
        ids = list(described(tmp_path).placeholders)
        assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


def test_a_tokenizer_without_words(tmp_path):
    numbers = {str(number): number for number in range(tiny.VOCAB)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="0"))
    with pytest.raises(ConfigError, match="has no token that is a word of letters"):
        prefixkit_vllm.write(with_prefix(), tmp_path, tokenizer=PreTrainedTokenizerFast(tokenizer_object=plain))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"gate": True, "positions": "none"}, "^vLLM cannot hold this prefix: .* no gate and no memory"),
        ("llama", {"infix": True}, "cannot hide an infix"),
        ("llama", {"layers": [0, 2]}, "a prefix in every layer, of one length"),
        ("gemma3", {"window": "pinned"}, "cannot keep a prefix in sight of a sliding window; apply the prefix with"),
        ("bart", {}, "^vLLM is given what a decoder-only model has read, and this model has cross, encoder as well"),
        ("bart", {"stacks": ["decoder"]}, "this model has an encoder as well"),
        ("gpt2", {"positions": "none"}, "keys cannot be turned"),
    ],
)
def test_a_prefix_that_keys_and_values_do_not_say(name, options, message, tmp_path):
    model = tiny.make(name)
    prefixkit.apply(model, num_virtual_tokens=TOKENS, **options)
    with pytest.raises(EngineError, match=message):
        prefixkit_vllm.write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_trained_with_the_prefix(tmp_path):
    config = tiny.LlamaConfig(**tiny.llama_sizes(num_labels=3))
    model = tiny.transformers.LlamaForSequenceClassification(config).eval()
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    with pytest.raises(EngineError, match=r"^the head \(score\) trained with the prefix, and vLLM has the base's"):
        prefixkit_vllm.write(model, tmp_path / "out")


def test_wrong_options(written, tmp_path):
    model, folder = written
    for options, error, message in (
        ({"placeholders": [7, 8]}, ConfigError, "2 placeholders were given, and the prefix has 5 virtual tokens"),
        (
            {"placeholders": [7, 8, 9, 10, 62]},
            ConfigError,
            r"placeholders \[62\] are not in the vocabulary, .* 0 to 61",
        ),
    ):
        with pytest.raises(error, match=message):
            prefixkit_vllm.write(model, tmp_path / "new", **options)
    with pytest.raises(CheckpointError, match="it is a file; name a folder"):
        prefixkit_vllm.write(model, folder / "vllm.json")
    assert not (tmp_path / "new").exists()
    with pytest.raises(prefixkit.AttachmentError):
        prefixkit_vllm.write(tiny.make("llama"), tmp_path / "new")


def test_a_folder_that_is_not_what_was_written(written, tmp_path):
    _, folder = written
    with pytest.raises(CheckpointError, match="has no vllm.json; write a prefix for vLLM there first"):
        described(tmp_path)
    description = described(folder)
    content = (folder / "prefix.safetensors").read_bytes()
    (folder / "prefix.safetensors").write_bytes(content[:-1] + b"x")
    with pytest.raises(CheckpointError, match="is not the file that vllm.json describes; write the prefix again"):
        tensors(folder, description)
    (folder / "prefix.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is not the file that vllm.json describes"):
        tensors(folder, description)
    (folder / "vllm.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(CheckpointError, match="is of another format than 1"):
        described(folder)


# Several


@pytest.mark.parametrize(
    ("one", "other", "block", "message"),
    [
        ((1, 2, 3), (1, 2, 3), None, "of 'a' are the same as those of 'b', so that a prompt does not say which"),
        ((1, 2, 3), (1, 2, 3, 4), None, "of 'a' are the beginning of, or begun by, those of 'b'"),
        ((1, 2, 3, 4), (1, 2), None, "of 'a' are the beginning of, or begun by, those of 'b'"),
        (FIRST, SECOND, 3, "of 'a' and 'b' begin with the same 3 ids, which vLLM's prefix caching .* in blocks of 3"),
    ],
)
def test_placeholders_that_are_not_apart(one, other, block, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        check_apart({"a": one, "b": other}, block)
    if block is None:
        folders = {"a": write_by_hand(tmp_path / "a", one), "b": write_by_hand(tmp_path / "b", other)}
        with pytest.raises(ConfigError, match=message):
            prefixkit_vllm.transfer_config(folders)


def test_placeholders_that_are_apart():
    check_apart({"a": FIRST, "b": SECOND, "c": (12, 11)}, BLOCK)


def test_the_settings_are_json_with_whole_paths(written, monkeypatch):
    _, folder = written
    monkeypatch.chdir(folder.parent)
    settings = json.loads(json.dumps(prefixkit_vllm.transfer_config({"e2e": "out"})))
    assert settings["kv_connector_extra_config"] == {"prefixes": {"e2e": str(folder)}}
    with pytest.raises(CheckpointError, match=r"has no vllm\.json"):
        prefixkit_vllm.transfer_config({"e2e": "nowhere"})


# Requests


def test_a_prompt_begins_with_the_placeholders(tokenizer, tmp_path):
    folder = write_by_hand(tmp_path / "a", FIRST)
    ids = tokenizer("name : Aromi")["input_ids"]
    assert prefixkit_vllm.prompt(folder, "name : Aromi", tokenizer) == [*FIRST, *ids]
    assert prefixkit_vllm.prompt(folder, ids) == [*FIRST, *ids]
    with pytest.raises(ConfigError, match="a text needs tokenizer="):
        prefixkit_vllm.prompt(folder, "name : Aromi")
    for text in ("", []):
        with pytest.raises(ConfigError, match="the text is empty"):
            prefixkit_vllm.prompt(folder, text, tokenizer)


def test_a_chat_template_puts_the_named_prefix_in_front(tokenizer, tmp_path):
    model = tiny.make("llama", vocab_size=len(tokenizer))
    folders = {}
    for tokens in (3, 40):
        prefixkit.apply(model, num_virtual_tokens=tokens)
        folders[f"p{tokens}"] = tmp_path / f"p{tokens}"
        prefixkit_vllm.write(model, folders[f"p{tokens}"], tokenizer=tokenizer)
        prefixkit.remove(model)
    template = prefixkit_vllm.chat_template(tokenizer, folders)
    chat = [{"role": "system", "content": " 'x' "}, {"role": "user", "content": "Tell me"}]

    def ids(**options):
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for name, folder in folders.items():
        assert ids(chat_template=template, prefix=name) == [*described(folder).placeholders, *ids()]
    assert ids(chat_template=template) == ids(chat_template=template, prefix=None) == ids()
    with pytest.raises(Exception, match="there is no prefix p4; there are: p3, p40"):
        ids(chat_template=template, prefix="p4")


def test_a_chat_template_that_would_lose_the_placeholders(tokenizer, tmp_path):
    """`a` and `b` are one token when they stand side by side."""
    pieces = tokenizer("he")["input_ids"] + tokenizer("r")["input_ids"]
    assert tokenizer(tokenizer.decode(pieces))["input_ids"] != pieces
    with pytest.raises(
        ConfigError, match="does not read the placeholders of 'a' back from their text in front of a ch"
    ):
        prefixkit_vllm.chat_template(tokenizer, {"a": write_by_hand(tmp_path / "a", pieces)})


def request_for(ids, **options):
    plain = {"kv_transfer_params": None, "skip_reading_prefix_cache": False}
    return SimpleNamespace(prompt_token_ids=ids, num_prompt_tokens=len(ids or ()), **{**plain, **options})


def test_which_prefix_a_prompt_means():
    texts = Texts({"a": FIRST, "b": SECOND}, BLOCK)
    for ids, name in (
        ([*FIRST, 7], "a"),
        ([*SECOND, 7], "b"),
        ([7, *FIRST], None),
        (FIRST[:-1], None),
        ([], None),
        (None, None),
    ):
        assert texts.prefix_of(ids) == name


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (FIRST, {}, "there is no text behind the placeholders of 'a'"),
        ([*FIRST, 7], {"skip_reading_prefix_cache": True}, "asks for log-probabilities of its prompt"),
        (
            [*FIRST, 7],
            {"kv_transfer_params": {"prefix": "b"}},
            "asks for the prefix 'b', and .* begins with those of 'a'",
        ),
        ([7, 8], {"kv_transfer_params": {"prefix": "b"}}, "asks for the prefix 'b', and its prompt begins with no pla"),
        (
            [7, 8],
            {"kv_transfer_params": {"prefix": "c"}},
            "prefix 'c', and there is none of that name; there are: a, b",
        ),
        ([*FIRST[:4], 7], {}, "its prompt begins with 4 of the 5 placeholders of 'a', and not with all"),
    ],
)
def test_requests_that_are_refused(ids, options, message):
    assert re.search(message, Texts({"a": FIRST, "b": SECOND}, BLOCK).refuses(request_for(ids, **options)))


@pytest.mark.parametrize(
    ("ids", "options"),
    [
        ([*FIRST, 7], {}),
        ([*FIRST, 7], {"kv_transfer_params": {"prefix": "a"}}),
        ([*FIRST, 7], {"kv_transfer_params": {"another": "setting"}}),
        ([7, 8], {"skip_reading_prefix_cache": True}),
        ([*FIRST[:3], 7], {}),
        (None, {}),
    ],
)
def test_requests_that_are_served(ids, options):
    assert Texts({"a": FIRST, "b": SECOND}, BLOCK).refuses(request_for(ids, **options)) == ""


# The middleware


@pytest.fixture
def send_to(tokenizer, tmp_path):
    """The request that the server gets, of one that is sent."""
    folders = {"a": str(write_by_hand(tmp_path / "a", FIRST))}
    settings = SimpleNamespace(get_from_extra_config=lambda *_: folders)
    state = SimpleNamespace(
        vllm_config=SimpleNamespace(kv_transfer_config=settings),
        engine_client=SimpleNamespace(get_tokenizer=lambda: tokenizer),
    )

    def sent(path, content, method="POST"):
        got = {}

        async def server(scope, receive, send):
            message = await receive()
            got["body"], got["headers"] = message["body"], dict(scope["headers"])
            got["after"] = await receive()

        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        half = len(content) // 2
        messages = [
            {"type": "http.request", "body": content[:half], "more_body": True},
            {"type": "http.request", "body": content[half:]},
            {"type": "http.disconnect"},
        ]
        scope = {"type": "http", "method": method, "path": path, "app": SimpleNamespace(state=state)}
        scope["headers"] = [(b"content-length", b"%d" % len(content)), (b"x", b"y")]

        async def receive():
            return messages.pop(0)

        asyncio.run(ByModelName(server)(scope, receive, None))
        if got["after"] == {"type": "http.disconnect"}:
            assert got["headers"] == {b"content-length": b"%d" % len(got["body"]), b"x": b"y"}
        return got["body"]

    return sent


def test_the_model_of_a_completion_names_its_prefix(send_to, tokenizer):
    text = "name : Aromi"
    ids = tokenizer(text)["input_ids"]
    for given, wanted in (
        (text, [*FIRST, *ids]),
        (ids, [*FIRST, *ids]),
        ([text, "x"], [[*FIRST, *ids], [*FIRST, *tokenizer("x")["input_ids"]]]),
        ([ids], [[*FIRST, *ids]]),
        ("", ""),
        (None, None),
    ):
        got = json.loads(send_to("/v1/completions", {"model": "a", "prompt": given, "max_tokens": 3}))
        assert got == {"model": "a", "prompt": wanted, "max_tokens": 3, "kv_transfer_params": {"prefix": "a"}}


def test_the_model_of_a_chat_names_its_prefix(send_to):
    asked = {"model": "a", "messages": [], "chat_template_kwargs": {"thinking": False}}
    assert json.loads(send_to("/v1/chat/completions", asked)) == {
        **asked, "chat_template_kwargs": {"thinking": False, "prefix": "a"}, "kv_transfer_params": {"prefix": "a"}
    }  # fmt: skip


@pytest.mark.parametrize("content", [{"model": "base", "prompt": "x"}, b"no json", b"[1]", b"{}"])
def test_other_requests_stay_as_they_are(send_to, content):
    plain = content if isinstance(content, bytes) else json.dumps(content).encode()
    assert send_to("/v1/completions", content) == plain


def test_other_paths_are_not_read(send_to):
    """The server gets what is sent, piece by piece."""
    asked = json.dumps({"model": "a", "prompt": "x"}).encode()
    assert send_to("/v1/embeddings", asked) == asked[: len(asked) // 2]


def test_importing_it_is_free():
    code = "import sys, prefixkit_vllm; sys.exit(' '.join({'torch', 'transformers', 'vllm'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in prefixkit_vllm.__all__:
        assert getattr(prefixkit_vllm, name) is not None
    with pytest.raises(AttributeError, match="^module 'prefixkit_vllm' has no attribute 'wrte'$"):
        prefixkit_vllm.wrte  # noqa: B018


def test_a_program_that_comes_to_nothing(written):
    """The last lines that it said are in the error."""
    model, folder = written
    with pytest.raises(EngineError, match=r"^vLLM, run by .*, came to nothing:\n(.|\n)*Error"):
        prefixkit_vllm.verify(model, folder, [11, 12], 2, base=folder)
