"""A plugin of one's own, from a repository that is complete and passes its tests: ``python -m prefixkit.template``.

``_repository`` beside this file is that repository: the plugin that the documentation explains, under a made-up name,
with what a distribution needs around it. Making a plugin is copying it and putting the real name in the place of the
made-up one.
"""

from __future__ import annotations

import re
from pathlib import Path

from prefixkit.discovery import plugins
from prefixkit.errors import PluginError

TEMPLATE: Path = Path(__file__).parent / "_repository"
_TYPE = re.compile(r"[A-Za-z0-9]+([._-][A-Za-z0-9]+)*")
_LEFT_BEHIND = ("__pycache__", ".pytest_cache")
"""What running the template itself leaves in it."""


def make_plugin(model_type: str, destination: Path | None = None) -> Path:
    """Write a repository with a plugin for ``model_type``, and return its folder.

    Args:
        model_type: The ``config.model_type`` that the plugin serves.
        destination: The folder, which must not be there yet or be empty; by default one of the distribution's name,
            here.

    Raises:
        PluginError: If the type is none, something is in the way, or an installed plugin serves the type.
    """
    names = names_for(model_type)
    folder = destination or Path(names["prefixkit-mytype"])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PluginError(f"{str(folder)!r} is there already; name another --destination")
    _refuse_a_second(model_type)
    for path in sorted(TEMPLATE.rglob("*")):
        inside = path.relative_to(TEMPLATE)
        if path.is_file() and not set(inside.parts) & set(_LEFT_BEHIND):
            target = folder / renamed(str(inside), names)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(renamed(path.read_text(encoding="utf-8"), names), encoding="utf-8")
    return folder


def names_for(model_type: str) -> dict[str, str]:
    """What stands in the place of each made-up name: distribution, module, class and type, longest first.

    Raises:
        PluginError: If no distribution could be named after the type.
    """
    if not _TYPE.fullmatch(model_type):
        raise PluginError(
            f"{model_type!r} is no model type; pass what config.model_type of your model says, such as 'mytype'"
        )
    words = re.split("[._-]", model_type)
    return {
        "prefixkit-mytype": "-".join(["prefixkit", *words]).lower(),
        "prefixkit_mytype": "_".join(["prefixkit", *words]).lower(),
        "MyType": "".join(word[0].upper() + word[1:] for word in words),
        "mytype": model_type,
    }


def renamed(text: str, names: dict[str, str]) -> str:
    """The text with every made-up name replaced, in one pass, so that no replacement is replaced again."""
    return re.sub("|".join(map(re.escape, names)), lambda found: names[found.group()], text)


def _refuse_a_second(model_type: str) -> None:
    """Two plugins for one type are an error in every `apply`."""
    for plugin in plugins():
        if model_type in (*plugin.model_types, *plugin.entry_points):
            raise PluginError(
                f"{plugin.distribution}, which is installed, serves model type {model_type!r}; two plugins for one "
                "type are refused, so work on that one, or uninstall it"
            )
