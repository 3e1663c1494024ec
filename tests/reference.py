"""Encoder-decoders with a prefix, written out plainly in float64: the oracle for z = [P; x; P'; y].

Nothing here calls prefixkit or a transformers module; weights come from the state dict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Prefix:
    """K and V per kind of attention and layer, ``(heads, P, dim)`` each, and the position policy."""

    encoder: list[Pair]
    decoder: list[Pair]
    cross: list[Pair]
    length: int
    shift: bool


def cut(flat: torch.Tensor, shapes: list[tuple[int, int]]) -> list[Pair]:
    """Read a flat prefix token by token: for each ``(heads, dim)`` first all of K, then all of V."""
    flat = flat.double()
    rows, place, pairs = flat.shape[0], 0, []
    for heads, dim in shapes:
        pair = []
        for _ in ("key", "value"):
            part = torch.empty(heads, rows, dim, dtype=torch.float64)
            for head in range(heads):
                part[head] = flat[:, place + head * dim : place + (head + 1) * dim]
            place += heads * dim
            pair.append(part)
        pairs.append((pair[0], pair[1]))
    assert place == flat.shape[1]
    return pairs


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: Pair,
    visible: torch.Tensor,
    heads: int,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """One row's attention. ``query (q, width)``, ``key``, ``value (k, width)``, ``visible (q, k)``.

    ``bias (heads, q, P + k)``, the prefix's columns first.
    """
    dim = query.shape[1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        keys = torch.cat([prefix[0][head], key[:, part]])
        values = torch.cat([prefix[1][head], value[:, part]])
        scores = query[:, part] @ keys.T * scale
        if bias is not None:
            scores = scores + bias[head]
        seen = torch.cat([torch.ones(len(query), len(prefix[0][head]), dtype=torch.bool), visible], dim=1)
        scores = scores.masked_fill(~seen, -math.inf)
        outputs.append(scores.softmax(-1) @ values)
    return torch.cat(outputs, dim=1)


def rows(ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Each row without its padding."""
    return [row[seen.bool()] for row, seen in zip(ids, mask, strict=True)]


