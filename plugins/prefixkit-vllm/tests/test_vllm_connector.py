"""The connector alone, in the environment that vLLM has: what it refuses to start with, and what it writes where."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import prefixkit_vllm
import pytest
import tiny
import torch
from prefixkit_vllm.folder import described

import prefixkit
from prefixkit.errors import CheckpointError, ConfigError, EngineError
from prefixkit.testing.subject import strengthen

pytest.importorskip("vllm", reason="vLLM has an environment of its own: nox -s vllm")
pytestmark = pytest.mark.filterwarnings("default")

TOKENS, BLOCK, LAYERS, HEADS, DIM = 5, 4, 3, 2, 8


@pytest.fixture(scope="module")
def connector():
    from prefixkit_vllm import connector

    return connector


@pytest.fixture
def folder(tmp_path):
    model = tiny.make("llama")
    prefixkit.apply(model, num_virtual_tokens=TOKENS)
    strengthen(model)
    prefixkit_vllm.write(model, tmp_path / "a")
    return tmp_path / "a"


class Attention:
    """A layer that keeps what it is given."""

    head_size = head_size_v = DIM

    def __init__(self, heads=HEADS):
        self.num_kv_heads, self.kv_cache, self.impl = heads, torch.zeros(10, heads, BLOCK, 2, DIM), self

    def do_kv_cache_update(self, layer, key, value, kv_cache, slots):
        assert layer is self
        assert kv_cache is self.kv_cache
        for number, slot in enumerate(slots.tolist()):
            kv_cache[slot // BLOCK, :, slot % BLOCK, 0] = key[number]
            kv_cache[slot // BLOCK, :, slot % BLOCK, 1] = value[number]


def configured(prefixes, *, layers=LAYERS, heads=HEADS, here=range(LAYERS), base=(), transfer=(), **changes):
    """What vLLM hands to the connector, as far as that looks at it."""
    told = {"kv_load_failure_policy": "fail", "get_from_extra_config": lambda *_: prefixes, **dict(transfer)}
    config = {"model_type": "llama", "hidden_size": 32, "vocab_size": tiny.VOCAB, **dict(base)}
    model = {
        "hf_text_config": SimpleNamespace(**config),
        "dtype": torch.float32,
        "get_total_num_hidden_layers": lambda: layers,
        "get_total_num_kv_heads": lambda: heads,
        "get_layers_start_end_indices": lambda _: (here[0], here[-1] + 1),
    }
    paths = {f"model.layers.{index}.self_attn.attn": Attention() for index in here}
    parallel = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    plain = {
        "kv_transfer_config": SimpleNamespace(**told),
        "model_config": SimpleNamespace(**model),
        "cache_config": SimpleNamespace(block_size=BLOCK, hash_block_size=None),
        "parallel_config": SimpleNamespace(**parallel),
        "speculative_config": None,
        "compilation_config": SimpleNamespace(static_forward_context={**paths, "model.layers.0.mlp": object()}),
    }
    return SimpleNamespace(**{**plain, **changes})


def made(connector, config):
    return connector.PrefixConnector(config, connector.KVConnectorRole.WORKER, None)


@pytest.fixture(autouse=True)
def alone(connector, monkeypatch):
    """One worker; vLLM's groups of processes are not there."""
    monkeypatch.setattr(connector, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(connector, "get_tensor_model_parallel_world_size", lambda: 1)


def rewritten(folder, **changes):
    """The folder with another description."""
    (folder / "vllm.json").write_bytes(dataclasses.replace(described(folder), **changes).as_json())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prefixes": {}}, ConfigError, r"\['prefixes'\] is \{\}; it is the folder of each prefix, by its name"),
        ({"prefixes": ["a"]}, ConfigError, r"\['prefixes'\] is \['a'\]"),
        ({"prefixes": {"a": "nowhere"}}, CheckpointError, "has no vllm.json"),
        ({"transfer": {"kv_load_failure_policy": "recompute"}}, ConfigError, "'recompute', with which vLLM serves"),
        (
            {"base": {"model_type": "qwen2"}},
            EngineError,
            "the prefix 'a' is for a base of .*'llama'.*, and this .*'qwen2'",
        ),
        ({"base": {"hidden_size": 64}}, EngineError, "'hidden_size': 32.*'hidden_size': 64"),
        ({"base": {"vocab_size": 63}}, EngineError, "'vocab_size': 62.*'vocab_size': 63"),
        ({"speculative_config": object()}, EngineError, "speculative decoding has layers of its own"),
        (
            {"parallel_config": SimpleNamespace(decode_context_parallel_size=2, prefill_context_parallel_size=1)},
            EngineError,
            "with context parallelism",
        ),
    ],
)
def test_it_does_not_start(connector, folder, options, error, message):
    with pytest.raises(error, match=message):
        made(connector, configured(**{"prefixes": {"a": str(folder)}, **options}))


