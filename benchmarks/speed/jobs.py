"""What is timed, of any library's model: a training step, and decoding. This module needs nobody's prefix."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.speed.cells import Cell


def batch_of(base: Any, cell: Cell, device: str) -> dict[str, torch.Tensor]:
    """Random tokens without padding, as a collator gives them."""
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(3, base.config.vocab_size, (cell.batch, cell.length), generator=drawn).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def forget(model: Any) -> None:
    """Take the gradients away."""
    model.zero_grad(set_to_none=True)


def step(model: Any, batch: dict[str, torch.Tensor], _: Any = None) -> torch.Tensor:
    """Of a model with a prefix; its loss."""
    loss = model(**batch).loss
    loss.backward()
    return loss


def step_to_embeddings(model: Any, batch: dict[str, torch.Tensor], _: Any = None) -> torch.Tensor:
    """Of the frozen base, which trains nothing: backward to the embeddings that enter the stack with the labels.

    Backward through every layer, and to no weight, is what a prefix cannot do without.
    """
    inputs = dict(batch)
    if model.config.is_encoder_decoder:
        shifted = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
        embeddings = model.get_input_embeddings()(shifted).requires_grad_()
        inputs["decoder_inputs_embeds"] = embeddings
    else:
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_()
        inputs["inputs_embeds"] = embeddings
    loss = model(**inputs).loss
    loss.backward()
    assert embeddings.grad is not None
    return loss


def generate(
    model: Any, cell: Cell, inputs: dict[str, torch.Tensor], cache: Any = None, **options: Any
) -> torch.Tensor:
    """The new tokens."""
    given = {"past_key_values": cache} if cache is not None else {}
    count = {"min_new_tokens": cell.new_tokens, "max_new_tokens": cell.new_tokens}
    with torch.no_grad():
        tokens = model.generate(**inputs, **given, **count, **options, do_sample=False, pad_token_id=0)
    return tokens[:, -cell.new_tokens :]
