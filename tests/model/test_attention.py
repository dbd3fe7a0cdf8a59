"""Packed attention up to the kernels' calls, which are replaced by what their authors document; the
kernels themselves where there is a GPU."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from recap_fast.config import ModelConfig
from recap_fast.model import attention_backends, attention_choice, attention_padded
from recap_fast.model.attention import (
    SDPA,
    Backend,
    Bounds,
    RaggedLayout,
    Segment,
    build_layout,
    packed_attention,
)
from recap_fast.model.attention_backends import (
    AttentionNeeds,
    UnavailableError,
    choose_backend,
    open_backend,
    try_backend,
)
from recap_fast.model.errors import ModelError
from recap_fast.model.policy import load_policy
from recap_fast.ops.loss_config import PolicyLossConfig
from recap_fast.report.metrics import read_metrics
from recap_fast.trainer import Trainer
from recap_fast.training.packing import pack_update
from tests.no_sync import ForbidHostSync
from tests.tiny import VOCAB, save_tiny_model, tiny_config, tiny_policy
from tests.training.test_packing import make_rows, one_at_a_time, run_packed


def documented_kernel(query, key, value, bounds, scale, shift=0) -> Tensor:
    """What flash-attn (2.1 and newer) promises, segment by segment in float64: keys and values of
    a head serve a run of query heads, and the causal mask is aligned at the last query and key."""
    for starts, end in ((bounds.query_starts, len(query)), (bounds.key_starts, len(key))):
        assert starts.dtype == torch.int32
        assert starts[0] == 0
        assert starts[-1] == end
    assert query.dtype == key.dtype == value.dtype
    lengths = bounds.query_starts.diff().tolist(), bounds.key_starts.diff().tolist()
    assert [bounds.max_queries, bounds.max_keys] == [max(lengths[0]), max(lengths[1])]
    assert isinstance(bounds.max_queries, int)
    assert isinstance(bounds.max_keys, int)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in zip(
        query.double().split(lengths[0]),
        key.double().repeat_interleave(group, 1).split(lengths[1]),
        value.double().repeat_interleave(group, 1).split(lengths[1]),
        strict=True,
    ):
        scores = scale * torch.einsum("qhd,khd->hqk", q, k)
        last = torch.arange(len(q)) + len(k) - len(q) + shift
        hidden = torch.arange(len(k)) > (last[:, None] if bounds.causal else len(k))
        outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.transpose(0, 1))
    return torch.cat(outputs, 1).transpose(0, 1).to(query.dtype)


DOCUMENTED = Backend("documented", documented_kernel)

# Lengths of prompts with the lengths of their completions; no completions: a whole sequence.
GROUPS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), max_size=4)), min_size=1, max_size=4
)


def to_segments(groups) -> list[Segment]:
    segments, start = [], 0
    for prompt, completions in groups:
        prefix = range(start, start + prompt)
        segments.append(Segment(range(0), prefix))
        start += prompt
        for length in completions:
            segments.append(Segment(prefix, range(start, start + length)))
            start += length
    return segments


def draw_inputs(tokens, heads=4, kv_heads=2, size=8, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(tokens, count, size, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


def one_by_one(segments, query, key, value, scale) -> Tensor:
    """Every token on its own: softmax over exactly the positions that it may see."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    rows = {}
    for segment in segments:
        for count, position in enumerate(segment.own, start=1):
            seen = [*segment.prefix, *segment.own[:count]]
            scores = scale * torch.einsum("hd,khd->hk", query[position], key[seen])
            rows[position] = torch.einsum("hk,khd->hd", scores.softmax(-1), value[seen])
    return torch.stack([rows[position] for position in sorted(rows)])


def with_gradients(run, inputs) -> list[Tensor]:
    output = run(*inputs)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device)
    weights = weights.bfloat16().to(output.dtype).view_as(output)  # the same in every dtype
    gradients = torch.autograd.grad(output, inputs, weights)
    return [output.detach(), *gradients]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@settings(max_examples=25, deadline=None)
