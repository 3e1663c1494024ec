"""prefixkit: prefix tuning and p-tuning v2 for every transformer.

Importing this package imports neither torch nor transformers; the names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from prefixkit.adapter import Adapter, PositionIds, PositionTable, RelativeBias, Site, Stack, find_stack, join_path
    from prefixkit.checkpoint import load, save
    from prefixkit.discovery import PluginInfo, plugins
    from prefixkit.errors import (
        AdapterConflictError,
        AttachmentError,
        CheckpointError,
        ConfigError,
        EngineError,
        MethodError,
        PluginError,
        PrefixkitError,
        UnknownAdapterError,
        UnsupportedModelError,
    )
    from prefixkit.hookspecs import hookimpl
    from prefixkit.layout import KeyValue, Layout
    from prefixkit.lifecycle import apply, config, disabled, fold, remove, sites
    from prefixkit.method import Method, PrefixShape
    from prefixkit.native_cache import to_cache
    from prefixkit.prefix_config import PrefixConfig

_HOME = {
    "apply": "lifecycle",
    "save": "checkpoint",
    "load": "checkpoint",
    "disabled": "lifecycle",
    "fold": "lifecycle",
    "remove": "lifecycle",
    "to_cache": "native_cache",
    "sites": "lifecycle",
    "config": "lifecycle",
    "plugins": "discovery",
    "hookimpl": "hookspecs",
    "Adapter": "adapter",
    "Stack": "adapter",
    "Site": "adapter",
    "PositionIds": "adapter",
    "PositionTable": "adapter",
    "RelativeBias": "adapter",
    "find_stack": "adapter",
    "join_path": "adapter",
    "Method": "method",
    "PrefixShape": "method",
    "PrefixConfig": "prefix_config",
    "Layout": "layout",
    "KeyValue": "layout",
    "PluginInfo": "discovery",
    "PrefixkitError": "errors",
    "PluginError": "errors",
    "UnknownAdapterError": "errors",
    "AdapterConflictError": "errors",
    "UnsupportedModelError": "errors",
    "MethodError": "errors",
    "ConfigError": "errors",
    "AttachmentError": "errors",
    "EngineError": "errors",
    "CheckpointError": "errors",
}

__all__ = [*_HOME, "__version__"]  # noqa: PLE0604 - the names are strings


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prefixkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"prefixkit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
