"""A request's ``model`` names its prefix: ``vllm serve --middleware prefixkit_vllm.by_model_name.ByModelName``.

The server's own ``--served-model-name`` takes the names; here a request that has the name of a prefix gets its
placeholders, as a user of :func:`prefixkit_vllm.prompt` and of the chat template would write it. It has no name of
vLLM's in it but what the server keeps in its state.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prefixkit_vllm.naming import prompt

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class ByModelName:
    """The middleware.

    Args:
        app: What it stands in front of.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Put a prefix into the request, if it names one."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith((COMPLETIONS, CHAT)):
            await self._app(scope, receive, send)
            return
        body = await _body(receive)
        asked = _read(body)
        folder = _folders(scope["app"].state).get(str(asked.get("model")))
        if folder is not None:
            body = json.dumps(
                with_prefix(asked, folder, scope["app"].state, chat=scope["path"].endswith(CHAT))
            ).encode()
            scope = {**scope, "headers": _headers(scope["headers"], len(body))}
        await self._app(scope, _replay(body, receive), send)


def with_prefix(asked: dict[str, Any], folder: str, state: Any, *, chat: bool) -> dict[str, Any]:
    """The request with the prefix that ``model`` names, which the connector then holds it to."""
    name = asked["model"]
    asked = {**asked, "kv_transfer_params": {**(asked.get("kv_transfer_params") or {}), "prefix": name}}
    if chat:
        return {**asked, "chat_template_kwargs": {**(asked.get("chat_template_kwargs") or {}), "prefix": name}}
    return {**asked, "prompt": _prompts(asked.get("prompt"), folder, asked, state)}


def _prompts(given: Any, folder: str, asked: dict[str, Any], state: Any) -> Any:
    """Ids for a text or ids, and a list of them for a list of texts or ids; anything else as it is."""
    if isinstance(given, str):
        tokenizer = state.engine_client.get_tokenizer()
        ids = tokenizer(given, add_special_tokens=asked.get("add_special_tokens", True))["input_ids"]
        return prompt(folder, ids) if ids else given
    if not isinstance(given, list) or not given:
        return given
    if isinstance(given[0], int):
        return prompt(folder, given)
    return [_prompts(one, folder, asked, state) for one in given]


def _folders(state: Any) -> dict[str, str]:
    """The folders of the prefixes that the connector was given, by name."""
    settings = state.vllm_config.kv_transfer_config
    return {} if settings is None else dict(settings.get_from_extra_config("prefixes", {}))


def _read(body: bytes) -> dict[str, Any]:
    """The request, or an empty one if it is none: the server says what is wrong with it."""
    try:
        asked = json.loads(body)
    except ValueError:
        return {}
    return asked if isinstance(asked, dict) else {}


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, then what the server receives otherwise, such as that the client is gone."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _headers(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    return [
        *((name, value) for name, value in headers if name != b"content-length"),
        (b"content-length", b"%d" % length),
    ]
