"""Every model type of transformers, tiny and random, built from its config class.

Example:
    python tests/architectures/tiny_models.py --kind causal --type llama
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

if not __package__:  # run as a script: the package is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from architectures.config_classes import knows, says
from architectures.inputs import forward_inputs
from architectures.overrides import REASONS
from architectures.sizes import tiny_config
from architectures.weights import randomise, settle, silence

KINDS = ("causal", "seq2seq", "encoder", "vision", "speech")

AUTO_CLASSES = {
    "causal": ("AutoModelForCausalLM",),
    "seq2seq": ("AutoModelForSeq2SeqLM",),
    "encoder": ("AutoModelForMaskedLM",),
    "vision": ("AutoModelForImageClassification",),
    "speech": ("AutoModelForSpeechSeq2Seq", "AutoModelForCTC", "AutoModelForAudioClassification"),
}
MAPPINGS = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForSpeechSeq2Seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "AutoModelForCTC": modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
    "AutoModelForAudioClassification": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
}
TWO_TOWERS = ("clip", "siglip")
BY_DECODER_CONFIG = ("musicgen", "musicgen_melody")  # their causal classes cannot take the config they are listed for


class CannotBuild(Exception):
    """This model type cannot be built here; the message says why."""


@dataclass
class TinyModel:
    """A model in eval mode, and what its ``forward`` can be called with."""

    kind: str
    model_type: str
    model: PreTrainedModel

    def inputs(self, batch: int = 2, tokens: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
        """Forward arguments without labels; every attention mask is all ones.

        Models of text that can also see or hear get text alone, but where ``kind`` is vision or speech: there
        the placeholders of an image or a sound come in front of the ``tokens``.
        """
        return forward_inputs(self.kind, self.model, batch=batch, tokens=tokens, seed=seed)


def model_types(kind: str) -> list[str]:
    """The model types of a kind, as transformers' auto classes list them."""
    types = {name for auto in AUTO_CLASSES[kind] for name in MAPPINGS[auto]}
    if kind == "encoder":
        types = {name for name in types if not says(CONFIG_MAPPING[name], "is_encoder_decoder")}
    return sorted(types)


def build(kind: str, model_type: str, **changes: Any) -> TinyModel:
    """The tiny model of a type, the same on every call; raises `CannotBuild` with the reason.

    Args:
        kind: One of `KINDS`; some types are listed in several.
        model_type: As in ``config.model_type``.
        changes: Config fields that are to be different; a dict for a sub-config's.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            model = _model(kind, model_type, changes)
        except Exception as error:
            raise CannotBuild(REASONS.get(model_type) or f"{type(error).__name__}: {error}") from error
        randomise(model)
        tiny = TinyModel(kind, model_type, model.float().eval())
        settle(model, lambda: tiny.inputs(batch=8))
    silence(model, getattr(model.config.get_text_config(decoder=True), "eos_token_id", None))
    return tiny


def _model(kind: str, model_type: str, changes: dict[str, Any]) -> PreTrainedModel:
    auto = next(name for name in AUTO_CLASSES[kind] if model_type in MAPPINGS[name])
    config = tiny_config(model_type, **{**_causal(kind, model_type), **changes})
    listed = MAPPINGS[auto][model_type]
    if kind == "vision" and model_type in TWO_TOWERS:
        return transformers.AutoModel.from_config(config)
    if model_type in BY_DECODER_CONFIG:
        return getattr(transformers, listed)(config.decoder)
    if isinstance(listed, tuple):  # several classes: the first is the plain one
        config.architectures = [listed[0]]
    return getattr(transformers, auto).from_config(_listed_config(auto, listed, config))


def _listed_config(auto: str, listed: Any, config: Any) -> Any:
    """The part of ``config`` for the listed class: before transformers 5.10 ``from_config`` passes the whole."""
    text = config.get_text_config()
    wanted = getattr(getattr(transformers, str(listed), None), "config_class", None)
    return text if wanted is type(text) and text.model_type in MAPPINGS[auto] else config


def _causal(kind: str, model_type: str) -> dict[str, Any]:
    """What makes a model that can be either a causal one."""
    cls = CONFIG_MAPPING[model_type]
    return {name: True for name in ("is_decoder", "causal") if kind == "causal" and knows(cls, name)}


def _attempt(kind: str, model_type: str) -> str | None:
    """Build and run one type; the reason if that fails."""
    try:
        tiny = build(kind, model_type)
        with torch.no_grad():
            tiny.model(**tiny.inputs())
    except CannotBuild as reason:
        return _line(str(reason))
    except Exception as error:  # noqa: BLE001  (a type that crashes must not end the survey)
        return _line(f"{type(error).__name__}: {error}")
    return None


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


def _survey(kind: str, types: list[str]) -> Iterator[str]:
    started, failures = time.monotonic(), []
    for model_type in types:
        reason = _attempt(kind, model_type)
        if reason is not None:
            failures.append(f"  {model_type}: {reason}")
    yield f"{kind}: {len(types) - len(failures)} of {len(types)} built and ran ({time.monotonic() - started:.0f} s)"
    yield from failures


def main() -> None:
    """Print how many types of each kind can be built and run, and why the others cannot."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kind", choices=KINDS, help="only this kind")
    parser.add_argument("--type", dest="model_type", help="only this model type")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    for kind in [options.kind] if options.kind else KINDS:
        types = [name for name in model_types(kind) if options.model_type in {None, name}]
        for line in _survey(kind, types) if types else ():
            print(line, flush=True)


if __name__ == "__main__":
    main()
