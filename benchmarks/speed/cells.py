"""What one line of results is about."""

from __future__ import annotations

from dataclasses import dataclass

PREFIXKIT, CACHE_ENGINE, PEFT, BASE, NATIVE = "prefixkit", "prefixkit (cache)", "PEFT", "base", "native cache"
PREFIXKIT_MLP, PEFT_MLP = "prefixkit MLP", "PEFT MLP"
STATIC, COMPILED = ", static cache", ", compiled"
"""Behind a contender's name: it decodes into a static cache, and with a compiled forward into one."""
ADAPTERHUB, ADAPTERHUB_BASE = "AdapterHub", "AdapterHub's base"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A job of certain sizes, and who does it.

    Attributes:
        kind: What is measured: one of the names in :data:`benchmarks.speed.measuring.MEASURES`.
        model: One of the shapes in :mod:`benchmarks.speed.models`.
        contenders: Who takes part.
        batch: Rows.
        length: Tokens of each.
        tokens: Virtual tokens, P.
        new_tokens: To generate.
        attention: The model's ``attn_implementation``; where none is named, its default, which is mostly sdpa.
    """

    kind: str
    model: str
    contenders: tuple[str, ...]
    batch: int = 1
    length: int = 128
    tokens: int = 20
    new_tokens: int = 0
    attention: str = ""

    @property
    def label(self) -> str:
        """Unique within a grid."""
        parts = [self.kind, self.model, f"batch {self.batch}", f"length {self.length}", f"P {self.tokens}"]
        parts += [f"+ {self.new_tokens}"] * bool(self.new_tokens)
        return ", ".join([*parts, *[self.attention] * bool(self.attention)])
