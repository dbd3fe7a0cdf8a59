"""Whether a server can serve a run: asked before anything is written to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import torch

from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.server_client import BACKEND_HINT, ServerClient, ServerTrouble
from recap_fast.rollout.server_command import OLDEST_RELEASE, is_too_old
from recap_fast.rollout.server_label import OtherRunError
from recap_fast.rollout.server_worker import BACKEND

_LEAVING = 5.0
"""Seconds in which a run that has just ended has none of its requests left on a server."""


async def check_server(
    client: ServerClient,
    *,
    model_path: str,
    sizes: Mapping[str, str],
    dtype: torch.dtype,
    max_model_len: int,
) -> None:
    """Looks at a server that a run is about to take.

    Args:
        sizes: of the run's model, as `model_sizes` gives them.
        dtype: that the run's servers compute in.
        max_model_len: longest prompt and completion together, in tokens.

    Raises:
        EngineError: it cannot serve this run.
        ServerTrouble: it does not answer as a server does.
    """
    await _check_release(client)
    text = await client.weight_version()  # raises where the control routes are not there
    served = await client.models()
    await _check_model(client, model_path, sizes, dtype, served)
    longest = max(served.values(), default=0)
    if longest < max_model_len:
        raise EngineError(
            f"the server at {client.url} takes {longest} tokens, and a prompt with its "
            f"completion may have {max_model_len}: start it with `recap-fast serve` "
            f"and this run's configuration (a server of another kind with --max-model-len "
            f"{max_model_len}), or lower data.max_prompt_tokens or rollout.max_new_tokens"
        )
    await _check_idle(client, text)


async def _check_release(client: ServerClient) -> None:
    release = await client.version()
    if is_too_old(release):
        raise EngineError(
            f"the server at {client.url} is vllm {release}: wanted {OLDEST_RELEASE} or newer, "
            f"whose tokens say which weights sampled them"
        )


async def _check_model(
    client: ServerClient,
    model_path: str,
    sizes: Mapping[str, str],
    dtype: torch.dtype,
    served: Mapping[str, int],
) -> None:
    try:
        found = await client.describe()
    except ServerTrouble as error:
        raise EngineError(
            f"the server at {client.url} does not say what it serves, as one with recap-fast's "
            f"worker extension would: {BACKEND_HINT} ({error})"
        ) from None
    different = [
        f"{name} {found[name]} (here {value})"
        for name, value in sizes.items()
        if name in found and found[name] != value
    ]
    if different or not sizes.keys() & found.keys():
        named = next(iter(served), "a model without a name")
        raise EngineError(
            f"the server at {client.url} serves another model than the run's: {named} has "
            f"{', '.join(different) or 'no sizes'}, and the run trains {model_path}: "
            f"{BACKEND_HINT} of this run"
        )
    wanted = str(dtype).removeprefix("torch.")
    if found.get("dtype", wanted) != wanted:
        raise EngineError(
            f"the server at {client.url} computes in {found['dtype']}, and the run has its "
            f"rollouts in {wanted} (rollout.dtype): {BACKEND_HINT} of this run"
        )
    if found.get("backend") != BACKEND:
        raise EngineError(
            f"the server at {client.url} takes weights by {found.get('backend') or 'no transfer'}, "
            f"wanted {BACKEND}: {BACKEND_HINT}"
        )


async def _check_idle(client: ServerClient, text: str) -> None:
    """Nobody of this run samples yet, and whatever a run that has ended has left is taken over."""
    until = time.monotonic() + _LEAVING
    while (count := await client.load()) > 0:
        if time.monotonic() > until:
            raise OtherRunError(
                f"the server at {client.url} is sampling for another run: {count} requests, from "
                f"weights {text!r}; a server serves one run at a time: let the other one end, or "
                f"start another server"
            )
        await asyncio.sleep(0.5)
