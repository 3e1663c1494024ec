"""The only module that touches what transformers does not document for users.

A function of ours stands before each attention function that a model may call, under the same name. So
no config changes, masks are the model's own, and a model without a prefix gets what it got before.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, wraps
from importlib.util import find_spec
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version  # transformers brings it
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache, StaticLayer
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from prefixkit.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
else:
    try:
        from transformers import PreTrainedConfig
    except ImportError:  # its name before transformers 5.0
        from transformers import PretrainedConfig as PreTrainedConfig

AttentionFunction = Callable[..., tuple[torch.Tensor, Any]]

VERSION: str = transformers.__version__
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""The registry of attention functions, under the name by which models import it."""
EAGER = "eager_attention_forward"
"""How the names end of the eager attention functions, which are in no registry but beside a model's classes."""
STANDS_BEFORE = "prefixkit_stands_before"
"""The attribute that marks an attention function as ours."""
CACHE = "past_key_values"
"""The parameter that takes the native cache; in transformers itself it is ``cache`` from 5.24 on."""
CACHES = ("layer_past", CACHE, "past_key_value", "cache")
"""What attention calls the same, in one version of transformers or another."""
_CACHE_IS_RENAMED = Version(VERSION) >= Version("5.24.dev0")
HELD = "prefixkit_identity"
"""The attribute of a cache that says which prefix is in it."""
PAGED = "cache"
"""The keyword under which continuous batching hands its cache down to the attention."""
_Paged: Any = getattr(sdpa_attention, "PagedAttentionCache", None)
WRAPPABLE = ("eager", "sdpa", "flex_attention")
"""Attention implementations whose masks the engine knows how to widen."""


def config_of(module: nn.Module) -> PreTrainedConfig:
    """The config that ``module`` reads its settings from."""
    if not has_config(module):
        raise EngineError(
            f"{type(module).__name__} has no transformers config, so it is no attention or stack that takes a prefix; "
            "an adapter names the module that calls the attention function"
        )
    config: PreTrainedConfig = module.config  # type: ignore[assignment]
    return config


def has_config(module: nn.Module) -> bool:
    """Whether ``module`` has a transformers config of its own."""
    return isinstance(getattr(module, "config", None), PreTrainedConfig)


def check_wrappable(config: PreTrainedConfig) -> str:
    """The name of the attention implementation of ``config``.

    Raises:
        EngineError: If it cannot be wrapped.
    """
    name = attention_implementation_of(config)
    if name not in WRAPPABLE:
        raise EngineError(
            f"the attention engine cannot wrap the attention implementation {name!r}; possible: "
            f"{', '.join(WRAPPABLE)}. Call model.set_attn_implementation('sdpa'), or pass engine='cache'"
        )
    return name


def attention_implementation_of(config: PreTrainedConfig) -> str:
    """The name of the attention implementation that ``config`` asks for."""
    return str(config._attn_implementation)


def stand_before_attention(home: str, make: Callable[[str, AttentionFunction], AttentionFunction]) -> None:
    """Put ``make(name, function)`` in the place of every attention function that the file ``home`` calls.

    What stands there afterwards hands on the calls of every module that is no site, so it may stay. A name
    of our own in the config would not do: some models ask for the name before they make a mask.
    Safe to repeat.
    """
    file: Any = importlib.import_module(home)
    interface = getattr(file, INTERFACE, None)
    if interface is None:
        return
    for name, function in list(vars(file).items()):
        if name.endswith(EAGER) and not hasattr(function, STANDS_BEFORE):
            setattr(file, name, _standing_before(make, "eager", function))
    for name in WRAPPABLE[1:]:
        if name in interface and not hasattr(interface[name], STANDS_BEFORE):
            function = _standing_before(make, name, interface[name])
            if name in getattr(interface, "_local_mapping", {}):
                interface[name] = function
            else:
                AttentionInterface.register(name, function)


def _standing_before(
    make: Callable[[str, AttentionFunction], AttentionFunction], name: str, function: AttentionFunction
) -> AttentionFunction:
    made = wraps(function)(make(name, function))
    setattr(made, STANDS_BEFORE, True)
    return made


