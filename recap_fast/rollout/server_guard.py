"""Guards every route of a vLLM server with its key.

vLLM's own `--api-key` guards what samples, and leaves the routes that pause the server, replace its
weights and call into its processes to whoever reaches the port. Named by `--middleware`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

_Scope = MutableMapping[str, Any]
_Application = Callable[[_Scope, Any, Any], Awaitable[None]]

_OPEN = ("/health",)
"""For whoever looks after the process, and has no key."""


class KeyGuard:
    """ASGI middleware: 401 for a request without `Authorization: Bearer KEY`, on every route but
    /health. The key is the environment's VLLM_API_KEY.

    Raises:
        RuntimeError: there is no key.
    """

    def __init__(self, app: _Application) -> None:
        key = os.environ.get("VLLM_API_KEY")
        if not key:
            raise RuntimeError("wanted a key in the environment as VLLM_API_KEY, got none")
        self._app = app
        self._wanted = _hash(f"Bearer {key}")

    async def __call__(self, scope: _Scope, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):  # "lifespan": no request of anybody's
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        known = len(given) == 1 and secrets.compare_digest(
            _hash(given[0].decode("latin-1")), self._wanted
        )
        if path in _OPEN or known:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = json.dumps({"error": "this server wants its key"}).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
            ]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})


def _hash(text: str) -> bytes:
    """Of one length, so that comparing takes one time."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
