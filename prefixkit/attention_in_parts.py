"""Attention in two parts: to the prefix, once for all rows, and to each row's own keys.

All rows share the prefix, so their queries meet it in one dense product, and no row gets a copy of it or of its own
keys (Juravsky et al. 2024, "Hydragen", arXiv 2402.05099, §3). With ``o`` a part's output and ``l`` the log of the sum
of its exponentiated scores, both together give::

    l = log(exp(l_prefix) + exp(l_own))
    o = exp(l_prefix - l) * o_prefix + exp(l_own - l) * o_own

In the backward pass each part is handed the joint ``o`` and ``l``: with them its probabilities are those of the
whole softmax, and its gradients its share of the whole's.

It is what torch's flash kernel for CPUs computes; on other devices the prefix goes in front of every row's keys.
"""

from __future__ import annotations

from typing import Any

import torch

from prefixkit.layout import KeyValue

MANY_TOKENS = 256
"""From this length of a prefix on two kernels and their join are faster than a longer row of keys."""
MANY_BYTES = 2**20
"""The same where a row has one query, as in decoding: of the longer rows that would have to be written."""
ELSEWHERE = ("position_bias", "softcap", "s_aux", "output_attentions", "cache")
"""What only the wrapped attention function knows how to treat."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def pays(tokens: int, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether two parts are faster than keys and values in one row, written anew with the prefix in front.

    Args:
        tokens: Length P of the prefix.
        query: ``(batch, heads, queries, dim)``.
        key: ``(batch, kv_heads, keys, dim)``; values are like it.
    """
    if query.shape[2] > 1:
        return tokens >= MANY_TOKENS
    batch, kv_heads, keys, dim = key.shape
    return 2 * batch * kv_heads * (tokens + keys) * dim * key.element_size() >= MANY_BYTES


def can_serve(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, arguments: dict[str, Any]
) -> bool:
    """Whether the kernel takes what transformers' function for torch's own attention was called with."""
    plain = not arguments.get("dropout") and all(not _is_given(arguments.get(name)) for name in ELSEWHERE)
    same = query.dtype == key.dtype == value.dtype and query.shape[-1] == key.shape[-1] == value.shape[-1]
    return (
        plain
        and same
        and query.device.type == "cpu"
        and (mask is None or _is_plain(mask, query, key))
        and not _is_leaving_torch()
    )


def _is_leaving_torch() -> bool:
    """Whether a graph is being made for others, who do not know the kernel."""
    is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # its name from torch 2.7 on
    return bool(is_exporting()) or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _is_given(argument: Any) -> bool:
    return argument is not None and argument is not False


def _is_plain(mask: Any, query: torch.Tensor, key: torch.Tensor) -> bool:
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.requires_grad:
        return False
    fits = mask.shape[1] in (1, query.shape[1]) and mask.shape[2] in (1, query.shape[2])
    return fits and mask.shape[3] >= key.shape[2]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: KeyValue,
    mask: torch.Tensor | None,
    *,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """The attention's output ``(batch, heads, queries, dim)``, with ``prefix`` in front of every row.

    Args:
        query: ``(batch, heads, queries, dim)``.
        key: ``(batch, kv_heads, keys, dim)``, each row's own.
        value: As ``key``.
        prefix: Key and value ``(kv_heads, P, dim)``.
        mask: Of the own keys, additive and nowhere -inf, ``(batch or 1, heads or 1, queries or 1, keys)``.
        causal: Without a mask: whether key ``k`` is hidden from the queries before it.
        scale: Of the scores; ``None``: one over the root of ``dim``.
    """
    batch, heads, queries, dim = query.shape
    groups = heads // key.shape[1]
    front = prefix.key.unsqueeze(0), prefix.value.unsqueeze(0)
    if queries == 1:  # the heads that share keys are queries of one head
        query = query.reshape(batch, heads // groups, groups, dim)
        mask = None if mask is None else _of_groups(mask, groups)
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        front = front[0].repeat_interleave(groups, dim=1), front[1].repeat_interleave(groups, dim=1)
    if mask is not None:
        mask = mask.expand(-1, -1, query.shape[2], -1)
    tensors = query, key, value, *front
    # Going through autograd takes as long as the work of a short step of decoding.
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    run = InParts.apply if learns else InParts.forward
    output: torch.Tensor = run(*tensors, mask, causal, scale)[0]
    return output.reshape(batch, heads, queries, dim)


def _of_groups(mask: torch.Tensor, groups: int) -> torch.Tensor:
    """The mask of one query for each head, as of the queries of one head."""
    if mask.shape[1] == 1:
        return mask
    return mask.reshape(mask.shape[0], -1, groups, mask.shape[3])


class InParts(torch.autograd.Function):
    """The two parts and their join; all tensors have as many heads as the query."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # noqa: PLR0917 - as autograd calls it
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        front_key: torch.Tensor,
        front_value: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output ``(batch, heads, queries, dim)`` and log-sum-exp ``(batch, heads, queries)``."""
        to_front, front = _forward(_as_one_row(query), front_key, front_value, 0.0, False, scale=scale)
        to_own, own = _forward(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        batch = query.shape[0]
        front = _as_rows(front, batch)
        share = torch.sigmoid(front - own).unsqueeze(-1).to(query.dtype)
        return torch.lerp(to_own, _as_rows(to_front, batch), share), torch.logaddexp(front, own)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Keep what the backward pass needs: nothing larger than queries and keys."""
        *tensors, ctx.causal, ctx.scale = inputs
        ctx.set_materialize_grads(False)  # a gradient that is missing is no zero, and somebody looks for it
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
        """Gradients of query, key, value and of the prefix's key and value."""
        if grad is None:
            return (None,) * 8
        query, key, value, front_key, front_value, mask, output, total = ctx.saved_tensors
        own = grad, query, key, value, output, total
        grads = _backward(*own, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale)
        of_front = _backward(
            *(_as_one_row(grad), _as_one_row(query), front_key, front_value),
            *(_as_one_row(output), _as_one_row(total), 0.0, False),
            scale=ctx.scale,
        )
        of_query = grads[0] + _as_rows(of_front[0], query.shape[0])
        return of_query, grads[1], grads[2], of_front[1], of_front[2], None, None, None


def _as_one_row(tensor: torch.Tensor) -> torch.Tensor:
    """``(batch, heads, queries, ...)`` as ``(1, heads, batch * queries, ...)``."""
    return tensor.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _as_rows(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """The inverse of :func:`_as_one_row`."""
    rows: torch.Tensor = tensor[0].unflatten(1, (batch, -1)).transpose(0, 1)
    return rows