def paged_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache of continuous batching in the arguments of a stack or of an attention call; else ``None``."""
    cache = arguments.get(PAGED)
    return cache if _Paged is not None and isinstance(cache, _Paged) else None


def has_paged_attention() -> bool:
    """Whether sdpa itself reads and writes the cache of continuous batching, as from transformers 5.20 or so on."""
    there = _Paged is not None and PAGED in signature(sdpa_attention_forward).parameters
    return there and not _CACHE_IS_RENAMED  # every cache is called so from then on, and that was not tried


def with_paged(
    module: nn.Module, key: torch.Tensor, value: torch.Tensor, arguments: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values that an attention call reads.

    In continuous batching the cache leaves ``arguments``, and these are written into it; else they are all.
    """
    cache = paged_cache(arguments)
    if cache is None:
        return key, value
    del arguments[PAGED]
    found: tuple[torch.Tensor, torch.Tensor] = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=arguments
    )
    return found


def without_flash(config: Any) -> Any:
    """The settings of continuous batching, or their defaults, but for a change to flash attention by itself."""
    from transformers import ContinuousBatchingConfig

    return replace(config or ContinuousBatchingConfig(), auto_switch_to_flash=False)


def is_torchs_attention(function: AttentionFunction) -> bool:
    """Whether ``function`` is transformers' way to torch's ``scaled_dot_product_attention``, and nobody else's."""
    return function is sdpa_attention_forward


def homes_of(module: nn.Module) -> list[str]:
    """The files whose attention functions ``module`` may call: those its classes are written in."""
    homes = (cls.__module__ for cls in type(module).__mro__)
    return [home for home in homes if hasattr(sys.modules.get(home), INTERFACE)]


def spreads_visibly() -> bool:
    """Whether a model's own tensor-parallel plan makes its weights ``DTensor``; before 5.20 they were plain."""
    return find_spec("transformers.distributed.tensor_parallel") is not None


def is_on_interface(module: nn.Module) -> bool:
    """Whether the attention of ``module`` is written for transformers' attention interface."""
    return bool(homes_of(module))


Seer = Callable[[nn.Module, tuple[Any, Any, Any, Any], dict[str, Any]], None]
_seer: ContextVar[Seer | None] = ContextVar("prefixkit_seer", default=None)
WATCHED = "prefixkit_watched"


