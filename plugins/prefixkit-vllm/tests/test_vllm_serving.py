"""vLLM with prefixes, in the environment that it has: offline and over HTTP, against transformers with the same prefix.

Every way to lose or bend a prefix there that is known without a word of vLLM's is planted, and has to be found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import prefixkit_vllm
import pytest
import torch
from prefixkit_vllm import asking, checking
from prefixkit_vllm.folder import described
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import prefixkit
from prefixkit.errors import EngineError, VerificationError

pytest.importorskip("vllm", reason="vLLM has an environment of its own: nox -s vllm")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[3]
TOKENIZER = ROOT / "examples/gpt2-e2e-base"
LENGTHS, BLOCK, NEW = (5, 32, 40), 32, 12
ENGINE = {"dtype": "float32", "gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 26}
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PAGE = ROOT / "docs/how-to/serve-vllm.md"
PARTS = re.compile(r"^(<!--[^\n]*-->\n)?```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\b\d+(\.\d+)?(e-?\d+)?\b")
MAKERS = {
    "llama": lambda **sizes: LlamaForCausalLM(LlamaConfig(**sizes)),
    "qwen2": lambda **sizes: Qwen2ForCausalLM(Qwen2Config(**sizes)),
    "qwen3": lambda **sizes: Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=32)),
    "mistral": lambda **sizes: MistralForCausalLM(MistralConfig(**{"sliding_window": 24, **sizes})),
}


def make(name, folder, **changes):
    """A tiny model with grouped queries, whose heads have a size that vLLM computes with on a CPU, saved."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = CHAT
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    options = {**sizes, **special, "num_key_value_heads": 2, "max_position_embeddings": 512, **changes}
    model = MAKERS[name](vocab_size=len(tokenizer), **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def with_prefix(model, tokens, name="default", **options):
    """A prefix as large as a model's own keys and values, another one for each length."""
    prefixkit.apply(model, num_virtual_tokens=tokens, name=name, **{"window": "slide", **options})
    prefixkit.activate(model, name)
    (weight,) = [value for key, value in model.named_parameters() if key.startswith(f"prefixkit.{name}.")]
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(tokens)))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A base, its tokenizer, the model with the prefixes p5, p32 and p40 on it, and a folder with those of vLLM."""
    root = tmp_path_factory.mktemp("served")
    model, tokenizer = make("llama", root / "base")
    for tokens in LENGTHS:
        with_prefix(model, tokens, f"p{tokens}")
        prefixkit_vllm.write(model, root / f"p{tokens}", tokenizer=tokenizer)
    return model, tokenizer, root


def spoiled(served, name, change):
    """A copy of p40 under other placeholders, with changed tensors and a description that knows nothing of it."""
    model, _, root = served
    prefixkit.activate(model, "p40")
    ids = [1000 + len(name), *described(root / "p40").placeholders[1:]]
    prefixkit_vllm.write(model, root / name, placeholders=ids)
    file = root / name / "prefix.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    told = dataclasses.replace(described(root / name), sha256=digest)
    (root / name / "vllm.json").write_bytes(told.as_json())
    return root / name


def turned_back(tensors):
    """Keys as if they stood 40 positions further in front: those of a text that starts at 0."""
    found = {}
    for name, part in tensors.items():
        if name.endswith("key"):
            angles = -40 * 10000.0 ** (-torch.arange(0, 32, 2).double() / 32)
            one, other = part.double().chunk(2, dim=-1)
            part = torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], -1)
        found[name] = part.float()
    return found


def of_another(tensors):
    generator = torch.Generator().manual_seed(99)
    return {name: torch.randn(part.shape, generator=generator) for name, part in tensors.items()}


def values_of_another(tensors):
    return {name: part.roll(1, 0) if name.endswith("value") else part for name, part in tensors.items()}


def layers_exchanged(tensors):
    other = {"0": "1", "1": "0"}
    return {re.sub(r"\d", lambda n: other.get(n[0], n[0]), name): part for name, part in tensors.items()}


TRAPS = {
    "keys at other positions": turned_back,
    "the numbers of another": of_another,
    "values of other heads": values_of_another,
    "layers exchanged": layers_exchanged,
}


@pytest.fixture(scope="module")
def engine(served):
    """A vLLM in this process with all prefixes, right ones and spoiled ones, and blocks that none of them fills."""
    _, _, root = served
    folders = {f"p{tokens}": root / f"p{tokens}" for tokens in LENGTHS}
    folders |= {name: spoiled(served, name, change) for name, change in TRAPS.items()}
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    room = {"max_model_len": 256, "block_size": BLOCK, "max_num_batched_tokens": 64, "max_num_seqs": 16}
    transfer = prefixkit_vllm.transfer_config(folders)
    return LLM(**asking.SETTINGS, **ENGINE, **room, model=str(root / "base"), kv_transfer_config=transfer)


@pytest.fixture
def verified(served, engine, monkeypatch):
    """Verify with the engine that runs already."""
    model, tokenizer, root = served

    def said(asked, python):
        return asking.said_by(engine, asked["prompts"], asked["new_tokens"], asked["never"])

    monkeypatch.setattr(checking, "_said", said)
    ids = tokenizer("name : Aromi | food : Chinese\n")["input_ids"]

    def verify(prefix, folder=None, prompt=ids):
        prefixkit.activate(model, prefix)
        return prefixkit_vllm.verify(model, root / (folder or prefix), prompt, NEW, base=root / "base")

    return verify


def ours(served, prefix, ids, tokens, ends=None):
    """What transformers says, with the prefix of that name or without one."""
    model, _, _ = served
    text = torch.tensor([ids])
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": ends}
    if prefix:
        prefixkit.activate(model, prefix)
    with torch.no_grad(), contextlib.nullcontext() if prefix else prefixkit.disabled(model):
        said = model.generate(text, attention_mask=torch.ones_like(text), **settings)
    return said[0, len(ids) :].tolist()


def jobs(number, seed, lengths=(3, 9, 30, 64, 100)):
    """Prefixes or none, texts that are asked for again and again, and how many tokens are wanted."""
    draw = random.Random(seed)
    texts = [[draw.randrange(3, 2048) for _ in range(length)] for length in lengths]
    names = [*(f"p{tokens}" for tokens in LENGTHS), None]
    return [(draw.choice(names), draw.choice(texts), draw.choice([4, 12, 40])) for _ in range(number)]


# Offline


@pytest.mark.parametrize("tokens", LENGTHS)
def test_vllm_says_what_the_model_says(verified, tokens):
    for prompt in ([7], list(range(30, 130))):
        verdict = verified(f"p{tokens}", prompt=prompt)
        assert verdict.equal == verdict.tokens == NEW
        assert verdict.with_prefix < 1e-4 < verdict.effect
    assert str(verdict).startswith("vllm: 12 of 12 greedy tokens equal")


def test_several_prefixes_and_none_in_one_batch(served, engine):
    """In pieces of 64 tokens, and with texts that prefix caching has seen behind another prefix."""
    from vllm import SamplingParams

    _, _, root = served
    asked = jobs(24, seed=1)
    prompts = [ids if name is None else prefixkit_vllm.prompt(root / name, ids) for name, ids, _ in asked]
    settings = [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False) for *_, new in asked]
    said = engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
    for job, one in zip(asked, said, strict=True):
        assert list(one.outputs[0].token_ids) == ours(served, *job)
        assert one.kv_transfer_params == ({"prefix": job[0]} if job[0] else None)


@pytest.fixture
def fresh(engine):
    """Nothing is kept from before, and nothing of what is written wrongly stays."""
    assert engine.reset_prefix_cache()
    yield
    assert engine.reset_prefix_cache()


def generated(engine, ids, **options):
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False, **options)
    (said,) = engine.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False)
    return said.outputs[0]


def test_log_probabilities_of_a_prompt_are_refused(served, engine, verified, fresh):
    """vLLM would read the placeholders as words, and keep for later requests what came of it."""
    _, _, root = served
    text = list(range(200, 260))
    assert generated(engine, prefixkit_vllm.prompt(root / "p40", text), prompt_logprobs=1).finish_reason == "error"
    assert generated(engine, text, prompt_logprobs=1).finish_reason == "length"
    assert verified("p40", prompt=text).equal == NEW


def test_a_prompt_with_some_of_the_placeholders_is_refused(served, engine, verified, fresh):
    """It would leave a block of words, which prefix caching takes for the prefix's."""
    _, _, root = served
    some = list(described(root / "p40").placeholders[:36])
    assert generated(engine, [*some, 7]).finish_reason == "error"
    assert generated(engine, [*some[:20], 7]).finish_reason == "length"
    assert verified("p40").equal == NEW


