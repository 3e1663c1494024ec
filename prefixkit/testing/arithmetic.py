"""Attention found in what a model computes: a product, a softmax, and a product with its weights.

This sees attention that is not on transformers' attention interface, and knows neither the adapter
nor a name of the model's. The first product of the softmax's shape has the keys, the first one of the
softmax's result has the values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from prefixkit.testing.attention_call import AttentionCall

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRODUCTS = ("matmul", "__matmul__", "bmm")
CHANGES = ("div", "__truediv__", "mul", "__mul__", "add", "__add__", "__iadd__", "sub", "__sub__")
"""What may happen to scores between product and softmax, but for masking."""
HIDDEN = -1e4
"""Scores below this are those of a masked key."""
BIASED = 1e-3
"""Scores farther than this from the product have a bias."""


@dataclass
class Product:
    """A product that may be one of queries and keys.

    Attributes:
        path: The module that computed it.
        query: The left side, with the number that the right side was divided by.
        key: The right side, ``(batch [× heads], keys, dim)``.
        result: The product, with all that happened to it since.
        alike: What happened to all its columns alike.
    """

    path: str
    query: torch.Tensor
    key: torch.Tensor
    result: torch.Tensor
    alike: list[Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=list)

    def scores(self, key: torch.Tensor) -> torch.Tensor:
        """Of ``key`` as of a key of the product's own, without what is added to some columns only."""
        scores = self.query @ key.transpose(-1, -2)
        for change in self.alike:
            scores = change(scores)
        return scores


class Watch(TorchFunctionMode):
    """Finds the attention calls of the forwards of ``model`` inside the block; changes nothing.

    Example::

        with watched(Watch(model)) as watch:
            model(input_ids)
        print([(call.path, call.key.shape) for call in watch.found])
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.found: list[AttentionCall] = []
        self.batch = 1
        self._inside: list[str] = []
        self._products: list[Product] = []
        self._changed: list[tuple[torch.Tensor, torch.Tensor, Callable[[Any], Any]]] = []
        self._weighing: tuple[Product, str, torch.Tensor, torch.Tensor] | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``function``, and see what it is."""
        name = getattr(function, "__name__", "")
        if name in PRODUCTS:
            return self._product(function, *args)
        if name == "softmax":
            return self._softmax(function, *args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        if name in CHANGES:
            self._change(function, args[0], result, args[1])
        return result

    def scores(self, path: str, product: Product, scores: torch.Tensor) -> torch.Tensor:
        """The scores that the softmax gets."""
        return scores

    def values(self, path: str, value: torch.Tensor) -> torch.Tensor:
        """The values that the weights are multiplied with."""
        return value

    def _change(self, function: Any, source: torch.Tensor, result: torch.Tensor, by: Any) -> None:
        number = not isinstance(by, torch.Tensor) or by.ndim == 0
        for product in self._products:
            if product.result is source:
                product.result = result
                if number or by.shape[-1] == 1:
                    product.alike.append(lambda scores: function(scores, by))
        if number:
            self._changed.append((source, result, lambda other: function(other, by)))

    def _product(self, function: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        path = self._inside[-1]
        if self._weighing is not None and left.numel() == self._weighing[2].numel():
            product, softmax, _, scores = self._weighing
            self._weighing, self._products, self._changed = None, [], []
            self._note(_around(path, softmax, product.path), product, right, scores)
            weighed: torch.Tensor = function(left, self.values(path, right))
            return weighed
        result: torch.Tensor = function(left, right)
        query, key = left, right
        for source, changed, repeat in self._changed:
            if changed is right:
                key, query = source, repeat(left)
        self._products.append(Product(path, query, key.transpose(-1, -2), result))
        return result

    def _softmax(self, function: Any, scores: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        same = [one for one in self._products if one.result is scores]
        alike = [one for one in self._products if _of_one_shape(one.result, scores)]
        product = next(iter(same + alike), None)
        path, given = self._inside[-1], scores
        if product is not None:
            given = self.scores(path, product, scores)
        weights: torch.Tensor = function(given, *args, **kwargs)
        if product is not None:
            self._weighing = (product, path, weights, scores.clone())
        return weights

    def _note(self, path: str, product: Product, value: torch.Tensor, scores: torch.Tensor) -> None:
        plain = product.scores(product.key).reshape(scores.shape)
        parts = (product.query, product.key, value, scores, plain)
        query, key, value, scores, plain = (self._by_head(part.detach()) for part in parts)
        seen = scores > HIDDEN
        added = torch.where(seen, scores - plain, 0.0)
        self.found.append(
            AttentionCall(
                path=path,
                query=query,
                key=key,
                value=value,
                mask=torch.where(seen, 0.0, torch.finfo(scores.dtype).min),
                options={"position_bias": added} if added.abs().max() > BIASED else {},
            )
        )

    def _by_head(self, tensor: torch.Tensor) -> torch.Tensor:
        """``(batch × heads, …)`` as ``(batch, heads, …)``."""
        return tensor.unflatten(0, (self.batch, -1)) if tensor.ndim == 3 else tensor


class AlonePrompt(Watch):
    """The first ``prompt`` tokens see each other only, as a prefix does."""

    def __init__(self, model: PreTrainedModel, prompt: int) -> None:
        super().__init__(model)
        self.prompt = prompt

    def scores(self, path: str, product: Product, scores: torch.Tensor) -> torch.Tensor:
        """The scores with the text hidden from the prompt."""
        scores = scores.clone()
        scores[..., : self.prompt, self.prompt :] = torch.finfo(scores.dtype).min
        return scores


class InFront(Watch):
    """Keys and values stand in front of the model's own; nothing else is added to their scores.

    Args:
        model: A bare model.
        pieces: Keys and values ``(heads, P, dim)`` by attention module.
    """

    def __init__(self, model: PreTrainedModel, pieces: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__(model)
        self.pieces = pieces

    def scores(self, path: str, product: Product, scores: torch.Tensor) -> torch.Tensor:
        """The scores with those of the prefix in front."""
        front = product.scores(self._at(path, 0, product.query))
        return torch.cat([front.reshape(*scores.shape[:-1], -1), scores], dim=-1)

    def values(self, path: str, value: torch.Tensor) -> torch.Tensor:
        """The values behind those of the prefix."""
        return torch.cat([self._at(path, 1, value), value], dim=-2)

    def _at(self, path: str, part: int, like: torch.Tensor) -> torch.Tensor:
        piece = next(self.pieces[one][part] for one in self.pieces if f"{path}.".startswith(f"{one}."))
        whole = piece.expand(self.batch, *piece.shape)
        return whole.flatten(0, 1) if like.ndim == 3 else whole


@contextmanager
def watched(watch: Watch) -> Iterator[Watch]:
    """Have ``watch`` see the forwards of its model inside the block."""
    handles = []

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: watch._inside.append(path)

    def count(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch.batch = len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

    def leave(*_: Any) -> None:
        watch._inside.pop()

    handles.append(watch.model.register_forward_pre_hook(count, with_kwargs=True))
    for path, module in watch.model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with watch:
            yield watch
    finally:
        for handle in handles:
            handle.remove()


def _around(*paths: str) -> str:
    """The innermost module around all of ``paths``."""
    return os.path.commonpath([path.replace(".", "/") for path in paths]).replace("/", ".")


def _of_one_shape(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same shape, or the same with batch and heads in one dimension."""
    return one.numel() == other.numel() and one.shape[-2:] == other.shape[-2:]
