"""``prefixkit inspect``: where a prefix goes in a model, and what a saved prefix is. No weights are read."""

from __future__ import annotations

import argparse
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from prefixkit import checkpoint_files, hub
from prefixkit.adapter import Adapter, Site
from prefixkit.assembly import build, check_model, stacks_of
from prefixkit.attention_engine import AttentionEngine
from prefixkit.cli.bases import base_config, without_weights
from prefixkit.cli.saved import check_revision, is_own
from prefixkit.cli.table import facts, table
from prefixkit.cli.wrong import CommandError
from prefixkit.discovery import installed, plugins
from prefixkit.errors import CheckpointError, EngineError
from prefixkit.formats import detection
from prefixkit.head import choose_head, head_parameters
from prefixkit.prefix_config import PrefixConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.attachment import Attachment

SITE_HEADS = ("stack", "layers", "kv heads", "key dim", "value dim", "window", "module")
BYTES = 4  # a prefix is float32
MODEL_FILE = "config.json"


def run(options: argparse.Namespace) -> None:
    """Print what stands at the place: a saved prefix, or a model."""
    folder = _prefix(options.place, options.revision)
    if folder is None:
        _show_model(options)
        return
    if options.of_a_model:
        raise CommandError(
            f"{', '.join(options.of_a_model)} is of a model, and {options.place!r} is a saved prefix; leave it out, or "
            "name a model"
        )
    _show_prefix(folder)


def _prefix(place: str, revision: str | None) -> Path | None:
    """The folder of a saved prefix, which may be a copy from the hub; ``None`` if it is a model."""
    check_revision(place, revision)
    if Path(place).exists():
        return _here(hub.local_copy(place))
    try:
        base_config(place, revision=revision)
    except CommandError:
        if not hub.is_repo_id(place):
            raise
        try:
            return hub.local_copy(place, revision=revision)
        except CheckpointError as error:
            raise CommandError(f"{place!r} is neither a model nor a prefix: {error}") from error
    return None


def _here(path: Path) -> Path | None:
    """The folder, if it holds a prefix of prefixkit; ``None`` if it holds a model."""
    if is_own(path):
        return path
    if (path / checkpoint_files.ADAPTER_FILE).is_file() or not (path / MODEL_FILE).is_file():
        if detection.telling_file(path) is None:
            raise checkpoint_files.no_checkpoint(path)
        raise CommandError(
            f"{str(path)!r} holds a prefix of another library; `prefixkit convert {shlex.quote(str(path))} DST "
            "--to prefixkit` makes one of it that can be shown"
        )
    return None


def _show_prefix(folder: Path) -> None:
    config = checkpoint_files.read_config(folder)
    shapes = checkpoint_files.read_shapes(folder)
    head = {name: shape for name, shape in shapes.items() if name.startswith("head.")}
    size = (folder / checkpoint_files.TENSOR_FILE).stat().st_size
    print(
        facts(
            {
                "prefix": config.name,
                "method": _method(config),
                "base": f"{config.base_model_name_or_path or 'not known'} ({config.model_type})",
                **_policies(config),
                "trained head": f"{', '.join(config.head)}: {_count(head.values()):,} numbers" if head else "none",
                "numbers": f"{_count(shapes.values()):,}",
                "file": f"{size / 1000:,.1f} kB",
            }
        )
    )
    print("\n" + _sites(config.sites, dict(config.layer_tokens)))
    print("\n" + table(("tensor", "shape"), [(name, str(shape)) for name, shape in sorted(shapes.items())]))


def _method(config: PrefixConfig) -> str:
    options = ", ".join(f"{name}={value}" for name, value in config.method_options.items())
    return f"{config.method}{' (folded)' if config.folded else ''}{f' ({options})' if options else ''}"


def _policies(config: PrefixConfig) -> dict[str, object]:
    more = {
        name: value
        for name, value in (("gate", config.gate), ("infix", config.infix), ("frozen tokens", config.num_frozen_tokens))
        if value
    }
    return {
        "virtual tokens": config.num_virtual_tokens,
        "positions": config.positions,
        "window": config.window,
        "engine": config.engine,
        **more,
    }


