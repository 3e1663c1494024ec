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
        PositionIds as PositionIds,
        PositionTable as PositionTable,
        RelativeBias as RelativeBias,
        Site as Site,
        Stack as Stack,
        find_stack as find_stack,
        join_path as join_path,
    )
    from prefixkit.checkpoint import (
        load as load,
        save as save,
    )
    from prefixkit.combining import (
        average as average,
        compose as compose,
    )
    from prefixkit.discovery import (
        PluginInfo as PluginInfo,
        plugins as plugins,
    )
    from prefixkit.errors import (
        AdapterConflictError as AdapterConflictError,
        AttachmentError as AttachmentError,
        CheckpointError as CheckpointError,
        ConfigError as ConfigError,
        DataError as DataError,
        EngineError as EngineError,
        MethodError as MethodError,
        PluginError as PluginError,
        PrefixkitError as PrefixkitError,
        UnknownAdapterError as UnknownAdapterError,
        UnsupportedModelError as UnsupportedModelError,
        VerificationError as VerificationError,
    )
    from prefixkit.exporting import export as export
    from prefixkit.generic.stacks import generic_adapter as generic_adapter
    from prefixkit.hookspecs import hookimpl as hookimpl
    from prefixkit.initialisation import (
        ChunksInit as ChunksInit,
        TextInit as TextInit,
    )
    from prefixkit.layout import (
        KeyValue as KeyValue,
        Layout as Layout,
    )
    from prefixkit.learning_rate import (
        check_lr as check_lr,
        recommended_lr as recommended_lr,
    )
    from prefixkit.lifecycle import (
        activate as activate,
        apply as apply,
        config as config,
        disabled as disabled,
        fold as fold,
        names as names,
        remove as remove,
        sites as sites,
        unfreeze as unfreeze,
    )
    from prefixkit.method import (
        Method as Method,
        PrefixShape as PrefixShape,
    )
    from prefixkit.native_cache import to_cache as to_cache
    from prefixkit.parameter_groups import parameter_groups as parameter_groups
    from prefixkit.prefix_config import PrefixConfig as PrefixConfig
    from prefixkit.prefix_state import in_front as in_front
    from prefixkit.publishing import push_to_hub as push_to_hub
    from prefixkit.several import (
        rows as rows,
    )
    from prefixkit.site_forward import (
        alibi_in_front as alibi_in_front,
        through_cache as through_cache,
    )

_HOME = {
    "apply": "lifecycle",
    "save": "checkpoint",
    "load": "checkpoint",
    "push_to_hub": "publishing",
    "disabled": "lifecycle",
    "fold": "lifecycle",
    "remove": "lifecycle",
    "activate": "lifecycle",
    "rows": "several",
    "compose": "combining",
    "average": "combining",
    "names": "lifecycle",
    "unfreeze": "lifecycle",
    "to_cache": "native_cache",
    "export": "exporting",
    "sites": "lifecycle",
    "config": "lifecycle",
    "plugins": "discovery",
    "TextInit": "initialisation",
    "recommended_lr": "learning_rate",
    "check_lr": "learning_rate",
    "parameter_groups": "parameter_groups",
    "ChunksInit": "initialisation",
    "hookimpl": "hookspecs",
    "Adapter": "adapter",
    "Stack": "adapter",
    "Site": "adapter",
    "PositionIds": "adapter",
    "PositionTable": "adapter",
    "RelativeBias": "adapter",
    "find_stack": "adapter",
    "join_path": "adapter",
    "in_front": "prefix_state",
    "generic_adapter": "generic.stacks",
    "through_cache": "site_forward",
    "alibi_in_front": "site_forward",
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
    "DataError": "errors",
    "VerificationError": "errors",
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