@given(groups=GROUPS, order=st.randoms(use_true_random=False))
def test_layouts_equal_one_token_at_a_time(kv_heads, groups, order):
    segments = to_segments(groups)
    inputs = draw_inputs(max(s.own.stop for s in segments), kv_heads=kv_heads)
    expected = with_gradients(lambda *x: one_by_one(segments, *x, 0.3), inputs)
    order.shuffle(segments)
    for backend, tolerance in ((DOCUMENTED, 1e-12), (SDPA, 1e-5)):
        layout = build_layout(segments, backend)
        results = with_gradients(lambda *x: layout.attend(*x, scale=0.3, dropout=0.0), inputs)  # noqa: B023
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted, atol=tolerance, rtol=tolerance)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_patches_of_an_image_see_one_another(lengths, order):
    segments = to_segments([(length, []) for length in lengths])
    inputs = draw_inputs(sum(lengths), kv_heads=4)

    def dense(*inputs: Tensor) -> Tensor:
        outputs = []
        for query, key, value in zip(*(x.split(lengths) for x in inputs), strict=True):
            scores = 0.3 * torch.einsum("qhd,khd->hqk", query, key)
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
        return torch.cat(outputs)

    expected = with_gradients(dense, inputs)
    order.shuffle(segments)
    for backend, tolerance in ((DOCUMENTED, 1e-12), (SDPA, 1e-5)):
        layout = build_layout(segments, backend, causal=False)
        results = with_gradients(lambda *x: layout.attend(*x, scale=0.3, dropout=0.0), inputs)  # noqa: B023
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted, atol=tolerance, rtol=tolerance)


def test_images_of_one_size_are_one_rectangle_without_a_mask():
    layout = build_layout(to_segments([(6, []), (4, []), (6, [])]), SDPA, causal=False)
    assert [tuple(bucket.queries.shape) for bucket in layout.buckets] == [(1, 4), (2, 6)]
    assert all(bucket.mask is None for bucket in layout.buckets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("groups", [[(2, [3, 1])], [(4, []), (2, [])]])
def test_padding_asks_gpus_for_as_many_heads_of_keys(monkeypatch, groups, kv_heads, dtype):
    """With fewer, CUDA's kernels that take a mask refuse, and torch holds all scores in memory."""
    calls = []

    def watched(query, key, value, **kwargs):
        calls.append((query.shape[1], key.shape[1], value.shape[1], kwargs))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **kwargs)

    monkeypatch.setattr(attention_padded, "scaled_dot_product_attention", watched)
    segments = to_segments(groups)
    tokens = max(s.own.stop for s in segments)
    inputs = draw_inputs(tokens, kv_heads=kv_heads, dtype=dtype, device="meta")
    layout = build_layout(segments, SDPA).to(torch.device("meta"))
    results = with_gradients(lambda *x: layout.attend(*x, scale=0.3, dropout=0.0), inputs)
    assert [r.shape for r in results] == [inputs[0].shape, *(x.shape for x in inputs)]
    assert len(calls) == len(layout.buckets)
    for queries, keys, values, kwargs in calls:
        assert queries == keys == values == 4
        assert "enable_gqa" not in kwargs


def test_repeated_heads_of_keys_are_those_of_grouped_queries(monkeypatch):
    """What a GPU is asked for, computed here: head by head what the CPU's own grouping gives."""
    query, key, value = (x.transpose(0, 1)[None] for x in draw_inputs(7, heads=6, kv_heads=2))
    expected = attention_padded._attend(query, key, value, is_causal=True)
    monkeypatch.setattr(attention_padded, "_groups_heads", lambda device: False)
    result = attention_padded._attend(query, key, value, is_causal=True)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)


def test_whole_sequences_need_no_gathering():
    layout = build_layout(to_segments([(3, []), (1, []), (5, [])]), DOCUMENTED)
    assert isinstance(layout, RaggedLayout)
    assert layout.keys is None
    bounds = layout.bounds
    assert bounds.key_starts is bounds.query_starts
    assert bounds.query_starts.tolist() == [0, 3, 4, 9]
    assert (bounds.max_queries, layout.max_length) == (5, 5)
    moved = layout.to(torch.device("meta")).bounds
    assert moved.key_starts is moved.query_starts
    assert moved.key_starts.is_meta


