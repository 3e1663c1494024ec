"""The two built-in methods. They enter by the hook that any plugin uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prefixkit.hookspecs import hookimpl
from prefixkit.method import Method, PrefixShape

if TYPE_CHECKING:
    from prefixkit.prefix_encoder import PrefixEncoder

OPTIONS = {"prefix_projection": True, "encoder_hidden_size": 512, "prefix_dropout": 0.0}


def build(shape: PrefixShape, options: Mapping[str, Any]) -> PrefixEncoder:
    """A prefix encoder with or without the MLP, as ``prefix_projection`` says."""
    from prefixkit.prefix_encoder import PrefixEncoder

    return PrefixEncoder(
        shape,
        prefix_projection=options["prefix_projection"],
        encoder_hidden_size=options["encoder_hidden_size"],
    )


@hookimpl
def prefixkit_methods() -> Iterator[Method]:
    """Prefix tuning (Li & Liang 2021), and p-tuning v2 (Liu et al. 2022): the same, without the MLP."""
    yield Method(name="prefix-tuning", build=build, options=OPTIONS)
    yield Method(name="p-tuning-v2", build=build, options={**OPTIONS, "prefix_projection": False})
