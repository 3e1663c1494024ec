"""The prefix in a llama-server over HTTP: one that is played here, and a real one where ``LLAMA_SERVER`` names it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import tiny
import torch

import prefixkit
from prefixkit.errors import ConfigError, EngineError, VerificationError
from prefixkit.serving import llama_cpp as target
from prefixkit.serving.llama_cpp import server as over_http
from prefixkit.serving.llama_cpp.running import DESCRIPTION
from prefixkit.serving.verdict import answers_of
from prefixkit.testing.subject import strengthen

TOKENS, PROMPT, NEW = 5, [11, 12, 13, 14, 15, 16], 8
PLACEHOLDERS = [31, 32, 33, 34, 35]
BINARY = os.environ.get("LLAMA_SERVER")


def with_prefix():
    model = tiny.make("llama")
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    strengthen(model)
    return model


@pytest.fixture
def folder(tmp_path):
    """A folder as ``write`` leaves it, as far as a server's client reads it."""
    files = dict.fromkeys(["prefix.f32.bin", "prefix.f16.flash.bin"], "")
    document = {"format": 1, "placeholders": PLACEHOLDERS, "streams": 1, "files": files}
    (tmp_path / DESCRIPTION).write_text(json.dumps(document))
    return tmp_path


class Played:
    """What a llama-server does with one slot, with transformers for a model.

    Args:
        model: With the prefix.
        takes: The file that fits its cache.
        keeps: Whether the slot still holds the prefix when the prompt comes.
    """

    def __init__(self, model, takes="prefix.f16.flash.bin", keeps=True):
        self.model, self.takes, self.keeps, self.restored = model, takes, keeps, False

    def restore(self, filename):
        if filename != self.takes:
            return 400, {"error": {"message": "Unable to restore slot"}}
        self.restored = True
        return 200, {"n_restored": TOKENS}

    def complete(self, prompt, n_predict, n_probs, id_slot, **_):
        held = self.restored and self.keeps and prompt[:TOKENS] == PLACEHOLDERS
        ids, steps = prompt[TOKENS:] if held else prompt, []
        for _ in range(n_predict):
            with torch.no_grad(), torch.no_grad() if held else prefixkit.disabled(self.model):
                logits = self.model(torch.tensor([ids])).logits[0, -1]
            allowed = logits.clone()
            allowed[tiny.SPECIAL["eos_token_id"]] = -torch.inf
            chances = logits.log_softmax(-1).topk(n_probs)
            pairs = zip(chances.indices.tolist(), chances.values.tolist(), strict=True)
            top = [{"id": token, "logprob": chance} for token, chance in pairs]
            steps.append({"id": int(allowed.argmax()), "top_logprobs": top})
            ids = [*ids, steps[-1]["id"]]
        return 200, {"completion_probabilities": steps}


