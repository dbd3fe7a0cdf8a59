"""The benchmarks measure what they say: adapters against float64, absences, counts, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import LossLab
from benchmarks.inputs import SHAPES, Inputs, Shape, compute_truth, errors
from benchmarks.measuring import device_timer, peak_mib
from benchmarks.peers import (
    FLOORS,
    LOGPROBS,
    POLICY_LOSSES,
    VERL_HEADS,
    Implementation,
    _unsloth_fused_linear,
    clipped_mean,
    from_logprobs,
)
from benchmarks.training_step import WORKLOADS, make_rollouts, model_flops, recap_step
from recap_fast.bench.suites import SHAPES as SHAPE_WORDS
from recap_fast.bench.suites import run_suites
from recap_fast.model.policy import Policy
from recap_fast.types import UserError

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TINY = Shape(3, 5, 16, 101, "float32")
RUNNABLE = {
    i.name: i
    for i in (*POLICY_LOSSES, *LOGPROBS)
    if i.kind != "floor" and i.why_absent(CPU, "float32") is None
}


def test_the_truth_is_what_autograd_finds_in_float64():
    inputs = Inputs.random(TINY)
    hidden = inputs.hidden.detach().double().requires_grad_()
    weight = inputs.weight.detach().double().requires_grad_()
    logprobs = torch.log_softmax(hidden @ weight.t(), -1)
    picked = logprobs.gather(-1, inputs.targets[..., None])[..., 0]
    clipped_mean(picked, inputs.advantages.double()).backward()
    truth = compute_truth(inputs)
    torch.testing.assert_close(truth.logprobs, picked.detach())
    torch.testing.assert_close(truth.d_hidden, hidden.grad)
    torch.testing.assert_close(truth.d_weight, weight.grad)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if "torch.compile" in name else ())
        for name in RUNNABLE
    ],
)
def test_adapters_compute_the_same_step(name):
    inputs = Inputs.random(TINY)
    step = RUNNABLE[name].build(inputs)
    for _ in range(2):  # a step can be run again
        inputs.clear()
        logprobs = step()
        found = errors(inputs, logprobs, compute_truth(inputs))
        assert max(found.values()) < 1e-5, found
    if "Liger" not in name:
        assert logprobs is not None


ON_CUDA = {
    f"{suite}, {i.name}": i
    for suite, implementations in (("loss", POLICY_LOSSES), ("log-probs", LOGPROBS))
    for i in implementations
    if i.name.startswith(("recap-fast triton", "Liger Triton", "Liger CuTe"))
}


@pytest.mark.parametrize("name", ON_CUDA)
def test_adapters_for_cuda_are_called_as_they_want(name):
    """Triton runs in its interpreter; Liger's CuTe function has a torch path behind one name."""
    inputs = Inputs.random(TINY)
    found = errors(inputs, ON_CUDA[name].build(inputs)(), compute_truth(inputs))
    assert max(found.values()) < 1e-5, found


def nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        (hidden @ weight.t()).flatten(0, -2), targets.flatten(), reduction="none"
    ).view_as(targets)


def cce_as_documented(e, c, targets, bias=None, reduction="mean", impl="cce"):
    assert impl in ("cce", "cce_exact")
    assert reduction == "none"
    return nll(e, c, targets)


def quack_as_documented(
    x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True,
    use_scaled_exp=None,
):  # fmt: skip
    assert x.dim() == 2
    assert reduction == "mean"
    return nll(x, weight, target).mean()


def quack_whole_as_documented(
    x, weight, bias, target, ignore_index=-100, reduction="mean", inplace_backward=False
):
    assert bias is None
    assert reduction == "none"
    return nll(x, weight, target)


def verl_as_documented(hidden, weight, labels, temperature=1.0, reduction="none", group=None):
    assert reduction == "none"
    assert hidden.dim() == 2
    return -nll(hidden, weight, labels), torch.zeros(len(labels))


