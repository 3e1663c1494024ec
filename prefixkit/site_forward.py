"""What a ``site_forward`` is made of: the prefix in attention that is not on transformers' attention interface.

Such attention often takes a cache, and goes on with the keys and values that the cache gives back.
:func:`through_cache` runs the module's own ``forward`` with a cache that gives the prefix's back as well.
Nothing of the architecture is written again, so nothing of it can differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prefixkit import transformers_internals as internals
from prefixkit.errors import EngineError
from prefixkit.prefix_state import NO_MASK, find_state, keys_in_front


class CacheInFront:
    """Stands in for the cache of one attention call; what it gives back has the prefix in front.

    Attributes:
        used: Whether the attention has asked for its keys and values.
    """

    def __init__(self, module: nn.Module, cache: Any) -> None:
        self.module = module
        self.cache: Any = None if cache is None else internals.self_and_cross(cache)[0]
        self.used: bool = False

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of the call and of the cache, which does not get to hold the prefix."""
        self.used = True
        if self.cache is not None:
            key, value = self.cache.update(key, value, *args, **kwargs)
        return keys_in_front(self.module, key, value)

    def get_seq_length(self, *args: Any) -> Any:
        """How many tokens the cache holds."""
        return 0 if self.cache is None else self.cache.get_seq_length(*args)


def through_cache(
    module: nn.Module,
    *args: Any,
    cache_name: str | None = None,
    mask_name: str | None = "attention_mask",
    **kwargs: Any,
) -> Any:
    """A ``site_forward`` for attention that takes a cache and goes on with what its ``update`` returns.

    The module's own ``forward`` runs, with the prefix in what the cache gives back and in the mask.

    Example::

        yield Stack(..., site_forward=functools.partial(prefixkit.through_cache, cache_name="kv_cache"))

    Args:
        module: The site's module.
        *args: What its ``forward`` was called with.
        cache_name: The parameter of its ``forward`` that takes the cache, which may be ``None`` in a call; by default
            the one of ``layer_past``, ``past_key_values``, ``past_key_value`` and ``cache`` that there is.
        mask_name: The parameter that takes the mask, as in :func:`prefixkit.in_front`; ``None`` if the
            mask has the prefix's columns already.
        **kwargs: What its ``forward`` was called with.

    Raises:
        EngineError: If ``forward`` has no such parameters, does not use the cache, or gets no mask and may
            make a causal one of its own.
    """
    names = _parameters(type(module))
    cache_name = cache_name or next((name for name in internals.CACHES if name in names), internals.CACHES[0])
    for name in (cache_name, mask_name):
        if name is not None and name not in names:
            raise EngineError(
                f"{type(module).__name__}.forward takes no {name!r} in transformers {internals.VERSION}, but "
                f"{', '.join(names)}; the adapter was written for another version"
            )
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    cache = CacheInFront(module, arguments.get(cache_name))
    if mask_name is None:
        _check_all_see(module)
    else:
        _check_mask(module, arguments.get(mask_name), arguments[names[0]])
        arguments[mask_name] = mask_in_front(module, arguments.get(mask_name))
    output = type(module).forward(module, **{**arguments, cache_name: cache})
    if not cache.used:
        raise EngineError(f"{type(module).__name__}.forward does not use its {cache_name!r}; pass engine='cache'")
    return output


def _check_mask(module: nn.Module, mask: torch.Tensor | None, states: torch.Tensor) -> None:
    """Torch aligns a causal mask of its own at the upper left: with a prefix, a token would not see itself."""
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise EngineError(
            f"{type(module).__name__} was given a {type(mask).__name__} for a mask, which cannot be widened here; make "
            "the model with attn_implementation='eager'"
        )
    if mask is None and states.shape[1] > 1 and getattr(module, "is_causal", False):
        raise EngineError(
            f"{type(module).__name__} was given no mask and may make a causal one that knows no prefix; make the model "
            "with attn_implementation='eager', or pass engine='cache'"
        )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _parameters(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of what ``forward`` takes; torch.compile need not look how they are found."""
    return internals.parameter_names(cls)


def mask_in_front(module: nn.Module, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask of one attention call with the prefix's columns in front, as :func:`prefixkit.in_front` gives it."""
    if mask is None:
        _check_all_see(module)
        return None
    found = find_state(module, {}, looks=True)
    if found is None or found[1].read is not None:
        return mask
    site, state = found
    wide: torch.Tensor = state.widened(mask, site, mask.shape[0])
    return wide


def _check_all_see(module: nn.Module) -> None:
    """Raise if some queries do not see some virtual tokens, and there is no mask that could say so."""
    found = find_state(module, {}, looks=True)
    if found is not None and found[1].read is None and found[1].seen(found[0]) is not None:
        raise EngineError(NO_MASK)


def alibi_in_front(module: nn.Module, alibi: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """The linear bias of one attention call (ALiBi) with the prefix's columns in front, for a ``site_forward``.

    Under ``positions="shift"`` the prefix stands right before the first real token. Under ``"none"`` it is
    at no distance from any token.

    Example::

        alibi = prefixkit.alibi_in_front(module, alibi, slopes)
        key, value, mask = prefixkit.in_front(module, key, value, mask)
        scores = query @ key.transpose(-1, -2) * scaling + alibi + mask

    Args:
        module: The site's module.
        alibi: The bias of the real keys, ``(batch or 1, heads, queries or 1, keys)``: slope × position, the
            first real token of each row at 0.
        slopes: By how much the bias grows from one key to the next, ``(heads,)``.

    Returns:
        ``(batch or 1, heads, queries or 1, P + keys)``; ``alibi`` itself without a prefix.

    Raises:
        EngineError: If the prefix has not reached the module.
    """
    found = find_state(module, {}, looks=True)
    if found is None or found[1].read is not None:
        return alibi
    site, state = found
    tokens, places = state.tokens(site), state.query_positions
    assert places is not None, "a stack with a linear bias has positions=RelativeBias(...)"
    # At no distance from any token: as if each virtual token stood where the query stands.
    places = (
        torch.arange(tokens)[None, None] - tokens if state.shifts else (places - state.num_virtual_tokens)[..., None]
    )
    front = slopes[:, None, None].to(alibi.device) * places[:, None].to(alibi.device)
    batch, heads, queries = (max(one, other) for one, other in zip(front.shape[:3], alibi.shape[:3], strict=True))
    parts = (front.to(alibi.dtype).expand(batch, heads, queries, tokens), alibi.expand(batch, heads, queries, -1))
    return torch.cat(parts, dim=-1)
