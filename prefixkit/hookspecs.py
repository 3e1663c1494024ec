"""The hooks a plugin can implement.

A plugin is a module named by an entry point of the group ``prefixkit``. The entry point's name
is the model type it serves::

    [project.entry-points.prefixkit]
    my-type = "my_plugin"

Hooks hand over data and do nothing else. They run when a model type or a method is first asked
for, so a plugin module must import neither torch nor transformers at its top.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from prefixkit.adapter import Adapter
from prefixkit.method import Method

PROJECT = "prefixkit"

hookspec: pluggy.HookspecMarker = pluggy.HookspecMarker(PROJECT)
hookimpl: pluggy.HookimplMarker = pluggy.HookimplMarker(PROJECT)
"""Marks a function as an implementation of one of the hooks below."""


@hookspec
def prefixkit_adapters() -> Iterable[Adapter]:
    """Yield the adapters of this plugin.

    Example::

        @prefixkit.hookimpl
        def prefixkit_adapters():
            yield prefixkit.Adapter(model_types=("my-type",), stacks=stacks)

    Returns:
        :class:`~prefixkit.Adapter` objects. A plugin whose entry point has the model type's name
        is asked first, and alone if it answers. Two distributions that answer at the same step are
        an error.

    .. versionadded:: 0.1
    """
    raise NotImplementedError


@hookspec
def prefixkit_methods() -> Iterable[Method]:
    """Yield the methods of this plugin: named ways to parametrise a prefix.

    Example::

        @prefixkit.hookimpl
        def prefixkit_methods():
            yield prefixkit.Method(name="my-method", build=build, options={"rank": 8})

    Returns:
        :class:`~prefixkit.Method` objects.

    .. versionadded:: 0.1
    """
    raise NotImplementedError
