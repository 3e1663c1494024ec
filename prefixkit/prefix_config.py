"""What a prefix is, apart from its numbers: stored with every checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from prefixkit.adapter import STACKS, Site
from prefixkit.errors import ConfigError, PluginError, closest

POSITIONS: Final = ("shift", "none")
WINDOWS: Final = ("pinned", "slide")
ENGINES: Final = ("auto", "attention", "cache")


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """Everything about a prefix but its numbers.

    Attributes:
        method: Name of the method that parametrises it.
        method_options: The method's options, defaults filled in.
        num_virtual_tokens: Its length P.
        name: Its name on the model.
        positions: ``"shift"`` (the first real token stands at position P) or ``"none"`` (at 0).
        window: ``"pinned"`` (every query sees it) or ``"slide"`` (it slides out of sliding windows).
        stacks: Which of encoder, decoder and cross attention carry it; ``None``: all there are.
        layers: Which layers carry it; ``None``: all.
        engine: ``"auto"``, ``"attention"`` or ``"cache"``.
        folded: Whether an MLP was replaced by the flat prefix it gave.
        model_type: The base's ``config.model_type``.
        base_model_name_or_path: Where the base came from, for people to read.
        sites: Where it stands.
        layer_tokens: Layers with fewer virtual tokens, and how many: the last ones.
        head: Modules of the base that train, and are saved, with it.
        head_tied: Parameters of the base that are one with the head's, and so were trained too; ``None``: not known.
        gate: Whether it has a softmax of its own and a gate, which was shut at the start.
        infix: Whether it stands between a text and its continuation.
        num_frozen_tokens: How many of its first virtual tokens do not train.
    """

    method: str
    method_options: Mapping[str, Any]
    num_virtual_tokens: int
    name: str = "default"
    positions: str = "shift"
    window: str = "pinned"
    stacks: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    layer_tokens: tuple[tuple[int, int], ...] = ()
    engine: str = "auto"
    folded: bool = False
    model_type: str
    base_model_name_or_path: str = ""
    sites: tuple[Site, ...] = ()
    head: tuple[str, ...] = ()
    head_tied: tuple[str, ...] | None = None
    gate: bool = False
    infix: bool = False
    num_frozen_tokens: int = 0

    def __post_init__(self) -> None:
        for field, kind in (
            ("method", str),
            ("model_type", str),
            ("folded", bool),
            ("gate", bool),
            ("infix", bool),
            ("method_options", Mapping),
        ):
            _of_kind(field, getattr(self, field), kind)
        _all_of_kind("layers", self.layers or (), int)
        _all_of_kind("head", self.head, str)
        _all_of_kind("head_tied", self.head_tied or (), str)
        _check_lengths(self.num_virtual_tokens, self.num_frozen_tokens, self.layer_tokens)
        _one_of("positions", self.positions, POSITIONS)
        _one_of("window", self.window, WINDOWS)
        _one_of("engine", self.engine, ENGINES)
        for stack in self.stacks or ():
            _one_of("stacks", stack, STACKS)
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ConfigError(
                f"name is {self.name!r}; it must be a Python identifier, since it becomes a module's name"
            )
        dropout = self.prefix_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ConfigError(f"prefix_dropout is {dropout!r}; it must be at least 0 and below 1")

    @property
    def prefix_dropout(self) -> float:
        """Share of the prefix's numbers dropped in training; 0 for a method without that option."""
        value: float = self.method_options.get("prefix_dropout", 0.0)
        return value

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {**asdict(self), "method_options": dict(self.method_options)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PrefixConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: If a field is missing, unknown, or has a value of the wrong kind.
        """
        known = {field.name for field in fields(cls)}
        for name in data:
            if name not in known:
                raise ConfigError(f"unknown field {name!r}{closest(name, known)}")
        try:
            sites = tuple(Site(**site) for site in data["sites"])
            return cls(
                **{
                    **data,
                    "sites": sites,
                    "stacks": _tuple(data.get("stacks")),
                    "layers": _tuple(data.get("layers")),
                    "layer_tokens": tuple(map(tuple, data.get("layer_tokens", ()))),
                    "head": tuple(data.get("head", ())),
                    "head_tied": _tuple(data.get("head_tied")),
                }
            )
        except (TypeError, KeyError, AttributeError, PluginError) as error:
            raise ConfigError(f"a field is missing or has a value of the wrong kind: {error}") from error


def _check_lengths(tokens: object, frozen: object, layer_tokens: tuple[Any, ...]) -> None:
    if type(tokens) is not int or tokens < 1:
        raise ConfigError(f"num_virtual_tokens is {tokens!r}; it must be a whole number of 1 or more")
    if type(frozen) is not int or not 0 <= frozen < tokens:
        raise ConfigError(
            f"num_frozen_tokens is {frozen!r}; of {tokens} virtual tokens 0 to {tokens - 1} can be frozen"
        )
    for pair in layer_tokens:
        if not isinstance(pair, tuple) or [type(part) for part in pair] != [int, int] or not 1 <= pair[1] <= tokens:
            raise ConfigError(
                f"layer_tokens has {pair!r}; it must say of layers, by number, how many of the {tokens} virtual "
                "tokens they have, 1 or more (layers= leaves layers out)"
            )


def _tuple(values: Iterable[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def _of_kind(field: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"{field} is {value!r}; it must be a {kind.__name__}")


def _all_of_kind(field: str, values: Iterable[object], kind: type) -> None:
    for value in values:
        if type(value) is not kind:
            raise ConfigError(f"{field} holds {value!r}; each must be a {kind.__name__}")


def _one_of(field: str, value: object, possible: tuple[str, ...]) -> None:
    if value not in possible:
        raise ConfigError(f"{field} is {value!r}{closest(value, possible)}; possible: {', '.join(possible)}")
