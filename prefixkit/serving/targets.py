"""The programs that a prefix is exported for, and what each of their modules has.

Nothing here imports torch: the command line asks for the names when it shows its help.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from prefixkit.errors import CheckpointError, EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

    from prefixkit.serving.verdict import Verdict


class Serving(Protocol):
    """What the module of a target has."""

    def write(self, model: PreTrainedModel, place: Path, **options: Any) -> None:
        """Write the prefix of ``model`` for the program."""

    def runs(self, place: Path, **options: Any) -> Sequence[Mapping[str, Any]]:
        """The options under which :meth:`verify` runs each thing that was written, one after the other."""

    def verify(
        self, model: PreTrainedModel, place: Path, prompt: Sequence[int], new_tokens: int, **options: Any
    ) -> Verdict:
        """Whether the program says what ``model`` says, with its prefix and without."""


@dataclass(frozen=True)
class Target:
    """A program, or a file that programs read.

    Attributes:
        module: Which serves it.
        mark: The file in the folder that is written, by which it is known again; empty where one file is written.
        options: Of ``write`` that the command line has.
        run_options: Of ``verify`` that say where the program is, or what it runs.
        reads_weights: Whether writing needs the weights of the base.
        of_the_base: What the module wants of the base beside the model: its ``tokenizer`` to write, its place
            (``base``) to verify.
        distribution: The package that has the module.
    """

    module: str
    mark: str = ""
    options: tuple[str, ...] = ()
    run_options: tuple[str, ...] = ()
    reads_weights: bool = True
    of_the_base: tuple[str, ...] = ()
    distribution: str = "prefixkit"

    def serving(self) -> Serving:
        """The module.

        Raises:
            EngineError: If it is in a package that is not installed.
        """
        try:
            return cast("Serving", importlib.import_module(self.module))
        except ModuleNotFoundError as error:
            if error.name != self.module.split(".", maxsplit=1)[0]:
                raise
            raise EngineError(f"that is served by {self.distribution}; pip install {self.distribution}") from error


TARGETS = {
    "kv": Target("prefixkit.serving.keys_and_values", options=("positions",), reads_weights=False),
    "llama.cpp": Target(
        "prefixkit.serving.llama_cpp", mark="llama_cpp.json", options=("gguf",), run_options=("gguf", "server")
    ),
    "vllm": Target(
        "prefixkit_vllm",
        mark="vllm.json",
        run_options=("python", "engine"),
        reads_weights=False,
        of_the_base=("tokenizer", "base"),
        distribution="prefixkit-vllm",
    ),
    "onnx": Target("prefixkit.serving.onnx", mark="model.onnx", options=("baked",)),
    "pt2": Target("prefixkit.serving.pt2", mark="model.pt2", options=("max_cache_len",)),
}
"""By the names that ``prefixkit export --to`` takes."""


def written_for(place: Path) -> str:
    """The name of the target that ``place`` was written for.

    Raises:
        CheckpointError: If there is nothing, or nothing of any target.
    """
    if place.is_file():
        return "kv"
    found = [name for name, target in TARGETS.items() if target.mark and (place / target.mark).is_file()]
    if len(found) == 1:
        return found[0]
    marks = ", ".join(f"{target.mark} ({name})" for name, target in TARGETS.items() if target.mark)
    what = f"was written for more than one program ({', '.join(found)})" if found else f"has none of {marks}"
    raise CheckpointError(
        f"{str(place)!r} {what if place.exists() else 'is not there'}; name what `prefixkit export` wrote"
    )
