"""prefixkit: prefix tuning and p-tuning v2 for every transformer.

Importing this package imports neither torch nor transformers; the names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from prefixkit.adapter import (
        Adapter as Adapter,
    )
    from prefixkit.adapter import (
        PositionIds as PositionIds,
    )
    from prefixkit.adapter import (
        PositionTable as PositionTable,
    )
    from prefixkit.adapter import (
        RelativeBias as RelativeBias,
    )
    from prefixkit.adapter import (
        Site as Site,
    )
    from prefixkit.adapter import (
        Stack as Stack,
    )
    from prefixkit.adapter import (
        find_stack as find_stack,
    )
    from prefixkit.adapter import (
        join_path as join_path,
    )
    from prefixkit.checkpoint import (
        load as load,
    )
    from prefixkit.checkpoint import (
        save as save,
    )
    from prefixkit.discovery import (
        PluginInfo as PluginInfo,
    )
    from prefixkit.discovery import (
        plugins as plugins,
    )
    from prefixkit.errors import (
        AdapterConflictError as AdapterConflictError,
    )
    from prefixkit.errors import (
        AttachmentError as AttachmentError,
    )
    from prefixkit.errors import (
        CheckpointError as CheckpointError,
    )
    from prefixkit.errors import (
        ConfigError as ConfigError,
    )
    from prefixkit.errors import (
        EngineError as EngineError,
    )
    from prefixkit.errors import (
        MethodError as MethodError,
    )
    from prefixkit.errors import (
        PluginError as PluginError,
    )
    from prefixkit.errors import (
        PrefixkitError as PrefixkitError,
    )
    from prefixkit.errors import (
        UnknownAdapterError as UnknownAdapterError,
    )
    from prefixkit.errors import (
        UnsupportedModelError as UnsupportedModelError,
    )
    from prefixkit.hookspecs import (
        hookimpl as hookimpl,
    )
    from prefixkit.layout import (
        KeyValue as KeyValue,
    )
    from prefixkit.layout import (
        Layout as Layout,
    )
    from prefixkit.lifecycle import (
        apply as apply,
    )
    from prefixkit.lifecycle import (
        config as config,
    )
    from prefixkit.lifecycle import (
        disabled as disabled,
    )
    from prefixkit.lifecycle import (
        fold as fold,
    )
    from prefixkit.lifecycle import (
        remove as remove,
    )
    from prefixkit.lifecycle import (
        sites as sites,
    )
    from prefixkit.method import (
        Method as Method,
    )
    from prefixkit.method import (
        PrefixShape as PrefixShape,
    )
    from prefixkit.native_cache import (
        to_cache as to_cache,
    )
    from prefixkit.prefix_config import (
        PrefixConfig as PrefixConfig,
    )

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
