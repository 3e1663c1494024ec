"""Carry out a study, or show what it found.

    python -m benchmarks.studies run init-e2e --seeds 3
    python -m benchmarks.studies show init-e2e

``run`` goes on where it was stopped: what has a result is not run again. ``show`` prints a table, each arm at the
best of its learning rates, and draws a plot for the documentation.
"""

from __future__ import annotations

import argparse

import torch
import transformers

from benchmarks.studies.plans import STUDIES
from benchmarks.studies.report import plot, table
from benchmarks.studies.runs import carry_out_all


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "show"])
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    arguments = parser.parse_args()
    if arguments.what == "show":
        print(table(arguments.study))
        print(plot(arguments.study))
        return
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    carry_out_all(STUDIES[arguments.study].plan(range(arguments.seeds)))


if __name__ == "__main__":
    main()