def _count(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _show_model(options: argparse.Namespace) -> None:
    model = without_weights(
        base_config(options.place, num_labels=options.num_labels, revision=options.revision), options.task
    )
    model_type = check_model(model)
    adapter = installed().adapter_for(model_type)
    stacks = stacks_of(model, adapter)
    seen = Adapter(model_types=(), stacks=lambda _: stacks)  # watched once, not once for each engine
    attachment = _attachment(model, seen, options, options.engine)
    head = head_parameters(model, choose_head(model, "auto", attachment.stacks))
    print(facts(_of_model(model, adapter) | _of_prefix(model, attachment, options, sum(map(_numel, head.values())))))
    for engine in ("attention", "cache"):
        print(f"{engine} engine: {_verdict(model, seen, options, engine)}")
    print("\n" + _sites(attachment.layout.sites))


def _numel(value: object) -> int:
    return int(value.numel())  # type: ignore[attr-defined] # a parameter; torch is not imported for its name


def _attachment(model: PreTrainedModel, adapter: Adapter, options: argparse.Namespace, engine: str) -> Attachment:
    method = installed().method(options.method)
    config = PrefixConfig(
        method=method.name,
        method_options=method.resolve({}),
        num_virtual_tokens=options.num_virtual_tokens,
        positions=options.positions,
        window=options.window,
        stacks=tuple(options.stacks) if options.stacks else None,
        engine=engine,
        model_type=check_model(model),
    )
    return build(model, config, adapter, method)


def _verdict(model: PreTrainedModel, adapter: Adapter, options: argparse.Namespace, engine: str) -> str:
    try:
        _attachment(model, adapter, options, engine)
    except EngineError as error:
        return f"no: {error}"
    return "yes"


def _of_model(model: PreTrainedModel, adapter: Adapter) -> dict[str, object]:
    model_type = str(model.config.model_type)
    found = [info.distribution for info in plugins() if model_type in info.model_types and adapter.model_types]
    return {
        "model": f"{type(model).__name__} ({model_type}), {model.num_parameters():,} parameters",
        "adapter": ", ".join(found) or "none needed: watched in a forward pass",
    }


def _of_prefix(
    model: PreTrainedModel, attachment: Attachment, options: argparse.Namespace, head: int
) -> dict[str, object]:
    config, flat = attachment.config, options.num_virtual_tokens * attachment.layout.width
    trains = sum(value.numel() for value in attachment.encoder.parameters())
    asked = "" if config.positions == options.positions else f" (not {options.positions}: they cannot be moved)"
    folded = f"; folded {flat:,}" if flat != trains else ""
    share = 100 * trains / (model.num_parameters() + trains)
    return {
        "method": config.method,
        "virtual tokens": config.num_virtual_tokens,
        "positions": config.positions + asked,
        "window": config.window,
        "engine": "attention" if isinstance(attachment.engine, AttentionEngine) else "cache",
        "prefix": f"{trains:,} parameters, {share:.2f} % of the model{folded}",
        "file": f"about {BYTES * trains / 1000:,.0f} kB",
        "head that trains": f"{head:,} parameters" if head else "none",
    }


def _sites(sites: Sequence[Site], tokens: dict[int, int] | None = None) -> str:
    """One line for each run of equal sites."""
    rows = []
    for _, run in groupby(sites, key=lambda site: (*_shape(site), _pattern(site.path), (tokens or {}).get(site.layer))):
        alike = list(run)
        first, last = alike[0], alike[-1]
        layers = str(first.layer) if first is last else f"{first.layer}-{last.layer}"
        rows.append((first.stack, layers, *map(str, _shape(first)[1:]), _modules(alike)))
    return table(SITE_HEADS, rows)


def _shape(site: Site) -> tuple[str, int, int, int, str]:
    return site.stack, site.kv_heads, site.key_dim, site.value_dim, "-" if site.window is None else str(site.window)


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "*", path)


def _modules(alike: Sequence[Site]) -> str:
    return alike[0].path if len({site.path for site in alike}) == 1 else _pattern(alike[0].path)
