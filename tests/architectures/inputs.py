"""Forward arguments for a tiny model, by what its ``forward`` takes and by model type where that does not tell."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from architectures.config_classes import PreTrainedConfig
from architectures.sizes import DECODER_START

FIRST, LAST = 10, 60
"""Token ids that are nobody's special token, in every vocabulary here."""
SAMPLES = 1600
"""A sound of which some twenty frames or more are left behind the convolutions."""
FRAMES = 64

Tensors = dict[str, torch.Tensor]


@dataclass
class Request:
    """What is asked for, and the numbers it is filled with."""

    kind: str
    model: PreTrainedModel
    batch: int
    tokens: int
    generator: torch.Generator

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    def takes(self, name: str) -> bool:
        return name in inspect.signature(self.model.forward).parameters

    def ids(self, *shape: int) -> torch.Tensor:
        return torch.randint(FIRST, LAST, shape, generator=self.generator)

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)


def forward_inputs(kind: str, model: PreTrainedModel, *, batch: int, tokens: int, seed: int) -> Tensors:
    """Arguments for ``model.forward``, without labels."""
    request = Request(kind, model, batch, tokens, torch.Generator().manual_seed(seed))
    special = BY_TYPE.get((kind, model.config.model_type)) or BY_TYPE.get(("", model.config.model_type))
    given = (special or BY_MAIN_INPUT.get(model.main_input_name, text))(request)
    if request.takes("decoder_input_ids") and "decoder_input_ids" not in given:
        start = torch.full((batch, 1), DECODER_START)
        given["decoder_input_ids"] = torch.cat([start, request.ids(batch, tokens - 1)], dim=1)
    return given


def text(request: Request) -> Tensors:
    ids = request.ids(request.batch, request.tokens)
    given = {"input_ids": ids}
    if request.takes("attention_mask"):
        given["attention_mask"] = torch.ones_like(ids)
    if request.kind == "vision" and request.takes("pixel_values"):
        given.update(image(request))
    return given