def test_placeholders_alone_are_refused(served, engine):
    _, _, root = served
    for tokens in LENGTHS:
        assert generated(engine, list(described(root / f"p{tokens}").placeholders)).finish_reason == "error"


@pytest.mark.parametrize("trap", TRAPS)
def test_trap_other_numbers(verified, trap):
    with pytest.raises(VerificationError, match="the prefix is there and is not read as it should be"):
        verified("p40", trap)


def test_trap_another_prefix(verified):
    with pytest.raises(VerificationError, match="the prefix is there and is not read as it should be"):
        verified("p40", "p32")


def test_trap_a_prompt_without_placeholders(verified, monkeypatch):
    monkeypatch.setattr(checking, "prompt_of", lambda _, prompt: list(prompt))
    with pytest.raises(VerificationError, match="the prefix is lost: the answer is that of the bare base"):
        verified("p40")


@pytest.mark.parametrize("where", ["nowhere", "in another block"])
def test_trap_a_connector_that_writes_elsewhere(verified, fresh, monkeypatch, where):
    write = connector().PrefixConnector._write

    def elsewhere(self, load):
        if where == "in another block":
            write(self, dataclasses.replace(load, blocks=tuple(block + 5 for block in load.blocks)))

    monkeypatch.setattr(connector().PrefixConnector, "_write", elsewhere)
    with pytest.raises(VerificationError):
        verified("p40")