def test_shared_prompts_are_repeated_among_the_keys_only():
    layout = build_layout(to_segments([(2, [3, 1]), (1, [])]), DOCUMENTED)
    assert layout.bounds.query_starts.tolist() == [0, 2, 5, 6, 7]
    assert layout.bounds.key_starts.tolist() == [0, 2, 7, 10, 11]
    assert layout.keys.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5, 6]
    assert (layout.bounds.max_queries, layout.max_length) == (3, 5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_a_shared_prompt_are_summed_in_float32(device):
    """In bfloat16 a sum of ones stops at 256. (torch's own sum is that narrow on CUDA only.)"""
    repeats = Backend("repeats", lambda query, key, value, *rest: value)
    layout = build_layout(to_segments([(1, [1] * 999)]), repeats).to(torch.device(device))
    inputs = draw_inputs(1000, dtype=torch.bfloat16, device=device)
    layout.attend(*inputs, scale=None, dropout=0.0).sum().backward()
    gradient = inputs[2].grad
    assert gradient.dtype == torch.bfloat16
    assert gradient[0].unique().tolist() == [1000]
    assert gradient[1:].unique().tolist() == [1]


def pack(rows, backend, max_tokens=1000, share_prefixes=True):
    rollouts, advantages, supervised = rows
    return pack_update(
        rollouts, advantages, supervised, [2] * len(supervised), config=PolicyLossConfig(),
        max_tokens=max_tokens, share_prefixes=share_prefixes, attention=backend,
    )  # fmt: skip


@pytest.mark.parametrize("share_prefixes", [True, False])
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(1, 3),
    size=st.integers(1, 4),
    supervised=st.integers(0, 3),
    max_tokens=st.sampled_from([40, 90, 1000]),
    longest=st.sampled_from([3, 17]),
)
def test_a_model_computes_what_each_sequence_alone_would(
    share_prefixes, seed, groups, size, supervised, max_tokens, longest
):
    rows = make_rows(seed, groups, size, supervised, longest)
    policy = tiny_policy(seed=seed % 3)
    packed, _ = run_packed(policy, pack(rows, DOCUMENTED, max_tokens, share_prefixes))
    expected, _ = one_at_a_time(policy, rows[0], rows[2])
    torch.testing.assert_close(packed, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_kernels_for_16_bits_get_16_bits(share_prefixes):
    """Rotary embeddings make float32 of queries and keys under autocast."""
    seen = set()

    def kernel(query, key, value, *rest):
        seen.update((query.dtype, key.dtype, value.dtype))
        return documented_kernel(query, key, value, *rest)

    rows = make_rows(11, 2, 4, 2)
    policy = tiny_policy(dtype=torch.bfloat16)
    ours, theirs = (
        run_packed(policy, pack(rows, backend, share_prefixes=share_prefixes))[0]
        for backend in (Backend("watched", kernel), SDPA)
    )
    assert seen == {torch.bfloat16}
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


# ---- the calls of torch's kernel and of flash-attn, on tensors without data


class Calls(TorchDispatchMode):
    """Records the arguments of torch's operator for variable lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.arguments: list[dict[str, object]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "torch_attn":
            names = [argument.name for argument in operator._schema.arguments]
            self.names.append(operator._schema.name)
            self.arguments.append(dict(zip(names, args, strict=False)))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("groups", [[(2, [3, 1]), (1, [])], [(4, []), (2, [])]])
def test_torchs_kernel_is_called_as_it_wants_to_be(monkeypatch, kv_heads, groups):
    segments = to_segments(groups)
    tokens = max(s.own.stop for s in segments)
    backend = Backend("varlen", attention_backends._load_varlen())
    layout = build_layout(segments, backend).to(torch.device("meta"))
    inputs = draw_inputs(tokens, kv_heads=kv_heads, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # unknown for "meta"
    with ForbidHostSync("meta"), Calls() as calls:
        results = with_gradients(lambda *x: layout.attend(*x, scale=0.3, dropout=0.0), inputs)
    assert [r.shape for r in results] == [inputs[0].shape, *(x.shape for x in inputs)]
    assert {r.dtype for r in results} == {torch.bfloat16}
    assert calls.names == ["torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"]
    for arguments in calls.arguments:
        assert arguments["is_causal"] is True
        assert list(arguments["window_size"]) == [-1, 0]
        assert arguments["scale"] == 0.3
        assert arguments["max_q"] == max(len(s.own) for s in segments)
        assert arguments["max_k"] == max(s.num_keys for s in segments)
        assert arguments["query"].shape == (tokens, 4, 8)
        assert arguments["key"].shape == (sum(s.num_keys for s in segments), kv_heads, 8)
        assert arguments["cu_seq_q"].dtype == arguments["cu_seq_k"].dtype == torch.int32


def test_torchs_kernel_sees_all_of_an_image(monkeypatch):
    backend = Backend("varlen", attention_backends._load_varlen())
    layout = build_layout(to_segments([(4, []), (2, [])]), backend, causal=False)
    inputs = draw_inputs(6, kv_heads=4, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    with Calls() as calls:
        layout.to(torch.device("meta")).attend(*inputs, scale=0.3, dropout=0.0)
    (arguments,) = calls.arguments
    assert arguments["is_causal"] is False
    assert list(arguments["window_size"]) == [-1, -1]


def test_compiles_into_one_graph(monkeypatch):
    segments = to_segments([(2, [3, 1]), (1, [])])
    backend = Backend("varlen", attention_backends._load_varlen())
    layout = build_layout(segments, backend).to(torch.device("meta"))
    inputs = draw_inputs(7, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(*heads_first: Tensor) -> Tensor:
        return packed_attention(None, *heads_first, None, layout=layout, scaling=0.3)[0]

    results = with_gradients(lambda *x: attend(*(t.transpose(0, 1)[None] for t in x)), inputs)
    assert [r.shape for r in results] == [(1, 7, 4, 8), *(x.shape for x in inputs)]


@pytest.fixture
def _fresh_loaders():
    loaders = attention_backends._load_varlen, attention_backends._load_flash_attn
    for loader in loaders:
        loader.cache_clear()
    yield
    for loader in loaders:
        loader.cache_clear()


def install(monkeypatch, name: str, **functions) -> None:
    module = ModuleType(name)
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("_fresh_loaders")
def test_torchs_kernel_of_release_2_11(monkeypatch):
    """It takes fewer key heads as they are, and knows no switch for that."""

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
        return_aux=None, scale=None, window_size=(-1, -1),
    ):  # fmt: skip
        assert window_size == (-1, 0)
        assert return_aux is None
        bounds = Bounds(cu_seq_q, cu_seq_k, max_q, max_k, causal=True)
        return documented_kernel(query, key, value, bounds, scale)

    install(monkeypatch, "torch.nn.attention.varlen", varlen_attn=varlen_attn)
    try_backend(Backend("varlen", attention_backends._load_varlen()), NEEDS)


@pytest.mark.usefixtures("_fresh_loaders")
def test_flash_attn_is_called_as_it_wants_to_be(monkeypatch):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert causal is True
        assert dropout_p == softcap == 0.0
        assert not return_attn_probs
        bounds = Bounds(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        return documented_kernel(q, k, v, bounds, softmax_scale)

    install(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    try_backend(Backend("flash_attn", attention_backends._load_flash_attn()), NEEDS)


# ---- the choice


NEEDS = AttentionNeeds(torch.device("cpu"), torch.bfloat16, 4, 2, 16)
ON_CUDA = replace(NEEDS, device=torch.device("cuda"))


def test_a_cpu_gets_padded_rectangles_and_the_reasons():
    choice = choose_backend("auto", NEEDS)
    assert choice.backend is SDPA
    reason = "needs a CUDA device, not cpu"
    assert choice.refused == {"varlen": reason, "flash_attn": reason}
    for name in choice.refused:
        with pytest.raises(UnavailableError, match=reason):
            choose_backend(name, NEEDS)


@pytest.mark.parametrize("name", ["varlen", "flash_attn"])
def test_kernels_for_variable_lengths_have_no_float32(name):
    needs = replace(ON_CUDA, dtype=torch.float32)
    reason = "computes in bfloat16 or float16, not float32"
    with pytest.raises(UnavailableError, match=reason):
        open_backend(name, needs)
    assert choose_backend("auto", needs).refused == {"varlen": reason, "flash_attn": reason}


@pytest.mark.usefixtures("_fresh_loaders")
def test_on_cuda_the_first_that_loads_and_passes_its_trial(monkeypatch):
    """varlen, else flash-attn, else rectangles; and with a name, that one or an error."""
    tried = []

    def trial(backend, needs):
        tried.append(backend.name)
        if backend.name == broken:
            raise UnavailableError("fails on a trial: no kernel image")

    broken = None
    monkeypatch.setattr(attention_backends, "try_backend", trial)
    install(monkeypatch, "flash_attn", flash_attn_varlen_func=documented_kernel)
    assert choose_backend("auto", ON_CUDA).backend.name == "varlen"
    assert choose_backend("flash_attn", ON_CUDA).backend.name == "flash_attn"
    assert choose_backend("sdpa", ON_CUDA).backend is SDPA
    broken = "varlen"
    choice = choose_backend("auto", ON_CUDA)
    assert choice.backend.name == "flash_attn"
    assert choice.refused == {"varlen": "fails on a trial: no kernel image"}
    assert tried == ["varlen", "flash_attn", "varlen", "flash_attn"]
    with pytest.raises(UnavailableError, match="no kernel image"):
        choose_backend("varlen", ON_CUDA)
    attention_backends._load_flash_attn.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    choice = choose_backend("auto", ON_CUDA)
    assert choice.backend is SDPA
    assert choice.refused["flash_attn"] == "is not installed"
    with pytest.raises(UnavailableError, match="is not installed"):
        choose_backend("flash_attn", ON_CUDA)
    install(monkeypatch, "flash_attn")  # without the function
    with pytest.raises(UnavailableError, match="cannot be imported: .*flash_attn_varlen_func"):
        choose_backend("flash_attn", ON_CUDA)


def test_the_trial_accepts_what_is_documented():
    for dtype in (torch.bfloat16, torch.float16):
        try_backend(DOCUMENTED, replace(NEEDS, dtype=dtype, num_heads=14, head_dim=64))


def aligned_at_the_start(query, key, value, bounds, scale) -> Tensor:
    """Causal from the first key, as scaled_dot_product_attention's own flag is."""
    outputs = []
    for (q0, q1), (k0, k1) in zip(
        bounds.query_starts.unfold(0, 2, 1).tolist(),
        bounds.key_starts.unfold(0, 2, 1).tolist(),
        strict=True,
    ):
        rows = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        out = torch.nn.functional.scaled_dot_product_attention(
            *rows, is_causal=True, enable_gqa=True
        )
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def off_by_one_key(query, key, value, *rest) -> Tensor:
    return documented_kernel(query, key, value, *rest, shift=1)


def without_key_gradient(query, key, value, *rest) -> Tensor:
    return documented_kernel(query, key.detach() + 0 * key, value, *rest)


def not_a_number(query, key, value, *rest) -> Tensor:
    return documented_kernel(query, key, value, *rest) * torch.nan


def not_built_for_this(query, key, value, *rest) -> Tensor:
    raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (aligned_at_the_start, "output differs from sdpa's"),
        (off_by_one_key, "output differs from sdpa's"),
        (without_key_gradient, "key gradient differs from sdpa's by 100%"),
        (not_a_number, "output differs from sdpa's by nan%"),
        (not_built_for_this, "fails on a trial: RuntimeError: CUDA error: no kernel image is ava"),
    ],
)
def test_the_trial_refuses_what_is_wrong(kernel, reason):
    with pytest.raises(UnavailableError, match=reason):
        try_backend(Backend("wrong", kernel), NEEDS)