class Weights:
    """A state dict in float64."""

    def __init__(self, model: Any) -> None:
        self.values = {name: value.double() for name, value in model.state_dict().items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.values[name]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.values[name + ".weight"].T
        bias = self.values.get(name + ".bias")
        return y if bias is None else y + bias

    def layer_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean, spread = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (spread + 1e-5).sqrt() * self[name + ".weight"] + self[name + ".bias"]

    def rms_norm(self, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self[name + ".weight"]


def causal(length: int) -> torch.Tensor:
    return torch.tensor([[k <= q for k in range(length)] for q in range(length)])


def bart_logits(model: Any, source: torch.Tensor, target: torch.Tensor, prefix: Prefix) -> torch.Tensor:
    """Logits ``(targets, vocab)`` of one unpadded pair (Lewis et al. 2020, post-norm)."""
    w, config = Weights(model), model.config
    start = prefix.length if prefix.shift else 0

    def embed(side: str, ids: torch.Tensor, moved: bool) -> torch.Tensor:
        first = start if moved else 0
        table = w[f"model.{side}.embed_positions.weight"]
        x = w["model.shared.weight"][ids] + torch.stack([table[2 + first + i] for i in range(len(ids))])
        return w.layer_norm(f"model.{side}.layernorm_embedding", x)

    def attention(name: str, x: torch.Tensor, y: torch.Tensor, pair: Pair, seen: torch.Tensor, heads: int) -> Any:
        q, k, v = w.linear(name + ".q_proj", x), w.linear(name + ".k_proj", y), w.linear(name + ".v_proj", y)
        scale = (config.d_model // heads) ** -0.5
        return w.linear(name + ".out_proj", attend(q, k, v, pair, seen, heads, scale))

    def feed_forward(name: str, x: torch.Tensor) -> torch.Tensor:
        middle = torch.nn.functional.gelu(w.linear(name + ".fc1", x))
        return w.layer_norm(name + ".final_layer_norm", x + w.linear(name + ".fc2", middle))

    x = embed("encoder", source, bool(prefix.encoder))
    everything = torch.ones(len(source), len(source), dtype=torch.bool)
    for layer in range(config.encoder_layers):
        name = f"model.encoder.layers.{layer}"
        heads = config.encoder_attention_heads
        pair = _pair(prefix.encoder, layer, heads, config.d_model // heads)
        x = w.layer_norm(
            name + ".self_attn_layer_norm", x + attention(name + ".self_attn", x, x, pair, everything, heads)
        )
        x = feed_forward(name, x)

    y = embed("decoder", target, bool(prefix.decoder))
    heads = config.decoder_attention_heads
    for layer in range(config.decoder_layers):
        name = f"model.decoder.layers.{layer}"
        own = _pair(prefix.decoder, layer, heads, config.d_model // heads)
        cross = _pair(prefix.cross, layer, heads, config.d_model // heads)
        y = w.layer_norm(
            name + ".self_attn_layer_norm",
            y + attention(name + ".self_attn", y, y, own, causal(len(target)), heads),
        )
        seen = torch.ones(len(target), len(source), dtype=torch.bool)
        y = w.layer_norm(
            name + ".encoder_attn_layer_norm", y + attention(name + ".encoder_attn", y, x, cross, seen, heads)
        )
        y = feed_forward(name, y)
    return y @ w["model.shared.weight"].T + w["final_logits_bias"]


def t5_bucket(distance: int, both_ways: bool, buckets: int, furthest: int) -> int:
    """T5's relative-position bucket of ``key − query`` (Raffel et al. 2020, and mesh-tensorflow)."""
    bucket = 0
    if both_ways:
        buckets //= 2
        if distance > 0:
            bucket += buckets
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return bucket + distance
    far = exact + int(math.log(distance / exact) / math.log(furthest / exact) * (buckets - exact))
    return bucket + min(far, buckets - 1)


def t5_logits(model: Any, source: torch.Tensor, target: torch.Tensor, prefix: Prefix) -> torch.Tensor:
    """Logits ``(targets, vocab)`` of one unpadded pair (Raffel et al. 2020, pre-norm, no scaling)."""
    w, config = Weights(model), model.config
    heads, eps = config.num_heads, config.layer_norm_epsilon

    def bias(side: str, length: int, columns: int) -> torch.Tensor:
        """Query ``i`` stands at ``P + i``, virtual token ``j`` at ``j``; under ``none`` the latter have no bias."""
        table = w[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        spread = {"buckets": config.relative_attention_num_buckets, "furthest": config.relative_attention_max_distance}
        result = torch.zeros(heads, length, columns + length, dtype=torch.float64)
        for q in range(length):
            for k in range(-columns, length):
                if k >= 0 or prefix.shift:
                    bucket = t5_bucket(k - q, side == "encoder", **spread)
                    result[:, q, columns + k] = table[bucket]
        return result

    def attention(
        name: str, x: torch.Tensor, y: torch.Tensor, pair: Pair, seen: torch.Tensor, scores: torch.Tensor | None
    ) -> torch.Tensor:
        q, k, v = w.linear(name + ".q", x), w.linear(name + ".k", y), w.linear(name + ".v", y)
        return w.linear(name + ".o", attend(q, k, v, pair, seen, heads, 1.0, scores))

    def feed_forward(name: str, x: torch.Tensor) -> torch.Tensor:
        middle = w.linear(name + ".DenseReluDense.wi", w.rms_norm(name + ".layer_norm", x, eps)).relu()
        return x + w.linear(name + ".DenseReluDense.wo", middle)

    x = w["shared.weight"][source]
    everything = torch.ones(len(source), len(source), dtype=torch.bool)
    encoder_bias = bias("encoder", len(source), prefix.length if prefix.encoder else 0)
    for layer in range(config.num_layers):
        name = f"encoder.block.{layer}.layer"
        pair = _pair(prefix.encoder, layer, heads, config.d_kv)
        normed = w.rms_norm(name + ".0.layer_norm", x, eps)
        x = x + attention(name + ".0.SelfAttention", normed, normed, pair, everything, encoder_bias)
        x = feed_forward(name + ".1", x)
    x = w.rms_norm("encoder.final_layer_norm", x, eps)

    y = w["shared.weight"][target]
    decoder_bias = bias("decoder", len(target), prefix.length if prefix.decoder else 0)
    seen = torch.ones(len(target), len(source), dtype=torch.bool)
    for layer in range(config.num_decoder_layers):
        name = f"decoder.block.{layer}.layer"
        own = _pair(prefix.decoder, layer, heads, config.d_kv)
        cross = _pair(prefix.cross, layer, heads, config.d_kv)
        normed = w.rms_norm(name + ".0.layer_norm", y, eps)
        y = y + attention(name + ".0.SelfAttention", normed, normed, own, causal(len(target)), decoder_bias)
        normed = w.rms_norm(name + ".1.layer_norm", y, eps)
        y = y + attention(name + ".1.EncDecAttention", normed, x, cross, seen, None)
        y = feed_forward(name + ".2", y)
    y = w.rms_norm("decoder.final_layer_norm", y, eps)
    return y * config.d_model**-0.5 @ w["shared.weight"].T


def _pair(pairs: list[Pair], layer: int, heads: int, dim: int) -> Pair:
    """The layer's prefix, or one of length 0."""
    return pairs[layer] if pairs else (torch.zeros(heads, 0, dim).double(), torch.zeros(heads, 0, dim).double())


LOGITS = {"bart": bart_logits, "t5": t5_logits, "t5-deep-encoder": t5_logits}
