"""Checkpoints of the code of Liu et al. 2022, "P-Tuning v2": a whole model, of which the prefix and the head are taken.

``prefix_encoder.embedding.weight`` is the flat prefix ``(P, layers × 2 × hidden_size)``; with
``prefix_encoder.trans.{0,2}.{weight,bias}`` it is ``(P, hidden_size)`` and an MLP stands behind it. The base's own
tensors are in the file too, and are left there. The prefix is a cache, so the first real token stands at position P.

This rests on ``model/prefix_encoder.py``, ``model/sequence_classification.py`` and their neighbours in
THUDM/P-tuning-v2. The head must have the names that the model here gives it; that code's classifier of sentences is
one linear layer on a pooler also where transformers has two layers and none.
"""

from __future__ import annotations

from collections.abc import Mapping

from prefixkit.formats.found import FLAT, MLP, Found, Target, check_width, found, refuse_others, task_head, tensor
from prefixkit.formats.mlp import fold

START = "prefix_encoder."
EMBEDDING = f"{START}embedding.weight"
TRANS = f"{START}trans"


def is_here(names: Mapping[str, object]) -> bool:
    """Whether the tensors of a file have such a prefix among them."""
    return EMBEDDING in names


def read(tensors: Mapping[str, object], settings: Mapping[str, object], target: Target) -> Found:
    """The prefix and the head among ``tensors``; ``settings`` is the ``config.json`` beside it.

    Raises:
        CheckpointError: If it is damaged, or for another model or head.
    """
    stated, real = settings.get("model_type"), target.model.config.model_type
    if stated is not None and stated != real:
        raise target.damaged(f"it is of model type {stated!r}; this {type(target.model).__name__} is {real!r}")
    if target.is_encoder_decoder:
        raise target.damaged(f"P-tuning v2 has encoders; this {type(target.model).__name__} is an encoder-decoder")
    projected = f"{TRANS}.0.weight" in tensors
    if projected:
        flat, known = fold(target, tensors, embedding=EMBEDDING, trans=TRANS)
    else:
        flat, known = tensor(target, tensors, EMBEDDING, 2), {EMBEDDING}
    refuse_others(target, [name for name in tensors if name.startswith(START)], known)
    check_width(target, flat, target.sites, EMBEDDING)
    return found(
        target,
        flat,
        method=MLP if projected else FLAT,
        prefix_dropout=settings.get("hidden_dropout_prob"),
        head=task_head(target, tensors),
        positions="shift",
    )
