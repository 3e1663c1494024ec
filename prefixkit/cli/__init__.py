"""The command ``prefixkit``: one module for each of its subcommands, loaded when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from prefixkit.cli.arguments import parser
from prefixkit.errors import PrefixkitError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code: 0, or 1 with one message on stderr.

    Args:
        arguments: What stands behind ``prefixkit`` on the command line.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parser().parse_args(words)
        importlib.import_module(f"prefixkit.cli.{options.command}").run(options)
    except BrokenPipeError:  # whoever reads has seen enough
        sys.stderr.close()
        return 1
    # ImportError: of the packages that not every command needs, whose messages name them.
    except (PrefixkitError, OSError, ImportError) as error:
        if "--debug" in words:
            raise
        print(f"prefixkit: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prefixkit: interrupted", file=sys.stderr)
        return 130
    return 0
