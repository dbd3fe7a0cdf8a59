"""What samples rollouts, in this process or in servers, and how far ahead."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from recap_fast.config.section import Section


def check_url(url: str) -> str:
    """The URL of a server, and nothing else; ValueError where it is none."""
    wanted = f"wanted http://host:port, got {url!r}"
    try:
        parts = urlsplit(url)
        is_port = parts.port != 0
    except ValueError as error:
        raise ValueError(f"{wanted}: {error}") from None
    if parts.scheme not in ("http", "https") or not (parts.hostname and is_port):
        raise ValueError(wanted)
    if any(character.isspace() for character in url):  # some of which urlsplit drops
        raise ValueError(wanted)
    if parts.username is not None:
        raise ValueError("wanted http://host:port without a user: keys come from the environment")
    if parts.path.rstrip("/") or parts.query or parts.fragment:
        raise ValueError(f"{wanted}: leave out what comes after the port")
    return url


class ServerConfig(Section):
    """Of rollout.engine vllm_server: vLLM in processes of its own, which sample while this one
    trains."""

    urls: list[str] = []
    """Servers that `recap-fast serve` has started, as "http://host:port"; the environment variable
    RECAP_FAST_SERVER_KEY holds their key, and each serves one run at a time. []: the
    run starts servers on this host, and ends them."""
    count: int = Field(1, ge=1)
    """Servers that the run starts. On CUDA each takes the next tensor_parallel_size GPUs behind
    those that train."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of its GPUs' memory that a server of ours takes."""
    transfer: Literal["auto", "shared_memory", "ipc", "nccl", "nccl_sparse"] = "auto"
    """How weights come to servers. shared_memory: through the memory of the trainer's host; ipc:
    from a copy on the first training GPU, to servers of the same host; nccl: to any host, by
    broadcast; nccl_sparse: the same, but only what an update has changed, of which trainer and
    servers keep copies on their hosts. auto: shared_memory on a CPU; on CUDA ipc for servers of
    this host, else nccl."""
    adapters: Literal["merged", "named"] = "merged"
    """How adapters (model.lora) come to servers. merged: added to the weights, all of which are
    sent. named: servers of this host load each version of the adapters under a name of its own,
    beside the base from model.path; requests under way end with the version they began with."""
    timeout: float = Field(600.0, gt=0)
    """Seconds in which a server that has requests must answer one of them, and take weights over.
    One that does not is restarted, or left out until it is back."""
    start_timeout: float = Field(900.0, gt=0)
    """Seconds in which a server must be ready."""

    @field_validator("urls")
    @classmethod
    def _check_urls(cls, urls: list[str]) -> list[str]:
        found = [check_url(url).rstrip("/") for url in urls]
        for url in found:
            if found.count(url) > 1:
                raise ValueError(f"{url} is given twice: name each server once")
        return urls

    @model_validator(mode="after")
    def _check(self) -> ServerConfig:
        if self.urls and self.count != 1:
            raise ValueError(
                f"count is {self.count}, which is of servers that the run starts, and urls names "
                f"{len(self.urls)} that others have started: leave one of the two out"
            )
        return self


class AsyncConfig(Section):
    """Of rollouts that are sampled while the trainer trains (rollout.engine vllm_server)."""

    depth: int = Field(0, ge=0)
    """Steps ahead of the trainer for which rollouts are sampled. 0: the two take turns; 1: one
    step off, which hides the shorter of both behind the longer."""
    max_staleness: int | None = Field(None, ge=0)
    """Most steps between the weights that sampled a token and those that are trained on it. Unset:
    depth, and steps are trained on in their order; larger: a step does not wait for its longest
    rollouts, which a later one trains on."""
    on_update: Literal["keep", "recompute"] = "keep"
    """What requests in flight do with their keys and values when the weights change."""

    @property
    def staleness_bound(self) -> int:
        return self.depth if self.max_staleness is None else self.max_staleness

    @model_validator(mode="after")
    def _check(self) -> AsyncConfig:
        if self.staleness_bound < self.depth:
            raise ValueError(
                f"max_staleness is {self.max_staleness} and depth {self.depth}: rollouts that are "
                f"sampled {self.depth} steps ahead are up to {self.depth} steps old; raise "
                f"max_staleness to at least {self.depth}, or lower depth"
            )
        if self.max_staleness and not self.depth:
            raise ValueError(
                f"max_staleness is {self.max_staleness}, but depth is 0, where nothing is sampled "
                f"ahead: set depth to at least 1, or leave max_staleness out"
            )
        if self.on_update == "recompute" and not self.depth:
            raise ValueError(
                "on_update is recompute, but depth is 0, where no request is in flight when the "
                "weights change: set depth to at least 1, or leave on_update out"
            )
        return self


