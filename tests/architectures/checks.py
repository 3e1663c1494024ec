"""The kit's core checks on a model of any kind: what holds of every model that a prefix serves.

Every check compares the model with a prefix with something that does not have it from prefixkit: with
the bare model, with the same model run another way, or with the same text as a prompt.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

import prefixkit
from architectures.tiny_models import TinyModel
from prefixkit.errors import EngineError
from prefixkit.testing.recording import is_on_interface, recorded_calls, replaced_attention
from prefixkit.testing.subject import strengthen

TOKENS = 4
NEW = 5
ENGINES = ("attention", "cache")
CONVOLVED = ("convbert",)
"""Types off the attention interface with convolutions beside the attention."""
CLOSE = {"atol": 2e-3, "rtol": 2e-3}


class Failed(AssertionError):
    """A check does not hold; the message says what differs."""


def outputs_of(result: Any) -> list[torch.Tensor]:
    """Every floating tensor that a forward returned, caches left out."""
    values = result.values() if hasattr(result, "values") else result
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


def run(model: PreTrainedModel, inputs: dict[str, Any], **more: Any) -> list[torch.Tensor]:
    """The model's outputs without gradients."""
    with torch.no_grad():
        return outputs_of(model(**inputs, **more))


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two outputs are equal to the last bit."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def with_prefix(tiny: TinyModel, **options: Any) -> PreTrainedModel:
    """A copy of the model with a strong prefix."""
    model = prefixkit.apply(copy.deepcopy(tiny.model), num_virtual_tokens=TOKENS, **{"head": False, **options})
    strengthen(model)
    return model


def slots_get_gradients(tiny: TinyModel) -> str:
    """Every key and value of every virtual token in every site gets a gradient."""
    model = with_prefix(tiny)
    sum(output.float().square().mean() for output in outputs_of(model(**tiny.inputs()))).backward()  # type: ignore[union-attr]
    gradient = model.get_parameter("prefixkit.default.embedding.weight").grad
    if gradient is None:
        raise Failed("the prefix gets no gradient")
    sites = prefixkit.sites(model)
    for site, pair in zip(sites, prefixkit.Layout(sites).split(gradient), strict=True):
        for name, part in (("key", pair.key), ("value", pair.value)):
            if not bool((part.abs().amax(dim=(0, 2)) > 0).all()):
                raise Failed(f"a {name} of {site.path} gets no gradient")
    return f"{len(sites)} sites"


def disabled_is_the_base(tiny: TinyModel) -> str:
    """Disabled and removed, the outputs are the base's to the last bit; enabled, they are not."""
    inputs = tiny.inputs()
    # torch may take another kernel where weights need a gradient, with other last bits.
    before = run(copy.deepcopy(tiny.model).requires_grad_(False), inputs)
    model = with_prefix(tiny)
    if same(run(model, inputs), before):
        raise Failed("the prefix changes nothing")
    with prefixkit.disabled(model):
        if not same(run(model, inputs), before):
            raise Failed("disabled, the outputs are not the base's")
    prefixkit.remove(model).requires_grad_(False)
    if not same(run(model, inputs), before) or list(model.state_dict()) != list(tiny.model.state_dict()):
        raise Failed("removed, the model is not the base")
    return "bit-equal"


def rows_are_apart(tiny: TinyModel) -> str:
    """A row of a batch equals the row alone."""
    model, inputs = with_prefix(tiny), tiny.inputs(batch=2)
    batch = next(value.shape[0] for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim)
    both = zip(
        run(model, inputs), run(model, {name: _row(value, batch) for name, value in inputs.items()}), strict=True
    )
    pairs = [(one[: len(row)], row) for one, row in both if one.shape[1:] == row.shape[1:]]
    for together, alone in pairs:
        _compare("a row of a batch and the row alone", together, alone)
    if not pairs:
        raise Failed("no output has a row for each input")
    return "equal"


def _row(value: Any, batch: int) -> Any:
    return value[:1] if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch else value


def generation_is_recomputation(tiny: TinyModel) -> str:
    """The logits of every generated token are those of one forward over the whole text, without a cache."""
    try:
        _compare("generation and recomputation", *_generated(with_prefix(tiny), tiny.inputs()))
    except Failed:
        if not _generates_from_other_positions(tiny):
            raise
        cached, uncached = (_generate(with_prefix(tiny), tiny.inputs(), use_cache=cache) for cache in (True, False))
        _compare("generation with and without a cache", _logits(cached), _logits(uncached))
        return "equal to generation without a cache (transformers counts positions otherwise in a forward)"
    return "equal"


def _generates_from_other_positions(tiny: TinyModel) -> bool:
    """Whether the bare model's generation is not that of its forward either, but is with and without a cache."""
    made = _generated(tiny.model, tiny.inputs())
    cached, uncached = (_generate(tiny.model, tiny.inputs(), use_cache=cache) for cache in (True, False))
    return not torch.allclose(*made, **CLOSE) and torch.allclose(_logits(cached), _logits(uncached), **CLOSE)


def bare_generation_is_recomputation(tiny: TinyModel) -> None:
    """The same of the bare model."""
    _compare("generation and recomputation of the bare model", *_generated(tiny.model, tiny.inputs()))


def _logits(made: Any) -> torch.Tensor:
    return torch.stack(made.logits, dim=1).float()


