"""What a server may answer, and what is made of it."""

from __future__ import annotations

import asyncio
import copy
import resource
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from PIL import Image

from recap_fast.rollout import server_client
from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.server_client import ServerClient, ServerTrouble, connections_each
from recap_fast.rollout.server_label import OtherRunError
from recap_fast.rollout.server_request import Request, read_completions
from recap_fast.types import ImageInput, Prompt
from tests.rollout.fake_server import FakeServer

PROMPT = Prompt("test", 4, [1, 2, 3], "?", "", {})
REQUEST = Request(PROMPT, PROMPT.token_ids, 2, 4, 1.0, 9, (0, 7), 100)

CHOICE = {
    "index": 0,
    "finish_reason": "stop",
    "token_ids": [5, 6, 7],
    "logprobs": {
        "content": [
            {"token_id": 5, "logprob": -0.5},
            {"token_id": 6, "logprob": -1.5},
            {"token_id": 7, "logprob": 0.0},
        ]
    },
    "weight_versions": [
        {"version": "0badf00d:3", "start": 0, "end": 2},
        {"version": "0badf00d:4", "start": 2, "end": 3},
    ],
}
STEP_OF = ServerClient("http://there", key=None, timeout=1.0, run="0badf00d").step_of
ANSWER = {"choices": [{**CHOICE, "index": 1}, CHOICE]}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    found = FakeServer()
    yield found
    found.die()


def ask(url: str, work: Callable[[ServerClient], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    async def run() -> Any:
        client = ServerClient(url, **{"key": None, "timeout": 2.0, **options})
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())


def test_a_completion_has_a_version_for_every_token() -> None:
    completions = read_completions(ANSWER, REQUEST, STEP_OF)
    assert [one.token_ids for one in completions] == [[5, 6, 7]] * 2
    assert completions[0].logprobs == [-0.5, -1.5, 0.0]
    assert completions[0].versions == [3, 3, 4]


def sample(server: FakeServer, answer: Any) -> Any:
    """What is made of an answer of that server."""
    server._generate = lambda _: (200, answer)  # type: ignore[method-assign]
    return ask(server.url, lambda client: client.generate(REQUEST, 3), run="0badf00d")


def test_a_server_s_answer_is_read(server: FakeServer) -> None:
    assert [one.token_ids for one in sample(server, ANSWER)] == [[5, 6, 7]] * 2


def _without_a_choice(answer: Any) -> None:
    answer["choices"].pop()


def _with_twice_the_same(answer: Any) -> None:
    answer["choices"][0]["index"] = 0


def _aborted(answer: Any) -> None:
    answer["choices"][0]["finish_reason"] = "abort"


def _empty(answer: Any) -> None:
    answer["choices"][0] |= {"token_ids": [], "logprobs": {"content": []}}


def _too_long(answer: Any) -> None:
    answer["choices"][0]["token_ids"] = [5] * 5


def _other_tokens(answer: Any) -> None:
    answer["choices"][0]["logprobs"]["content"][1]["token_id"] = 99


def _not_a_number(answer: Any) -> None:
    answer["choices"][0]["logprobs"]["content"][1]["logprob"] = -9999.0


def _positive(answer: Any) -> None:
    answer["choices"][0]["logprobs"]["content"][1]["logprob"] = 0.5


def _without_versions(answer: Any) -> None:
    answer["choices"][0]["weight_versions"] = None


def _versions_with_a_gap(answer: Any) -> None:
    answer["choices"][0]["weight_versions"][1]["start"] = 1


def _versions_too_short(answer: Any) -> None:
    answer["choices"][0]["weight_versions"].pop()


def _never_given_weights(answer: Any) -> None:
    answer["choices"][0]["weight_versions"][0]["version"] = "default"


def _an_infinite_token(answer: Any) -> None:
    answer["choices"][0]["token_ids"][0] = float("inf")


def _a_token_beyond_the_vocabulary(answer: Any) -> None:
    answer["choices"][0]["token_ids"][2] = 100
    answer["choices"][0]["logprobs"]["content"][2]["token_id"] = 100


def _a_negative_token(answer: Any) -> None:
    answer["choices"][0]["token_ids"][2] = -7
    answer["choices"][0]["logprobs"]["content"][2]["token_id"] = -7


def _a_version_that_is_no_text(answer: Any) -> None:
    answer["choices"][0]["weight_versions"][0]["version"] = None


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "damage",
    [
        _without_a_choice, _with_twice_the_same, _aborted, _empty, _too_long, _other_tokens,
        _not_a_number, _positive, _without_versions, _versions_with_a_gap, _versions_too_short,
        _never_given_weights, _an_infinite_token, _a_token_beyond_the_vocabulary,
        _a_negative_token, _a_version_that_is_no_text,
    ],
    ids=lambda damage: damage.__name__.strip("_"),
)  # fmt: skip
def test_an_answer_that_is_none_is_refused(
    damage: Callable[[Any], None], server: FakeServer
) -> None:
    answer = copy.deepcopy(ANSWER)
    damage(answer)
    with pytest.raises(ServerTrouble, match="test:4: http://.* answered nonsense: "):
        sample(server, answer)