def test_the_trial_of_a_vision_towers_backend():
    needs = replace(NEEDS, num_kv_heads=4, causal=False)
    try_backend(DOCUMENTED, needs)

    def always_causal(query, key, value, bounds, scale):
        return documented_kernel(query, key, value, replace(bounds, causal=True), scale)

    try_backend(Backend("wrong", always_causal), NEEDS)
    with pytest.raises(UnavailableError, match="output differs from sdpa's"):
        try_backend(Backend("wrong", always_causal), needs)


def test_the_trial_leaves_random_numbers_alone():
    state = torch.get_rng_state()
    try_backend(DOCUMENTED, NEEDS)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


def test_explicit_backend_that_cannot_run_is_an_error(folder):
    config = ModelConfig(path=folder, device="cpu", attention="varlen")
    with pytest.raises(ModelError, match=r"model\.attention: varlen cannot run .* CUDA device"):
        load_policy(config, folder)
    config = ModelConfig(path=folder, device="cpu")
    assert load_policy(config, folder).attention is SDPA
    with pytest.raises(ModelError, match=r"model\.attention: flash_attn cannot run"):
        load_policy(config, folder, trainable=False, attention="flash_attn")


def test_a_loaded_model_asks_for_its_own_heads(folder, monkeypatch, caplog):
    asked = []

    def choose(name, needs):
        asked.append((name, needs))
        return attention_backends.Choice(DOCUMENTED, {"varlen": "is broken"})

    monkeypatch.setattr("recap_fast.model.attention_choice.choose_backend", choose)
    caplog.set_level(logging.DEBUG, "recap_fast.model.attention_choice")
    policy = load_policy(ModelConfig(path=folder, dtype="bfloat16", device="cpu"), folder)
    assert policy.attention is DOCUMENTED
    assert asked == [("auto", AttentionNeeds(torch.device("cpu"), torch.bfloat16, 4, 2, 12))]
    assert "documented; varlen is broken" in caplog.text


