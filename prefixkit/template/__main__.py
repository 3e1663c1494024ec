"""``python -m prefixkit.template``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prefixkit.errors import PluginError
from prefixkit.template import make_plugin, names_for


def main() -> int:
    """Make a plugin, and say what comes next."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixkit.template", description="Make a repository with a plugin for a model type."
    )
    parser.add_argument("model_type", metavar="NAME", help="the config.model_type that the plugin is to serve")
    parser.add_argument(
        "--destination", type=Path, metavar="FOLDER", help="where to write it (prefixkit-NAME in this folder)"
    )
    options = parser.parse_args()
    try:
        folder = make_plugin(options.model_type, options.destination)
    except (PluginError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    print(
        f"the plugin {names_for(options.model_type)['prefixkit-mytype']} is in {folder}; its README.md says what to do."
    )
    print(f'  cd {folder}\n  pip install -e ".[test]"\n  OMP_NUM_THREADS=1 pytest -m "not slow and not gpu"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
