"""``python -m benchmarks.studies run init-e2e --seeds 3``: carry out what has no result yet."""

from __future__ import annotations

import argparse

import torch
import transformers

from benchmarks.studies.plans import STUDIES
from benchmarks.studies.runs import carry_out_all


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies", description=__doc__)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    carry_out_all(STUDIES[arguments.study](range(arguments.seeds)))


if __name__ == "__main__":
    main()