@pytest.mark.parametrize("label", ["deadbeef:3", "3", "somebody"])
def test_tokens_of_another_run_are_refused(label: str) -> None:
    answer = copy.deepcopy(ANSWER)
    answer["choices"][0]["weight_versions"][0]["version"] = label
    with pytest.raises(OtherRunError, match=r"http://there .* another run .* one run at a time"):
        read_completions(answer, REQUEST, STEP_OF)


def test_a_request_is_what_in_process_sampling_asks_for() -> None:
    body = REQUEST.body("0badf00d:3")
    assert body["token_ids"] == [1, 2, 3]
    parameters = body["sampling_params"]
    assert parameters["n"] == 2
    assert parameters["max_tokens"] == 4
    assert parameters["seed"] == 9
    assert parameters["top_p"] == 1.0
    assert parameters["top_k"] == 0
    assert parameters["stop_token_ids"] == [0, 7]
    assert body["cache_salt"] != REQUEST.body("0badf00d:4")["cache_salt"]


def test_an_image_has_a_name_for_each_version_of_the_weights() -> None:
    picture = Image.new("RGB", (28, 28), (1, 2, 3))
    image = ImageInput(picture, *[None] * (len(ImageInput.__slots__) - 1))  # type: ignore[arg-type]
    prompt = Prompt("test", 0, [1, 2], "?", "", {}, (image,))
    request = Request(prompt, [1, 2], 1, 4, 1.0, 0, (), 100)
    first, again, later = (request.body(v)["content_parts"][0] for v in ("a:3", "a:3", "b:3"))
    assert first == again
    assert first["url"] == later["url"]
    assert first["uuid"] != later["uuid"]
    assert first["url"].startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("status", "kind", "hint"),
    [
        (401, EngineError, "RECAP_FAST_SERVER_KEY"),
        (403, EngineError, "--enable-scale-out"),
        (404, EngineError, "recap-fast serve"),
        (400, EngineError, "told to fail"),
        (500, ServerTrouble, "told to fail"),
        (503, ServerTrouble, "told to fail"),
    ],
)
def test_an_error_says_what_was_asked_where_and_what_helps(
    status: int, kind: type[Exception], hint: str, server: FakeServer
) -> None:
    server.failing["/weight_info"] = status
    with pytest.raises(kind, match=f"asking for the version of its weights.*{hint}") as caught:
        ask(server.url, lambda client: client.weight_version())
    assert server.url in str(caught.value)


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(ServerTrouble, match=r"http://127\.0\.0\.1:9/pause cannot be reached"):
        ask("http://127.0.0.1:9", lambda client: client.pause(recompute=False))


def test_a_server_that_takes_no_connection_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as sampling may take, but not for as long as a connection may."""
    monkeypatch.setattr(server_client, "_PROMPT_WAIT", 0.3)
    with socket.socket() as full, ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        with pytest.raises(ServerTrouble, match=rf"{url}/.* took no connection within 0\.3 s"):
            ask(url, lambda client: client.generate(REQUEST, 3))


def test_whether_anybody_listens(server: FakeServer) -> None:
    assert ask(server.url, lambda client: client.is_listening())
    assert not ask("http://127.0.0.1:9", lambda client: client.is_listening())


def test_no_proxy_of_the_environment_is_asked(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert ask(server.url, lambda client: client.version()) == "0.32.0"


def test_what_a_failed_update_says(server: FakeServer) -> None:
    info = {"transfer": "shared_memory", "pid": 1, "descriptor": 99, "index": []}
    server.failing["/update_weights"] = 500
    with pytest.raises(ServerTrouble, match="giving it the weights of step 5"):
        ask(server.url, lambda client: client.receive(info, 5))
    assert server.routes() == ["/update_weights"]


@pytest.mark.parametrize(
    ("soft", "hard", "servers", "connections", "raised"),
    [
        (1024, 2**20, 2, 1024, 2560),
        (1024, -1, 1, 1024, 1536),  # without a limit
        (-1, -1, 2, 1024, None),
        (4096, 4096, 2, 1024, None),
        (1024, 2048, 3, 512, 2048),
        (256, 256, 8, 16, None),
    ],
)
def test_requests_have_open_files(
    soft: int, hard: int, servers: int, connections: int, raised: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each request takes one, and many systems allow a process 1,024 where it asks for no more."""
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    assert connections_each(servers) == connections
    assert limits == ([] if raised is None else [(raised, hard)])
