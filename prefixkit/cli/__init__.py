"""The command ``prefixkit``: one module for each of its subcommands, loaded when it is called."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Sequence

from prefixkit.cli.arguments import parser
from prefixkit.errors import PrefixkitError

LONGEST = 300
"""How much of another library's message is shown."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code: 0, or 1 with one message on stderr.

    Args:
        arguments: What stands behind ``prefixkit`` on the command line.
    """
    if arguments is None:
        _print_anything()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parser().parse_args(words)
        importlib.import_module(f"prefixkit.cli.{options.command}").run(options)
    except BrokenPipeError:  # whoever reads has seen enough
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("prefixkit: interrupted", file=sys.stderr)
        return 130
    # Models, tokenizers and Trainer fail in as many ways as there are of them.
    except Exception as error:
        if "--debug" in words:
            raise
        print(f"prefixkit: error: {_message(error)}", file=sys.stderr)
        return 1
    return 0


def _message(error: Exception) -> str:
    # ImportError: of the packages that not every command needs, whose messages name them.
    if isinstance(error, PrefixkitError | OSError | ImportError):
        return str(error)
    reason = next(iter(str(error).splitlines()), "no reason given")
    return f"{type(error).__name__}: {reason[:LONGEST]}; --debug shows where it comes from"


def _print_anything() -> None:
    """Let what the terminal's encoding lacks be printed as its code: that is no reason to lose the work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
