"""Several prefixes of one model at once: each row of a batch with its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import PreTrainedModel

from prefixkit import transformers_internals as internals
from prefixkit.errors import AttachmentError, ConfigError
from prefixkit.mixture import Rows, check_mixable
from prefixkit.own_generate import OwnGenerate
from prefixkit.prefixes import check_head, require
from prefixkit.row_heads import heads_of_rows

if TYPE_CHECKING:
    from prefixkit.prefixes import Prefixes

Model = TypeVar("Model", bound=PreTrainedModel)


@contextmanager
def rows(model: Model, names: Sequence[str | None]) -> Iterator[Model]:
    """Inside the block each row of a call has the prefix that ``names`` says of it, and its head.

    Example::

        with prefixkit.rows(model, ["summaries", None, "dialogue"]):
            tokens = model.generate(**inputs)  # three rows; the second one is the bare base's

    What comes out is what each row gives by itself. The prefixes may have different lengths, layers and stacks, but
    one policy of positions and of windows. Gradients go to all that train (:func:`prefixkit.unfreeze`); heads of
    prefixes that are not active do not train.

    Args:
        model: A model with the prefixes.
        names: For each row its prefix, or ``None`` for the bare base, whose positions are counted from the mask as
            they are with a prefix. In ``generate`` a row's beams and returned sequences have the row's.

    Raises:
        AttachmentError: If the model has no prefix, none of such a name, or inside another such block.
        ConfigError: If no row names one, or they cannot be in one call (see above; gates, infixes, memories).
        EngineError: In a call that has other rows than were named.
    """
    prefixes = require(model)
    if isinstance(names, str):
        raise ConfigError(f"names is {names!r}; pass a list with a name, or None, for each row")
    chosen = _checked(model, prefixes, tuple(names))
    prefixes.rows = Rows(chosen)
    own = model.__dict__.get("generate")
    if model.can_generate():
        model.__dict__["generate"] = GenerateRows(model, prefixes.rows)
    try:
        with heads_of_rows(model, prefixes):
            yield model
    finally:
        prefixes.rows = None
        model.__dict__.pop("generate", None)
        if own is not None:
            model.__dict__["generate"] = own


def _checked(model: PreTrainedModel, prefixes: Prefixes, names: tuple[str | None, ...]) -> tuple[str | None, ...]:
    if prefixes.rows is not None or not prefixes.enabled:
        raise AttachmentError("prefixkit.rows does not go inside prefixkit.disabled or another prefixkit.rows")
    used = {name: prefixes.named(name) for name in names if name is not None}
    check_mixable(used)
    for one in (prefixes.attachment, *used.values()):
        check_head(model, prefixes, one)
    return names


class GenerateRows(OwnGenerate):
    """Stands in for ``model.generate``: a row becomes several, one behind the other."""

    def __init__(self, model: PreTrainedModel, named: Rows) -> None:
        super().__init__(model)
        self.named = named

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the method of the class."""
        before = self.named.repeats
        self.named.repeats = frozenset({1, internals.rows_for_each(self.model, args, kwargs)})
        try:
            return self.original()(*args, **kwargs)
        finally:
            self.named.repeats = before
