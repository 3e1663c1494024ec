"""Continuous batching of transformers: many requests in one row, and the active prefix in front of each.

The attention of transformers writes its paged cache itself, so that the cache holds the text alone. What it holds was
read with a prefix, though: one cache goes with one prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefixkit import transformers_internals as internals
from prefixkit.adapter import PositionIds
from prefixkit.attention_engine import AttentionEngine
from prefixkit.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.attachment import Attachment
    from prefixkit.prefixes import Prefixes

WAYS_IN = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
READ_WITH = "prefixkit_read_with"
"""The attribute of a paged cache that says with which prefix its text was read."""
INSTEAD = "use generate(), or prefixkit.remove(model) first"


class ContinuousBatching:
    """Stands in for one of the ways into continuous batching.

    Args:
        model: Whose.
        prefixes: On it.
        name: The method that it stands in for.
    """

    def __init__(self, model: PreTrainedModel, prefixes: Prefixes, name: str) -> None:
        self.model = model
        self.prefixes = prefixes
        self.method = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the method of the class, with sdpa.

        Raises:
            EngineError: If the prefix would be lost there, or be another one than its cache was read with.
        """
        if not self.prefixes.enabled:
            self._check_kept(kwargs)
            return self._original(*args, **kwargs)
        wrong = _what_is_wrong(self.model, self.prefixes)
        if wrong:
            raise EngineError(f"continuous batching does not serve {wrong}; {INSTEAD}")
        self._check_kept(kwargs)
        if len(args) > 2:
            raise EngineError(f"with a prefix {self.method} takes its settings by name")
        name = "continuous_batching_config"
        return self._original(*args, **{**kwargs, name: internals.without_flash(kwargs.get(name))})

    @property
    def _original(self) -> Any:
        return getattr(type(self.model), self.method).__get__(self.model)

    def _check_kept(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse a manager that outlives the call, and the prefix that its cache was read with."""
        kept = getattr(self.model, "_cached_continuous_batching_manager", None) is not None
        if kept or kwargs.get("persistent_manager"):
            raise EngineError(
                "a persistent manager of continuous batching keeps text that was read with one prefix, or with none; "
                "leave persistent_manager out, and call model.destroy_cached_continuous_batching_manager() if there "
                "is one"
            )


def _what_is_wrong(model: PreTrainedModel, prefixes: Prefixes) -> str:
    """What continuous batching does not serve, or an empty text."""
    attachment = prefixes.attachment
    implementation = internals.attention_implementation_of(model.config)
    cases = {
        "a prefix in this version of transformers": not internals.has_paged_attention(),
        "a prefix for each row (prefixkit.rows)": prefixes.rows is not None,
        "a prefix of the cache engine": not isinstance(attachment.engine, AttentionEngine),
        "an infix": attachment.config.infix,
        f"a prefix with {implementation!r} attention, only with sdpa": implementation != "sdpa",
        "a prefix of this architecture": not _is_plain(attachment),
    }
    return next((what for what, holds in cases.items() if holds), "")


def _is_plain(attachment: Attachment) -> bool:
    """Whether it stands in one decoder that is told its positions, and hands the cache down to its attention."""
    stacks = [stack for stack in attachment.stacks if stack.sites]
    sites = {site.stack for stack in stacks for site in stack.sites}
    told = all(isinstance(stack.positions, PositionIds) and stack.hands_down for stack in stacks)
    return sites == {"decoder"} and told and all(stack.site_forward is None for stack in stacks)


def check_paged(prefixes: Prefixes, arguments: Mapping[str, Any]) -> None:
    """Refuse a call of continuous batching whose cache was read with another prefix, or that has one for each row.

    Raises:
        EngineError: If it is one.
    """
    cache = internals.paged_cache(arguments)
    if cache is None:
        return
    wrong = _what_is_wrong_in_call(prefixes)
    if wrong:
        raise EngineError(f"continuous batching does not serve {wrong}; {INSTEAD}")
    now = _mark(prefixes.attachment) if prefixes.enabled else ()
    if cache.__dict__.setdefault(READ_WITH, now) != now:
        raise EngineError(
            "the prefix was changed, switched on or switched off while continuous batching ran, and its cache holds "
            "text that was read with what was there before; stop this manager and start another"
        )


def _what_is_wrong_in_call(prefixes: Prefixes) -> str:
    if not prefixes.enabled:
        return ""
    if prefixes.rows is not None:
        return "a prefix for each row (prefixkit.rows)"
    return "" if _is_plain(prefixes.attachment) and not prefixes.attachment.config.infix else "this prefix"


def _mark(attachment: Attachment) -> tuple[Any, ...]:
    """What tells one prefix, and its numbers, from another."""
    numbers = attachment.encoder.state_dict(keep_vars=True).values()
    return attachment.identity, *(0 if value.is_inference() else value._version for value in numbers)