@pytest.mark.parametrize(
    ("needs", "told"),
    [
        (replace(ON_CUDA, num_heads=28, num_kv_heads=4), "held 7 times"),
        (replace(ON_CUDA, num_kv_heads=4), "up to twice as long"),
        (replace(ON_CUDA, causal=False), "each size of image"),
    ],
)
def test_a_gpu_that_falls_back_to_padding_is_told_what_it_costs(monkeypatch, caplog, needs, told):
    """float32 on a GPU: the reason of each faster backend and the price, in one warning."""
    caplog.set_level(logging.INFO, "recap_fast.model.attention_choice")
    refused = replace(needs, dtype=torch.float32)
    assert attention_choice._backend_for("auto", "some/model", refused) is SDPA
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    text = warning.getMessage()
    assert "some/model falls back to torch's scaled dot product (varlen computes in bf" in text
    assert told in text
    assert ("held" in text) == (needs.num_heads != needs.num_kv_heads and needs.causal)


@pytest.mark.parametrize(("name", "needs"), [("sdpa", ON_CUDA), ("auto", NEEDS)])
def test_padding_that_was_asked_for_or_is_best_is_no_warning(caplog, name, needs):
    caplog.set_level(logging.INFO, "recap_fast.model.attention_choice")
    assert attention_choice._backend_for(name, "some/model", needs) is SDPA
    assert all(record.levelno < logging.WARNING for record in caplog.records)


