"""What a config class says of its fields and its parts, in every version of transformers that is served."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

from transformers import CONFIG_MAPPING

try:
    from transformers import PreTrainedConfig
except ImportError:  # its name before transformers 5.0
    from transformers import PretrainedConfig as PreTrainedConfig

DECODES = {"is_decoder": True, "add_cross_attention": True}
UNSAID: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("encoder-decoder", "encoder"): ("bert", {}),
    ("encoder-decoder", "decoder"): ("bert", DECODES),
    ("speech-encoder-decoder", "encoder"): ("wav2vec2", {}),
    ("speech-encoder-decoder", "decoder"): ("bert", DECODES),
    **{
        (model_type, name): (part, {})
        for model_type in ("musicgen", "musicgen_melody")
        for name, part in (("text_encoder", "t5"), ("audio_encoder", "encodec"))
    },
}
"""Parts that have to be given before transformers 5.20, and have these defaults since."""


@dataclass
class Part:
    """A sub-config that a config class makes by default.

    Attributes:
        cls: Its class.
        initial: What that class is called with.
    """

    cls: type[PreTrainedConfig]
    initial: dict[str, Any] = field(default_factory=dict)


def fields_of(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields of a class with their defaults, `None` where there is none; those of every config are left out."""
    if not dataclasses.is_dataclass(cls):
        return _parameters_of(cls)
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = [field for field in dataclasses.fields(cls) if field.name not in common]
    return {field.name: None if field.default is dataclasses.MISSING else field.default for field in own}


def _parameters_of(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """The same before transformers 5.5, where classes have an ``__init__``: its parameters, and what it hands on."""
    found: dict[str, Any] = {}
    for base in cls.__mro__[: cls.__mro__.index(PreTrainedConfig)]:
        if "__init__" not in vars(base):
            continue
        parameters = list(signature(base.__init__).parameters.values())[1:]
        named = [one for one in parameters if one.kind not in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)]
        found = {**{one.name: None if one.default is Parameter.empty else one.default for one in named}, **found}
        if len(named) == len(parameters):
            break
    return found


def says(cls: type[PreTrainedConfig], name: str) -> Any:
    """The default of a field of ``cls`` or of every config, `None` if there is no such field."""
    return fields_of(cls).get(name, getattr(cls, name, None))


def knows(cls: type[PreTrainedConfig], name: str) -> bool:
    """Whether ``cls`` has such a field."""
    return name in fields_of(cls) or hasattr(cls, name) or name in signature(PreTrainedConfig.__init__).parameters


def part_names(cls: type[PreTrainedConfig], default: PreTrainedConfig | None = None) -> list[str]:
    """The names of the sub-configs of ``cls``; before transformers 5.20 some are seen in its default only."""
    if hasattr(cls, "sub_configs_defaults"):
        return list(cls.sub_configs_defaults)
    listed = cls.sub_configs if isinstance(cls.sub_configs, dict) else {}  # of a backbone it may be a property
    seen = [name for name in fields_of(cls) if isinstance(vars(default or cls).get(name), PreTrainedConfig)]
    return list(dict.fromkeys([*listed, *seen]))


def part_of(cls: type[PreTrainedConfig], name: str, default: PreTrainedConfig | None) -> Part | None:
    """What the sub-config ``name`` is made from.

    Args:
        cls: The class of the whole.
        name: One of `part_names`.
        default: The whole with its defaults, `None` if it cannot be made.
    """
    made = getattr(default, name, None)
    if hasattr(cls, "sub_configs_defaults"):
        spec = cls.sub_configs_defaults[name]
        return Part(type(made or spec.default_config), spec.init_kwargs)
    if isinstance(made, PreTrainedConfig):
        return Part(type(made), _differing(made))
    if (cls.model_type, name) in UNSAID:
        model_type, initial = UNSAID[cls.model_type, name]
        return Part(CONFIG_MAPPING[model_type], initial)
    listed = cls.sub_configs.get(name)
    return Part(listed) if getattr(listed, "model_type", "") else None


def _differing(made: PreTrainedConfig) -> dict[str, Any]:
    """The fields in which a config is not what its class makes by itself."""
    try:
        usual = type(made)().to_dict()
    except Exception:  # noqa: BLE001  (some defaults contradict each other, in whatever way the validator says)
        return {}
    own = fields_of(type(made)).keys() - set(part_names(type(made), made))
    return {name: value for name, value in made.to_dict().items() if name in own and usual.get(name, value) != value}


def make(cls: type[PreTrainedConfig], values: dict[str, Any]) -> PreTrainedConfig:
    """``cls(**values)``; before transformers 5.20 some classes take their parts as dicts only."""
    if hasattr(cls, "sub_configs_defaults"):
        return cls(**values)
    parts = {name: value.to_diff_dict() for name, value in values.items() if isinstance(value, PreTrainedConfig)}
    return cls(**{**values, **parts})
