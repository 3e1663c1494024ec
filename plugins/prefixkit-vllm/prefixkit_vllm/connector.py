"""The connector that vLLM is given: it writes the keys and values of a prefix where the placeholders stand.

vLLM makes it twice, in the scheduler and in each worker. The scheduler's tells which requests begin with placeholders,
and that these are computed already; the worker's writes their keys and values, by the very function with which the
attention writes its own. What cannot be served with its prefix is refused, and never served without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from prefixkit.errors import ConfigError, EngineError
from prefixkit_vllm.folder import Description, described, tensors
from prefixkit_vllm.texts import Texts

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = init_logger("vllm.prefixkit")  # a child of vLLM's, whose handler prints it


Piece = tuple[torch.Tensor, ...]
"""Key and value of a layer, ``(P, kv_heads, dim)``."""


@dataclass(frozen=True)
class Load:
    """The virtual tokens ``first`` to P - 1 of a prefix, into a request's blocks."""

    prefix: str
    first: int
    blocks: tuple[int, ...]


@dataclass
class Loads(KVConnectorMetadata):
    """What the worker has to do before a step, and which requests it has to report as failed."""

    loads: list[Load] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)


class PrefixConnector(KVConnectorBase_V1):
    """Prefixes by name, from ``kv_connector_extra_config["prefixes"]``, a folder for each.

    Raises:
        CheckpointError: If a folder is not what :func:`prefixkit_vllm.write` wrote.
        ConfigError: If the settings are wrong, or two prefixes cannot be told apart.
        EngineError: If a prefix is not for this model, or vLLM runs in a way that was not foreseen.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        folders = self._kv_transfer_config.get_from_extra_config("prefixes", {})
        _check_settings(vllm_config, folders)
        self._folders: dict[str, str] = dict(folders)
        self._described = {name: described(folder) for name, folder in folders.items()}
        self._block = vllm_config.cache_config.block_size
        # Of how many tokens prefix caching takes the first ids for the same text.
        hashed = min(self._block, vllm_config.cache_config.hash_block_size or self._block)
        self._texts = Texts({name: one.placeholders for name, one in self._described.items()}, hashed)
        for name, one in self._described.items():
            _check_base(name, one, vllm_config.model_config.hf_text_config)
        self._next = Loads()
        self._refused: set[str] = set()
        self._layers: dict[int, Any] = {}
        self._pieces: dict[str, dict[int, Piece]] = {}

    # In the scheduler

    def on_new_request(self, request: Request) -> None:
        """Refuse what cannot be served with its prefix."""
        reason = self._texts.refuses(request)
        if reason:
            logger.error("prefixkit: request %s is refused: %s", request.request_id, reason)
            self._refused.add(request.request_id)
            request.skip_reading_prefix_cache = False  # or vLLM would not ask, and read the placeholders as words

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """How many virtual tokens are still to be loaded; a refused request waits for some, which never come."""
        if request.request_id in self._refused:
            return 1, True
        prefix = self._texts.prefix_of(request.prompt_token_ids)
        tokens = len(self._described[prefix].placeholders) if prefix else 0
        return max(0, tokens - num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Note what is to be loaded, and where."""
        if request.request_id in self._refused:
            self._next.refused.add(request.request_id)
        elif num_external_tokens:
            prefix = self._texts.prefix_of(request.prompt_token_ids)
            assert prefix is not None
            tokens = len(self._described[prefix].placeholders)
            (ids,) = blocks.get_block_ids()
            used = tuple(ids[: -(-tokens // self._block)])
            self._next.loads.append(Load(prefix, tokens - num_external_tokens, used))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Loads:
        """What was noted in this step."""
        noted, self._next = self._next, Loads()
        return noted

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The answer says which prefix it has, as ``kv_transfer_params``."""
        refused = request.request_id in self._refused
        self._refused.discard(request.request_id)
        prefix = None if refused else self._texts.prefix_of(request.prompt_token_ids)
        return False, {"prefix": prefix} if prefix else None

    # In a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Read the prefixes, now that the layers are there."""
        self._layers = _attention(self._vllm_config)
        self._pieces = {name: self._read(name) for name in self._folders}
        logger.info("prefixkit: prefixes %s in %d layers", ", ".join(self._folders), len(self._layers))

    def _read(self, name: str) -> dict[int, Piece]:
        """Keys and values of the layers and heads that this worker has, as its attention makes them."""
        config, numbers = self._vllm_config.model_config, tensors(self._folders[name], self._described[name])
        depth, heads = config.get_total_num_hidden_layers(), config.get_total_num_kv_heads()
        if len(numbers) != 2 * depth:
            raise EngineError(f"the prefix {name!r} has {len(numbers) // 2} layers, and the model {depth}")
        return {
            index: tuple(
                _heads_here(name, numbers[f"decoder.{index}.{part}"], heads, layer, size)
                .transpose(0, 1)
                .to(layer.kv_cache.device, config.dtype)
                .contiguous()
                for part, size in (("key", layer.head_size), ("value", layer.head_size_v))
            )
            for index, layer in self._layers.items()
        }

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Write keys and values before the model reads them."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        for load in metadata.loads:
            self._write(load)

    def _write(self, load: Load) -> None:
        tokens = torch.arange(load.first, len(self._described[load.prefix].placeholders))
        blocks = torch.tensor(load.blocks)
        slots = blocks[tokens // self._block] * self._block + tokens % self._block
        for index, layer in self._layers.items():
            key, value = (part[load.first :] for part in self._pieces[load.prefix][index])
            slots = slots.to(key.device)
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The refused requests: what they wait for has failed."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        return KVConnectorTransferResults(finished_recving=set(metadata.refused), failed_recving=set(metadata.refused))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """It is there already."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is kept."""

    def wait_for_save(self) -> None:
        """Nothing is kept."""


def _check_settings(config: VllmConfig, folders: Any) -> None:
    """Refuse what would lose a prefix, or read it otherwise."""
    if not isinstance(folders, Mapping) or not folders:
        raise ConfigError(
            f"kv_connector_extra_config['prefixes'] is {folders!r}; it is the folder of each prefix, by its name"
        )
    if config.kv_transfer_config.kv_load_failure_policy != "fail":
        raise ConfigError(
            "kv_load_failure_policy is 'recompute', with which vLLM serves what is refused, and reads its placeholders "
            "as words; leave it out"
        )
    parallel = config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise EngineError(
            "with context parallelism a worker has every so many tokens only, which a prefix is not cut to"
        )
    if config.speculative_config is not None:
        raise EngineError("speculative decoding has layers of its own, for which the prefix has no keys and values")


def _check_base(name: str, prefix: Description, base: Any) -> None:
    """Refuse another base, as far as its config tells."""
    wanted = {what: getattr(prefix, what) for what in ("model_type", "hidden_size", "vocab_size")}
    found = {what: getattr(base, what, None) for what in wanted}
    if found != wanted:
        raise EngineError(f"the prefix {name!r} is for a base of {wanted}, and this one is of {found}")


def _attention(config: VllmConfig) -> dict[int, Any]:
    """The attention of each layer here, by the layer's number.

    Raises:
        EngineError: If one has none that keys and values can be written to.
    """
    found = {
        extract_layer_index(path): layer
        for path, layer in config.compilation_config.static_forward_context.items()
        if hasattr(getattr(layer, "impl", None), "do_kv_cache_update")
    }
    first, end = config.model_config.get_layers_start_end_indices(config.parallel_config)
    if sorted(found) != list(range(first, end)):
        raise EngineError(
            f"layers {first} to {end - 1} of this model should have an attention that a prefix can be written to, and "
            f"{sorted(found)} have; vLLM cannot serve it with a prefix"
        )
    return found


def _heads_here(name: str, part: torch.Tensor, heads: int, layer: Any, size: int) -> torch.Tensor:
    """``(kv_heads, P, dim)`` of this worker out of the model's; where there are more workers than heads, they share."""
    if part.shape[0] != heads or part.shape[2] != size:
        raise EngineError(
            f"the prefix {name!r} has {part.shape[0]} heads of {part.shape[2]} numbers for keys and values, and the "
            f"model {heads} of {size}"
        )
    first = get_tensor_model_parallel_rank() * heads // get_tensor_model_parallel_world_size()
    return part[first : first + layer.num_kv_heads]