def test_a_run_lays_its_batches_out_for_the_chosen_backend(folder, tmp_path, monkeypatch):
    """Training, the reference and the evaluation: none may fall back to padding in silence."""
    asked = []

    def choose(name, needs):
        asked.append(name)
        return attention_backends.Choice(DOCUMENTED, {})

    def no_padding(segments, **rest):
        raise AssertionError("padded")

    monkeypatch.setattr("recap_fast.model.attention_choice.choose_backend", choose)
    monkeypatch.setattr("recap_fast.model.attention.build_padded", no_padding)
    config = tiny_config(
        tmp_path, folder, "training.steps=1", "loss.kl_coef=0.05", "model.reference=initial"
    )
    trainer = Trainer(config)
    try:
        trainer.train()
    finally:
        trainer.close()
    assert asked == ["auto", "documented"]
    loss = read_metrics(tmp_path / "run")[-1]["eval/words/loss"]
    assert math.isfinite(loss)


# ---- on a GPU


@pytest.fixture(params=["varlen", "flash_attn"])
def cuda_backend(request):
    needs = AttentionNeeds(torch.device("cuda"), torch.bfloat16, 8, 2, 64)
    try:
        return open_backend(request.param, needs)
    except UnavailableError as error:
        if request.param == "varlen":
            raise  # comes with every torch that is supported
        pytest.skip(f"flash_attn {error}")


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("kv_heads", "size"), [(2, 64), (8, 128), (1, 32)])
def test_kernels_are_as_close_to_the_truth_as_sdpa(cuda_backend, shared, kv_heads, size):
    rng = np.random.default_rng(size)
    groups = [
        (int(rng.integers(1, 300)), rng.integers(1, 300, size=4 * shared).tolist())
        for _ in range(3)
    ]
    segments = to_segments(groups)
    tokens = max(s.own.stop for s in segments)
    inputs = draw_inputs(tokens, 8, kv_heads, size, torch.bfloat16, "cuda")

    def run(backend, inputs):
        layout = build_layout(segments, backend).to(inputs[0].device)
        return with_gradients(lambda *x: layout.attend(*x, scale=None, dropout=0.0), inputs)

    exact = run(DOCUMENTED, [x.detach().cpu().double().requires_grad_() for x in inputs])
    for ours, theirs, truth in zip(
        run(cuda_backend, inputs), run(SDPA, inputs), exact, strict=True
    ):
        ours_error, theirs_error = ((x.double().cpu() - truth).norm() for x in (ours, theirs))
        assert ours_error <= 1.5 * theirs_error + 1e-4 * truth.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shared", [True, False])
