"""The methods beside prefix tuning and p-tuning v2: prompt tuning, prefix memory, shared keys and values."""

from __future__ import annotations

import copy
from types import MappingProxyType

import pytest
import tiny
import torch
from accelerate import cpu_offload
from test_checkpoint import assert_same, state
from torch import nn
from torch.nn import functional

import prefixkit
from prefixkit.discovery import installed
from prefixkit.errors import ConfigError, EngineError, MethodError
from prefixkit.testing import MethodConformance
from prefixkit.testing.subject import enable_checkpointing

TOKENS = 5
ROWS = {"method": "prompt-tuning", "num_virtual_tokens": TOKENS}
MEMORY = {"method": "prefix-memory", "num_virtual_tokens": 1}


def outputs(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


# Prompt tuning


@pytest.mark.parametrize("name", [*tiny.DECODERS, "mistral", "qwen3"])
def test_embeddings_in_front_of_the_text(name):
    """Against the bare model on the same embeddings, with the gradient."""
    window = {"window": "slide"} if name == "mistral" else {}
    model, ids = tiny.make(name), tiny.tokens(3, 7)
    torch.manual_seed(0)
    table = model.get_input_embeddings()
    rows = torch.randn(TOKENS, table.embedding_dim, requires_grad=True)
    both = torch.cat([rows.expand(3, -1, -1), table(ids)], dim=1)
    expected = model(inputs_embeds=both).logits[:, TOKENS:]
    expected.square().mean().backward()
    prefixkit.apply(model, init=rows.detach(), **ROWS, **window)
    found = model(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    found.square().mean().backward()
    torch.testing.assert_close(model.prefixkit.default.embedding.weight.grad, rows.grad, atol=1e-5, rtol=1e-3)


def test_a_prompt_of_words_is_that_prompt():
    model, prompt, text = tiny.make("gpt2"), tiny.tokens(TOKENS, seed=3), tiny.tokens(2, 6)
    expected = outputs(model, torch.cat([prompt.expand(2, -1), text], dim=1))[:, TOKENS:]
    prefixkit.apply(model, init=prefixkit.TextInit(prompt), **ROWS)
    torch.testing.assert_close(outputs(model, text), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("init", ["auto", "tokens", "matched", "zeros", "random"])
def test_every_word_starts_it(init):
    model = prefixkit.apply(tiny.make("llama"), init=init, **ROWS)
    given = model.prefixkit.default()
    assert given.shape == (TOKENS, 32)
    assert bool((given == 0).all()) == (init == "zeros")


@pytest.mark.parametrize("positions", ["shift", "none"])
def test_prompt_tuning_folded_saved_and_generated_with(positions, tmp_path):
    model, ids = (
        prefixkit.apply(tiny.make("llama"), positions=positions, num_frozen_tokens=1, **ROWS),
        tiny.tokens(2, 6),
    )
    expected = outputs(model, ids)
    made = model.generate(ids, max_new_tokens=4, do_sample=False)
    slow = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(made, slow)
    prefixkit.save(model, tmp_path / "rows")
    again = prefixkit.load(tiny.make("llama"), tmp_path / "rows")
    assert torch.equal(outputs(again, ids), expected)
    prefixkit.fold(again)
    torch.testing.assert_close(outputs(again, ids), expected)
    prefixkit.save(again, tmp_path / "flat")
    torch.testing.assert_close(outputs(prefixkit.load(tiny.make("llama"), tmp_path / "flat"), ids), expected)
    if positions == "shift":
        cache = prefixkit.to_cache(model, batch_size=2)
        prefixkit.remove(model)
        torch.testing.assert_close(outputs(model, ids, past_key_values=cache), expected, atol=1e-5, rtol=1e-4)


def test_prompt_tuning_under_checkpointing_and_padding():
    gradients = []
    ids, mask = tiny.tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = prefixkit.apply(tiny.make("llama").train(), **ROWS)
        if checkpointing:
            enable_checkpointing(model)
        logits = model(ids, attention_mask=mask).logits
        logits[mask.bool()].square().mean().backward()
        gradients.append(model.prefixkit.default.embedding.weight.grad)
    torch.testing.assert_close(*gradients)
    alone = outputs(model.eval(), ids[:1, 3:])
    torch.testing.assert_close(logits[0, 3:], alone[0], atol=1e-4, rtol=1e-4)


def test_disabled_prompt_tuning_reads_nothing():
    model, ids = tiny.make("gpt2").requires_grad_(False), tiny.tokens(2, 6)
    base = outputs(model, ids)
    prefixkit.apply(model, **ROWS)
    with prefixkit.disabled(model):
        assert torch.equal(outputs(model, ids), base)
    assert not torch.equal(outputs(model, ids), base)


# Prefix memory


@pytest.mark.parametrize("name", [*tiny.EVERY])
def test_an_empty_memory_is_the_base(name):
    model = tiny.make(name).requires_grad_(False)
    inputs = tiny.inputs(model)
    with torch.no_grad():
        base = model(**inputs).logits
        prefixkit.apply(model, **MEMORY)
        assert torch.equal(model(**inputs).logits, base)
    assert prefixkit.config(model).positions == "none"


def test_a_memory_against_its_formula():
    """What is added to the last layer's attention of a model whose heads share keys by two."""
    torch.manual_seed(0)
    model = prefixkit.apply(tiny.make("llama").double(), layers=[2], **MEMORY)
    matrices = torch.randn(1, 2 * 8 * 8).double()
    module, seen = model.model.layers[2].self_attn, []
    module.register_forward_hook(lambda *call: seen.append(call[1:]), with_kwargs=True)
    with torch.no_grad():
        model(tiny.tokens(1, 6))
        model.prefixkit.default.double().matrices.copy_(matrices)
        model(tiny.tokens(1, 6))
    (_, options, (plain, _)), (_, _, (found, _)) = seen
    states, (cos, sin) = options["hidden_states"], options["position_embeddings"]
    query = module.q_proj(states)[0].view(6, 4, 8).transpose(0, 1)
    query = query * cos[0] + torch.cat([-query[..., 4:], query[..., :4]], dim=-1) * sin[0]
    last = matrices.view(2, 8, 8)
    added = torch.stack([(functional.elu(query[head]) + 1) @ last[head // 2] for head in range(4)], dim=1)
    torch.testing.assert_close(found[0] - plain[0], module.o_proj(added.flatten(1)), atol=1e-9, rtol=1e-7)


def test_a_memory_trains_is_saved_and_generates(tmp_path):
    model, ids = prefixkit.apply(tiny.make("llama"), **MEMORY), tiny.tokens(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    matrices = model.prefixkit.default.matrices
    assert matrices.grad.abs().min() > 0
    with torch.no_grad():
        matrices.normal_(std=0.1)
    assert torch.equal(
        model.generate(ids, max_new_tokens=4, do_sample=False),
        model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False),
    )
    prefixkit.fold(model)
    prefixkit.save(model, tmp_path)
    assert torch.equal(outputs(prefixkit.load(tiny.make("llama"), tmp_path), ids), outputs(model, ids))


# Shared keys and values


@pytest.mark.parametrize("method", ["p-tuning-v2", "prefix-tuning"])
def test_shared_keys_are_the_values(method):
    model = prefixkit.apply(tiny.make("llama"), method, num_virtual_tokens=TOKENS, share_key_value=True)
    pairs = prefixkit.Layout(prefixkit.sites(model)).split(model._prefixkit.attachment.flat())
    assert all(torch.equal(pair.key, pair.value) for pair in pairs)
    assert (pairs[0].key - pairs[1].key).abs().max() > 0.1
    if method == "p-tuning-v2":
        assert model.prefixkit.default.embedding.weight.shape == (TOKENS, 3 * 16)
    expected = outputs(model, tiny.tokens(2, 6))
    prefixkit.fold(model)
    torch.testing.assert_close(outputs(model, tiny.tokens(2, 6)), expected)
    assert model.prefixkit.default.embedding.weight.shape == (TOKENS, 3 * 32)


def test_a_shared_start_is_halfway():
    model = tiny.make("gpt2")
    width = sum(site.width for site in prefixkit.sites(model))
    flat = torch.randn(TOKENS, width)
    prefixkit.apply(model, num_virtual_tokens=TOKENS, share_key_value=True, init=flat)
    wanted = prefixkit.Layout(prefixkit.sites(model)).split(flat)
    found = prefixkit.Layout(prefixkit.sites(model)).split(model._prefixkit.attachment.flat())
    for asked, given in zip(wanted, found, strict=True):
        torch.testing.assert_close(given.key, (asked.key + asked.value) / 2)


# Refused


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "t5",
            ROWS,
            MethodError,
            "are for models that are a decoder and nothing else; this one has cross, decoder, enc",
        ),
        ("llama", {**ROWS, "engine": "cache"}, EngineError, "^the cache engine has no way to read embeddings"),
        (
            "llama",
            {**ROWS, "init": torch.zeros(4, 32)},
            ConfigError,
            r"^init is \(4, 32\) .*; the embeddings are \(5, 32\)",
        ),
        ("llama", {**MEMORY, "num_virtual_tokens": 3}, ConfigError, "^method 'prefix-memory' has no virtual tokens"),
        ("llama", {**MEMORY, "gate": True}, ConfigError, "pass num_virtual_tokens=1, gate=False"),
        ("llama", {**MEMORY, "engine": "cache"}, EngineError, "holds keys and values only, no gate and no memory"),
        ("llama", {**MEMORY, "init": "tokens"}, ConfigError, "^a memory starts empty, at the base model"),
        ("llama", {**MEMORY, "prefix_projection": True}, MethodError, "has no option 'prefix_projection'"),
        (
            "llama",
            {"num_virtual_tokens": 3, "share_key_value": 1},
            MethodError,
            "^share_key_value is 1; it must be True",
        ),
    ],
)
def test_what_is_refused(name, options, error, message):
    model = tiny.make(name)
    before = state(model)
    with pytest.raises(error, match=message):
        prefixkit.apply(model, **options)
    assert_same(before, state(model))


def test_a_memory_leaves_by_no_cache():
    with pytest.raises(EngineError, match="^a native cache holds keys and values only"):
        prefixkit.to_cache(prefixkit.apply(tiny.make("llama"), **MEMORY))


# The kit


class LowRank(nn.Module):
    """A third party's, as in the guide."""

    def __init__(self, rows, width, rank):
        super().__init__()
        self.left = nn.Parameter(torch.randn(rows, rank, dtype=torch.float32))
        self.right = nn.Parameter(torch.randn(rank, width, dtype=torch.float32) * 0.02 / rank**0.5)

    def forward(self):
        return self.left @ self.right


def low_rank(shape, options):
    return LowRank(shape.num_virtual_tokens, shape.width, options["rank"])


class OnLlama(MethodConformance):
    def make_model(self):
        return tiny.MAKERS["llama"]()


class TestLowRank(OnLlama):
    method = prefixkit.Method(name="low-rank", build=low_rank, options={"rank": 8, "prefix_dropout": 0.0})


class TestPrefixTuning(OnLlama):
    method = installed().method("prefix-tuning")


class TestPTuningV2(OnLlama):
    method = installed().method("p-tuning-v2")


class TestSharedKeysAndValues(OnLlama):
    method = installed().method("p-tuning-v2")
    options = MappingProxyType({"share_key_value": True, "init": "random"})

    def test_it_starts_where_it_is_asked_to(self):
        """Halfway: see above."""


class TestGated(OnLlama):
    method = installed().method("prefix-tuning")
    options = MappingProxyType({"gate": True})


class TestPromptTuning(OnLlama):
    method = installed().method("prompt-tuning")


class TestPrefixMemory(OnLlama):
    method = installed().method("prefix-memory")
    num_virtual_tokens = 1


class Wrong(LowRank):
    """A method with one mistake."""


class Forgets(Wrong):
    """Part of it is in no state dict."""

    def __init__(self, rows, width, rank):
        super().__init__(rows, width, rank)
        self.hidden = torch.randn(rows, 1)

    def forward(self):
        return super().forward() * self.hidden


class Rolls(Wrong):
    """Random in every call."""

    def forward(self):
        return super().forward() + torch.randn(1)


class Idle(Wrong):
    """A parameter that does nothing."""

    def __init__(self, rows, width, rank):
        super().__init__(rows, width, rank)
        self.spare = nn.Parameter(torch.ones(1))

    def forward(self):
        return super().forward() + 0 * self.spare


class Shared(Wrong):
    """All models have one and the same parameter."""

    one = None

    def __init__(self, rows, width, rank):
        super().__init__(rows, width, rank)
        Shared.one = self.right = self.right if Shared.one is None else Shared.one


class Halves(Wrong):
    """In the default dtype."""

    def __init__(self, rows, width, rank):
        super().__init__(rows, width, rank)
        self.left = nn.Parameter(torch.randn(rows, rank).float().to(torch.get_default_dtype()))

    def forward(self):
        return self.left.float() @ self.right


class StartsElsewhere(Wrong):
    def start(self, flat):
        self.left.zero_()


@pytest.mark.parametrize(
    ("encoder", "test"),
    [
        (Forgets, "test_saved_and_loaded_it_is_the_same"),
        (Rolls, "test_it_gives_the_same_twice"),
        (Idle, "test_it_trains_and_the_base_does_not"),
        (Shared, "test_two_models_share_nothing"),
        (Halves, "test_parameters_are_float32_whatever_the_default"),
        (StartsElsewhere, "test_it_starts_where_it_is_asked_to"),
    ],
)
def test_the_kit_sees_a_wrong_method(encoder, test, tmp_path):
    def build(shape, options):
        return encoder(shape.num_virtual_tokens, shape.width, 4)

    subject = type("Subject", (OnLlama,), {})()
    subject.method = prefixkit.Method(name="wrong", build=build, options={})
    arguments = {"tmp_path": tmp_path} if "saved" in test else {"default": torch.float16} if "float32" in test else {}
    with pytest.raises(AssertionError):
        getattr(subject, test)(**arguments)


@pytest.mark.parametrize("way", ["fold", "to_cache"])
def test_virtual_tokens_are_read_without_dropout(way):
    """As right after training."""
    dropouts = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    model, ids = prefixkit.apply(tiny.make("gpt2", **dropouts), **ROWS), tiny.tokens(2, 6)
    expected = outputs(model, ids)
    model.train()
    if way == "fold":
        prefixkit.fold(model)
        found = outputs(model.eval(), ids)
    else:
        cache = prefixkit.to_cache(model, batch_size=2)
        assert model.transformer.training
        found = outputs(prefixkit.remove(model).eval(), ids, past_key_values=cache)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_virtual_tokens_of_an_offloaded_model():
    model, ids = tiny.make("gpt2"), tiny.tokens(2, 6)
    rows = torch.randn(TOKENS, 32)
    expected = outputs(prefixkit.apply(copy.deepcopy(model), init=rows, **ROWS), ids)
    prefixkit.apply(cpu_offload(model, execution_device=torch.device("cpu")), init=rows, **ROWS)
    torch.testing.assert_close(outputs(model, ids), expected)


@pytest.mark.parametrize("ids", [[5, 9999, 3, 3, 3], [5, -1, 3, 3, 3]])
def test_words_that_are_none(ids):
    with pytest.raises(ConfigError, match="^these token ids are not among this"):
        prefixkit.apply(tiny.make("gpt2"), init=prefixkit.TextInit(ids), **ROWS)
