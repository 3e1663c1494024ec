"""Upload a prefix to the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prefixkit import checkpoint_files, hub
from prefixkit.model_card import is_local, is_ours, model_card
from prefixkit.prefixes import require

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from prefixkit.attachment import Attachment

MESSAGE = "Upload a prefix"


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    name: str | None = None,
    commit_message: str | None = MESSAGE,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload the model's prefix, and its head if that trained, with a model card that says how to load it.

    Example::

        prefixkit.push_to_hub(model, "user/my-prefix")
        prefixkit.load(another_model, "user/my-prefix")

    The repository is made if need be, and gets what :func:`save` writes, in one commit. The card names base,
    method and policies; its license is yours to add. A ``README.md`` that is there and was not written by
    prefixkit, or from which you have taken the line that says so, stays.

    Args:
        model: A model with a prefix.
        repo_id: The repository, ``"user/my-prefix"``; without an owner it is yours.
        name: Of several prefixes, which; the active one by default.
        commit_message: Of the commit.
        private: Whether a repository that is made is private; by default, what its owner has set.
        token: For the hub; by default the one you have logged in with.
        revision: The branch, which is made if need be; the main one by default.
        create_pr: Whether to open a pull request, and leave the branch.

    Returns:
        The address of the commit, or of the pull request. Under FSDP2 every process has to call, and all but the
        first return an empty text.

    Raises:
        AttachmentError: If the model has no prefix, or none of that name.
        CheckpointError: If the prefix is offloaded, or the hub refuses or cannot be reached.
    """
    attachment = require(model).named(name)
    tensors = attachment.whole_tensors(model)
    if not attachment.writes(model):
        return ""
    return publish(
        model,
        attachment,
        tensors,
        repo_id,
        commit_message=commit_message,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
    )


def publish(
    model: PreTrainedModel,
    attachment: Attachment,
    tensors: Mapping[str, torch.Tensor],
    repo_id: str,
    *,
    commit_message: str | None = MESSAGE,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload the prefix whose checkpoint holds ``tensors``.

    A base that is a folder of this machine is named without its path, which is nobody else's business.

    Raises:
        CheckpointError: If the hub refuses or cannot be reached.
    """
    base = attachment.config.base_model_name_or_path
    config = replace(attachment.config, base_model_name_or_path=Path(base).name if is_local(base) else base)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint_files.write(Path(folder), config, tensors)
        files = {file: (Path(folder) / file).read_bytes() for file in hub.PREFIX_FILES}
    api = hub.client(token)
    repo_id = hub.make_repository(api, repo_id, private=private, revision=revision)
    card = hub.card_of(api, repo_id, revision)
    if card is None or is_ours(card):
        size = len(files[hub.PREFIX_FILES[0]])
        files[hub.CARD_FILE] = model_card(model, attachment, repo_id, size=size, revision=revision).encode()
    message = commit_message or MESSAGE
    return hub.commit(api, repo_id, files, message=message, revision=revision, create_pr=create_pr)