@contextmanager
def attention_seen_by(model: nn.Module, see: Seer) -> Iterator[None]:
    """Inside the block ``see(module, (query, key, value, mask), options)`` gets every attention call of ``model``.

    Attention and masks are the eager ones there, so that every mask can be looked at.
    """
    AttentionInterface.register(WATCHED, _watched_attention)
    AttentionMaskInterface.register(WATCHED, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    configs = {id(config): config for module in model.modules() for config in _configs_of(module)}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    token = _seer.set(see)
    try:
        for config in configs.values():
            config._attn_implementation_internal = WATCHED
        yield
    finally:
        _seer.reset(token)
        for config, name in before:
            config._attn_implementation_internal = name


@contextmanager
def uncompiled_attention(model: nn.Module) -> Iterator[None]:
    """Inside, eager attention stands in for flex attention, which is compiled first and not worth it for one call."""
    configs = {id(config): config for module in model.modules() for config in _configs_of(module)}
    flex = [config for config in configs.values() if config._attn_implementation_internal == "flex_attention"]
    try:
        for config in flex:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config in flex:
            config._attn_implementation_internal = "flex_attention"


def indexes_by_place(config: PreTrainedConfig) -> bool:
    """Whether sparse attention takes a token's position for its place among the keys.

    MiniMax-M3 does, and before transformers 5.20 so do all that choose their ``index_topk`` keys (DeepSeek-V3.2).
    """
    if "minimax_m3_sparse" in (getattr(config, "layer_types", None) or ()):
        return True
    return bool(getattr(config, "index_topk", None)) and tuple(map(int, VERSION.split(".")[:2])) < (5, 20)


def looked_elsewhere(error: Exception) -> bool:
    """Whether a watched model failed since it has attention functions of its own, as some have before 5.5."""
    return isinstance(error, KeyError) and error.args == (WATCHED,)


def _configs_of(module: nn.Module) -> list[PreTrainedConfig]:
    """The config of ``module`` and those of its parts, which some modules pass on."""
    config = getattr(module, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return []
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    return [config, *(part for part in parts if isinstance(part, PreTrainedConfig))]


def _watched_attention(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any = None, **options: Any
) -> Any:
    see = _seer.get()
    if see is not None:
        see(module, (query, key, value, attention_mask), options)
    homes = (sys.modules[home] for home in homes_of(module))
    function = next((getattr(home, EAGER) for home in homes if hasattr(home, EAGER)), ALL_ATTENTION_FUNCTIONS["sdpa"])
    return function(module, query, key, value, attention_mask, **options)


class SiteForward:
    """Stands in for the ``forward`` of one module.

    Args:
        module: The module.
        function: What is called in its place, as ``function(module, ...)`` with all arguments by name.
        serves: Whether ``function`` is wanted now; else the module's own ``forward`` runs.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any], serves: Callable[[nn.Module], bool]) -> None:
        self.module = module
        self.function = function
        self.serves = serves
        self.names: tuple[str, ...] = parameter_names(type(module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As ``module.forward``."""
        if not self.serves(self.module):
            return type(self.module).forward(self.module, *args, **kwargs)
        return self.function(self.module, **dict(zip(self.names, args, strict=False)), **kwargs)


def parameter_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """The names of the parameters of the class's ``forward``, in order."""
    return _names_of(cls.forward)


@cache
def _names_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(signature(forward).parameters)[1:]


def takes_what(module: nn.Module, function: Callable[..., Any]) -> bool:
    """Whether ``function(module, ...)`` takes what the module's own ``forward`` takes, all by name.

    A function that knows the cache by names of other versions only, and swallows the rest, would lose it.
    """
    variable = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    given = signature(type(module).forward).parameters.values()
    names = {one.name for one in list(given)[1:] if one.kind not in variable}
    wanted = list(signature(function).parameters.values())[1:]
    takes = {one.name for one in wanted if one.kind not in variable}
    needs = {one.name for one in wanted if one.name in takes and one.default is Parameter.empty}
    theirs, known = names & set(CACHES), takes & set(CACHES)
    if theirs and known and not theirs & known:
        return False
    return needs <= names and (names <= takes or any(one.kind is Parameter.VAR_KEYWORD for one in wanted))


_FORWARDS = ("_old_forward", "forward")
"""Where a module's own ``forward`` may stand; accelerate's hooks move it to the former."""


def stand_in(module: nn.Module, function: Callable[..., Any], serves: Callable[[nn.Module], bool]) -> None:
    """Have ``function`` answer for the ``forward`` of ``module``, inside accelerate's hooks if it has any."""
    name = next((name for name in _FORWARDS if name in module.__dict__), "forward")
    module.__dict__[name] = SiteForward(module, function, serves)


def stand_aside(module: nn.Module) -> None:
    """Undo :func:`stand_in`."""
    for name in _FORWARDS:
        if isinstance(module.__dict__.get(name), SiteForward):
            del module.__dict__[name]
            if name == "_old_forward":
                module.__dict__[name] = type(module).forward.__get__(module)


def replace_checkpointing(stack: nn.Module, make: Callable[[Any], Any]) -> None:
    """Put ``make(function)`` in the place of every checkpoint function below ``stack``. Safe to repeat."""
    for module in stack.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, make):  # type: ignore[arg-type]
            module.__dict__["_gradient_checkpointing_func"] = make(function)


def give_back_checkpointing(stack: nn.Module, kind: type[Any]) -> None:
    """Undo :func:`replace_checkpointing`."""
    for module in stack.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, kind):
            module.__dict__["_gradient_checkpointing_func"] = function.function


def new_block_mask(
    mask_mod: Callable[..., torch.Tensor], batch: int, queries: int, keys: int, device: torch.device
) -> Any:
    """Flex attention's block mask of ``mask_mod(row, head, query, key)``, compiled as transformers' own are."""
    return _compiled_create_block_mask()(mask_mod, batch, None, queries, keys, device=str(device))


