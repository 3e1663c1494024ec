"""What of a prefix PEFT can express, and the files that ``PeftModel.from_pretrained`` loads.

``adapter_config.json`` and ``adapter_model.safetensors`` as in :mod:`prefixkit.formats.peft`, which says what they
rest on. PEFT folds an MLP when it saves, and so does this. It picks the class that hands the prefix over by
``task_type``, and gives sentence classifiers and taggers a head called ``classifier`` or ``score``, question answering
``qa_outputs``: of what it looks for, all must be in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from prefixkit import checkpoint_files, placement, transformers_internals as internals
from prefixkit.attachment import MODULE
from prefixkit.errors import CheckpointError
from prefixkit.formats.peft import BASE, CARTRIDGE, CONFIG_FILE, PREFIX_TUNING, PROMPT, TENSOR_FILES, deal, slots
from prefixkit.head import head_parameters
from prefixkit.method import MEMORY

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.attachment import Attachment

CLASSIFIER, ANSWERS = ("classifier", "score"), ("qa_outputs",)
TASKS = {
    "ForSequenceClassification": ("SEQ_CLS", CLASSIFIER),
    "ForTokenClassification": ("TOKEN_CLS", CLASSIFIER),
    "ForQuestionAnswering": ("QUESTION_ANS", ANSWERS),
}
"""By the end of the model's class: PEFT's ``task_type``, and the modules that it saves with it."""
OWN_FORMAT = "save it without format='peft'"


class Task(NamedTuple):
    """How PEFT runs a model: its ``task_type``, and the modules that it saves with the prefix."""

    task_type: str
    modules: tuple[str, ...]


def write(model: PreTrainedModel, attachment: Attachment, directory: Path) -> None:
    """Write the prefix, folded, and the head as PEFT does.

    Under FSDP2 every process has to call, and the first one writes.

    Raises:
        CheckpointError: If PEFT cannot express it, with the reason, or the folder holds something else.
    """
    task = _task(model)
    _refuse(_reasons(model, attachment, task))
    _check_folder(directory)
    tensors = {PROMPT: _flat(model, attachment), **_head(model, attachment, task)}
    if attachment.writes(model):
        checkpoint_files.write_files(directory, TENSOR_FILES[0], tensors, CONFIG_FILE, _config(model, attachment, task))


def _refuse(reasons: Iterator[str]) -> None:
    reason = next(reasons, None)
    if reason is not None:
        raise CheckpointError(f"PEFT cannot express this prefix: {reason}")


def _reasons(model: PreTrainedModel, attachment: Attachment, task: Task) -> Iterator[str]:
    """Why PEFT cannot express the prefix, and what to do."""
    yield from _reasons_of_kind(attachment)
    yield from _reasons_of_place(model, attachment)
    yield from _reasons_of_shape(attachment)
    yield from _reasons_of_head(model, attachment, task)
    if model.config.is_encoder_decoder and not _is_shared(model, attachment):
        yield (
            "of an encoder-decoder with an even number of layers, it gives layers i and i + num_layers / 2 one prefix, "
            f"and those of this one differ; {OWN_FORMAT}"
        )


def _reasons_of_kind(attachment: Attachment) -> Iterator[str]:
    config = attachment.config
    if attachment.gives == MEMORY:
        yield f"method {config.method!r} gives a memory, and PEFT has keys and values only; {OWN_FORMAT}"
    for name, value in (("gate", config.gate), ("infix", config.infix), ("layer_tokens", config.layer_tokens)):
        if value:
            shown = dict(value) if isinstance(value, tuple) else value
            yield f"it has {name}={shown}, and PEFT has no such thing; {OWN_FORMAT}"
    if config.positions != "shift":
        yield (
            f"it has positions={config.positions!r}, and PEFT's first real token stands behind the prefix; train with "
            f"positions='shift', or {OWN_FORMAT}"
        )
    windows = sorted({site.window for site in attachment.layout.sites if site.window is not None})
    if config.window == "pinned" and windows:
        yield (
            f"it has window='pinned', and PEFT's slides out of this model's sliding windows ({windows[0]} positions); "
            f"train with window='slide', or {OWN_FORMAT}"
        )


def _reasons_of_place(model: PreTrainedModel, attachment: Attachment) -> Iterator[str]:
    stacks = sorted({site.stack for site in attachment.layout.sites})
    allowed = ["decoder"] if model.config.is_encoder_decoder else stacks[:1]
    if stacks != allowed:
        yield (
            f"it stands in {', '.join(stacks)}, and PEFT's in {allowed[0]} self-attention only; apply it with "
            f"stacks=('{allowed[0]}',), or {OWN_FORMAT}"
        )
    for stack in attachment.stacks:
        module = model.get_submodule(stack.path)
        if stack.sites and not (stack.caches and internals.takes_cache(module)):
            yield (
                f"PEFT hands it over in past_key_values, which {type(module).__name__} does not take or keeps in "
                f"another form; {OWN_FORMAT}"
            )
    layers, every = (
        [site.layer for site in attachment.layout.sites if site.stack == allowed[0]],
        _depth(model, allowed[0]),
    )
    if attachment.config.layers is not None or layers != list(range(every)):
        yield f"it stands in layers {layers} of {every}, and PEFT's in all; apply it without layers=, or {OWN_FORMAT}"


def _depth(model: PreTrainedModel, stack: str) -> int:
    """How many layers the stack has that PEFT gives a prefix."""
    config: Any = model.config.get_text_config()
    names = ("decoder_layers", "num_decoder_layers") if stack == "decoder" else ()
    return int(next((getattr(config, name) for name in names if hasattr(config, name)), config.num_hidden_layers))


def _reasons_of_shape(attachment: Attachment) -> Iterator[str]:
    shapes = {(site.kv_heads, site.key_dim, site.value_dim) for site in attachment.layout.sites}
    if len(shapes) > 1 or any(key != value for _, key, value in shapes):
        listed = ", ".join(f"{heads} × {key} and {heads} × {value}" for heads, key, value in sorted(shapes))
        yield f"PEFT has keys and values of one shape in all layers; here they are {listed}; {OWN_FORMAT}"
    if any(site.turn for site in attachment.layout.sites):
        yield f"layers of this model share a module, and PEFT has one prefix for each module; {OWN_FORMAT}"


def _reasons_of_head(model: PreTrainedModel, attachment: Attachment, task: Task) -> Iterator[str]:
    own, saved = set(head_parameters(model, attachment.config.head)), set(_head(model, attachment, task))
    others = sorted(name for name in own if f"{BASE}{name}" not in saved)
    if others:
        possible = ", ".join(task.modules) or "none"
        yield (
            f"{', '.join(others)} trained with it, and the heads that PEFT looks for in a {type(model).__name__} are: "
            f"{possible}; apply it with head=False, or {OWN_FORMAT}"
        )
    if model.config.is_encoder_decoder and task.modules:
        yield f"of encoder-decoders PEFT serves language models, and this is a {type(model).__name__}; {OWN_FORMAT}"
    by_name = internals.takes_cache(model)
    if task.modules and not by_name and not _head_is_as_peft_runs_it(model, task):
        yield (
            f"PEFT calls the body and the head of a {type(model).__name__} by itself, the head on the pooled output, "
            f"and this head is none of that kind; {OWN_FORMAT}"
        )
    if not task.modules and not by_name and not internals.takes_any_keyword(model):
        yield f"PEFT passes past_key_values, which {type(model).__name__} does not hand to its body; {OWN_FORMAT}"
    if any(kind.__name__.endswith("ForMultipleChoice") for kind in type(model).__mro__):
        yield f"PEFT has no task of multiple choice, which makes several rows of one; {OWN_FORMAT}"


def _head_is_as_peft_runs_it(model: PreTrainedModel, task: Task) -> bool:
    """PEFT gives the head what the body's pooler gives, or where it has none, the states; and calls nothing else."""
    children = model.named_children()
    parts = {name: part for name, part in children if name != MODULE and any(True for _ in part.parameters())}
    heads = [part for name, part in parts.items() if name in task.modules]
    bodies = [part for name, part in parts.items() if name not in task.modules]
    if len(heads) != 1 or len(bodies) != 1:
        return False
    linear = isinstance(heads[0], nn.Linear)
    pooled = getattr(bodies[0], "pooler", None) is not None
    return linear == pooled if task.task_type == "SEQ_CLS" else linear


