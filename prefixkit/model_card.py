"""The model card of an uploaded prefix: what it is, and the lines that load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixkit.attention_engine import AttentionEngine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixkit.attachment import Attachment

MARK = "<!-- Written by prefixkit, which writes it anew with every upload. Remove this line to keep your changes. -->"


def is_ours(card: str) -> bool:
    """Whether prefixkit wrote a card, and nobody has made it their own since."""
    return MARK in card


def model_card(
    model: PreTrainedModel, attachment: Attachment, repo_id: str, *, size: int, revision: str | None = None
) -> str:
    """The text of ``README.md``.

    Args:
        model: The model that carries the prefix.
        attachment: The prefix.
        repo_id: Where it will be.
        size: Of its file, in bytes.
        revision: The branch, if not the main one.
    """
    from huggingface_hub import ModelCard

    return str(ModelCard(_content(model, attachment, repo_id, size, revision)))


def _content(model: PreTrainedModel, attachment: Attachment, repo_id: str, size: int, revision: str | None) -> str:
    table = "\n".join(f"| {name} | {value} |" for name, value in _rows(model, attachment, size).items())
    return f"""---
{_metadata(attachment)}
---
{MARK}

# {repo_id.rpartition("/")[2]}

A prefix for [transformers](https://github.com/huggingface/transformers) models, made with prefixkit. It holds no
weights of its base, which stays as it is.

```python
{_code(model, attachment, repo_id, revision)}
```

| | |
|---|---|
{table}
"""


def _metadata(attachment: Attachment) -> str:
    from huggingface_hub import ModelCardData

    config = attachment.config
    fields: dict[str, Any] = {}
    if config.base_model_name_or_path and not is_local(config.base_model_name_or_path):
        fields = {"base_model": config.base_model_name_or_path, "base_model_relation": "adapter"}
    tags = ["prefixkit", config.method, config.model_type]
    return ModelCardData(library_name="prefixkit", tags=list(dict.fromkeys(tags)), **fields).to_yaml()


def is_local(base: str) -> bool:
    """Whether the base is a folder of this machine, whose path says nothing to others."""
    return Path(base).is_absolute() or base.startswith((".", "~")) or base.count("/") > 1 or Path(base).exists()


def _code(model: PreTrainedModel, attachment: Attachment, repo_id: str, revision: str | None) -> str:
    kind, config = type(model), attachment.config
    package = "transformers" if kind.__module__.startswith("transformers.") else kind.__module__
    base = f"path/to/{Path(config.base_model_name_or_path).name}"
    if config.base_model_name_or_path and not is_local(config.base_model_name_or_path):
        base = config.base_model_name_or_path
    # A head that trained has as many outputs as the task; without this, the class would make it another size.
    labels = f", num_labels={model.config.num_labels}" if config.head and _counts_labels(model) else ""
    branch = f", revision={revision!r}" if revision else ""
    return (
        f"import prefixkit\nfrom {package} import {kind.__name__}\n\n"
        f'model = {kind.__name__}.from_pretrained("{base}"{labels})\n'
        f'prefixkit.load(model, "{repo_id}"{branch})'
    )


def _counts_labels(model: PreTrainedModel) -> bool:
    return "For" in type(model).__name__ and "Classification" in type(model).__name__


def _rows(model: PreTrainedModel, attachment: Attachment, size: int) -> dict[str, str]:
    config = attachment.config
    tensors = attachment.tensors(model)
    head = sum(value.numel() for name, value in tensors.items() if name.startswith("head."))
    base = config.base_model_name_or_path
    every = sum(value.numel() for value in tensors.values())
    return {
        "base model": f"`{Path(base).name if is_local(base) else base}`" if base else "not known",
        "model type, class": f"`{config.model_type}`, `{type(model).__name__}`",
        "method": config.method + (", folded" if config.folded else ""),
        "virtual tokens (P)": str(config.num_virtual_tokens),
        "prefix in": _stacks(attachment),
        "positions": f"`{config.positions}`",
        "window": f"`{config.window}`",
        "engine": "attention" if isinstance(attachment.engine, AttentionEngine) else "cache",
        "trained head": f"{', '.join(f'`{name}`' for name in config.head)} ({head:,} parameters)" if head else "none",
        "parameters": f"{every:,}",
        "size": f"{size / 1000:,.1f} kB",
    }


def _stacks(attachment: Attachment) -> str:
    kinds = [site.stack for site in attachment.layout.sites]
    return ", ".join(f"{kind} ({kinds.count(kind)} layers)" for kind in dict.fromkeys(kinds))
