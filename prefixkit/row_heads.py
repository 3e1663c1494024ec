"""Heads of a batch whose rows have different prefixes: each row goes through its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call

from prefixkit.errors import ConfigError, EngineError
from prefixkit.head import head_parameters

if TYPE_CHECKING:
    from prefixkit.mixture import Rows
    from prefixkit.prefixes import Prefixes


NOT_BY_ROW = "cannot be another one for each row; activate one prefix at a time"


@contextmanager
def heads_of_rows(model: nn.Module, prefixes: Prefixes) -> Iterator[None]:
    """Inside, each row's states go through the head of the prefix that it names, or the base's.

    Raises:
        ConfigError: If a head is a bare parameter, whose use cannot be told by row.
    """
    rows = prefixes.rows
    assert rows is not None
    # The active one's too, which is in the model: rows of prefixes without that head have the base's.
    owners = (prefixes.attachment, *rows.used(prefixes).values())
    named = dict.fromkeys(name for one in owners for name in one.config.head)
    modules = dict(model.named_modules())
    _check_heads(model, prefixes, list(named))
    handles = []
    try:
        for path in named:
            hook = HeadOfRows(path, prefixes, rows)
            handles.append(modules[path].register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_heads(model: nn.Module, prefixes: Prefixes, paths: list[str]) -> None:
    """Raise where a head is more than a module that is called once, after all attention."""
    modules = dict(model.named_modules())
    sites = [site.path for stack in prefixes.stacks for site in stack.sites]
    own = {id(value) for path in paths for value in head_parameters(model, [path]).values()}
    for path in paths:
        if path not in modules:
            raise ConfigError(f"the head {path!r} is a bare parameter, and {NOT_BY_ROW}")
        if isinstance(modules[path], nn.ModuleList | nn.ModuleDict):
            raise ConfigError(f"the head {path!r} is a list of modules, which is not called itself, and {NOT_BY_ROW}")
        if any(f"{site}.".startswith(f"{path}.") for site in sites):
            raise ConfigError(f"the head {path!r} contains attention that has a prefix, and {NOT_BY_ROW}")
    every = [name for name, value in model.named_parameters(remove_duplicate=False) if id(value) in own]
    for name in every:
        if not any(name.startswith(f"{path}.") for path in paths):
            raise ConfigError(f"the head's weights are tied with {name!r}, and {NOT_BY_ROW}")
    if len(every) > len(own):
        raise ConfigError(f"the weights of heads are tied with one another ({', '.join(every)}), and {NOT_BY_ROW}")


class HeadOfRows:
    """Forward hook of a head: computes it with the values of every prefix that some row names."""

    def __init__(self, path: str, prefixes: Prefixes, rows: Rows) -> None:
        self.path = path
        self.prefixes = prefixes
        self.rows = rows
        self.under_way: bool = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """For each row what the head gives with its prefix's values."""
        if self.under_way or not self.prefixes.enabled:
            return None
        if not isinstance(output, torch.Tensor):
            raise EngineError(
                f"the head {self.path!r} gives a {type(output).__name__}, which has no rows to choose from"
            )
        names = self.rows.of_call(output.shape[0])
        self.under_way = True
        try:
            values = {name: self._values(module, name) for name in dict.fromkeys(names)}
            of = {name: functional_call(module, own, args, kwargs) for name, own in values.items()}
        finally:
            self.under_way = False
        return torch.stack([of[name][row] for row, name in enumerate(names)])

    def _values(self, module: nn.Module, name: str | None) -> dict[str, torch.Tensor]:
        """The head's own values under ``name``, by name in the module; what is not said is in the module now."""
        prefixes, active = self.prefixes, self.prefixes.attachment
        one = prefixes.attachments[name] if name else None
        if one is active:
            return {}
        own = one.kept_head if one else {}
        # Of the base what is aside; and that is in the way of a prefix that has no such head.
        values = {**{key: prefixes.base_head[key] for key in active.head_names}, **own}
        start = f"{self.path}."
        return {
            key.removeprefix(start): value.to(module.get_parameter(key.removeprefix(start)))
            for key, value in values.items()
            if key.startswith(start)
        }
