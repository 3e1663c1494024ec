"""Finding adapters and methods among the installed distributions.

Entry points of the group ``prefixkit`` are loaded by name first: a model type's own plugin is
imported, and no other. Only if that brings no adapter are the rest imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import pluggy

from prefixkit import hookspecs, methods
from prefixkit.adapter import Adapter
from prefixkit.errors import (
    AdapterConflictError,
    MethodError,
    PluginError,
    UnknownAdapterError,
    closest,
)
from prefixkit.method import Method


@dataclass(frozen=True, kw_only=True)
class PluginInfo:
    """One plugin, as :func:`prefixkit.plugins` lists it.

    Attributes:
        module: The module that its entry points name.
        entry_points: The names of its entry points: model types it is loaded for first.
        distribution: The distribution it comes from.
        version: That distribution's version.
        model_types: Model types it brings an adapter for.
        methods: Methods it brings.
        error: Why it could not be loaded, or ``None``.
    """

    module: str
    entry_points: tuple[str, ...]
    distribution: str
    version: str
    model_types: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class _Loaded:
    """What loading one module gave."""

    adapters: tuple[Adapter, ...] = ()
    methods: tuple[Method, ...] = ()
    error: str | None = None


class Registry:
    """The plugins of one set of entry points.

    Args:
        find: Returns the entry points; by default those of the installed distributions.
    """

    def __init__(self, find: Callable[[], Iterable[EntryPoint]] | None = None) -> None:
        self._entries = list((find or (lambda: entry_points(group=hookspecs.PROJECT)))())
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._loaded: dict[tuple[str, str], _Loaded] = {}
        self._builtin = self._register(methods)

    def adapter_for(self, model_type: str) -> Adapter:
        """The adapter for a ``config.model_type``: a plugin's, or the generic one.

        Raises:
            UnknownAdapterError: If a plugin of that name failed to load, with the reason.
            AdapterConflictError: If two distributions bring one, or two modules of one.
        """
        named = [entry for entry in self._entries if entry.name == model_type]
        found = self._adapters(named, model_type) or self._adapters(self._entries, model_type)
        broken = [entry for entry in named if self._load(entry).error]
        if not found and broken:
            raise UnknownAdapterError(
                f"the plugin for model type {model_type!r} failed to load: {_distribution(broken[0])}: "
                f"{self._load(broken[0]).error}; mend or uninstall it, or pass adapter="
            )
        if not found:
            from prefixkit.generic.stacks import generic_adapter  # imports torch, which listing plugins does not need

            return generic_adapter()
        if len(found) > 1:
            distributions = sorted({distribution for distribution, _ in found})
            several = len(distributions) > 1
            who = "two distributions" if several else f"two modules of {distributions[0]}"
            names = distributions if several else sorted(module for _, module in found)
            raise AdapterConflictError(
                f"{who} bring an adapter for model type {model_type!r}: "
                f"{' and '.join(names)}; uninstall one, or pass adapter= to choose"
            )
        return next(iter(found.values()))

    def conflicts(self) -> list[str]:
        """For every model type that two plugins serve and :meth:`adapter_for` refuses, why."""
        served = [name for info in self.plugins() for name in info.model_types]
        twice = sorted({name for name in served if served.count(name) > 1})
        return [message for message in map(self._conflict, twice) if message]

    def method(self, name: str) -> Method:
        """The method called ``name``.

        Raises:
            MethodError: If there is none, or two plugins bring one of that name.
        """
        found = {f"{method.name} of prefixkit": method for method in self._builtin.methods if method.name == name}
        if not found:
            for entry in self._entries:
                found |= {
                    f"{method.name} of {_distribution(entry)}": method
                    for method in self._load(entry).methods
                    if method.name == name
                }
        if len(found) > 1:
            raise MethodError(f"two plugins bring a method {name!r}: {' and '.join(sorted(found))}; uninstall one")
        if not found:
            names = sorted(self._method_names())
            raise MethodError(
                f"no method {name!r}{closest(name, names)}; installed: {', '.join(names)}{self._failures()}"
            )
        return next(iter(found.values()))

    def plugins(self) -> list[PluginInfo]:
        """All plugins, loaded; a broken one carries its error."""
        return [self._info(entries) for entries in self._by_module()]

    def _adapters(self, entries: Iterable[EntryPoint], model_type: str) -> dict[tuple[str, str], Adapter]:
        """Adapters by distribution and module; a module may have several entry points."""
        return {
            (_distribution(entry), entry.value): adapter
            for entry in entries
            for adapter in self._load(entry).adapters
            if model_type in adapter.model_types
        }

    def _conflict(self, model_type: str) -> str:
        try:
            self.adapter_for(model_type)
        except AdapterConflictError as error:
            return str(error)
        return ""

    def _method_names(self) -> set[str]:
        brought = (method for entry in self._entries for method in self._load(entry).methods)
        return {method.name for method in (*self._builtin.methods, *brought)}

    def _failures(self) -> str:
        failed = [info for info in self.plugins() if info.error]
        return "".join(
            f". Plugin {info.entry_points[0]!r} of {info.distribution} failed to load: {info.error}" for info in failed
        )

    def _by_module(self) -> list[list[EntryPoint]]:
        """The entry points, those of one module of one distribution together."""
        groups: dict[tuple[str, str], list[EntryPoint]] = {}
        for entry in sorted(self._entries, key=lambda entry: (_distribution(entry), entry.value, entry.name)):
            groups.setdefault((_distribution(entry), entry.value), []).append(entry)
        return list(groups.values())

    def _info(self, entries: list[EntryPoint]) -> PluginInfo:
        entry = entries[0]
        loaded = self._load(entry)
        return PluginInfo(
            module=entry.value,
            entry_points=tuple(entry.name for entry in entries),
            distribution=_distribution(entry),
            version=entry.dist.version if entry.dist else "",
            model_types=tuple(name for adapter in loaded.adapters for name in adapter.model_types),
            methods=tuple(method.name for method in loaded.methods),
            error=loaded.error,
        )

    def _load(self, entry: EntryPoint) -> _Loaded:
        """Import and register a plugin once; one that fails is remembered with its reason."""
        key = (_distribution(entry), entry.value)
        if key not in self._loaded:
            try:
                self._loaded[key] = self._register(entry.load())
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin stops itself and nothing else
                self._loaded[key] = _Loaded(error=f"{type(error).__name__}: {error}")
        return self._loaded[key]

    def _register(self, module: ModuleType) -> _Loaded:
        _check_hooks(module)
        if self._manager.is_registered(module):
            raise PluginError(f"module {module.__name__!r} is already registered by another distribution")
        self._manager.register(module)
        try:
            loaded = _Loaded(
                adapters=tuple(self._collect(module, "prefixkit_adapters", Adapter)),
                methods=tuple(self._collect(module, "prefixkit_methods", Method)),
            )
            served = [name for adapter in loaded.adapters for name in adapter.model_types]
            _refuse_twice(module, "adapter", served)
            _refuse_twice(module, "method", [method.name for method in loaded.methods])
            return loaded
        except BaseException:
            self._manager.unregister(module)
            raise

    def _collect(self, module: ModuleType, hook: str, kind: type[Any]) -> Iterable[Any]:
        """What ``module`` alone hands over through ``hook``, checked."""
        others = [plugin for plugin in self._manager.get_plugins() if plugin is not module]
        for yielded in self._manager.subset_hook_caller(hook, remove_plugins=others)():
            for item in yielded:
                if not isinstance(item, kind):
                    raise PluginError(f"{hook} yielded {item!r}; it yields prefixkit.{kind.__name__} objects")
                yield item


def _check_hooks(module: ModuleType) -> None:
    """Refuse what pluggy would pass over without a word."""
    known = {name for name in vars(hookspecs) if name.startswith("prefixkit_")}
    marked = False
    for name, function in vars(module).items():
        mark = getattr(function, f"{hookspecs.PROJECT}_impl", None)
        is_marked = isinstance(mark, dict)
        if name.startswith("prefixkit_") and callable(function) and not is_marked:
            raise PluginError(f"function {name!r} of {module.__name__!r} lacks @prefixkit.hookimpl")
        hook = (mark.get("specname") if mark else None) or name
        if is_marked and hook not in known:
            raise PluginError(
                f"{module.__name__!r} implements an unknown hook {hook!r}{closest(hook, known)}; "
                f"possible: {', '.join(sorted(known))}"
            )
        marked = marked or is_marked
    if not marked:
        raise PluginError(f"{module.__name__!r} implements no hook; possible: {', '.join(sorted(known))}")


def _refuse_twice(module: ModuleType, kind: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PluginError(f"{module.__name__!r} brings more than one {kind} for {', '.join(map(repr, twice))}")


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an unknown distribution"


@functools.cache
def installed() -> Registry:
    """The registry of the installed distributions, made once."""
    return Registry()


def plugins() -> list[PluginInfo]:
    """Every installed plugin, loaded: what it serves, or why it could not be loaded.

    Example::

        for plugin in prefixkit.plugins():
            print(plugin.distribution, plugin.model_types, plugin.error)
    """
    return installed().plugins()
