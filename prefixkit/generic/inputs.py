"""Inputs for a tiny forward pass of a model that nothing is known of but its signature and its config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import torch

from prefixkit import placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 3
"""Tokens of a text; their ids do not go up by one, so that they are no positions."""
TARGETS = 2
"""Tokens of a decoder's text where there is an encoder: fewer than the encoder's states."""

FRAMES = 64
"""Frames of features."""
SAMPLES = 4000
"""Samples of a sound: a quarter of a second."""

Inputs = Mapping[str, Any]


def candidates(model: PreTrainedModel, targets: int = TARGETS) -> Iterator[Inputs]:
    """Inputs to try, the likeliest first: what the model names as its main input, and what has to go with it.

    Args:
        model: The model.
        targets: Tokens for the decoder of an encoder-decoder.
    """
    main = getattr(model, "main_input_name", "input_ids")
    takes = signature(model.forward).parameters
    decoder: dict[str, Any] = {}
    if "decoder_input_ids" in takes:
        decoder["decoder_input_ids"] = _ids(model, targets)
    for value in _MAKERS[main](model) if main in _MAKERS else ():
        yield {main: value, **decoder}
    if main != "input_ids" and "input_ids" in takes:
        yield {"input_ids": _ids(model, TOKENS), **decoder}
    for value in _images(model) if main == "input_ids" and "pixel_values" in takes else ():
        yield {"input_ids": _ids(model, TOKENS), "pixel_values": value, **decoder}
    dummies = {name: value.to(placement.real_device(model)) for name, value in model.dummy_inputs.items()}
    if all(name in takes for name in dummies):
        yield {**decoder, **dummies}


def required(model: PreTrainedModel) -> list[str]:
    """Arguments that ``forward`` cannot do without, as far as its signature tells."""
    return [
        name
        for name, parameter in signature(model.forward).parameters.items()
        if parameter.default is Parameter.empty
        and parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    ]


def _ids(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    """Token ids ``(1, tokens)`` that are nobody's special ones, and do not go up by one."""
    config = model.config.get_text_config()
    values = (value for name, value in config.to_dict().items() if name.endswith("token_id"))
    special = {token for value in values for token in (value if isinstance(value, list) else [value])}
    vocabulary = getattr(config, "vocab_size", None) or 100
    ordinary = [token for token in range(min(vocabulary, 1000)) if token not in special][-2 * tokens - 1 :]
    order = [ordinary[(2 * index) % len(ordinary)] for index in reversed(range(tokens))]
    return torch.tensor([order], device=placement.real_device(model))


def _text(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    ids = _ids(model, TOKENS)
    yield ids
    yield ids[None]  # of a multiple-choice model: (batch, choices, tokens)
    for books in _settings(model, "num_codebooks"):
        yield ids.expand(books, -1)


def _images(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    size = next(_settings(model, "image_size"), 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    yield _noise(model, 1, next(_settings(model, "num_channels"), 3), height, width)


def _features(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """A spectrogram, with as many frames as the encoder has positions for, or features frame by frame."""
    for bins in _settings(model, "num_mel_bins"):
        for frames in _settings(model, "max_source_positions"):
            yield _noise(model, 1, bins, 2 * frames)
    for name in ("feature_projection_input_dim", "input_feat_per_channel", "input_dim", "num_mel_bins"):
        for size in _settings(model, name):
            yield _noise(model, 1, FRAMES, size)


def _sound(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    for bins in _settings(model, "num_mel_bins"):
        for length in _settings(model, "max_length"):
            yield _noise(model, 1, length, bins)
    yield _noise(model, 1, SAMPLES)


def _anything(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """For a main input that has no name of its own."""
    for make in (_text, _images, _sound):
        yield from make(model)


_MAKERS = {
    "input_ids": _text,
    "pixel_values": _images,
    "input_features": _features,
    "input_values": _sound,
    "inputs": _anything,
}


def _settings(model: PreTrainedModel, name: str) -> Iterator[Any]:
    """What the config, or that of a part, says under ``name``."""
    parts = (getattr(model.config, part, None) for part in getattr(model.config, "sub_configs", {}))
    for config in (*parts, model.config):
        value = getattr(config, name, None)
        if value:
            yield value


def _noise(model: PreTrainedModel, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    return values.to(device=placement.real_device(model), dtype=placement.compute_dtype(model))
