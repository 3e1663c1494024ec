"""The Hugging Face Hub: the few files of a prefix, down and up, through ``huggingface_hub``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from prefixkit import __version__
from prefixkit.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFIX_FILES = ("prefix.safetensors", "prefix_config.json")
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter.safetensors",
    "pytorch_adapter.bin",
    "model_head.safetensors",
    "pytorch_model_head.bin",
)
"""What PEFT and AdapterHub upload. Whole models, which some older code saved, are gigabytes: never downloaded."""
CARD_FILE = "README.md"

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"
_REPO_ID = re.compile(rf"{_PART}/{_PART}")

Token = str | bool | None


def is_repo_id(place: object) -> bool:
    """Whether it has the form of a repository with its owner: ``user/my-prefix``.

    A name alone is taken for a folder: that is what it is more often.
    """
    return isinstance(place, str) and _REPO_ID.fullmatch(place) is not None


def local_copy(place: str | os.PathLike[str], *, revision: str | None = None, token: Token = None) -> Path:
    """The path itself if it is there, or no repository's name; else the folder that the repository is copied to.

    Raises:
        CheckpointError: If the repository cannot be had, or holds no prefix, or the path is one file of a checkpoint.
    """
    if os.path.exists(place) or not is_repo_id(place):  # noqa: PTH110 - a path that was given stays as it is
        return _whole(Path(place))
    from huggingface_hub import snapshot_download

    repo_id = str(place)
    with _clear_errors(repo_id, revision, f"there is no folder {repo_id!r} here, and "):
        copy = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            allow_patterns=[*PREFIX_FILES, *ADAPTER_FILES],
            library_name="prefixkit",
            library_version=__version__,
        )
    if not any((Path(copy) / name).is_file() for name in (*PREFIX_FILES, *ADAPTER_FILES)):
        raise CheckpointError(
            f"the repository {repo_id!r} holds no {PREFIX_FILES[0]}, nor a prefix of PEFT or AdapterHub; upload one "
            "with prefixkit.push_to_hub, or check the name and revision="
        )
    return Path(copy)


def _whole(path: Path) -> Path:
    """Refuse a part: beside it may stand another checkpoint, which would be loaded for the one that was named."""
    if path.name in (*PREFIX_FILES, *ADAPTER_FILES) and path.is_file():
        raise CheckpointError(
            f"{str(path)!r} is one file of a checkpoint; pass the folder that it stands in, {str(path.parent)!r}"
        )
    return path


def client(token: Token = None) -> HfApi:
    """A client that says who asks."""
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="prefixkit", library_version=__version__)


def make_repository(api: HfApi, repo_id: str, *, private: bool | None, revision: str | None) -> str:
    """The whole name of the repository, which is there afterwards, with the branch ``revision``.

    Raises:
        CheckpointError: If it cannot be made, or not be reached.
    """
    with _clear_errors(repo_id, revision):
        whole = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(whole, branch=revision, exist_ok=True)
        return whole


def card_of(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """The text of the repository's model card, if it has one.

    Raises:
        CheckpointError: If the repository cannot be reached.
    """
    from huggingface_hub.errors import EntryNotFoundError

    with _clear_errors(repo_id, revision):
        try:
            path = api.hf_hub_download(repo_id, CARD_FILE, revision=revision)
        except EntryNotFoundError:
            return None
        return Path(path).read_text(encoding="utf-8", errors="replace")


def commit(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, bytes],
    *,
    message: str,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Put the files into the repository, in one commit, and return its address.

    Raises:
        CheckpointError: If the hub refuses them, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    with _clear_errors(repo_id, revision):
        done = api.create_commit(
            repo_id, operations=operations, commit_message=message, revision=revision, create_pr=create_pr
        )
    return str(done.pr_url or done.commit_url)


@contextmanager
def _clear_errors(repo_id: str, revision: str | None, before: str = "") -> Iterator[None]:
    """Turn the client's errors into ours, which say what to do."""
    from huggingface_hub import constants, errors

    offline = f"{before}the hub is not asked: offline mode is on (HF_HUB_OFFLINE)"
    try:
        yield
    except CheckpointError:
        raise
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"the repository {repo_id!r} has no revision {revision!r}; see its branches") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{before}{constants.ENDPOINT} shows no repository {repo_id!r}; check the name. If it is private or gated, "
            "pass token=, or log in with `hf auth login`"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise CheckpointError(f"{offline}; unset that, or name a folder") from error
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(
                f"{offline}, and {repo_id!r} is not among what was downloaded before; unset that and load it once, or "
                "name a folder"
            ) from error
        raise CheckpointError(_unreachable(before, repo_id, error)) from error
    except Exception as error:
        # The client lets through the errors of whichever HTTP library it is built on.
        raise CheckpointError(_unreachable(before, repo_id, error)) from error


def _unreachable(before: str, repo_id: str, error: Exception) -> str:
    from huggingface_hub import constants

    reason = " ".join(str(error).split())[:300]
    return (
        f"{before}{constants.ENDPOINT} did not do what was asked for {repo_id!r}: {type(error).__name__}: {reason}. "
        "Check the connection, the name, and the rights of your token (token=, or `hf auth login`)"
    )
