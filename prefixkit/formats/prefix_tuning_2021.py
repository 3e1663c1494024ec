"""Checkpoints of the code of Li & Liang 2021, "Prefix-Tuning": the prefix's own ``pytorch_model.bin``.

A decoder alone has ``wte.weight (P, dim)`` and ``control_trans.{0,2}.{weight,bias}`` (deeper: 4 as well), and the
first real token stands at position P. Without the MLP ``control_trans`` is one row of numbers
``(P, layers × 2, heads, head_dim)``, or the cache of real words ``(layers × 2, 1, heads, P, head_dim)``. An
encoder-decoder has two more of the first kind, ``wte_enc`` with ``control_trans_enc`` and, for cross-attention,
``wte2`` with ``control_trans2``, and real tokens keep their positions.

This rests on ``PrefixTuning`` of both kinds of model as it is found in public copies of
XiangLisaLi/PrefixTuning (``get_prompt_p5``, ``get_prompt_p2``, ``get_prompt_p2_shallow``). An infix of that code has
``wte2`` and no ``control_trans2``; it reads the text before it in another way than ours, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from prefixkit.formats.found import FLAT, MLP, Found, Target, check_moves, check_width, found, refuse_others, tensor
from prefixkit.formats.mlp import fold

PARTS = {
    "encoder": ("wte_enc", "control_trans_enc"),
    "decoder": ("wte", "control_trans"),
    "cross": ("wte2", "control_trans2"),
}
DIRECT = "control_trans"


def is_here(names: Mapping[str, object]) -> bool:
    """Whether the tensors of a file are such a prefix."""
    return DIRECT in names or f"{DIRECT}.0.weight" in names


def read(tensors: Mapping[str, object], settings: Mapping[str, object], target: Target) -> Found:
    """The prefix among ``tensors``; ``settings`` is the ``config.json`` beside it.

    Raises:
        CheckpointError: If it is an infix, damaged, or for another model.
    """
    if settings.get("use_infix") is True or ("wte2.weight" in tensors and "control_trans2.0.weight" not in tensors):
        raise target.damaged("it is an infix of the 2021 code, which has no counterpart here; retrain with infix=True")
    if DIRECT in tensors:
        flat = _direct(target, tensors)
        return _found(target, settings, flat, {DIRECT}, tensors, method=FLAT)
    stacks = [stack for stack in PARTS if target.of_stack(stack)]
    flats: list[torch.Tensor] = []
    known: set[str] = set()
    for stack in stacks:
        wte, trans = PARTS[stack]
        flat, names = fold(target, tensors, embedding=f"{wte}.weight", trans=trans)
        check_width(target, flat, target.of_stack(stack), trans)
        flats.append(flat)
        known |= names
    if len({len(flat) for flat in flats}) > 1:
        raise target.damaged(f"its prefixes have {', '.join(str(len(flat)) for flat in flats)} virtual tokens")
    return _found(target, settings, torch.cat(flats, dim=1), known, tensors, method=MLP)


def _found(
    target: Target,
    settings: Mapping[str, object],
    flat: torch.Tensor,
    known: set[str],
    tensors: Mapping[str, object],
    *,
    method: str,
) -> Found:
    # The buffer of token numbers is 0 to P - 1 always.
    refuse_others(target, tensors, known | {"input_tokens"})
    if not target.is_encoder_decoder:
        check_moves(target, ["decoder"])
    return found(
        target,
        flat,
        method=method,
        prefix_dropout=settings.get("prefix_dropout"),
        positions="none" if target.is_encoder_decoder else "shift",
    )


def _direct(target: Target, tensors: Mapping[str, object]) -> torch.Tensor:
    """A prefix without the MLP as ``(P, width)``."""
    if target.is_encoder_decoder:
        raise target.damaged("control_trans has no MLP, which the 2021 code has for decoders alone")
    numbers = tensor(target, tensors, DIRECT)
    width = sum(site.width for site in target.sites)
    if numbers.ndim == 5 and numbers.shape[1] == 1:
        flat = numbers[:, 0].permute(2, 0, 1, 3).flatten(1)
        check_width(target, flat, target.sites, DIRECT)
        return flat
    if numbers.ndim != 1 or len(numbers) % width:
        raise target.damaged(
            f"control_trans is {tuple(numbers.shape)}; expected one row, {width} numbers for each virtual token of "
            f"this {type(target.model).__name__}, or (layers × 2, 1, heads, P, head_dim)"
        )
    return numbers.view(-1, width)