def test_trap_placeholders_that_are_not_computed(verified, fresh, monkeypatch):
    """A connector that has nothing to load: vLLM reads them as words."""
    monkeypatch.setattr(connector().PrefixConnector, "get_num_new_matched_tokens", lambda *_: (0, False))
    with pytest.raises(VerificationError, match="the prefix is there and is not read as it should be"):
        verified("p40")


def connector():
    from prefixkit_vllm import connector as module

    return module


# In a process of its own


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen2", {}),
        ("qwen3", {"positions": "none"}),
        ("mistral", {}),
        ("mistral", {"num_virtual_tokens": 40}),
    ],
)
def test_other_models(name, options, tmp_path):
    """Mistral's window is of 24 tokens, and the prefix slides out of it."""
    model, _ = make(name, tmp_path / "base")
    with_prefix(model, **{"tokens": options.pop("num_virtual_tokens", 5), **options})
    prefixkit_vllm.write(model, tmp_path / "p")
    verdict = prefixkit_vllm.verify(model, tmp_path / "p", range(30, 50), NEW, base=tmp_path / "base", **ENGINE)
    assert verdict.equal == NEW
    assert verdict.with_prefix < 1e-4 < verdict.effect


def test_trap_a_vllm_without_the_connector(served):
    model, _, root = served
    prefixkit.activate(model, "p5")
    with pytest.raises(VerificationError, match="the prefix is there and is not read as it should be"):
        prefixkit_vllm.verify(model, root / "p5", [7, 8], base=root / "base", **ENGINE, kv_transfer_config=None)


def test_another_base_is_an_error(served, tmp_path):
    model, _, root = served
    make("qwen2", tmp_path / "base")
    prefixkit.activate(model, "p5")
    with pytest.raises(EngineError, match="the prefix 'prefix' is for a base of .*'llama'.*'qwen2'"):
        prefixkit_vllm.verify(model, root / "p5", [7, 8], base=tmp_path / "base", **ENGINE)


def test_the_page_of_the_documentation(monkeypatch, capsys):
    """Its blocks, but for that of a server, print what it says, whatever the numbers are on this machine."""
    monkeypatch.chdir(ROOT)
    namespace, printed = {"__name__": "page"}, ""
    for comment, language, code in PARTS.findall(PAGE.read_text(encoding="utf-8")):
        if language == "python" and "a running server" not in comment:
            exec(compile(code, str(PAGE), "exec"), namespace)
            printed = capsys.readouterr().out
        elif language == "text":
            assert NUMBER.sub("N", printed) == NUMBER.sub("N", code), printed


# Over HTTP


class Server:
    """A server of vLLM's own, with a cache that is too small for what it is asked.

    Args:
        root: With the base and the prefixes.
    """

    def __init__(self, root):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        tokenizer, folders = AutoTokenizer.from_pretrained(root / "base"), {f"p{n}": root / f"p{n}" for n in LENGTHS}
        (root / "chat.jinja").write_text(prefixkit_vllm.chat_template(tokenizer, folders))
        blocks = 16 * BLOCK * 3 * 2 * 2 * 32 * 4  # bytes of 16 blocks: layers, keys and values, heads, numbers, float32
        told = {
            "model": root / "base",
            "served-model-name": ["base", *folders],
            "dtype": "float32",
            "block-size": BLOCK,
            "max-model-len": 256,
            "max-num-batched-tokens": 64,
            "max-num-seqs": 16,
            "gpu-memory-utilization": 0.05,
            "kv-cache-memory-bytes": blocks,
            "chat-template": root / "chat.jinja",
            "kv-transfer-config": json.dumps(prefixkit_vllm.transfer_config(folders)),
            "middleware": "prefixkit_vllm.by_model_name.ByModelName",
            "port": self.url.rpartition(":")[2],
        }
        options = [part for name, value in told.items() for part in (f"--{name}", *_as_list(value))]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *options]
        self.log = root / "server.log"
        with self.log.open("w") as log:
            there = {**os.environ, "PYTHONSAFEPATH": "1", "VLLM_NO_USAGE_STATS": "1"}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=there)

    def wait(self):
        """Until it answers."""
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with contextlib.suppress(URLError):
                return self.get("/health")
            time.sleep(1)
        raise TimeoutError(self.log.read_text()[-3000:])

    def get(self, path):
        with urlopen(self.url + path) as answer:
            return answer.read().decode()

    def post(self, path, **fields):
        request = Request(self.url + path, json.dumps(fields).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(request) as answer:
                return json.load(answer)
        except HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, prompt, tokens=NEW, model="base", **options):
        """The new tokens, and which prefix the server says that it has used."""
        greedy = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        said = self.post("/v1/completions", model=model, prompt=prompt, max_tokens=tokens, **greedy, **options)
        return said if isinstance(said, tuple) else (said["choices"][0]["token_ids"], said["kv_transfer_params"])