class VerlHeadAsDocumented:
    def __init__(self, chunk_size=512, impl_backend="torch"):
        assert impl_backend == "torch"

    def __call__(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        logprobs = -nll(hidden_states, vocab_weights, input_ids)
        return logprobs, torch.zeros_like(logprobs)


STANDINS = {
    "verl's head": (
        "verl.utils.experimental.torch_functional", "FusedLinearForPPO", VerlHeadAsDocumented,
    ),
    "CCE": ("cut_cross_entropy", "linear_cross_entropy", cce_as_documented),
    "CCE exact": ("cut_cross_entropy", "linear_cross_entropy", cce_as_documented),
    "quack": (
        "quack.linear_cross_entropy", "chunked_linear_cross_entropy", quack_as_documented,
    ),
    "quack, whole logits": (
        "quack.linear_cross_entropy", "linear_cross_entropy_func", quack_whole_as_documented,
    ),
    "verl Triton": (
        "verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", verl_as_documented,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STANDINS)
def test_adapters_of_packages_that_need_a_gpu_to_install(name, monkeypatch):
    """Against functions of the documented signature: shapes, signs, and which loss it is."""
    path, function, standin = STANDINS[name]
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    setattr(sys.modules[path], function, standin)
    implementation = next(i for i in (*POLICY_LOSSES, *VERL_HEADS) if i.name == name)
    inputs = Inputs.random(TINY)
    if implementation.is_cross_entropy:
        inputs = inputs.with_unit_advantages()
    found = errors(inputs, implementation.build(inputs)(), compute_truth(inputs))
    assert max(found.values()) < 1e-5, found


UNSLOTH = """
import torch

def fused_linear_logprobs(
    hidden, weight, targets, *, bias=None, mask=None, temperature=1.0, logit_scale_multiply=0.0,
    logit_scale_divide=0.0, logit_softcapping=0.0, return_entropy=False, return_mean_logits=False,
    return_log_sum_sq_probs=False, return_is_top1=False, rows_per_chunk=None,
    entropy_requires_grad=True, max_rows_per_chunk=None,
):
    assert return_entropy
    assert return_mean_logits == return_log_sum_sq_probs == return_is_top1
    logprobs = torch.log_softmax(hidden @ weight.t(), -1)
    picked = logprobs.gather(-1, targets[..., None])[..., 0]
    return (picked,) + (torch.zeros_like(picked),) * (4 if return_mean_logits else 1)
"""


@pytest.mark.parametrize(
    "implementation", [i for i in LOGPROBS if i.name.startswith("unsloth")], ids=str
)
def test_the_adapter_of_unsloth_takes_one_file_and_not_the_package(
    implementation, tmp_path, monkeypatch
):
    package = tmp_path / "unsloth_zoo"
    (package / "fused_losses").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it wants unsloth, and patches torch')")
    (package / "fused_losses" / "fused_linear.py").write_text(UNSLOTH)
    monkeypatch.syspath_prepend(tmp_path)
    _unsloth_fused_linear.cache_clear()
    assert implementation.why_absent(CPU, "float32") is None
    inputs = Inputs.random(TINY)
    found = errors(inputs, implementation.build(inputs)(), compute_truth(inputs))
    _unsloth_fused_linear.cache_clear()
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("floor", [FLOORS[0]], ids=str)
def test_the_floor_runs_the_three_products(floor):
    inputs = Inputs.random(TINY)
    floor.build(inputs)()
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = hidden @ weight.t()
    torch.testing.assert_close(inputs.hidden.grad, logits @ weight)
    wanted = logits.flatten(0, 1).t() @ hidden.flatten(0, 1)
    torch.testing.assert_close(inputs.weight.grad, wanted)


def test_absences_are_explained(monkeypatch):
    base = Implementation("x", lambda inputs: lambda: None)
    assert base.why_absent(CPU, "bfloat16") is None
    missing = replace(base, package="no_such_package")
    assert missing.why_absent(CPU, "bfloat16") == "no_such_package is not installed"
    on_cuda = replace(base, devices=("cuda",))
    assert on_cuda.why_absent(CPU, "bfloat16") == "needs cuda, this is cpu"
    half = replace(base, dtypes=("bfloat16",))
    assert "float32" in str(half.why_absent(CPU, "float32"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    hopper = replace(base, capability=(9, 0))
    assert "(8, 0)" in str(hopper.why_absent(torch.device("cuda"), "bfloat16"))


@pytest.mark.parametrize("factor", [1.2, float("nan")])
def test_a_wrong_result_gets_no_time(factor):
    def off(hidden, weight, targets):
        logprobs = torch.log_softmax(hidden @ weight.t(), -1)
        return factor * logprobs.gather(-1, targets[..., None])[..., 0]

    lab = LossLab(TINY, CPU)
    peer = Implementation("off", lambda inputs: from_logprobs(off, inputs))
    with pytest.raises(pytest.skip.Exception, match="wrong: error_"):
        lab.check(peer, lab.build(peer))
    ours = replace(peer, kind="ours")
    with pytest.raises(pytest.fail.Exception, match="wrong: error_"):
        lab.check(ours, lab.build(ours))


BOGUS = """
import pytest
@pytest.mark.parametrize("implementation", ["fine peer", "bogus peer", "recap-fast broken"])
def test_bogus(implementation, benchmark):
    if implementation == "bogus peer":
        raise ZeroDivisionError("a peer's own bug")
    assert "recap" not in implementation
    benchmark.pedantic(sum, args=((1, 2),), rounds=2)
    benchmark.extra_info.update(suite="bogus", size="1", implementation=implementation)
"""


def test_a_peer_that_fails_is_noted_and_ours_fails_the_run(tmp_path):
    file, results = tmp_path / "test_bogus.py", tmp_path / "results.json"
    file.write_text(BOGUS)
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.conftest", str(file), "-q",
               "-c", str(ROOT / "pyproject.toml"), f"--benchmark-json={results}",
               "-p", "no:cacheprovider"]  # fmt: skip
    # pytest-benchmark stands back in a worker of pytest-xdist, which this process may be.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    record = json.loads(results.read_text())
    (measured,) = record["benchmarks"]
    assert measured["extra_info"]["implementation"] == "fine peer"
    noted = {entry["implementation"]: entry for entry in record["not_measured"]}
    assert noted["bogus peer"]["reason"] == "failed: ZeroDivisionError: a peer's own bug"
    assert not noted["bogus peer"]["failed"]
    assert noted["recap-fast broken"]["failed"]
    assert "node" not in record["machine_info"]
    assert record["recap_fast"]["versions"]["torch"] == torch.__version__


def test_plain_pytest_does_not_collect_the_suites():
    configured = (ROOT / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in configured


def test_shapes_have_the_same_words_everywhere():
    assert set(SHAPES) == set(WORKLOADS) == set(SHAPE_WORDS)
    tokens = {(shape.tokens, shape.hidden, shape.vocab) for shape in SHAPES["gpu"]}
    assert tokens == {(n, h, 151936) for n in (8192, 32768, 131072) for h in (2048, 3584)}


def test_peak_memory_sees_what_a_step_holds():
    shape = Shape(16, 64, 64, 8192)
    logits = shape.tokens * shape.vocab * 4 / 2**20  # float32, MiB
    eager = peak_mib("eager torch", "policy_loss", shape, CPU)
    chunked = peak_mib("chunked torch (as verl)", "policy_loss", shape, CPU)
    assert eager is not None
    assert chunked is not None
    assert logits < eager < 6 * logits
    assert chunked < 0.8 * eager, "half the rows at a time"


def test_flops_are_counted_as_they_are_done():
    from torch.utils.flop_counter import FlopCounterMode

    workload = WORKLOADS["small"]
    _, update, model = recap_step(workload, CPU)
    policy = Policy(model, torch.bfloat16)
    products = 0
    for batch in update.batches:
        with FlopCounterMode(display=False) as counter:
            policy.hidden(batch).sum().backward()
        counts = counter.get_flop_counts()["Global"]
        products += sum(n for op, n in counts.items() if "mm" in str(op))
    # Attention by its definition: query, key and value products of every visible pair.
    pairs, seen = 0, set()
    for rollout in make_rollouts(workload)[0]:
        prompt, own = len(rollout.prompt.token_ids), len(rollout.token_ids) - 1
        start = prompt if rollout.group in seen else 0
        seen.add(rollout.group)
        pairs += sum(position + 1 for position in range(start, prompt + own))
    attention = 3 * 4 * workload.model.layers * workload.model.hidden * pairs
    head = 6 * update.num_policy_tokens * workload.model.hidden * workload.model.vocab
    assert model_flops(workload, update) == products + attention + head


def test_cpu_timer_counts_seconds():
    timer = device_timer(CPU)
    start = timer()
    time.sleep(0.02)
    assert 0.02 <= timer() - start < 1


@pytest.mark.gpu
def test_event_timer_counts_the_devices_seconds():
    timer = device_timer(torch.device("cuda"))
    start = timer()
    torch.cuda._sleep(20_000_000)  # cycles: about 10 ms at 2 GHz
    assert 0.002 < timer() - start < 0.2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"names": ["losses"]}, "no suite 'losses'.*policy_loss.*training_step"),
        ({"names": [], "shapes": "huge"}, "small, cpu, gpu, got 'huge'"),
    ],
)
def test_bench_says_what_it_wants(arguments, words, tmp_path):
    with pytest.raises(UserError, match=words):
        run_suites(**arguments, output=tmp_path)
