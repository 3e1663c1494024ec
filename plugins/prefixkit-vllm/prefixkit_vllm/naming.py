"""How a request names its prefix: by the placeholder ids at the beginning of its prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixkit.errors import ConfigError
from prefixkit_vllm.folder import check_apart, described

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt(
    folder: str | Path, text: str | Sequence[int], tokenizer: PreTrainedTokenizerBase | None = None
) -> list[int]:
    """The ids of a prompt that asks for a prefix: its placeholders, then the text.

    Example::

        client.completions.create(model="base", prompt=prompt("runs/e2e-vllm", "name : Aromi", tokenizer))

    Args:
        folder: What :func:`prefixkit_vllm.write` wrote.
        text: The text, or its ids.
        tokenizer: The base's, for a text.

    Raises:
        CheckpointError: If the folder has no prefix.
        ConfigError: If there is no text, or no tokenizer for one.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise ConfigError("a text needs tokenizer=; without one, pass the ids of the text")
        text = tokenizer(text)["input_ids"]
    if not text:
        raise ConfigError("the text is empty; behind the placeholders vLLM needs a token that it can go on from")
    return [*described(folder).placeholders, *text]


def transfer_config(prefixes: Mapping[str, str | Path]) -> dict[str, Any]:
    """What vLLM is to be told: ``LLM(..., kv_transfer_config=)``, or as JSON ``--kv-transfer-config``.

    Args:
        prefixes: The folder of each prefix, by a name for it.

    Raises:
        CheckpointError: If a folder has no prefix.
        ConfigError: If two prefixes have the same placeholders.
    """
    check_apart({name: described(folder).placeholders for name, folder in prefixes.items()})
    return {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": "prefixkit_vllm.connector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {
            "prefixes": {name: str(Path(folder).resolve()) for name, folder in prefixes.items()}
        },
    }


def chat_template(tokenizer: PreTrainedTokenizerBase, prefixes: Mapping[str, str | Path]) -> str:
    """The tokenizer's chat template, with a prefix in front that ``chat_template_kwargs={"prefix": name}`` chooses.

    Without ``prefix`` it is the tokenizer's own. Another name is an error.

    Raises:
        CheckpointError: If a folder has no prefix.
        ConfigError: If two prefixes have the same placeholders, or the tokenizer does not read them back from their
            text: then write the prefix again, with ``tokenizer=``.
    """
    ids = {name: described(folder).placeholders for name, folder in prefixes.items()}
    check_apart(ids)
    texts = {name: str(tokenizer.decode(list(one), clean_up_tokenization_spaces=False)) for name, one in ids.items()}
    template = _chosen(texts) + tokenizer.get_chat_template()
    without = _read(tokenizer, template)
    for name, placeholders in ids.items():
        if _read(tokenizer, template, prefix=name) != [*placeholders, *without]:
            raise ConfigError(
                f"the tokenizer does not read the placeholders of {name!r} back from their text in front of a chat; "
                "write the prefix again with tokenizer=, or with placeholders= that it does"
            )
    return template


def _chosen(texts: Mapping[str, str]) -> str:
    """The piece of template in front; it ends in an expression, behind which no white space is dropped."""
    return (
        "{%- if prefix is defined and prefix is not none %}"
        f"{{%- set prefixes = {json.dumps(dict(texts))} %}}"
        "{%- if prefix not in prefixes %}"
        "{{- raise_exception('there is no prefix ' ~ prefix ~ '; there are: ' ~ (prefixes | join(', '))) }}"
        "{%- endif %}"
        "{{- prefixes[prefix] }}"
        "{%- endif %}"
        "{{- '' }}"
    )


def _read(tokenizer: PreTrainedTokenizerBase, template: str, **options: str) -> list[int]:
    """The ids of a short chat, as the server makes them."""
    chat = [{"role": "user", "content": "Hello"}]
    settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, **options}
    text: Any = tokenizer.apply_chat_template(chat, chat_template=template, **settings)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
