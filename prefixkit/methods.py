"""The built-in methods. They enter by the hook that any plugin uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prefixkit.hookspecs import hookimpl
from prefixkit.method import EMBEDDINGS, MEMORY, Method, PrefixShape

if TYPE_CHECKING:
    from prefixkit.prefix_encoder import Memory, PrefixEncoder, VirtualTokens

DROPOUT = {"prefix_dropout": 0.0}
OPTIONS = {"prefix_projection": True, "encoder_hidden_size": 512, "share_key_value": False, **DROPOUT}


FLAT_RATE, MLP_RATE, TOKENS_RATE, MEMORY_RATE = 0.1, 0.0005, 0.3, 0.01
"""What the studies found, to about a factor of two. An MLP's is below its best one, which fails in some seeds."""


def learning_rate(options: Mapping[str, Any]) -> float:
    """Of a prefix with or without the MLP."""
    rate: float = MLP_RATE if options["prefix_projection"] else FLAT_RATE
    return rate


def build(shape: PrefixShape, options: Mapping[str, Any]) -> PrefixEncoder:
    """A prefix encoder with or without the MLP, as ``prefix_projection`` says."""
    from prefixkit.prefix_encoder import PrefixEncoder

    return PrefixEncoder(
        shape,
        prefix_projection=options["prefix_projection"],
        encoder_hidden_size=options["encoder_hidden_size"],
        share_key_value=options["share_key_value"],
    )


def build_tokens(shape: PrefixShape, _: Mapping[str, Any]) -> VirtualTokens:
    """Input embeddings of virtual tokens."""
    from prefixkit.prefix_encoder import VirtualTokens

    return VirtualTokens(shape)


def build_memory(shape: PrefixShape, _: Mapping[str, Any]) -> Memory:
    """Empty memories."""
    from prefixkit.prefix_encoder import Memory

    return Memory(shape)


@hookimpl
def prefixkit_methods() -> Iterator[Method]:
    """Prefix tuning (Li & Liang 2021), and p-tuning v2 (Liu et al. 2022): the same, without the MLP.

    For comparison, prompt tuning (Lester et al. 2021) and prefix memory (Wang et al. 2025).
    """
    flat = {**OPTIONS, "prefix_projection": False}
    yield Method(name="prefix-tuning", build=build, options=OPTIONS, learning_rate=learning_rate)
    yield Method(name="p-tuning-v2", build=build, options=flat, learning_rate=learning_rate)
    yield Method(
        name="prompt-tuning",
        build=build_tokens,
        options=DROPOUT,
        gives=EMBEDDINGS,
        learning_rate=lambda _: TOKENS_RATE,
    )
    yield Method(
        name="prefix-memory", build=build_memory, options=DROPOUT, gives=MEMORY, learning_rate=lambda _: MEMORY_RATE
    )
