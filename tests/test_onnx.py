"""The graphs that onnxruntime runs, against transformers with the prefix; and traps, which verify has to find."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from spoiled import spoil

import prefixkit
from prefixkit.serving import onnx
from prefixkit.serving.prefix_file import PREFIX, read_prefix
from prefixkit.testing.subject import strengthen

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="needs the extra [onnx]; run by `nox -s onnx`")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
TOKENS, PROMPT, NEW = 5, (11, 12, 13, 14), 6
MODELS = ["llama", "gpt2"]
OTHERS = ["llama-mqa", "qwen3", "mistral", "gemma3"]


def with_prefix(name, **options):
    model = tiny.make(name)
    prefixkit.apply(model, **{"num_virtual_tokens": TOKENS, "window": "slide", **options})
    strengthen(model)
    return model


@pytest.fixture(scope="module", params=MODELS)
def written(request, tmp_path_factory):
    """A model, and the folder it was written into, in both forms."""
    model, folder = with_prefix(request.param), tmp_path_factory.mktemp(request.param)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    onnx.write(model, folder, baked=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return model, folder


@pytest.fixture
def llama(tmp_path_factory, request, written):
    """The llama of :func:`written` in a folder that a test may spoil."""
    model, folder = written
    if model.config.model_type != "llama":
        pytest.skip("one model is enough")
    copy = tmp_path_factory.mktemp("spoilt")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    return model, copy


@pytest.mark.parametrize("baked", [False, True], ids=["fed", "baked"])
def test_verify(written, baked):
    model, folder = written
    verdict = onnx.verify(model, folder, PROMPT, NEW, baked=baked)
    assert verdict.equal == NEW
    assert verdict.with_prefix < 1e-4 < verdict.effect
    assert str(verdict).startswith(f"onnx ({onnx.BAKED if baked else onnx.BARE}): 6 of 6 greedy tokens equal")


@pytest.mark.parametrize("baked", [False, True], ids=["fed", "baked"])
def test_rows_padded_on_the_left_are_the_rows_alone(written, baked):
    model, folder = written
    rows = [tiny.tokens(length, seed=length) for length in (7, 3, 1)]
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    shown = {"return_dict_in_generate": True, "output_logits": True}
    alone = [model.generate(row[None], attention_mask=torch.ones(1, len(row)), **settings, **shown) for row in rows]
    ids, mask = (part.numpy() for part in tiny.left_pad(rows))
    session = onnx.session_of(folder / (onnx.BAKED if baked else onnx.BARE))
    past = onnx.first_past(session, None if baked else read_prefix(folder / PREFIX), rows=3)
    if not baked:
        mask = np.concatenate([np.ones((3, TOKENS), dtype=np.int64), mask], axis=1)
    for number in range(NEW):
        logits, past = onnx.call(session, ids, mask, past)
        expected = torch.cat([one.logits[number] for one in alone])
        torch.testing.assert_close(torch.from_numpy(logits[:, -1]), expected, atol=1e-4, rtol=0)
        ids = logits[:, -1:].argmax(-1)
        mask = np.concatenate([mask, np.ones((3, 1), dtype=np.int64)], axis=1)


def test_a_prefix_that_is_fed_nowhere(llama, monkeypatch):
    model, folder = llama
    monkeypatch.setattr(onnx, "read_prefix", lambda _: None)
    with pytest.raises(prefixkit.VerificationError, match="the prefix is lost: the answer is that of the bare base"):
        onnx.verify(model, folder, PROMPT, NEW)


def test_a_graph_without_the_prefix_in_it(llama):
    model, folder = llama
    shutil.copy(folder / onnx.BARE, folder / onnx.BAKED)
    with pytest.raises(prefixkit.VerificationError, match="the prefix is lost: the answer is that of the bare base"):
        onnx.verify(model, folder, PROMPT, NEW, baked=True)


def test_layers_in_another_order(llama):
    model, folder = llama

    def swapped(tensors):
        other = {"0": "1", "1": "0"}
        return {
            f"decoder.{other.get(n, n)}.{part}": t
            for (_, n, part), t in ((k.split("."), t) for k, t in tensors.items())
        }

    spoil(folder, swapped)
    with pytest.raises(prefixkit.VerificationError, match="the prefix is there and is not read as it should be"):
        onnx.verify(model, folder, PROMPT, NEW)


def test_keys_for_values(llama):
    model, folder = llama
    other = {"key": "value", "value": "key"}
    spoil(
        folder, lambda tensors: {f"{k.rpartition('.')[0]}.{other[k.rpartition('.')[2]]}": t for k, t in tensors.items()}
    )
    with pytest.raises(prefixkit.VerificationError, match="the prefix is there and is not read as it should be"):
        onnx.verify(model, folder, PROMPT, NEW)


def test_one_virtual_token_for_all(llama):
    model, folder = llama
    spoil(folder, lambda tensors: {k: t[:, :1].expand_as(t).contiguous() for k, t in tensors.items()})
    with pytest.raises(prefixkit.VerificationError, match="the prefix is there and is not read as it should be"):
        onnx.verify(model, folder, PROMPT, NEW)


def test_a_mask_without_the_columns_of_the_prefix(llama, monkeypatch):
    model, folder = llama
    call = onnx.call

    def hidden(session, ids, mask, past):
        mask[:, : mask.shape[1] - len(PROMPT)] = 0
        return call(session, ids, mask, past)

    monkeypatch.setattr(onnx, "call", hidden)
    with pytest.raises(prefixkit.VerificationError, match="the prefix is lost: the answer is that of the bare base"):
        onnx.verify(model, folder, PROMPT, 1)


def test_a_text_that_starts_at_position_0(tmp_path, monkeypatch):
    model = with_prefix("llama")
    monkeypatch.setattr(onnx, "positions", lambda mask, ids: torch.arange(ids.shape[1])[None])
    onnx.write(model, tmp_path)
    with pytest.raises(prefixkit.VerificationError, match="the prefix is there and is not read as it should be"):
        onnx.verify(model, tmp_path, PROMPT, 1)


@pytest.mark.rare
@pytest.mark.parametrize("name", OTHERS)
def test_others(name, tmp_path):
    model = with_prefix(name)
    onnx.write(model, tmp_path, baked=True)
    for baked in (False, True):
        assert onnx.verify(model, tmp_path, PROMPT, NEW, baked=baked).equal == NEW


def test_the_page_on_encoders(tmp_path, capsys):
    """The blocks of the documentation that make a graph of a classifier."""
    page = (Path(__file__).parents[1] / "docs/how-to/serve-onnx.md").read_text().split("## Encoders and classifiers")[1]
    code, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL).groups()
    exec(
        compile(code, "serve-onnx.md", "exec"),
        {"torch": torch, "np": np, "onnx": onnx, "prefixkit": prefixkit, "folder": tmp_path},
    )
    assert capsys.readouterr().out.endswith(printed)


def test_a_damaged_graph(tmp_path):
    (tmp_path / onnx.BARE).write_bytes(b"junk")
    with pytest.raises(prefixkit.CheckpointError, match="model.onnx' is damaged or no graph of ONNX"):
        onnx.session_of(tmp_path / onnx.BARE)