def test_it_does_not_start_with_prefixes_that_prefix_caching_takes_for_each_other(connector, folder, tmp_path):
    ids = described(folder).placeholders
    for number, other in enumerate((ids, ids[:4], (*ids[:4], 3))):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "vllm.json").write_bytes((folder / "vllm.json").read_bytes())
        rewritten(tmp_path / str(number), placeholders=other)
        with pytest.raises(ConfigError, match="the placeholders of 'a'"):
            made(connector, configured({"a": str(folder), "b": str(tmp_path / str(number))}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 4}, "the prefix 'a' has 3 layers, and the model 4"),
        ({"heads": 4}, "the prefix 'a' has 2 heads of 8 numbers for keys and values, and the model 4 of 8"),
        (
            {"compilation_config": SimpleNamespace(static_forward_context={"model.layers.0.attn": Attention()})},
            r"layers 0 to 2 of this model should have an attention that a prefix can be written to, and \[0\] have",
        ),
    ],
)
def test_it_does_not_start_with_another_model(connector, folder, options, message):
    worker = made(connector, configured({"a": str(folder)}, **options))
    with pytest.raises(EngineError, match=message):
        worker.register_kv_caches({})


def test_a_damaged_file_is_found_at_the_start(connector, folder):
    (folder / "prefix.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is not the file that vllm.json describes"):
        made(connector, configured({"a": str(folder)})).register_kv_caches({})


def run(worker, load):
    metadata = type(worker.build_connector_meta(None))([load])
    worker.bind_connector_metadata(metadata)
    worker.start_load_kv(None)


@pytest.mark.parametrize("first", [0, 4])
def test_keys_and_values_are_written_where_the_blocks_are(connector, folder, first):
    """From the first that prefix caching has not found, number by number."""
    config = configured({"a": str(folder)})
    worker = made(connector, config)
    worker.register_kv_caches({})
    run(worker, connector.Load("a", first, (7, 3)))
    numbers = connector.tensors(folder, described(folder))
    for index in range(LAYERS):
        cache = config.compilation_config.static_forward_context[f"model.layers.{index}.self_attn.attn"].kv_cache
        for part, name in enumerate(("key", "value")):
            wanted = torch.zeros_like(cache[..., part, :])
            for token in range(first, TOKENS):
                wanted[(7, 3)[token // BLOCK], :, token % BLOCK] = numbers[f"decoder.{index}.{name}"][:, token]
            assert torch.equal(cache[..., part, :], wanted)


@pytest.mark.parametrize(("workers", "rank", "has"), [(2, 0, [0]), (2, 1, [1]), (4, 1, [0]), (4, 2, [1])])
def test_a_worker_has_its_own_heads(connector, folder, monkeypatch, workers, rank, has):
    monkeypatch.setattr(connector, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(connector, "get_tensor_model_parallel_world_size", lambda: workers)
    config = configured({"a": str(folder)}, here=range(1, 3))
    layer = Attention(heads=1)
    config.compilation_config.static_forward_context["model.layers.2.self_attn.attn"] = layer
    worker = made(connector, config)
    worker.register_kv_caches({})
    run(worker, connector.Load("a", 0, (0, 1)))
    key = connector.tensors(folder, described(folder))["decoder.2.key"]
    assert torch.equal(layer.kv_cache[0, :, 0, 0], key[has, 0])


def test_a_refused_request_waits_for_what_fails(connector, folder):
    scheduler = made(connector, configured({"a": str(folder)}))
    ids = [*described(folder).placeholders, 7]
    asked = {"request_id": "r", "prompt_token_ids": ids, "num_prompt_tokens": len(ids)}
    request = SimpleNamespace(**asked, kv_transfer_params={"prefix": "b"}, skip_reading_prefix_cache=True)
    scheduler.on_new_request(request)
    assert request.skip_reading_prefix_cache is False
    assert scheduler.get_num_new_matched_tokens(request, 0) == (1, True)
    scheduler.update_state_after_alloc(request, None, 1)
    metadata = scheduler.build_connector_meta(None)
    assert (metadata.loads, metadata.refused) == ([], {"r"})
    scheduler.bind_connector_metadata(metadata)
    assert scheduler.get_transfer_results(set()).failed_recving == {"r"}
    assert scheduler.request_finished(request, []) == (False, None)
    assert scheduler.build_connector_meta(None).refused == set()


def test_a_served_request(connector, folder):
    scheduler = made(connector, configured({"a": str(folder)}))
    blocks = SimpleNamespace(get_block_ids=lambda: ([9, 2, 4],))
    ids = [*described(folder).placeholders, 7]
    asked = {"request_id": "r", "prompt_token_ids": ids, "num_prompt_tokens": len(ids)}
    request = SimpleNamespace(**asked, kv_transfer_params=None, skip_reading_prefix_cache=False)
    scheduler.on_new_request(request)
    for computed, wanted in ((0, TOKENS), (4, 1), (8, 0)):
        assert scheduler.get_num_new_matched_tokens(request, computed) == (wanted, False)
        scheduler.update_state_after_alloc(request, blocks, wanted)
        loads = [connector.Load("a", computed, (9, 2))] if wanted else []
        assert scheduler.build_connector_meta(None).loads == loads
    assert scheduler.request_finished(request, []) == (False, {"prefix": "a"})
    bare = SimpleNamespace(**{**asked, "prompt_token_ids": [7, 8]})
    assert scheduler.get_num_new_matched_tokens(bare, 0) == (0, False)
    assert scheduler.request_finished(bare, []) == (False, None)


def test_the_metadata_is_pickled_on_its_way_to_the_workers(connector):
    import pickle

    metadata = connector.Loads([connector.Load("a", 0, (1, 2))], {"r"})
    assert pickle.loads(pickle.dumps(metadata)) == metadata
    assert json.dumps(dataclasses.asdict(metadata.loads[0]))