@contextmanager
def serving(played):
    """Inside, ``played`` answers at the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code, answer = played.restore(**fields) if "slots" in self.path else played.complete(**fields)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_file_that_the_server_takes(folder):
    model = with_prefix()
    with serving(Played(model)) as address:
        verdict = target.verify(model, folder, PROMPT, NEW, server=address)
        assert target.runs(folder, server=address) == [{}]
    assert str(verdict).startswith("llama-server: 8 of 8 greedy tokens equal; ")
    assert verdict.with_prefix < 1e-4 < verdict.effect


def test_a_slot_that_lost_the_prefix(folder):
    """The placeholders are read as words."""
    model = with_prefix()
    lost = pytest.raises(VerificationError, match="is not read as it should be")
    with serving(Played(model, keeps=False)) as address, lost:
        target.verify(model, folder, PROMPT, NEW, server=address)


@pytest.mark.parametrize("untold", [(), (tiny.VOCAB - 1,), (3,)], ids=["all", "the last", "one in the middle"])
def test_ids_that_the_server_does_not_tell(untold, folder):
    """A converter leaves out ids at the end, which are no tokens; any other is a difference."""
    model = with_prefix()
    played = Played(model)
    complete = played.complete

    def less(**asked):
        code, said = complete(**asked)
        for step in said["completion_probabilities"]:
            step["top_logprobs"] = [one for one in step["top_logprobs"] if one["id"] not in untold]
        return code, said

    played.complete = less
    wrong = pytest.raises(VerificationError) if untold == (3,) else nullcontext()
    with serving(played) as address, wrong:
        assert target.verify(model, folder, PROMPT, NEW, server=address).equal == NEW


def test_an_answer_that_ends_in_no_number_is_not_cut(folder, monkeypatch):
    model = with_prefix()
    with_it, without = answers_of(model, PROMPT, NEW)
    with_it.logits[-3:] = torch.nan
    monkeypatch.setattr(target, "answers", lambda *_, **__: (with_it, without))
    with pytest.raises(VerificationError):
        target.verify(model, folder, PROMPT, NEW, gguf="any")


def test_errors(folder):
    model = with_prefix()
    none = pytest.raises(EngineError, match="takes no file of .* prefix.f32.bin: .* with 400: .*Unable to restore")
    with serving(Played(model, takes="none")) as address, none:
        target.verify(model, folder, PROMPT, NEW, server=address)
    with pytest.raises(EngineError, match=f"no llama-server answers at {address.rstrip('/')}"):
        target.verify(model, folder, PROMPT, NEW, server=address)
    for wrong in ({"server": "127.0.0.1:8080"}, {}, {"server": "http://x", "gguf": "x"}):
        with pytest.raises(ConfigError, match=r"pass either gguf=|the address of a llama-server is '127.0.0.1:8080'"):
            target.verify(model, folder, PROMPT, NEW, **wrong)


real = pytest.mark.skipif(BINARY is None, reason="LLAMA_SERVER names the program llama-server")


@contextmanager
def started(gguf, folder, *options):
    """Inside, a real llama-server runs at the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [BINARY, "-m", str(gguf), "--slot-save-path", f"{folder}/", "--port", str(port), "-c", "512", "-t", "1"]
    with (folder / "log").open("w") as log:
        program = subprocess.Popen([*command, *options], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urlopen(address + "/health").close()
                break
            except (URLError, OSError):
                assert program.poll() is None, (folder / "log").read_text()[-3000:]
                time.sleep(0.2)
        yield address
    finally:
        program.terminate()
        program.wait()


@pytest.fixture
def written(tmp_path):
    to_gguf = pytest.importorskip("to_gguf", reason="a GGUF is written by the package gguf")
    model = with_prefix()
    path = to_gguf.convert(model, tmp_path / "base.gguf")
    target.write(model, tmp_path / "out", gguf=path)
    return model, path, tmp_path / "out"


@real
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--no-cache-idle-slots",),
        ("--flash-attn", "on"),
        ("--flash-attn", "off"),
        ("--cache-type-k", "f32", "--cache-type-v", "f32"),
        ("--parallel", "2", "--kv-unified"),
    ],
    ids=" ".join,
)
def test_a_real_server(options, written):
    model, path, folder = written
    with started(path, folder, *options) as address:
        verdict = target.verify(model, folder, PROMPT, NEW, server=address)
    print(verdict)
    assert verdict.equal == NEW


@real
def test_trap_a_cache_for_each_slot(written):
    model, path, folder = written
    with started(path, folder, "--parallel", "2", "--no-kv-unified") as address:
        with pytest.raises(EngineError, match="llama-server takes no file of"):
            target.verify(model, folder, PROMPT, NEW, server=address)
        target.write(model, folder, gguf=path, streams=2)
        assert target.verify(model, folder, PROMPT, NEW, server=address).equal == NEW


@real
def test_trap_an_idle_slot(written, monkeypatch):
    """A slot that waits while another one is used is cleared, and the placeholders are read as words."""
    model, path, folder = written
    restore = over_http.LlamaServer.restore

    def and_another_slot(self, folder, slot=0):
        placeholders = restore(self, folder, slot)
        self.ask([21, 22, 23], 2, tiny.VOCAB, slot=1)
        return placeholders

    monkeypatch.setattr(over_http.LlamaServer, "restore", and_another_slot)
    with started(path, folder) as address, pytest.raises(VerificationError, match="is not read as it should be"):
        target.verify(model, folder, PROMPT, NEW, server=address)
    with started(path, folder, "--no-cache-idle-slots") as address:
        assert target.verify(model, folder, PROMPT, NEW, server=address).equal == NEW


@real
def test_the_page(written):
    """What the page has a user of the server do."""
    others = pytest.importorskip("test_llama_cpp")
    _, path, folder = written
    code = next(code for needs, code, _ in others.BLOCKS.findall(others.PAGE.read_text()) if needs == "llama-server")
    with started(path, folder, "--no-cache-idle-slots", "--flash-attn", "on") as address:
        namespace = {"OUT": str(folder)}
        exec(compile(code.replace("http://127.0.0.1:8080", address), str(others.PAGE), "exec"), namespace)
        assert namespace["complete"](PROMPT) == namespace["complete"](PROMPT)