def _task(model: PreTrainedModel) -> Task:
    names = [kind.__name__ for kind in type(model).__mro__]
    for end, (task_type, modules) in TASKS.items():
        if any(name.endswith(end) for name in names):
            return Task(task_type, modules)
    if model.config.is_encoder_decoder:
        return Task("SEQ_2_SEQ_LM", ())
    generates = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    return Task("CAUSAL_LM" if generates else "FEATURE_EXTRACTION", ())


def _head(model: PreTrainedModel, attachment: Attachment, task: Task) -> dict[str, torch.Tensor]:
    """All that PEFT looks for in the file, whether or not it trained; it matches the ends of names."""
    modules = [name for name, _ in model.named_modules() if name.endswith(task.modules)] if task.modules else []
    own = attachment.tensors(model)  # what trained, also while the prefix is disabled
    values = {name: own.get(f"head.{name}", value.detach()) for name, value in head_parameters(model, modules).items()}
    return {f"{BASE}{name}": placement.whole(value) for name, value in values.items()}


def head_of_the_base(model: PreTrainedModel, attachment: Attachment) -> list[str]:
    """Parameters that go into PEFT's file with the prefix, though they did not train and are the base's."""
    own = attachment.head_values(model)
    saved = (name.removeprefix(BASE) for name in _head(model, attachment, _task(model)))
    return [name for name in saved if name not in own]