def _as_list(value):
    return map(str, value) if isinstance(value, list) else [str(value)]


@pytest.fixture(scope="module")
def server(served):
    _, _, root = served
    running = Server(root)
    try:
        running.wait()
        yield running
    finally:
        running.process.terminate()
        running.process.wait(60)


def test_many_requests_at_once(served, server):
    """With preemption, and with prefix caching."""
    _, _, root = served
    asked = jobs(40, seed=2)

    def run(job):
        name, ids, tokens = job
        return server.complete(ids if name is None else prefixkit_vllm.prompt(root / name, ids), tokens)

    with ThreadPoolExecutor(16) as threads:
        said = list(threads.map(run, asked))
    for job, (tokens, prefix) in zip(asked, said, strict=True):
        assert (tokens, prefix) == (ours(served, *job), {"prefix": job[0]} if job[0] else None)
    metrics = dict(re.findall(r"^vllm:(\w+)\{.*?\} (\S+)$", server.get("/metrics"), re.MULTILINE))
    assert float(metrics["num_preemptions_total"]) > 0
    assert float(metrics["prefix_cache_hits_total"]) > 0
    assert float(metrics["external_prefix_cache_hits_total"]) > 0


def test_the_name_of_the_model_is_the_prefix(served, server):
    _, tokenizer, _ = served
    text = "name : Aromi | food : Chinese\n"
    ids = tokenizer(text)["input_ids"]
    assert {"base", "p5", "p32", "p40"} == {one["id"] for one in json.loads(server.get("/v1/models"))["data"]}
    for name in ("p5", "p40"):
        for prompt in (text, ids):
            assert server.complete(prompt, model=name) == (ours(served, name, ids, NEW), {"prefix": name})
    assert server.complete(text) == (ours(served, None, ids, NEW), None)


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({"model": "base", "chat_template_kwargs": {"prefix": "p32"}}, "p32"),
        ({"model": "p40"}, "p40"),
        ({"model": "base"}, None),
    ],
)
def test_a_chat(served, server, options, prefix):
    _, tokenizer, _ = served
    chat = [{"role": "user", "content": "Where to eat?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    wanted = ours(served, prefix, tokenizer(text, add_special_tokens=False)["input_ids"], NEW)
    greedy = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "max_tokens": NEW}
    said = server.post("/v1/chat/completions", messages=chat, **greedy, **options)
    assert said["choices"][0]["token_ids"] == wanted
    assert said["kv_transfer_params"] == ({"prefix": prefix} if prefix else None)


def test_a_chat_with_a_prefix_that_is_not_there(server):
    chat, kwargs = [{"role": "user", "content": "Hello"}], {"prefix": "p33"}
    code, said = server.post("/v1/chat/completions", model="base", messages=chat, chat_template_kwargs=kwargs)
    assert (code, "there is no prefix p33; there are: p5, p32, p40" in said) == (400, True)


def test_a_request_that_would_lose_its_prefix_is_an_error(served, server):
    """And the log says which, and why."""
    _, _, root = served
    whole = prefixkit_vllm.prompt(root / "p40", [7, 8])
    for prompt, options, reason in (
        (whole, {"echo": True, "logprobs": 1}, "log-probabilities of its prompt"),
        (whole[:40], {}, "there is no text behind the placeholders of 'p40'"),
        (whole[:36], {}, "its prompt begins with 36 of the 40 placeholders of 'p40', and not with all"),
        ([7, 8], {"kv_transfer_params": {"prefix": "p40"}}, "asks for the prefix 'p40', and its prompt begins with no"),
    ):
        code, _ = server.complete(prompt, **options)
        assert (code, reason in server.log.read_text()) == (500, True)
    assert server.complete(whole)[0] == ours(served, "p40", [7, 8], NEW)