@cache
def _compiled_create_block_mask() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    compiled: Callable[..., Any] = torch.compile(create_block_mask)
    return compiled


def cache_name(names: Collection[str]) -> str:
    """By which of these parameters a model, or a part of it, takes its native cache; empty: by none."""
    possible = (CACHE, *(["cache"] if _CACHE_IS_RENAMED else []))
    return next((name for name in possible if name in names), "")


def takes_cache(module: nn.Module) -> bool:
    """Whether the module's ``forward`` takes a native cache."""
    return bool(cache_name(signature(module.forward).parameters))


def given_cache(model: nn.Module, cache: object) -> dict[str, Any]:
    """The keyword argument that hands ``cache`` to the model, by the name of this version of transformers."""
    return {cache_name(signature(model.forward).parameters) or CACHE: cache}


def cache_among(arguments: Mapping[str, Any]) -> Cache | None:
    """The native cache among keyword arguments of a model."""
    return next((value for name in (CACHE, "cache") if isinstance(value := arguments.get(name), Cache)), None)


def takes(module: nn.Module, name: str) -> bool:
    """Whether the module's ``forward`` names a parameter so; what it swallows unnamed, it may ignore."""
    return name in signature(module.forward).parameters


def takes_any_keyword(module: nn.Module) -> bool:
    """Whether the module's ``forward`` accepts keyword arguments it does not name."""
    kinds = {parameter.kind for parameter in signature(module.forward).parameters.values()}
    return Parameter.VAR_KEYWORD in kinds


def can_hand_down(model: nn.Module, stack: str, site: str) -> bool:
    """Whether all modules from ``stack`` down to ``site`` accept keyword arguments they do not name."""
    names = site.removeprefix(stack).strip(".").split(".")
    paths = [".".join(filter(None, (stack, *names[:depth]))) for depth in range(len(names) + 1)]
    modules = (model.get_submodule(path) for path in paths)
    return all(isinstance(module, nn.ModuleList) or takes_any_keyword(module) for module in modules)


def quantised_by(module: nn.Module) -> str:
    """For messages: what quantises the weights of the model that ``module`` is of; empty if nothing does."""
    settings = getattr(config_of(module), "quantization_config", None) if has_config(module) else None
    kind = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return "" if kind is None else f" (the base is quantised by {getattr(kind, 'value', kind)})"


def may_drop_layers(stack: nn.Module) -> bool:
    """Whether a training step may leave out every layer of ``stack`` (LayerDrop)."""
    shares = (getattr(of, "layerdrop", 0.0) for of in (stack, getattr(stack, "config", None)))
    return stack.training and any(shares)


def uses_reentrant_checkpointing(stack: nn.Module) -> bool:
    """Whether the stack's layers are checkpointed the reentrant way."""
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in stack.modules())
    functions = (getattr(function, "function", function) for function in functions)  # ours stands in front
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)


def is_checkpointing(stack: nn.Module) -> bool:
    """Whether the next forward of ``stack`` drops activations to compute them again."""
    return stack.training and any(getattr(module, "gradient_checkpointing", False) for module in stack.modules())


def new_cache(model_config: PreTrainedConfig, *, cross: bool = False) -> Cache:
    """An empty native cache, of the kind ``generate`` makes for this architecture.

    The caches of a decoder with cross-attention grow by the layer, since ``DynamicCache(config=…)``
    counts encoder layers.
    """
    if cross or model_config.is_encoder_decoder or getattr(model_config, "add_cross_attention", False):
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache(config=model_config)


def new_static_cache(model_config: PreTrainedConfig, length: int, cross_length: int | None = None) -> Cache:
    """An empty native cache that does not grow: ``length`` places, and for cross-attention ``cross_length``."""
    own = StaticCache(config=model_config, max_cache_len=length)
    if cross_length is None:
        return own
    return EncoderDecoderCache(own, StaticCache(config=model_config, max_cache_len=cross_length))


