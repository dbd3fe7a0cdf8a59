"""Weight sync into vLLM, and rollouts from it, with random weights and no network."""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import torch

from benchmarks.measuring import pick_device
from benchmarks.on_gpu.part import Context, SkipPartError
from benchmarks.training_step import WORKLOADS, Workload, build_model, make_rollouts
from recap_fast.config import RolloutConfig
from recap_fast.rollout import vllm as vllm_rollout
from recap_fast.rollout.factory import make_engine
from recap_fast.rollout.mismatch import logprob_diff, sequence_logprobs, verify_sync
from recap_fast.rollout.protocol import iter_weights
from recap_fast.types import SamplingSpec
from tests.tiny_tokenizer import tiny_tokenizer

SYNCS = 3
CHECKED = 4
"""Rollouts whose log-probs are compared with the trainer's."""


def run(context: Context) -> dict[str, Any]:
    """Seconds and GB/s of a sync, tokens/s of generation, and the mismatch of log-probs.

    Raises:
        SkipPartError: vLLM cannot serve this device.
    """
    device = pick_device()
    reason = vllm_rollout.why_unavailable(device)
    if reason is not None:
        raise SkipPartError(reason)
    workload = WORKLOADS[context.shapes]
    model = build_model(workload.model, device, packed=False)
    tokenizer = tiny_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        stream = _stream(device)
        engine = make_engine(
            RolloutConfig(engine="vllm", cpu_kv_cache_gib=0.05),
            model=model,
            model_path=folder,
            tokenizer=tokenizer,
            max_model_len=max(64, 2 * (workload.prompt_tokens + workload.completion_tokens)),
            seed=0,
            device=device,
        )
        try:
            return {
                # An engine that makes its own the thread's must be waited for at the borders.
                "engine_changed_the_stream": _stream(device) != stream,
                **_sync(engine, model, workload, device),
                **_generate(engine, model, workload, device),
            }
        finally:
            engine.close()


def _stream(device: torch.device) -> Any:
    return torch.cuda.current_stream() if device.type == "cuda" else None


def _sync(engine: Any, model: Any, workload: Workload, device: torch.device) -> dict[str, Any]:
    prompt = make_rollouts(workload)[0][0].prompt
    times = []
    for _ in range(SYNCS):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)  # what arrives must differ from what was there
        start = time.perf_counter()
        engine.sync_weights(iter_weights(model))
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        stale = verify_sync(engine, model, [prompt]).stale
        assert not stale, f"{len(stale)} weights did not arrive, such as {stale[0]}"
    sent = sum(parameter.numel() for parameter in model.parameters()) * engine.dtype.itemsize
    seconds = statistics.median(times)
    return {
        "sync_seconds": seconds,
        "sync_first_seconds": times[0],
        "sync_gigabytes": sent / 1e9,  # in the engine's dtype
        "sync_gigabytes_per_second": sent / 1e9 / seconds,
    }


def _generate(engine: Any, model: Any, workload: Any, device: torch.device) -> dict[str, Any]:
    rollouts, _ = make_rollouts(workload)
    # Token ids are drawn from the model's vocabulary; the tokenizer only has to decode some text.
    prompts = [rollouts[index].prompt for index in range(0, len(rollouts), workload.group)]
    sampling = SamplingSpec(workload.group, workload.completion_tokens, 1.0, seed=0)
    engine.generate(prompts[:1], SamplingSpec(1, 4, 1.0, seed=0))
    start = time.perf_counter()
    sampled = engine.generate(prompts, sampling)
    seconds = time.perf_counter() - start
    tokens = sum(len(rollout.token_ids) for rollout in sampled)
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        ours = torch.cat([sequence_logprobs(model, rollout) for rollout in sampled[:CHECKED]])
    theirs = torch.tensor([p for rollout in sampled[:CHECKED] for p in rollout.logprobs])
    mean, largest = logprob_diff(ours.cpu(), theirs, torch.ones_like(theirs))
    # The trainer's guard stops at 0.5; stale weights of this sync show as more than rounding.
    assert mean.item() < 0.5, f"mean |log-prob difference| is {mean.item():.3g}"
    return {
        "engine": f"{engine.name} {engine.version}",
        "generated_tokens": tokens,
        "generation_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "logprob_diff_mean": mean.item(),
        "logprob_diff_max": largest.item(),
    }
