"""A stand-in for a vLLM server that does what a test tells it to: it dies, hangs, answers nonsense
or samples from old weights on demand. tests/rollout/test_server.py has the real one."""

from __future__ import annotations

import json
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from safetensors.torch import load_file

from recap_fast.rollout.sent_weights import (
    BroadcastWeights,
    GroupInfo,
    SharedWeights,
    shared_tensors,
)
from recap_fast.rollout.server_worker import adapter_digest, digest
from recap_fast.rollout.shared_weights import DIGEST_COLUMNS, sample_columns
from recap_fast.rollout.weight_patch import HostCopy
from tests.rollout.gloo_group import join

CPU = torch.device("cpu")


class FakeServer:
    """Answers on a port, of loopback where not said otherwise.

    Attributes:
        asked: (route, parameters, body) of every request, in order.
        keys_at: routes that were asked with a key.
        behaviour: of sampling: "well", "nonsense", "hang", "old" (weights), "error" (a 500).
        failing: routes that answer with the given status.
        held: weights, by name, after an update.
        version: label of its weights.
        model: what its worker says of its model.
        sampled: how many tokens it says that it has sampled.
        updating: whether an update of weights is open, beside which vLLM starts no other.
        busy: how many requests it says that it samples for.
        loses: weights, or layers of adapters, that do not arrive.
        hides: weights that it cannot show.
        adapters: digests of layers, by the adapters' name.
    """

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        self.asked: list[tuple[str, dict[str, list[str]], Any]] = []
        self.behaviour = "well"
        self.failing: dict[str, int] = {}
        self.held: dict[str, Any] = {}
        self.loses: set[str] = set()
        self.hides: set[str] = set()
        self.version = "default"
        self.release = "0.32.0"
        self.model = {"hidden_size": "8", "backend": "recap_fast"}
        self.busy = 0
        self.adapters: dict[str, dict[str, str]] = {}
        self.paused = False
        self.updating = False
        self.sampled = 0
        self.delay = 0.0
        self.dead = False
        self.key: str | None = None
        self.keys_at: set[str] = set()
        self._group: Any = None
        self.copy = HostCopy()
        self._hanging = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                raw = self.rfile.read(length)
                self._answer(json.loads(raw) if raw else None)

            def _answer(self, body: Any) -> None:
                if outer.dead:  # connections that are kept open outlive the server otherwise
                    self.close_connection = True
                    return
                parts = urlsplit(self.path)
                outer.asked.append((parts.path, parse_qs(parts.query), body))
                given = self.headers.get("Authorization")
                known = given == f"Bearer {outer.key}"
                if given is not None:
                    outer.keys_at.add(parts.path)
                if outer.key is None or known or parts.path == "/health":
                    status, content = outer._answer(parts.path, body)
                else:
                    status, content = 401, {"error": "no key"}
                if outer.dead:
                    self.close_connection = True
                    return
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._http = ThreadingHTTPServer((host, port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def routes(self, *but: str) -> list[str]:
        """What was asked, without questions about health."""
        return [route for route, _, _ in self.asked if route not in ("/health", *but)]

    def die(self) -> None:
        self.dead = True
        self._hanging.set()
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, route: str, body: Any) -> tuple[int, Any]:
        if route in self.failing:
            return self.failing[route], {"error": {"message": "told to fail"}}
        if route == "/inference/v1/generate":
            return self._generate(body)
        if route == "/start_weight_update":
            if self.updating:
                return 500, {"error": {"message": "a weight update is already active"}}
            self.updating = True
        elif route == "/update_weights":
            try:
                received = {name: tensor.clone() for name, tensor in self._receive(body)}
            except RuntimeError as error:
                self.updating = False
                return 500, {"error": {"message": str(error)}}
            self.held |= {n: t for n, t in received.items() if n not in self.loses}
        elif route == "/init_weight_transfer_engine":
            info = GroupInfo(**body["init_info"])
            self._group = join(
                b64decode(info.unique_id), rank=info.rank, world_size=info.world_size, device=CPU
            )
        elif route == "/get_world_size":
            return 200, {"world_size": 1}
        elif route == "/finish_weight_update":
            self.version = body["weight_version"]
            self.updating = False
        elif route == "/pause":
            self.paused = True
        elif route == "/resume":
            self.paused = False
        elif route == "/weight_info":
            return 200, {"weight_version": self.version}
        elif route == "/v1/load_lora_adapter":
            self.adapters[body["lora_name"]] = self._load_adapter(Path(body["lora_path"]))
            return 200, b"Success"
        elif route == "/v1/unload_lora_adapter":
            if self.adapters.pop(body["lora_name"], None) is None:
                return 404, {"error": {"message": "cannot be found"}}
            return 200, b"Success"
        elif route == "/collective_rpc" and body["method"] == "recap_fast_adapters":
            numbered = enumerate(self.adapters.values(), 1)
            return 200, {"results": [{str(number): layers for number, layers in numbered}]}
        elif route == "/collective_rpc":
            if body["method"] == "recap_fast_end_update":
                self.updating = False
                return 200, {"results": [{}]}
            if body["method"] == "recap_fast_model":
                return 200, {"results": [self.model]}
            shown = {n: t for n, t in self.held.items() if n not in self.hides}
            columns = {n: sample_columns(t, DIGEST_COLUMNS) for n, t in shown.items()}
            return 200, {"results": [{n: digest(c) for n, c in columns.items()}]}
        elif route == "/metrics":
            labels = '{engine="0",model_name="fake"}'
            return 200, f"vllm:generation_tokens_total{labels} {self.sampled}.0\n".encode()
        elif route == "/load":
            return 200, {"server_load": self.busy}
        elif route == "/version":
            return 200, {"version": self.release}
        elif route == "/v1/models":
            base = {"id": "fake", "root": "fake", "max_model_len": 128}
            return 200, {"data": [base, *({"id": x, "parent": "fake"} for x in self.adapters)]}
        return 200, {}

    def _load_adapter(self, folder: Path) -> dict[str, str]:
        settings = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        scale = settings["lora_alpha"] / settings["r"]
        start, end = "base_model.model.", ".lora_A.weight"
        return {
            name.removeprefix(start).removesuffix(end): adapter_digest(
                a, tensors[name.replace("lora_A", "lora_B")] * scale
            )
            for name, a in tensors.items()
            if name.endswith(end) and name.removeprefix(start).removesuffix(end) not in self.loses
        }

    def _receive(self, body: Any) -> Iterator[tuple[str, Any]]:
        info = dict(body["update_info"])
        if info.pop("transfer") == "shared_memory":
            return shared_tensors(SharedWeights(**info))
        assert self._group is not None
        return self.copy.receive(BroadcastWeights(**info), self._group, CPU)

    def _generate(self, body: Any) -> tuple[int, Any]:
        if self.behaviour == "nonsense":
            return 200, b"<html>It works!</html>"
        if self.behaviour == "error":
            return 500, {"error": {"message": "EngineDeadError"}}
        if self.behaviour == "hang":
            self._hanging.wait(60)
        time.sleep(self.delay)
        model = body.get("model", "fake")
        if model != "fake" and model not in self.adapters:
            return 404, {"error": {"message": f"The model `{model}` does not exist."}}
        run, _, step = self.version.rpartition(":")
        version = self.version if self.behaviour != "old" else f"{run}:{int(step) - 1}"
        parameters = body["sampling_params"]
        first = 5 + parameters["seed"]  # by which an answer is known to be that of its request
        tokens = list(range(first, first + min(3, parameters["max_tokens"])))
        choice = {
            "finish_reason": "length",
            "token_ids": tokens,
            "logprobs": {"content": [{"token_id": t, "logprob": -1.0} for t in tokens]},
            "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
        }
        choices = [{**choice, "index": i} for i in range(parameters["n"])]
        return 200, {"choices": choices, "model": model}
