"""``prefixkit plugins``."""

from __future__ import annotations

import argparse

from prefixkit import __version__
from prefixkit.cli.table import table
from prefixkit.discovery import PluginInfo, installed, plugins
from prefixkit.methods import prefixkit_methods

HEADS = ("plugin", "version", "methods", "adapters for model types")
REST = "all others, by watching a forward pass"


def run(_: argparse.Namespace) -> None:
    """Print what is installed; what is broken, or served twice, stands below, with the reason."""
    found = plugins()
    methods = ", ".join(method.name for method in prefixkit_methods())
    rows = [("prefixkit", __version__, methods, REST), *(_row(info) for info in found if not info.error)]
    print(table(HEADS, rows))
    broken = [(info.distribution, info.version, _asked_for(info), str(info.error)) for info in found if info.error]
    if broken:
        print("\n" + table(("broken plugin", "version", "entry points", "reason"), broken))
    for conflict in installed().conflicts():
        print(f"\nconflict: {conflict}")


def _row(info: PluginInfo) -> tuple[str, str, str, str]:
    return info.distribution, info.version, ", ".join(info.methods), ", ".join(sorted(info.model_types))


def _asked_for(info: PluginInfo) -> str:
    return ", ".join(info.entry_points)