def _flat(model: PreTrainedModel, attachment: Attachment) -> torch.Tensor:
    """The flat prefix in PEFT's slots, ``(P, num_layers × 2 × token_dim)``."""
    with torch.no_grad():
        flat: torch.Tensor = placement.whole(attachment.flat_of(model)).detach().cpu().float()
    if not model.config.is_encoder_decoder:
        return flat
    layers, sites = _num_layers(model, attachment), attachment.layout.sites
    own = flat.unflatten(1, (2 * len(sites), -1))
    dealt = flat.new_zeros(len(flat), 2 * layers, own.shape[2])  # slots that no layer gets stay zero
    for index, site in enumerate(sites):
        for half, slot in enumerate(slots(site.layer, layers)):
            dealt[:, slot] = own[:, 2 * index + half]
    return dealt.flatten(1)


def _num_layers(model: PreTrainedModel, attachment: Attachment) -> int:
    """PEFT's ``num_layers``: of an encoder-decoder it takes the encoder's."""
    if not model.config.is_encoder_decoder:
        return len(attachment.layout.sites)
    return max(int(model.config.get_text_config().num_hidden_layers), len(attachment.layout.sites))


def _is_shared(model: PreTrainedModel, attachment: Attachment) -> bool:
    """Whether layers that share slots in PEFT have the same prefix: then dealing out gives back what was put in."""
    with torch.no_grad():
        own = placement.whole(attachment.flat_of(model)).cpu().float()
    there = deal(_flat(model, attachment), _num_layers(model, attachment), attachment.layout.sites)
    return torch.equal(there, own)


def _config(model: PreTrainedModel, attachment: Attachment, task: Task) -> Mapping[str, Any]:
    config, site = attachment.config, attachment.layout.sites[0]
    common = {
        "auto_mapping": None,
        "base_model_name_or_path": config.base_model_name_or_path or None,
        "inference_mode": True,
        "modules_to_save": list(task.modules) or None,
        "num_attention_heads": site.kv_heads,
        "num_layers": _num_layers(model, attachment),
        "num_transformer_submodules": 2 if task.task_type == "SEQ_2_SEQ_LM" else 1,
        "num_virtual_tokens": config.num_virtual_tokens,
        "revision": None,
        "task_type": task.task_type,
        "token_dim": site.kv_heads * site.key_dim,
    }
    if config.num_frozen_tokens:
        return {"peft_type": CARTRIDGE, "num_frozen_tokens": config.num_frozen_tokens, **common}
    # Folded: PEFT cannot load an MLP for inference.
    flat = {"prefix_projection": False, "encoder_hidden_size": site.kv_heads * site.key_dim, "init_weights": None}
    return {"peft_type": PREFIX_TUNING, **flat, **common}


def _check_folder(directory: Path) -> None:
    """Never two checkpoints in one folder of which one would be loaded for the other."""
    if (directory / checkpoint_files.TENSOR_FILE).is_file():
        raise CheckpointError(
            f"{str(directory)!r} holds a checkpoint of prefixkit, which load would take for this; name another folder"
        )
    if (directory / CONFIG_FILE).is_file():
        kind = checkpoint_files.read_json(directory / CONFIG_FILE).get("peft_type")
        if kind not in (PREFIX_TUNING, CARTRIDGE):
            raise CheckpointError(f"{str(directory)!r} holds another adapter ({kind}); name another folder")
