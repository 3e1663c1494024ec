"""The graph of torch.export against transformers with the prefix; and traps, which verify has to find."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from spoiled import spoil
from versions import since

import prefixkit
from prefixkit.serving import pt2
from prefixkit.serving.prefix_file import PREFIX, read_prefix
from prefixkit.testing.subject import strengthen

pytestmark = [
    since("5.5", "static caches count by themselves"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
]
TOKENS, PROMPT, NEW, PLACES = 5, (11, 12, 13, 14), 6, 32


def with_prefix(name, **options):
    model = tiny.make(name)
    prefixkit.apply(model, **{"num_virtual_tokens": TOKENS, "window": "slide", **options})
    strengthen(model)
    return model


def exported(name, folder, **options):
    model = with_prefix(name, **options)
    pt2.write(model, folder, max_cache_len=PLACES)
    return model


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return exported("llama", folder), folder


@pytest.fixture
def written(once, tmp_path):
    """A llama, and the folder it was written into, which a test may spoil."""
    model, folder = once
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return model, tmp_path


@pytest.mark.parametrize("name", ["gpt2", pytest.param("qwen3", marks=pytest.mark.rare), "gemma3"])
def test_verify(name, tmp_path):
    """Gemma's windows are of 4 tokens, so that the prefix slides out of them."""
    model = exported(name, tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    verdict = pt2.verify(model, tmp_path, PROMPT, NEW)
    assert verdict.equal == NEW
    assert verdict.with_prefix < 1e-4 < verdict.effect
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_positions_of_its_own(tmp_path):
    model = exported("llama", tmp_path, positions="none")
    assert pt2.verify(model, tmp_path, PROMPT, NEW).equal == NEW


def test_bit_by_bit_and_again(written):
    """One graph serves calls of any length, and every text starts anew."""
    model, folder = written
    ids = tiny.tokens(1, 9)
    expected = tiny.logits(model, input_ids=ids)
    program, prefix = pt2.Program(folder / pt2.GRAPH), read_prefix(folder / PREFIX)
    for cuts in ([9], [1] * 9, [4, 1, 3, 1]):
        program.start(prefix)
        found = torch.cat([program(part) for part in ids.split(cuts, 1)], dim=1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_another_prefix_without_another_export(written):
    model, folder = written
    other = prefixkit.apply(tiny.make("llama"), num_virtual_tokens=TOKENS, init=tiny.random_flat(96, TOKENS, seed=7))
    assert all(
        torch.equal(one, two) for one, two in zip(model.model.parameters(), other.model.parameters(), strict=True)
    )  # one base
    prefixkit.export(other, folder / PREFIX)
    assert pt2.verify(other, folder, PROMPT, NEW).equal == NEW
    with pytest.raises(prefixkit.VerificationError, match="the prefix is there and is not read as it should be"):
        pt2.verify(model, folder, PROMPT, NEW)


def test_a_prefix_that_does_not_fit(written):
    _, folder = written
    program, prefix = pt2.Program(folder / pt2.GRAPH), read_prefix(folder / PREFIX)
    with pytest.raises(prefixkit.CheckpointError, match="^this prefix has 2 layers, and the graph 3$"):
        program.start(prefix[:2])
    with pytest.raises(prefixkit.CheckpointError, match=r"has \(1, 1, 5, 8\) where the graph takes \(1, 2, 5, 8\)$"):
        program.start([(key[:, :1], value) for key, value in prefix])
    with pytest.raises(prefixkit.ConfigError, match="^max_cache_len is 5; it needs room for 5 virtual tokens"):
        pt2.write(with_prefix("llama"), folder, max_cache_len=5)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("t5", prefixkit.UnsupportedModelError, "attends to an encoder"),
        ("mistral", prefixkit.EngineError, "a native cache cannot keep a prefix in sight of a sliding window"),
    ],
)
def test_refusals(name, error, message, tmp_path):
    stacks = {"stacks": ["decoder"]} if name == "t5" else {}
    model = prefixkit.apply(tiny.make(name), num_virtual_tokens=TOKENS, **stacks)
    with pytest.raises(error, match=message):
        pt2.write(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_prefix_that_is_put_nowhere(written, monkeypatch):
    monkeypatch.setattr(pt2, "read_prefix", lambda _: None)
    with pytest.raises(prefixkit.VerificationError, match="the prefix is lost: the answer is that of the bare base"):
        pt2.verify(*written, PROMPT, NEW)


def test_layers_in_another_order(written):
    order = {"0": "1", "1": "0", "2": "2"}

    def swapped(tensors):
        named = ((name.split("."), tensor) for name, tensor in tensors.items())
        return {f"{stack}.{order[layer]}.{part}": tensor for (stack, layer, part), tensor in named}

    spoil(written[1], swapped)
    with pytest.raises(prefixkit.VerificationError, match="the prefix is there and is not read as it should be"):
        pt2.verify(*written, PROMPT, NEW)


def test_one_virtual_token_for_all(written):
    spoil(written[1], lambda tensors: {name: t[:, :1].expand_as(t).contiguous() for name, t in tensors.items()})
    with pytest.raises(prefixkit.VerificationError, match="the prefix is there and is not read as it should be"):
        pt2.verify(*written, PROMPT, NEW)


def test_a_text_that_starts_at_position_0(tmp_path):
    model = with_prefix("llama")
    # Keys for a text at 0, in front of a graph that counts from P: what leaving the turn out would write.
    pt2.write(model, tmp_path, max_cache_len=PLACES)
    prefixkit.export(model, tmp_path / PREFIX, positions="none")
    with pytest.raises(prefixkit.VerificationError, match="the prefix is there and is not read as it should be"):
        pt2.verify(model, tmp_path, PROMPT, NEW)


def test_a_mask_without_the_columns_of_the_prefix(written, monkeypatch):
    """The graph's mask is of what it holds: told that this is nothing, it writes the text over the prefix."""
    start = pt2.Program.start

    def forgets(program, prefix):
        start(program, prefix)
        for layer in range(program.layers):
            program.buffers[f"held_{layer}"].fill_(0)

    monkeypatch.setattr(pt2.Program, "start", forgets)
    with pytest.raises(prefixkit.VerificationError, match="the prefix is lost: the answer is that of the bare base"):
        pt2.verify(*written, PROMPT, NEW)


class Logits(torch.nn.Module):
    """A call that a graph can be made of."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def encoder():
    model = tiny.encoder("SequenceClassification", num_labels=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize(
    "make", [encoder, lambda: tiny.make("llama"), lambda: tiny.make("gpt2")], ids=["bert", "llama", "gpt2"]
)
def test_the_model_with_its_prefix_is_a_graph(make):
    """Neither the batch nor the length of the traced call stays in it."""
    model = make()
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    strengthen(model)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        ids, mask = tiny.left_pad([tiny.tokens(7), tiny.tokens(4)])
        program = torch.export.export(Logits(model), (ids, mask), dynamic_shapes=(sizes, sizes), strict=False).module()
        for lengths in ((7, 4), (5, 2, 3), (6,)):
            ids, mask = tiny.left_pad([tiny.tokens(length) for length in lengths])
            expected = model(input_ids=ids, attention_mask=mask).logits
            with prefixkit.disabled(model):
                bare = model(input_ids=ids, attention_mask=mask).logits
            torch.testing.assert_close(program(ids, mask), expected, atol=1e-5, rtol=0)
            assert float((bare - expected).abs().max()) > 0.01


def test_what_does_not_fit_and_what_is_damaged(written):
    model, folder = written
    with pytest.raises(
        prefixkit.ConfigError, match=f"has {PLACES} places, and 5 virtual tokens, 4 of the prompt and 40 "
    ):
        pt2.verify(model, folder, PROMPT, 40)
    assert pt2.verify(model, folder, PROMPT, PLACES - TOKENS - len(PROMPT)).equal
    (folder / pt2.GRAPH).write_bytes(b"junk")
    with pytest.raises(prefixkit.CheckpointError, match="model.pt2' is damaged or no program of torch.export"):
        pt2.verify(model, folder, PROMPT, NEW)


def test_a_graph_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    model = with_prefix("llama")
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("no"))
    with pytest.raises(pytest.fail.Exception):
        pt2.write(model, tmp_path / "out", max_cache_len=PLACES)
    assert not (tmp_path / "out").exists()