class DynamicSamplingConfig(Section):
    """Groups whose rollouts no objective tells apart have no signal, and are replaced (DAPO)."""

    max_refills: int = Field(10, ge=1)
    """How often another prompt of the same source is sampled in the place of such a group. The last
    one stays, signal or not."""


class RolloutConfig(Section):
    engine: Literal["auto", "vllm", "vllm_server", "transformers"] = "auto"
    """auto: vLLM where it imports, else transformers. An explicit engine never falls back.
    vllm_server: vLLM in other processes, see `server`."""
    group_size: int = Field(8, ge=1)
    """Rollouts per prompt."""
    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, gt=0)
    dynamic_sampling: DynamicSamplingConfig | None = None
    """Unset: every group is trained, with or without a signal."""
    overlong_filtering: bool = False
    """Rollouts cut at `max_new_tokens` do not enter the loss, and are not compared with the others
    of their group (DAPO). The reward "overlong" is the softer way."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The engine's dtype. auto: for vLLM as `model.dtype`'s, the trained float32 weights for
    transformers on a CPU."""
    max_logprob_diff: float | None = Field(0.5, gt=0)
    """Stop when the mean |difference| between the engine's and the trainer's log-probs of the
    sampled tokens passes this. None: only warn."""
    warn_logprob_diff: float = Field(0.1, gt=0)
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """vLLM on CUDA: the largest share of the GPU's memory for the engine's weights, KV cache and
    graphs. In training the KV cache is sized by need: a step's rollouts at their longest."""
    cpu_kv_cache_gib: float = Field(1.0, gt=0)
    """vLLM on CPU: size of its KV cache."""
    tensor_parallel_size: int = Field(1, ge=1)
    """vLLM: processes, neighbours by rank, that share one engine, each with a part of its weights
    and KV cache. For models that one GPU does not hold; 1: every process has an engine. With
    vllm_server, GPUs of each server."""
    sleep: bool = False
    """vLLM on CUDA: the engine gives its weights and KV cache back while the model is trained."""
    server: ServerConfig = ServerConfig()
    asynchronous: AsyncConfig = Field(AsyncConfig(), alias="async")

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        given = {"tensor_parallel_size": self.tensor_parallel_size > 1, "sleep": self.sleep}
        for name, is_set in given.items():
            if is_set and self.engine == "transformers":
                raise ValueError(
                    f"{name} is {getattr(self, name)}, which only vllm knows, and engine is "
                    f"transformers"
                )
        if self.engine != "vllm_server":
            if self.asynchronous.depth:
                raise ValueError(
                    f"async.depth is {self.asynchronous.depth}, and engine is {self.engine}, which "
                    f"samples in the trainer's process: set engine to vllm_server, or depth to 0"
                )
            for name, field in ServerConfig.model_fields.items():
                if getattr(self.server, name) != field.default:
                    raise ValueError(
                        f"server.{name} is set, and engine is {self.engine}, which has no server: "
                        f"set engine to vllm_server, or leave server.{name} out"
                    )
        elif self.sleep:
            raise ValueError("sleep is true, which an engine in the trainer's process can alone")
        if self.server.adapters == "named":
            self._check_named()
        return self

    def _check_named(self) -> None:
        problem = None
        if self.tensor_parallel_size > 1:
            problem = (
                f"tensor_parallel_size is {self.tensor_parallel_size}: what a server holds of "
                f"adapters is compared where it is whole"
            )
        elif self.asynchronous.on_update == "recompute":
            problem = "async.on_update is recompute: requests keep their version, none changes"
        if problem:
            raise ValueError(f"server.adapters is named, and {problem}; set it to merged")

    @property
    def processes_per_engine(self) -> int:
        """Processes of the run that share an engine; servers have their own."""
        return 1 if self.engine == "vllm_server" else self.tensor_parallel_size

    @property
    def adapter_slots(self) -> int:
        """Versions of named adapters that a server has at a time: all that a request under way may
        have begun with, the newest, and the next."""
        return self.asynchronous.staleness_bound + 2