def _generate(model: PreTrainedModel, inputs: dict[str, Any], *, use_cache: bool) -> Any:
    both = "decoder_input_ids" in inputs
    main = "decoder_input_ids" if both else "input_ids"
    start = inputs[main][:, :1] if both else inputs[main]
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": use_cache}
    if model.generation_config.decoder_start_token_id is None:
        settings["decoder_start_token_id"] = 0
    with torch.no_grad():
        return model.generate(  # type: ignore[operator]
            **{**inputs, main: start}, **settings, return_dict_in_generate=True, output_logits=True, pad_token_id=0
        )


def _generated(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    both = "decoder_input_ids" in inputs
    main = "decoder_input_ids" if both else "input_ids"
    made = _generate(model, inputs, use_cache=True)
    whole = {**inputs, main: made.sequences[:, :-1]}
    if "attention_mask" in inputs and not both:
        whole["attention_mask"] = torch.ones_like(made.sequences[:, :-1])
    with torch.no_grad():
        again = model(**whole, use_cache=False).logits
    return _logits(made), again[:, -NEW:].float()


def engines_agree(tiny: TinyModel) -> str:
    """The cache engine and the attention engine give the same outputs, where both can serve the model."""
    here = {site.stack for site in prefixkit.sites(tiny.model)}
    shared = {"window": "slide", "stacks": [stack for stack in ("decoder", "cross") if stack in here]}
    if not shared["stacks"]:
        return "not applicable: an encoder takes no cache"
    try:
        found = [run(with_prefix(tiny, engine=engine, **shared), tiny.inputs())[0] for engine in ENGINES]
    except EngineError as error:
        return f"one engine only: {error}"
    _compare("attention engine and cache engine", *found)
    return "equal"


def prompt_is_a_prefix(tiny: TinyModel) -> str:
    """A prefix of a prompt's own keys and values gives the outputs of the prompt and the text read together."""
    inputs = tiny.inputs(batch=1, tokens=TOKENS + 5)
    if "input_ids" not in inputs:
        return "not applicable: it reads no text"
    # Off the interface no attention can be made to give zeros, so what mixes elsewhere is told by name.
    mixes = _mixes_elsewhere(tiny, inputs) if is_on_interface(tiny.model) else tiny.model_type in CONVOLVED
    if mixes:
        return "not applicable: tokens meet outside of attention too"
    model = copy.deepcopy(tiny.model)
    with recorded_calls(model) as calls:
        expected = run(model, inputs)[0][:, TOKENS:]
    by_path: dict[str, list[Any]] = {}
    for call in calls:
        by_path.setdefault(call.path, []).append(call)
    sites = prefixkit.sites(prefixkit.apply(copy.deepcopy(tiny.model), num_virtual_tokens=TOKENS, engine="attention"))
    if any(_is_biased(call.mask) for call in calls):
        return "not applicable: scores have a bias that comes from elsewhere than keys"
    if len(calls) != len(sites):
        return "not applicable: a stack runs several times"
    turns = [by_path[site.path][site.turn] for site in sites]
    pairs = [prefixkit.KeyValue(call.key[0][:, :TOKENS], call.value[0][:, :TOKENS]) for call in turns]
    flat = prefixkit.Layout(sites).join(pairs)
    prefixkit.apply(model, num_virtual_tokens=TOKENS, init=flat, head=False, window="slide", engine="attention")
    if prefixkit.config(model).positions == "none":
        return "not applicable: positions='none'"
    text = {name: value[:, TOKENS:] for name, value in inputs.items()}
    _compare("prompt and text, and the prompt as a prefix", run(model, text)[0], expected)
    return "equal"


def _is_biased(mask: torch.Tensor | None) -> bool:
    """Whether a mask does more than to show and to hide."""
    return mask is not None and bool(((mask != 0) & (mask > -1e4)).any())


def _mixes_elsewhere(tiny: TinyModel, inputs: dict[str, Any]) -> bool:
    """Whether a text's queries, keys, values or outputs depend on the prompt though all attention gives zeros."""
    other = dict(inputs)
    other["input_ids"] = inputs["input_ids"].clone()
    other["input_ids"][:, :TOKENS] = inputs["input_ids"][:, :TOKENS].flip(1).roll(1, 1)
    model = copy.deepcopy(tiny.model)
    seen = []
    for given in (inputs, other):
        with replaced_attention(model, zeros_of), recorded_calls(model) as calls:
            outputs = run(model, given)[0]
        parts = [part for call in calls for part in (call.query, call.key, call.value)]
        seen.append([outputs[:, TOKENS:], *(part[:, :, TOKENS:] for part in parts)])
    return not all(torch.equal(one, two) for one, two in zip(*seen, strict=True))


def zeros_of(function: Any) -> Any:
    """An attention function that gives zeros of the shape that ``function`` gives."""

    def attention(*args: Any, **kwargs: Any) -> Any:
        output, weights = function(*args, **kwargs)
        return torch.zeros_like(output), weights

    return attention


def _compare(what: str, one: torch.Tensor, other: torch.Tensor) -> None:
    if one.shape != other.shape or not torch.allclose(one, other, **CLOSE, equal_nan=False):
        gap = f"{(one - other).abs().max():.1e}" if one.shape == other.shape else f"{one.shape} and {other.shape}"
        raise Failed(f"{what} differ: {gap}")
