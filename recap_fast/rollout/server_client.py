"""Talks to one vLLM server (0.32 and newer) over HTTP. Every wait has a bound and a name.

Completions come from `/inference/v1/generate`, which takes and gives token ids and says of every
token which weights sampled it. The control routes are those of vLLM's development mode.
"""

from __future__ import annotations

import asyncio
import base64
import json
import resource
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch
from torch import Tensor

from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.server_label import check, label
from recap_fast.rollout.server_request import Completion, Request, read_completions

BACKEND_HINT = "start it with `recap-fast serve CONFIG`"
_PROMPT_WAIT = 30.0
"""Seconds for what a server answers at once."""
_CONNECTIONS = 1024
"""Requests that may be under way at a server: its own limit of open files is no lower."""
_OTHER_FILES = 512
"""Open files of a process that are no connections to servers."""
_REFUSED = "connection refused"
_SAMPLED = "vllm:generation_tokens_total"
"""vLLM's count of sampled tokens, a line for each engine and model."""
_Some = TypeVar("_Some")


class ServerTrouble(RuntimeError):
    """A server did not do what it was asked; another, or the same one restarted, may."""


class ServerClient:
    """One server's routes.

    Args:
        url: "http://host:port".
        key: API key; None: none is sent.
        timeout: seconds that an update of weights, or the answer to a request, may take.
        run: whose weights it gives and samples from.
        connections: how many requests for completions may be under way at a time; more of them
            wait here. Whatever else is asked waits for none of them.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None,
        timeout: float,
        run: str = "",
        connections: int = _CONNECTIONS,
    ) -> None:
        self.url = url.rstrip("/")
        self.run = run
        self._timeout = timeout
        self._places = asyncio.Semaphore(connections)
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            # What an answer may take in all is `asyncio.timeout`'s to say.
            timeout=httpx.Timeout(None, connect=_PROMPT_WAIT),
            # A proxy of the environment is for the world outside.
            trust_env=False,
            follow_redirects=False,
        )

    def move(self, url: str) -> None:
        """The server is at another address from now on."""
        self.url = url
        self._http.base_url = httpx.URL(url)

    async def _ask(
        self,
        method: str,
        route: str,
        what: str,
        *,
        body: Any = None,
        params: Mapping[str, str] | None = None,
        timeout: float | None = _PROMPT_WAIT,
        is_text: bool = False,
    ) -> Any:
        """A route's answer, read as JSON, or as text.

        Raises:
            EngineError: the request itself is at fault, and would be everywhere.
            ServerTrouble: anything else.
        """
        where = f"{self.url}{route}"
        try:
            async with asyncio.timeout(timeout):
                answer = await self._http.request(method, route, json=body, params=params)
        except httpx.ConnectTimeout:
            problem = f"took no connection within {_PROMPT_WAIT:g} s"
            raise ServerTrouble(f"{what}: {where} {problem}") from None
        except TimeoutError:
            raise ServerTrouble(f"{what}: {where} gave no answer within {timeout:g} s") from None
        except httpx.HTTPError as error:
            problem = str(error) or type(error).__name__
            raise ServerTrouble(f"{what}: {where} cannot be reached: {problem}") from None
        if answer.is_success:
            if is_text:
                return answer.text
            try:
                return answer.json() if answer.content else None
            except ValueError:
                said = answer.text[:120]
                raise ServerTrouble(f"{what}: {where} answered no JSON: {said!r}") from None
        said = f"{what}: {where} answered {answer.status_code}: {_message(answer)}"
        if answer.status_code in (401, 403):
            raise EngineError(f"{said}; {_access_hint(answer.status_code)}")
        if answer.status_code == 404 and isinstance(body, dict) and "model" in body:
            raise ServerTrouble(said)  # adapters by a name that it has lost
        if answer.status_code == 404:
            raise EngineError(f"{said}; its control routes are missing: {BACKEND_HINT}")
        if answer.status_code in (400, 422):
            raise EngineError(said)
        raise ServerTrouble(said)

    async def health(self, timeout: float) -> int | None:
        """The HTTP status of its answer; None without one. The key is not sent: that route needs
        none, and who listens there may not be known yet."""
        question = self._http.build_request("GET", "/health")
        question.headers.pop("Authorization", None)
        try:
            async with asyncio.timeout(timeout):
                answer = await self._http.send(question)
        except (httpx.HTTPError, TimeoutError):
            return None
        return answer.status_code

    async def is_healthy(self, timeout: float) -> bool:
        return await self.health(timeout) == httpx.codes.OK

    async def is_listening(self) -> bool:
        """Whether anybody takes connections there."""
        return await self.why_absent() is None

    async def is_refusing(self, timeout: float) -> bool:
        """Whether connections are refused there: nobody listens. False where that is not known
        within `timeout` seconds."""
        return await self.why_absent(timeout) == _REFUSED

    async def why_absent(self, timeout: float = _PROMPT_WAIT) -> str | None:
        """Why no connection can be made, or None."""
        address = self._http.base_url
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(address.host, port), timeout)
        except TimeoutError:
            return f"no answer within {timeout:g} s"
        except OSError as error:
            return _REFUSED if isinstance(error, ConnectionRefusedError) else str(error)
        writer.close()
        return None

    async def version(self) -> str:
        """vLLM's release."""
        answer = await self._ask("GET", "/version", "asking for its release")
        return str(_field(answer, "version", "asking for its release", self.url))

    async def models(self) -> dict[str, int]:
        """Name of what it serves, or the folder that it was read from -> longest sequence."""
        what = "asking what it serves"
        entries = _field(await self._ask("GET", "/v1/models", what), "data", what, self.url)
        found = {}
        for entry in entries:
            for key in ("root", "id"):
                if entry.get(key):
                    found[str(entry[key])] = int(entry.get("max_model_len") or 0)
        return found

    async def adapters(self) -> list[str]:
        """Names of the adapters that it has loaded."""
        what = "asking what it serves"
        entries = _field(await self._ask("GET", "/v1/models", what), "data", what, self.url)
        return [str(entry["id"]) for entry in entries if entry.get("parent")]

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Has it read adapters in peft's format, from a folder of its host."""
        body = {"lora_name": name, "lora_path": str(folder)}
        await self._adapter("load", body, f"giving it {name}")

    async def unload_adapter(self, name: str) -> None:
        """Requests under way with it go on."""
        await self._adapter("unload", {"lora_name": name}, f"taking {name} from it")

    async def _adapter(self, verb: str, body: Any, what: str) -> None:
        route = f"/v1/{verb}_lora_adapter"
        await self._ask("POST", route, what, body=body, timeout=self._timeout, is_text=True)

    async def adapter_digests(self, ranks: Mapping[str, int]) -> dict[str, dict[str, str]]:
        """See `WeightProbe.recap_fast_adapters`."""
        return await self._call(
            "recap_fast_adapters", [json.dumps(dict(ranks))], "reading adapters"
        )

    async def generate(
        self, request: Request, version: int, adapter: str | None = None
    ) -> list[Completion]:
        """Completions of a prompt, by index.

        Args:
            adapter: as `Request.body` takes it. All tokens are of `version` then.

        Raises:
            ServerTrouble: what came back is no answer to the request.
        """
        what = f"sampling for prompt {request.prompt.source}:{request.prompt.row}"
        async with self._places:
            answer = await self._ask(
                "POST",
                "/inference/v1/generate",
                what,
                body=request.body(label(self.run, version), adapter),
                timeout=None,
            )
        try:
            if adapter is None:
                return read_completions(answer, request, self.step_of)
            if answer["model"] != adapter:
                raise ValueError(f"sampled from {answer['model']!r}, wanted {adapter!r}")
            return read_completions(answer, request, version)
        except EngineError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ServerTrouble(f"{what}: {self.url} answered nonsense: {problem}") from None

    async def pause(self, *, recompute: bool) -> None:
        """Freezes what is in flight.

        Args:
            recompute: forget all keys and values; requests start over from the tokens they have.
        """
        params = {"mode": "keep", "clear_cache": str(recompute).lower()}
        await self._ask("POST", "/pause", "pausing", params=params, timeout=self._timeout)

    async def resume(self) -> None:
        await self._ask("POST", "/resume", "resuming", timeout=self._timeout)

    async def world_size(self) -> int:
        """Processes that hold a part of its model, or all of it."""
        what = "asking for its size"
        answer = await self._ask("GET", "/get_world_size", what)
        return int(_field(answer, "world_size", what, self.url))

    async def join(self, init_info: Mapping[str, Any]) -> None:
        """Has the server join a group for transfers. Ends when all of the group are there."""
        body = {"init_info": dict(init_info)}
        what = "joining the trainer's group"
        await self._ask(
            "POST", "/init_weight_transfer_engine", what, body=body, timeout=self._timeout
        )

    async def end_update(self) -> None:
        """See `WeightProbe.recap_fast_end_update`."""
        await self._call("recap_fast_end_update", [], "ending what another update has left")

    async def start_update(self, version: int) -> None:
        """Before `receive`. It must be paused, and within no other update."""
        await self._update("start_weight_update", None, version)

    async def receive(self, update_info: Mapping[str, Any], version: int) -> None:
        """Has the server take weights over."""
        await self._update("update_weights", {"update_info": dict(update_info)}, version)

    async def finish_update(self, version: int) -> None:
        await self._update(
            "finish_weight_update", {"weight_version": label(self.run, version)}, version
        )

    async def _update(self, route: str, body: Any, version: int) -> None:
        what = f"giving it the weights of step {version}"
        await self._ask("POST", f"/{route}", what, body=body, timeout=self._timeout)

    async def drop_image_caches(self) -> None:
        for route in ("/reset_mm_cache", "/reset_encoder_cache"):
            await self._ask("POST", route, "dropping cached images", timeout=self._timeout)

    def step_of(self, text: str) -> int:
        """The step that a label of weights names.

        Raises:
            OtherRunError: it is another run's.
            ValueError: nobody has given the server weights.
        """
        check(text, self.run, self.url)
        return int(text.rpartition(":")[2])

    async def load(self) -> int:
        """How many requests it is sampling for, of whomever."""
        what = "asking how busy it is"
        return int(_field(await self._ask("GET", "/load", what), "server_load", what, self.url))

    async def sampled_tokens(self) -> float | None:
        """How many it has sampled since its start, for whomever; None where it does not say."""
        try:
            text = await self._ask("GET", "/metrics", "asking for its progress", is_text=True)
        except (ServerTrouble, EngineError):
            return None
        lines = [line for line in text.splitlines() if line.startswith(_SAMPLED)]
        try:
            return sum(float(line.split()[-1]) for line in lines) if lines else None
        except ValueError:
            return None

    async def weight_version(self) -> str:
        """The label of its weights."""
        what = "asking for the version of its weights"
        answer = await self._ask("GET", "/weight_info", what)
        return str(_field(answer, "weight_version", what, self.url))

    async def own_version(self) -> str:
        """The same. Raises `OtherRunError` where another run has given them."""
        text = await self.weight_version()
        check(text, self.run, self.url)
        return text

    async def describe(self) -> dict[str, str]:
        """See `WeightProbe.recap_fast_model`."""
        return await self._call("recap_fast_model", [], "asking what model it has")

    async def digests(self, shapes: Mapping[str, Sequence[int]], count: int) -> dict[str, str]:
        """See `WeightProbe.recap_fast_digests`."""
        found = await self._probe("recap_fast_digests", shapes, count)
        return {str(name): str(value) for name, value in found.items()}

    async def columns(self, shapes: Mapping[str, Sequence[int]], count: int) -> dict[str, Tensor]:
        """See `VllmEngine.read_columns`."""
        found = await self._probe("recap_fast_columns", shapes, count)
        columns = {}
        for name, (rows, width, text) in found.items():
            values = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
            values = values.view(int(rows), int(width))
            columns[name] = values if len(shapes[name]) == 2 else values[:, 0]
        return columns

    async def _probe(
        self, method: str, shapes: Mapping[str, Sequence[int]], count: int
    ) -> dict[str, Any]:
        given = json.dumps({name: list(shape) for name, shape in shapes.items()})
        return await self._call(method, [given, str(count)], "reading its weights back")

    async def _call(self, method: str, args: Sequence[str], what: str) -> dict[str, Any]:
        """What a method of its worker's returns."""
        body = {"method": method, "args": list(args)}
        answer = await self._ask("POST", "/collective_rpc", what, body=body, timeout=self._timeout)
        results = _field(answer, "results", what, self.url)
        if not results or not isinstance(results[0], dict):
            raise ServerTrouble(f"{what}: {self.url} answered {str(results)[:120]!r}")
        return dict(results[0])

    async def close(self) -> None:
        await self._http.aclose()