def test_padding_on_a_gpu_holds_no_scores(dtype, shared):
    """28 heads of queries, 4 of keys, a prompt of 8 rollouts: without torch's plain path."""
    segments = to_segments([(1024, [512] * 8 if shared else [])])
    inputs = draw_inputs(max(s.own.stop for s in segments), 28, 4, 128, dtype, "cuda")
    layout = build_layout(segments, SDPA).to(torch.device("cuda"))
    allowed = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(allowed):
        results = with_gradients(lambda *x: layout.attend(*x, scale=None, dropout=0.0), inputs)
    exact = [x.detach().cpu().float().requires_grad_() for x in inputs]
    on_cpu = build_layout(segments, SDPA)
    expected = with_gradients(lambda *x: on_cpu.attend(*x, scale=None, dropout=0.0), exact)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-3
    for result, wanted in zip(results, expected, strict=True):
        assert (result.cpu().float() - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [True, False])
def test_kernels_do_not_wait_for_the_device(cuda_backend, shared):
    segments = to_segments([(50, [70, 1, 30] if shared else []), (90, [])])
    inputs = draw_inputs(max(s.own.stop for s in segments), 8, 2, 64, torch.bfloat16, "cuda")
    layout = build_layout(segments, cuda_backend).to(torch.device("cuda"))
    with ForbidHostSync("cuda"):
        results = with_gradients(lambda *x: layout.attend(*x, scale=None, dropout=0.0), inputs)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.gpu
def test_a_captured_graph_gives_the_same(cuda_backend):
    segments = to_segments([(50, [70, 1, 30]), (90, [])])
    inputs = draw_inputs(max(s.own.stop for s in segments), 8, 2, 64, torch.bfloat16, "cuda")
    layout = build_layout(segments, cuda_backend).to(torch.device("cuda"))
    expected = layout.attend(*inputs, scale=None, dropout=0.0).detach()
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layout.attend(*inputs, scale=None, dropout=0.0)
        output.fill_(torch.nan)
        graph.replay()
    torch.testing.assert_close(output, expected, atol=0, rtol=0)


@pytest.mark.gpu
def test_a_model_on_cuda_takes_torchs_kernel_where_that_can_run(tmp_path):
    path = str(save_tiny_model(tmp_path))
    config = ModelConfig(path=path, device="cuda", liger=False)
    # The tiny model's heads are 12 wide; kernels want a multiple of 8.
    assert load_policy(config, path).attention is SDPA
    with pytest.raises(ModelError, match="varlen cannot run"):
        load_policy(config.model_copy(update={"attention": "varlen"}), path)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, initializer_range=0.1,
        )
    ).save_pretrained(path)  # fmt: skip
    float32 = config.model_copy(update={"dtype": "float32"})
    assert load_policy(float32, path).attention is SDPA
    policy = load_policy(config, path)
    assert policy.attention.name == "varlen"
    rows = make_rows(11, 2, 4, 2)
    states = []
    for backend in (policy.attention, SDPA):
        batch = pack(rows, backend).to(policy.device).batches[0]
        policy.model.zero_grad()
        with ForbidHostSync("cuda"):
            hidden = policy.hidden(batch)
            hidden.float().square().sum().backward()
        gradients = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
        states.append((hidden.float(), torch.cat(gradients)))
    for ours, theirs in zip(*states, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
