"""Inputs for a tiny forward pass of a model that nothing is known of but its signature and its config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import torch

from prefixkit import transformers_internals as internals

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 3
"""Tokens of a text; their ids do not go up by one, so that they are no positions."""
TARGETS = 2
"""Tokens of a decoder's text where there is an encoder: fewer than the encoder's states."""

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
    makers = {**_MAKERS, main: _MAKERS.get(main, _text)} if main in takes else _MAKERS
    for value in makers[main](model) if main in makers else ():
        yield {main: value, **decoder}
    if main != "input_ids" and "input_ids" in takes:
        yield {"input_ids": _ids(model, TOKENS), **decoder}
    for value in _images(model) if main == "input_ids" and "pixel_values" in takes else ():
        yield {"input_ids": _ids(model, TOKENS), "pixel_values": value, **decoder}
    dummies = {name: value.to(internals.real_device(model)) for name, value in model.dummy_inputs.items()}
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
    special = {value for name, value in config.to_dict().items() if name.endswith("token_id")}
    vocabulary = getattr(config, "vocab_size", None) or 100
    ordinary = [token for token in range(min(vocabulary, 1000)) if token not in special][-2 * tokens - 1 :]
    order = [ordinary[(2 * index) % len(ordinary)] for index in reversed(range(tokens))]
    return torch.tensor([order], device=internals.real_device(model))


def _text(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    yield _ids(model, TOKENS)
    yield _ids(model, TOKENS)[None]  # of a multiple-choice model: (batch, choices, tokens)


def _images(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    config = _sub_config(model, "vision_config", "encoder")
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    yield _noise(model, 1, getattr(config, "num_channels", 3), height, width)


def _features(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """A spectrogram, with as many frames as the encoder has positions for, or features frame by frame."""
    config = _sub_config(model, "audio_config", "encoder")
    bins = getattr(config, "num_mel_bins", None)
    if bins and getattr(config, "max_source_positions", None):
        yield _noise(model, 1, bins, 2 * config.max_source_positions)
    names = ("feature_projection_input_dim", "input_feat_per_channel", "input_dim", "num_mel_bins")
    for size in (getattr(config, name, None) for name in names):
        if size:
            yield _noise(model, 1, 64, size)


def _sound(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    config = model.config
    if getattr(config, "num_mel_bins", None) and getattr(config, "max_length", None):
        yield _noise(model, 1, config.max_length, config.num_mel_bins)
    yield _noise(model, 1, 4000)


_MAKERS = {
    "input_ids": _text,
    "pixel_values": _images,
    "input_features": _features,
    "input_values": _sound,
}


def _sub_config(model: PreTrainedModel, *names: str) -> Any:
    """The config of a part, or the model's own."""
    found = (getattr(model.config, name, None) for name in names)
    return next((config for config in found if config is not None), model.config)


def _noise(model: PreTrainedModel, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    return values.to(device=internals.real_device(model), dtype=internals.compute_dtype(model))