def connections_each(servers: int) -> int:
    """How many requests may be under way at each of so many servers at a time. Each is an open
    file, so this process's limit of those, often 1,024, is raised as far as it has to and may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OTHER_FILES + servers * _CONNECTIONS
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(16, min(_CONNECTIONS, (max(soft, allowed) - _OTHER_FILES) // servers))


async def each(
    some: Sequence[_Some], work: Callable[[_Some], Awaitable[None]]
) -> dict[_Some, Exception]:
    """Does something with all servers of a kind at the same time. Returns those that failed."""
    results = await asyncio.gather(*map(work, some), return_exceptions=True)
    failed: dict[_Some, Exception] = {}
    for one, result in zip(some, results, strict=True):
        if isinstance(result, ServerTrouble | EngineError):
            failed[one] = result
        elif isinstance(result, BaseException):
            raise result
    return failed


def _field(answer: Any, name: str, what: str, url: str) -> Any:
    if not isinstance(answer, dict) or name not in answer:
        raise ServerTrouble(f"{what}: {url} answered {str(answer)[:120]!r}, without {name!r}")
    return answer[name]


def _message(answer: httpx.Response) -> str:
    """An error's text: vLLM gives it in several shapes."""
    try:
        said = answer.json()
    except ValueError:
        return answer.text.strip()[:300]
    if isinstance(said, dict):
        said = said.get("error", said.get("detail", said))
        if isinstance(said, dict):
            said = said.get("message", said)
    return str(said)[:300]


def _access_hint(status: int) -> str:
    if status == 401:
        return "set the key that it was started with in the environment as RECAP_FAST_SERVER_KEY"
    return f"it takes no token ids (--enable-scale-out): {BACKEND_HINT}"