def image(request: Request) -> Tensors:
    vision = getattr(request.config, "vision_config", request.config)
    size = getattr(vision, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": request.floats(request.batch, getattr(vision, "num_channels", 3), height, width)}


def sound(request: Request) -> Tensors:
    samples = request.floats(request.batch, SAMPLES)
    return {"input_values": samples, "attention_mask": torch.ones(request.batch, SAMPLES, dtype=torch.long)}


def frames(request: Request) -> Tensors:
    """Features per frame, frames first."""
    encoder = getattr(request.config, "encoder_config", request.config)
    names = ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins", "input_dim")
    size = next(getattr(encoder, name) for name in names if hasattr(encoder, name))
    mask = torch.ones(request.batch, FRAMES, dtype=torch.long)
    return {"input_features": request.floats(request.batch, FRAMES, size), "attention_mask": mask}


def stacked_frames(request: Request) -> Tensors:
    """Four frames in one."""
    given = frames(request)
    return {**given, "input_features": given["input_features"].repeat(1, 1, 4)}


def spectrogram(request: Request) -> Tensors:
    """Features first, and exactly as many frames as the encoder has positions for."""
    encoder = getattr(request.config, "audio_config", request.config)
    length = 2 * encoder.max_source_positions
    return {"input_features": request.floats(request.batch, encoder.num_mel_bins, length)}


def framed_spectrogram(request: Request) -> Tensors:
    return {"input_values": request.floats(request.batch, request.config.max_length, request.config.num_mel_bins)}


def streamed_speech(request: Request) -> Tensors:
    """Text, and for each of its tokens the stretch of sound that was heard with it."""
    audio = request.config.audio_config
    length = request.tokens * request.config.audio_length_per_tok
    return {
        **text(request),
        "input_features": request.floats(request.batch, audio.num_mel_bins, length),
        "num_delay_tokens": torch.tensor(1),
    }


def sound_in_text(request: Request) -> Tensors:
    """A sound and its placeholders in front of the text; how many is up to the encoder, so it is asked."""
    heard = _heard(request)
    inner = getattr(request.model, "model", request.model)  # before transformers 5.10 some have none
    wanted = inspect.signature(getattr(inner, "get_audio_features", request.model.get_audio_features)).parameters
    with torch.no_grad():
        features = request.model.get_audio_features(**{name: heard[name] for name in heard if name in wanted})
    features = getattr(features, "pooler_output", features)  # a tensor in transformers 4
    count = features.shape[:-1].numel() // request.batch
    names = ("audio_token_id", "audio_token_index")
    placeholder = next(getattr(request.config, name) for name in names if hasattr(request.config, name))
    words = request.ids(request.batch, request.tokens)
    ids = torch.cat([torch.full((request.batch, count), placeholder), words], dim=1)
    taken = {name: value for name, value in heard.items() if request.takes(name)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **taken}


def _heard(request: Request) -> Tensors:
    if request.takes("input_values"):  # without the noise that is added by default
        return {"input_values": request.floats(request.batch, 1, SAMPLES // 10), "sample": torch.tensor(False)}
    encoder = getattr(request.config, "audio_config", None) or request.config.encoder_config
    length = 2 * getattr(encoder, "n_window", FRAMES // 2)
    if hasattr(encoder, "input_dim"):
        return {"input_features": request.floats(request.batch, length, encoder.input_dim)}
    if not request.takes("input_features_mask"):
        return spectrogram(request)
    size = (encoder.num_mel_bins, length)
    if hasattr(encoder, "num_stacked_frames"):
        size = (length, encoder.num_mel_bins * encoder.num_stacked_frames)
    mask = torch.ones(request.batch, length, dtype=torch.long)
    return {"input_features": request.floats(request.batch, *size), "input_features_mask": mask}


def codes_last(request: Request) -> Tensors:
    """A text token and one audio code per codebook in each position."""
    shape = (request.batch, request.tokens, request.config.num_codebooks + 1)
    return {"input_ids": request.ids(*shape), "attention_mask": torch.ones(shape[:2], dtype=torch.long)}


def codes_stacked(request: Request) -> Tensors:
    """One row per codebook."""
    ids = request.ids(request.batch * request.config.num_codebooks, request.tokens)
    return {"input_ids": ids, "attention_mask": torch.ones(request.batch, request.tokens, dtype=torch.long)}


def dialogue(request: Request) -> Tensors:
    channels = request.config.decoder_config.num_channels
    return {**text(request), "decoder_input_ids": request.ids(request.batch, request.tokens, channels)}


def patches(request: Request) -> Tensors:
    """An image as rows of patches, as many as there are positions for."""
    vision = request.config.vision_config
    side = int(vision.num_patches**0.5)
    size = vision.num_channels * vision.patch_size**2
    return {
        "pixel_values": request.floats(request.batch, side * side, size),
        "pixel_attention_mask": torch.ones(request.batch, side * side, dtype=torch.long),
        "spatial_shapes": torch.full((request.batch, 2), side),
    }


def image_in_text(request: Request) -> Tensors:
    """An image's placeholders in front of the text."""
    words = request.ids(request.batch, request.tokens)
    soft = torch.full((request.batch, request.config.mm_tokens_per_image), request.config.image_token_index)
    ids = torch.cat([soft, words], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image(request)}


def anything(request: Request) -> Tensors:
    """Perceiver calls all that it looks at ``inputs``."""
    if request.kind == "vision":
        return {"inputs": image(request)["pixel_values"]}
    given = text(request)
    return {"inputs": given["input_ids"], "attention_mask": given["attention_mask"]}


BY_MAIN_INPUT: dict[str, Callable[[Request], Tensors]] = {
    "pixel_values": image,
    "input_values": sound,
    "input_features": frames,
    "input_ids": text,
}
BY_TYPE: dict[tuple[str, str], Callable[[Request], Tensors]] = {
    ("", "perceiver"): anything,
    ("", "voxtral_realtime"): streamed_speech,
    ("", "shieldgemma2"): image_in_text,
    ("", "siglip2"): patches,
    ("", "dia"): dialogue,
    ("", "kyutai_speech_to_text"): codes_last,
    ("", "musicgen_decoder"): codes_stacked,
    ("", "musicgen_melody_decoder"): codes_stacked,
    ("", "speech-encoder-decoder"): sound,
    ("", "audio-spectrogram-transformer"): framed_spectrogram,
    ("speech", "whisper"): spectrogram,
    ("speech", "fun_asr_nano"): sound_in_text,
    ("speech", "granite_speech"): sound_in_text,
    ("speech", "granite_speech_plus"): sound_in_text,
    ("speech", "qwen3_asr"): sound_in_text,
    ("speech", "vibevoice_asr"): sound_in_text,
    ("speech", "voxtral"): sound_in_text,
    ("", "granite_speech5_ctc"): stacked_frames,
}
