"""PEFT's prefix tuning and CARTRIDGE: ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).

The file has one key ``prompt_embeddings``, the flat prefix ``(P, num_layers × 2 × token_dim)``: an MLP is folded when
PEFT saves. Modules that were trained with it stand under ``base_model.`` and their name in the model. PEFT puts the
prefix into the native cache, so the first real token stands at position P, and the prefix slides out of sliding
windows like any context.

An encoder-decoder has a prefix in the decoder's self-attention only. There PEFT doubles the slots and deals them out
by four, of which the last two are thrown away: layer i gets slots ``4i`` and ``4i + 1``, modulo ``2 × num_layers``
(``PeftModel.get_prompt``, where ``num_transformer_submodules`` is 2).

This rests on the source of PEFT 0.21.2: ``peft_model.py``, ``tuners/prefix_tuning``, ``tuners/cartridge`` and
``utils/save_and_load.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from prefixkit.adapter import Site
from prefixkit.formats import fields, tensor_files
from prefixkit.formats.found import FLAT, MLP, Found, Target, check_moves, found, refuse_others, tensor

CONFIG_FILE = "adapter_config.json"
TENSOR_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PROMPT = "prompt_embeddings"
BASE = "base_model."
PREFIX_TUNING, CARTRIDGE = "PREFIX_TUNING", "CARTRIDGE"


def read(folder: Path, document: Mapping[str, Any], target: Target) -> Found:
    """The prefix in a folder of ``PeftModel.save_pretrained``.

    Raises:
        CheckpointError: If it is of another method, damaged, or for another shape.
    """
    kind = document.get("peft_type")
    if kind not in (PREFIX_TUNING, CARTRIDGE):
        raise target.damaged(
            f"it holds {kind} of PEFT; prefixkit reads {PREFIX_TUNING} and {CARTRIDGE}. Load it with PEFT itself"
        )
    path = tensor_files.first_of(folder, *TENSOR_FILES)
    if path is None:
        raise target.damaged(f"none of {', '.join(TENSOR_FILES)} is there")
    tensors = tensor_files.read(path)
    prompt = tensor(target, tensors, PROMPT, 2)
    refuse_others(target, tensors, [PROMPT, *(name for name in tensors if name.startswith(BASE))])
    fields.agree(target, document, "num_virtual_tokens", len(prompt), f"{PROMPT} has")
    head = {name.removeprefix(BASE): tensor(target, tensors, name) for name in tensors if name.startswith(BASE)}
    two = _has_two_submodules(document, target)
    sites = target.of_stack("decoder") if two else target.sites
    check_moves(target, {site.stack for site in sites})
    layers = _check_shape(document, target, prompt, sites)
    return found(
        target,
        deal(prompt, layers, sites) if two else prompt[:, : prompt.shape[1] * len(sites) // layers],
        method=MLP if document.get("prefix_projection") is True else FLAT,
        head=head,
        stacks=("decoder",) if two else None,
        window="slide",
        num_frozen_tokens=_frozen(document, target, len(prompt)) if kind == CARTRIDGE else 0,
        base_model_name_or_path=fields.text(document, "base_model_name_or_path"),
    )


def slots(layer: int, layers: int) -> tuple[int, int]:
    """Which slots of the flat prefix an encoder-decoder's decoder layer has for keys and for values."""
    return 4 * layer % (2 * layers), (4 * layer + 1) % (2 * layers)


def deal(prompt: torch.Tensor, layers: int, sites: Iterable[Site]) -> torch.Tensor:
    """The slots of ``prompt (P, width)`` that the decoder's layers get, one after the other."""
    every = prompt.unflatten(1, (2 * layers, -1))
    order = [slot for site in sites for slot in slots(site.layer, layers)]
    dealt: torch.Tensor = every[:, order].flatten(1)
    return dealt


def _has_two_submodules(document: Mapping[str, Any], target: Target) -> bool:
    """Whether PEFT deals the slots out as for an encoder-decoder, which the model must be then, and else not."""
    stated = fields.whole(target, document, "num_transformer_submodules")
    stated = stated or (2 if document.get("task_type") == "SEQ_2_SEQ_LM" else 1)
    if stated != (2 if target.is_encoder_decoder else 1):
        raise target.damaged(
            f"num_transformer_submodules is {stated}; PEFT has 2 for an encoder-decoder and 1 for any other model, "
            f"and this {type(target.model).__name__} is {'one' if target.is_encoder_decoder else 'none'}"
        )
    return stated == 2


def _check_shape(document: Mapping[str, Any], target: Target, prompt: torch.Tensor, sites: tuple[Site, ...]) -> int:
    """Refuse where layers, heads and numbers are not those of the sites; returns ``num_layers``."""
    layers = fields.whole(target, document, "num_layers") or len(sites)
    # Of a model with an encoder's depth in its config, PEFT takes that; a decoder may have fewer layers.
    depths = {len(sites), getattr(target.model.config.get_text_config(), "num_hidden_layers", len(sites))}
    if layers not in depths or [site.layer for site in sites] != list(range(layers)[: len(sites)]):
        raise target.damaged(
            f"num_layers is {layers}; the attention of this {type(target.model).__name__} that would carry the "
            f"prefix stands in layers {[site.layer for site in sites]}"
        )
    heads = fields.whole(target, document, "num_attention_heads") or sites[0].kv_heads
    token_dim = fields.whole(target, document, "token_dim") or sites[0].kv_heads * sites[0].key_dim
    for site in sites:
        if (site.kv_heads, site.key_dim, site.value_dim) != (heads, token_dim // heads, token_dim // heads):
            raise target.damaged(
                f"num_attention_heads is {heads} and token_dim is {token_dim}, heads of {token_dim // heads}; "
                f"{site.path!r} has {site.kv_heads} of {site.key_dim} for keys and {site.value_dim} for values"
            )
    if prompt.shape[1] != layers * 2 * token_dim:
        raise target.damaged(
            f"{PROMPT} is {tuple(prompt.shape)}; {layers} layers with token_dim {token_dim} are "
            f"{layers * 2 * token_dim} numbers for each virtual token"
        )
    return layers


def _frozen(document: Mapping[str, Any], target: Target, tokens: int) -> int:
    """How many of the first virtual tokens do not train; PEFT's default is one."""
    stated = fields.whole(target, document, "num_frozen_tokens", 0)
    frozen = 1 if stated is None else stated
    if frozen >= tokens:
        raise target.damaged(
            f"num_frozen_tokens is {frozen} of {tokens}, so that nothing would train; set it to {tokens - 1} or less "
            f"in {CONFIG_FILE}"
        )
    return frozen