def cache_of(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Cache:
    """A native cache that holds these keys and values, a pair for each layer, and grows in all of them."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(pairs):
        cache.update(key, value, layer)
    return cache


def pairs_in(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The keys and values that a native cache holds, layer by layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def static_cache_over(parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Cache:
    """A cache that writes into these tensors: for each layer keys, values, and how many tokens they hold.

    A layer with a sliding window has room for every token too: its mask says what is seen.
    """
    layers: list[Any] = []
    for keys, values, held in parts:
        layer = StaticLayer(max_cache_len=keys.shape[2])
        layer.keys, layer.values, layer.cumulative_length = keys, values, held
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layers.append(layer)
    return Cache(layers=layers)


def static_layers_append() -> bool:
    """Whether a static layer counts what it holds; before transformers 5.5 the caller tells it where to write."""
    return hasattr(StaticLayer(max_cache_len=1), "cumulative_length")


def with_cross(cache: Cache) -> Cache:
    """``cache`` with room of its own for cross-attention, as a decoder that is given encoder states needs."""
    return cache if isinstance(cache, EncoderDecoderCache) else EncoderDecoderCache(cache, DynamicCache())


def self_and_cross(cache: Cache) -> tuple[Cache, Cache | None]:
    """The self-attention part and the cross-attention part of a cache."""
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache, cache.cross_attention_cache
    return cache, None


def is_dynamic(cache: object) -> bool:
    """Whether ``cache`` is a plain dynamic cache, or a pair of them, that keeps what it is given."""
    if not isinstance(cache, Cache):
        return False
    parts = [part for part in self_and_cross(cache) if part is not None]
    return all(type(part) is DynamicCache and not getattr(part, "offloading", False) for part in parts)


def cached_tokens(cache: object) -> int | None:
    """How many tokens a native cache holds; ``None`` if it is none, or if only its device knows."""
    length = cache.get_seq_length() if isinstance(cache, Cache) else None
    return length if isinstance(length, int) else None


def mark_prefix(cache: Cache, identity: str) -> None:
    """Remember which prefix ``cache`` holds; copies of the cache, and wrappers around it, remember it too."""
    for part in (cache, self_and_cross(cache)[0]):
        setattr(part, HELD, identity)


def held_prefix(cache: object) -> str | None:
    """The identity of the prefix that prefixkit put in ``cache``, if it did."""
    own = self_and_cross(cache)[0] if isinstance(cache, Cache) else None
    identity: str | None = getattr(own, HELD, None)
    return identity


def rows_for_each(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many rows ``generate``, called so, makes of each that it is given: beams, or sequences to return."""
    names = tuple(signature(type(model).generate).parameters)[1:]  # type: ignore[attr-defined]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    settings = [named.get("generation_config"), getattr(model, "generation_config", None)]
    # What is not set is None from transformers 5.0 on, and before the default, over which the model's own goes.
    unset = GenerationConfig()  # type: ignore[no-untyped-call]

    def value(name: str) -> int:
        told = (getattr(given, name, None) for given in settings)
        return named.get(name) or next((number for number in told if number and number != getattr(unset, name)), 1)

    return max(value("num_beams"), value("num_return_sequences"))


def cache_in(output: Any) -> Cache | None:
    """The native cache among what a stack returned."""
    parts = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else ()
    return next((part for part in parts if isinstance(part, Cache)), None)


def layer_holds(layer: Any, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a layer of a native cache keeps just these keys and values."""
    pairs = ((getattr(layer, "keys", None), key), (getattr(layer, "values", None), value))
    return all(isinstance(kept, torch.Tensor) and torch.equal(kept, given) for kept, given in pairs)


def layer_slides(layer: Any) -> bool:
    """Whether a layer of a native cache forgets old keys."""
    return bool(getattr(layer, "is_sliding", False))


def set_not_updated(cache: Cache, layers: range) -> None:
    """Have the decoder append the encoder's states to a filled cross cache, not skip them."""
    if isinstance(cache, EncoderDecoderCache):
        cache.is_updated.update(dict.fromkeys(layers, False))
