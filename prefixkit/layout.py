"""The layout: how the flat prefix is cut into keys and values, and put together again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from prefixkit.adapter import STACKS, Site
from prefixkit.errors import ConfigError, PluginError

if TYPE_CHECKING:
    import torch


class KeyValue(NamedTuple):
    """The prefix of one site: ``key (kv_heads, P, key_dim)``, ``value (kv_heads, P, value_dim)``."""

    key: torch.Tensor
    value: torch.Tensor


class Layout:
    """The ordered sites of a prefix.

    The flat prefix ``(P, width)`` holds, per virtual token, encoder sites, decoder sites, cross
    sites, each by layer; per site K then V, each ``(kv_heads, dim)`` row-major. For a uniform
    decoder that is the layout of P-tuning v2, of the 2021 prefix-tuning code and of PEFT:
    ``width = num_layers × 2 × token_dim``, slot ``2l`` is K of layer ``l``, slot ``2l + 1`` is V.

    Args:
        sites: In any order.

    Raises:
        PluginError: If there is none, or two share a place.
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        in_order = sorted(sites, key=lambda site: (STACKS.index(site.stack), site.layer))
        self.sites: tuple[Site, ...] = tuple(in_order)
        if not self.sites:
            raise PluginError("the adapter names no site")
        places = [site.place for site in self.sites]
        twice = sorted({place for place in places if places.count(place) > 1})
        if twice:
            raise PluginError(f"the adapter names these sites twice: {', '.join(twice)}")
        self.width: int = sum(site.width for site in self.sites)

    def split(self, flat: torch.Tensor) -> list[KeyValue]:
        """Views of ``flat`` as K and V, one pair for each of :attr:`sites`.

        Args:
            flat: ``(P, width)``.

        Raises:
            ConfigError: If ``flat`` has another shape.
        """
        if flat.ndim != 2 or flat.shape[1] != self.width:
            raise ConfigError(f"a flat prefix for this model is (P, {self.width}); got {tuple(flat.shape)}")
        rows = flat.shape[0]
        pieces: list[KeyValue] = []
        start = 0
        for site in self.sites:
            middle = start + site.kv_heads * site.key_dim
            end = start + site.width
            key = flat[:, start:middle].view(rows, site.kv_heads, site.key_dim)
            value = flat[:, middle:end].view(rows, site.kv_heads, site.value_dim)
            pieces.append(KeyValue(key.transpose(0, 1), value.transpose(0, 1)))
            start = end
        return pieces

    def join(self, pieces: Sequence[KeyValue]) -> torch.Tensor:
        """The flat prefix ``(P, width)`` of K and V per site; the inverse of :meth:`split`.

        Raises:
            ConfigError: If the number of pieces or a shape does not fit the sites.
        """
        import torch

        if len(pieces) != len(self.sites):
            raise ConfigError(f"{len(self.sites)} sites need as many pairs of K and V; got {len(pieces)}")
        columns: list[torch.Tensor] = []
        for site, (key, value) in zip(self.sites, pieces, strict=True):
            for name, part, dim in (("K", key, site.key_dim), ("V", value, site.value_dim)):
                if part.ndim != 3 or (part.shape[0], part.shape[2]) != (site.kv_heads, dim):
                    raise ConfigError(
                        f"{name} of {site.path!r} is ({site.kv_heads}, P, {dim}); got {tuple(part.shape)}"
                    )
                columns.append(part.transpose(0, 1).reshape(part.shape[1], -1))
        return torch.cat(columns, dim=1)
