"""Rollouts from vLLM servers: processes of their own, on this host or elsewhere.

The trainer starts them and ends them, or attaches to those that `recap-fast serve` has started.
Sampling goes on while the trainer trains, and requests in flight survive an update of weights.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from recap_fast.config import RolloutConfig
from recap_fast.model.lora import adapter_rank, adapter_scales, base_weights, whole_adapters
from recap_fast.model.precision import compute_dtype
from recap_fast.model.vision import VisionAdapter
from recap_fast.rollout.protocol import (
    EngineError,
    ExpectedWeights,
    OnGroup,
    SamplingStoppedError,
    build_rollouts,
    check_prompts,
    prompt_seed,
)
from recap_fast.rollout.server_adapters import NamedAdapters
from recap_fast.rollout.server_check import check_server
from recap_fast.rollout.server_client import ServerClient, connections_each
from recap_fast.rollout.server_command import (
    check_gpus,
    check_installed,
    is_loopback,
    server_command,
    server_environment,
    server_key,
)
from recap_fast.rollout.server_label import OtherRunError, new_run
from recap_fast.rollout.server_member import Member
from recap_fast.rollout.server_pool import ServerPool
from recap_fast.rollout.server_process import ServerProcess, free_port, is_free, new_key
from recap_fast.rollout.server_request import Completion, Request
from recap_fast.rollout.transfer import Transfer, choose, make_transfer
from recap_fast.types import Prompt, Rollout, SamplingSpec, UserError, WeightSyncError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_LOOKS_EVERY = 0.5
"""Seconds between looks at whether the run is to stop."""
_STOPS_WITHIN = 1.5
"""Seconds for which a run that is to stop waits for servers to take weights."""

_Result = TypeVar("_Result")


class ServerEngine:
    """vLLM servers as one engine.

    Args:
        weight_shapes: of what a complete weight stream contains.
        sizes: the model's, as `model_sizes` gives them.
        vocabulary: how many tokens the model may sample from.
        stop_ids: tokens that end a completion, and stay its last token.
        vision: the model's adapter, if it has one.
        image_pixels: least and largest area of the images; None where no row has any.
        first_gpu: of those that servers of ours take; the ones before are the trainer's.
        logs: folder for the servers' logs.
        leads: whether this process starts servers and gives them weights; one of a run does.
        agree: gives all processes what the one that leads makes (JSON-able).
        adapted: the trained model, where servers load its adapters by name.
    """

    name = "vllm_server"
    ranks = 1

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model_path: str,
        tokenizer: PreTrainedTokenizerBase,
        max_model_len: int,
        seed: int,
        device: torch.device,
        weight_shapes: Mapping[str, Sequence[int]],
        sizes: Mapping[str, str],
        vocabulary: int,
        stop_ids: frozenset[int],
        logs: Path,
        vision: VisionAdapter | None = None,
        image_pixels: tuple[int, int] | None = None,
        first_gpu: int = 0,
        leads: bool = True,
        agree: Callable[[Callable[[], Any]], Any] = lambda make: make(),
        adapted: PreTrainedModel | None = None,
    ) -> None:
        self.dtype = compute_dtype(config.dtype, device)
        self._config = config
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._weight_shapes = weight_shapes
        self._vocabulary = vocabulary
        self._stop_ids = stop_ids
        self._vision = vision
        self._leads = leads
        self._agree = agree
        self._closed = False
        self._reported = 0.0, 0, 0
        self._stop: Sequence[int] = ()
        self._transfer: Transfer | None = None
        self._adapted = adapted
        self._adapters: NamedAdapters | None = None
        self._base_unknown = True
        self._own: list[_OwnServer] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="vllm servers", daemon=True
        )
        self._thread.start()
        command = partial(
            server_command,
            config,
            model_path=model_path,
            dtype=self.dtype,
            max_model_len=max_model_len,
            seed=seed,
            device=device,
            takes_images=vision is not None,
            image_pixels=image_pixels,
            adapter_rank=None if adapted is None else adapter_rank(adapted),
        )
        try:
            self._id = agree(new_run)
            agree(self._check_adapters)
            agree(lambda: self._make_transfer(device, first_gpu))
            members = self._make_members(command, logs, device, first_gpu)
            self._pool = self._run(self._make_pool(members))
            check = partial(
                check_server,
                model_path=model_path,
                sizes=sizes,
                dtype=self.dtype,
                max_model_len=max_model_len,
            )
            self._run(self._pool.start(check))
            self.version = self._run(self._pool.members[0].client.version())
        except BaseException:
            self.close()
            raise

    def _check_adapters(self) -> None:
        if self._adapted is None:
            return
        far = [url for url in self._config.server.urls if not is_loopback(url)]
        if far or self._vision is not None:
            problem = (
                f"{far[0]} is no address of loopback: servers read adapters from a folder of this "
                f"host"
                if far
                else "the model takes images: that is not tested"
            )
            raise EngineError(
                f"rollout.server.adapters is named, and {problem} (--set "
                f"rollout.server.adapters=merged)"
            )
        self._adapters = NamedAdapters(self.dtype, self._config.adapter_slots, self._id)

    def _make_transfer(self, device: torch.device, first_gpu: int) -> None:
        if self._adapted is not None:
            return
        settings = self._config.server
        last_gpu = first_gpu + settings.count * self._config.tensor_parallel_size
        kind = choose(
            settings,
            device,
            is_local=all(is_loopback(url) for url in settings.urls),
            neighbours=[] if settings.urls else range(first_gpu, last_gpu),
        )
        logger.info("weights go to the servers by %s", kind)
        shapes = self._weight_shapes
        self._transfer = make_transfer(kind, self.dtype, device, shapes, settings.timeout)

    def _make_members(
        self,
        command: Callable[..., list[str]],
        logs: Path,
        device: torch.device,
        first_gpu: int,
    ) -> list[Member]:
        settings = self._config.server
        if settings.urls:
            key = server_key()
            return [Member(self._client(url, key), is_attached=True) for url in settings.urls]

        size = self._config.tensor_parallel_size

        def choose() -> list[Any]:
            check_installed(takes_images=self._vision is not None)
            if device.type == "cuda":
                check_gpus(range(first_gpu, first_gpu + settings.count * size))
            ports: set[int] = set()
            while len(ports) < settings.count:
                ports.add(free_port())
            return [(port, new_key()) for port in sorted(ports)]

        members = []
        for place, (port, key) in enumerate(self._agree(choose)):
            gpus = range(first_gpu + place * size, first_gpu + (place + 1) * size)
            environment = server_environment(
                key,
                gpus if device.type == "cuda" else None,
                takes_adapters=self._adapted is not None,
            )
            own = _OwnServer(
                self._client(_address(port), key),
                partial(_start_server, command, environment, logs / f"server-{place}.log"),
                port,
                logs / f"server-{place}-{self._id}.port",
            )
            members.append(
                Member(own.client, own.start)
                if self._leads
                else Member(own.client, locate=own.locate)
            )
            self._own.append(own)
        return members

    def _client(self, url: str, key: str | None) -> ServerClient:
        settings = self._config.server
        return ServerClient(
            url,
            key=key,
            timeout=settings.timeout,
            run=self._id,
            connections=connections_each(len(settings.urls) or settings.count),
        )

    async def _make_pool(self, members: Sequence[Member]) -> ServerPool:
        for member in members:
            if member.start is not None:
                member.process = member.start()
        return ServerPool(
            members,
            transfer=self._transfer,
            timeout=self._config.server.timeout,
            start_timeout=self._config.server.start_timeout,
            recompute=self._config.asynchronous.on_update == "recompute",
            has_images=self._vision is not None,
            adapters=self._adapters,
        )

    def _run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def submit(
        self, prompt: Prompt, sampling: SamplingSpec, index: int, priority: int = 0
    ) -> Future[list[Rollout]]:
        """Starts the sampling of one group, number `index` among those of `sampling`, and returns
        at once. Groups of a lower `priority` come first.

        Its future raises `EngineError` where no server can complete it.
        """
        check_prompts([prompt], sampling, self._max_model_len, self._vision)
        images = self._vision if prompt.images else None
        request = Request(
            prompt=prompt,
            token_ids=(
                prompt.token_ids
                if images is None
                else list(images.collapse(prompt.token_ids, prompt.images))
            ),
            n=sampling.n if sampling.temperature > 0 else 1,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=prompt_seed(sampling.seed, sampling.group(index)),
            stop_token_ids=tuple(sorted(self._stop_ids)),
            vocabulary=self._vocabulary,
            vision=images,
            priority=priority,
        )

        async def sample() -> list[Rollout]:
            completions = await self._pool.sample(request)
            return self._rollouts(prompt, completions, sampling, index)

        return asyncio.run_coroutine_threadsafe(sample(), self._loop)

    def _rollouts(
        self, prompt: Prompt, completions: Sequence[Completion], sampling: SamplingSpec, index: int
    ) -> list[Rollout]:
        return build_rollouts(
            [prompt],
            [[(one.token_ids, one.logprobs) for one in completions]],
            sampling.n,
            self._stop_ids,
            self._tokenizer,
            first_group=sampling.group(index),
            versions=[[one.versions for one in completions]],
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSpec,
        on_group: OnGroup | None = None,
    ) -> list[Rollout]:
        check_prompts(prompts, sampling, self._max_model_len, self._vision)
        futures = [self.submit(prompt, sampling, i) for i, prompt in enumerate(prompts)]
        try:
            for future in self._completed(futures):
                if on_group is not None:
                    on_group(future.result())
            return [rollout for future in futures for rollout in future.result()]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def _completed(self, futures: Sequence[Future[_Result]]) -> Iterator[Future[_Result]]:
        """Each once it is complete."""
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=_LOOKS_EVERY, return_when="FIRST_COMPLETED")
            yield from done
            if not done and self._stop and self._pool.is_out():
                raise SamplingStoppedError("sampling was given up: no server is there")

    def heed(self, stop: Sequence[int]) -> None:
        """See `Stoppable`."""
        self._stop = stop

    def take_metrics(self) -> dict[str, float]:
        """Since the last call: seconds in which the servers had something to sample, requests that
        had to be asked again, and bytes of weights that were broadcast."""
        pool = self._pool
        busy, reissued = pool.busy_seconds(), pool.reissued
        sent = 0 if self._transfer is None else self._transfer.sent_bytes
        found = {
            "time/engine_busy": busy - self._reported[0],
            "rollout/reissued_requests": reissued - self._reported[1],
            "rollout/sync_bytes": sent - self._reported[2],
        }
        self._reported = busy, reissued, sent
        return found

    def any_rank(self, here: bool) -> bool:
        return here

    def sleep(self) -> None:
        """Servers have memory of their own."""

    def sync_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]], policy_version: int = 0
    ) -> None:
        """See `RolloutEngine`. Where servers load adapters by name the weights are left alone:
        adapters of the model that the engine was made with are given."""
        if self._adapted is None:
            self._sync_whole(named_tensors, policy_version)
            return
        base = base_weights(self._adapted, self.dtype) if self._base_unknown else iter(())
        if self._adapters is None:
            for _ in chain(base, whole_adapters(self._adapted)):  # every process takes part
                pass
        else:
            self._adapters.note_base(base)
            self._adapters.write(self._adapted, policy_version)
        self._base_unknown = False
        name = self._agreed(lambda: self._pool.update_adapters())
        if not self._leads:
            self._run(self._follow(policy_version, name))

    def _sync_whole(self, named_tensors: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        if not self._leads:  # before all agree on what comes next: no server has these yet
            self._loop.call_soon_threadsafe(self._pool.announce, policy_version)
        self._agreed(lambda: self._pool.hold())
        if self._transfer is None:
            for _ in named_tensors:  # every process takes part in gathering them
                pass
        else:
            try:
                expected = ExpectedWeights(self._weight_shapes)
                weights = self._transfer.write(expected.watch(named_tensors), policy_version)
                expected.check(f"{self.name} {self.version}")
            except BaseException:
                self._run(self._pool.let_go())
                raise

        self._agreed(lambda: self._pool.update(weights))
        if not self._leads:
            self._run(self._follow(policy_version, None))

    def _agreed(self, update: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """What an update of the servers returns, by the process that leads, in all."""
        try:
            found = self._agree(lambda: self._run_or_stop(update()))
        except OtherRunError:
            raise
        except UserError as error:  # of the process that leads, in all
            raise WeightSyncError(str(error)) from error
        if found is None:
            raise SamplingStoppedError("the servers did not get the last weights: the run stops")
        return found[0]

    def _run_or_stop(self, work: Coroutine[Any, Any, Any]) -> list[Any] | None:
        """What comes of it, alone in a list; None where the run was to stop before, or soon after
        that."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        patience = _STOPS_WITHIN
        while not wait([future], timeout=_LOOKS_EVERY).done:
            patience -= _LOOKS_EVERY if self._stop else 0.0
            if patience <= 0:
                future.cancel()
                self._loop.call_soon_threadsafe(self._pool.withhold)
                return None
        return [future.result()]

    async def _follow(self, version: int, adapter: str | None) -> None:
        self._pool.follow(version, adapter)

    def read_columns(self, shapes: Mapping[str, Sequence[int]], count: int) -> dict[str, Tensor]:
        """See `VllmEngine.read_columns`. Of layers that have adapters beside them, nothing."""
        adapted = {} if self._adapted is None else adapter_scales(self._adapted)
        found = self._run(self._pool.columns(shapes, count))
        return {n: x for n, x in found.items() if n.removesuffix(".weight") not in adapted}

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if hasattr(self, "_pool"):
            self._run(self._pool.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._transfer is not None:
            self._transfer.close()
        if self._adapters is not None:
            self._adapters.close()
        if self._leads:
            for own in self._own:
                own.moved_to.unlink(missing_ok=True)


@dataclass(slots=True)
class _OwnServer:
    """A server of the run's own, at a port that is its own for as long as nobody else takes it.

    Attributes:
        run: starts it at a port.
        moved_to: file with its port, for the run's other processes, once that is another one than
            they all know of.
    """

    client: ServerClient
    run: Callable[[int], ServerProcess]
    port: int
    moved_to: Path

    def start(self) -> ServerProcess:
        """See `Starter`."""
        if not is_free(self.port):
            port = free_port()
            logger.warning("port %d is taken: a server is started at %d", self.port, port)
            self._move(port)
            written = self.moved_to.with_suffix(".new")
            written.parent.mkdir(parents=True, exist_ok=True)
            written.write_text(str(port))
            written.replace(self.moved_to)
        return self.run(self.port)

    def locate(self) -> None:
        """See `Member`."""
        with suppress(FileNotFoundError):
            self._move(int(self.moved_to.read_text()))

    def _move(self, port: int) -> None:
        self.port = port
        self.client.move(_address(port))


def _start_server(
    command: Callable[..., list[str]], environment: Mapping[str, str], log: Path, port: int
) -> ServerProcess:
    return ServerProcess(command(port=port), environment, log)


def _address(port: int) -> str:
    return f"http://127.0.0.1:{port}"
