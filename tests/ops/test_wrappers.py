"""The loss inside what a loop wraps around a model: DDP, FSDP2, activation checkpointing,
torch.compile, a loss scaler. Losses and gradients are those of one plain process."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from recap_fast import PolicyLossConfig, PolicyLossOutput, RecapReweighter
from tests.example_modules import example
from tests.processes import report, run_ranks

ROWS, LENGTH, VOCAB, K = 7, 9, 131, 3
CONFIG = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.01, temperature=0.9)


def make_policy(tied: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small Llama with the loss in its forward, as examples/fsdp2.py makes it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    policy: nn.Module = example("fsdp2").WithLoss(LlamaForCausalLM(config).to(dtype))
    return policy


class Rows:
    """Rollouts of two rewards and rows of a supervised third objective, of unequal lengths."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
        self.targets = self.ids.roll(-1, 1)
        for row in range(ROWS):
            self.targets[row, LENGTH - 1 - row % 5 :] = -100
        self.objectives = torch.tensor([-1, -1, 2, -1, -1, 2, -1])
        self.advantages = torch.randn(ROWS, K, generator=generator)
        self.advantages[:, 2] = torch.nan
        self.advantages[1, 0] = torch.nan
        self.noise = 0.1 * torch.randn(3, ROWS, LENGTH, generator=generator)
        self.weights = torch.tensor([0.5, 0.9, 1.6])
        self.loss_scale: Tensor | None = None
        self.weight_grad: Tensor | None = None
        counted = (self.targets != -100).float().sum(1)
        is_policy = self.objectives < 0
        applies = (~self.advantages.isnan() & is_policy[:, None]).float()
        applies[:, 2] = (self.objectives == 2).float()
        self.denominators = (applies * counted[:, None]).sum(0)
        self.kl_denominator = counted[is_policy].sum()

    def loss(self, policy: nn.Module, rows: list[int]) -> PolicyLossOutput:
        """Of some of the rows, with the denominators of all."""
        old, ref, _ = (noise[rows].flatten() - 4.5 for noise in self.noise)
        numbers = torch.arange(len(rows)).repeat_interleave(LENGTH)
        output: PolicyLossOutput = policy(
            self.ids[rows],
            self.targets[rows],
            sequence_ids=numbers,
            advantages=self.advantages[rows],
            token_objectives=self.objectives[rows].repeat_interleave(LENGTH),
            objective_weights=self.weights,
            old_logprobs=old,
            ref_logprobs=ref,
            denominators=self.denominators,
            kl_denominator=self.kl_denominator,
            loss_scale=self.loss_scale,
            weight_grad=self.weight_grad,
            config=CONFIG,
        )
        return output


def plain(tied: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, losses and gradients of one process, all rows at once."""
    policy = make_policy(tied)
    output = Rows().loss(policy, list(range(ROWS)))
    output.loss.backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(policy.parameters()))
    return output.loss.detach(), output.objective_losses, gradients


def assert_gradients(policy: nn.Module, expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        wanted = expected[name]
        torch.testing.assert_close(
            parameter.grad, wanted, rtol=rtol, atol=rtol * wanted.abs().max().item(), msg=name
        )


# -- several processes


def wrapped(kind: str, policy: nn.Module) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(policy)
    sharded: nn.Module = example("fsdp2").shard(policy)
    return sharded


def train_step(kind: str, tied: bool) -> dict[str, float]:
    """Errors of two micro-batches a rank, of 1 to 3 rows, relative to one process."""
    loss, losses, gradients = plain(tied)
    policy = wrapped(kind, make_policy(tied))
    world = dist.get_world_size()
    total, parts = torch.zeros(()), torch.zeros(K)
    micro_batches = [[[0], [1]], [[2, 3], [4, 5, 6]]][dist.get_rank()]
    for number, rows in enumerate(micro_batches):
        is_last = number == len(micro_batches) - 1
        if kind == "fsdp2":
            policy.set_requires_gradient_sync(is_last)
        with policy.no_sync() if kind == "ddp" and not is_last else nullcontext():
            output = Rows().loss(policy, rows)
            (output.loss * world).backward()
        total += output.loss.detach()
        parts += output.objective_losses
    dist.all_reduce(total)
    dist.all_reduce(parts)
    errors = [(total - loss).abs() / loss.abs(), ((parts - losses).abs() / losses.abs()).max()]
    for name, parameter in policy.named_parameters():
        got = parameter.grad.full_tensor() if kind == "fsdp2" else parameter.grad
        wanted = gradients[name.removeprefix("module.")]
        errors.append((got - wanted).abs().max() / wanted.abs().max())
    names = ("loss", "losses", *gradients)
    return dict(zip(names, (error.item() for error in errors), strict=True))


def weight_grad_step(kind: str) -> dict[str, float]:
    """The head's gradient in a buffer, beside what reaches the weight, relative to one process."""
    wanted = plain(tied=False)[2]["model.lm_head.weight"]
    policy, rows = wrapped(kind, make_policy(tied=False)), Rows()
    rows.weight_grad = torch.zeros_like(wanted)
    rows.loss(policy, [[0, 1], [2, 3, 4, 5, 6]][dist.get_rank()]).loss.backward()
    own = (rows.weight_grad - wanted).abs().max() / wanted.abs().max()
    dist.all_reduce(rows.weight_grad)
    summed = (rows.weight_grad - wanted).abs().max() / wanted.abs().max()
    (head,) = (p for name, p in policy.named_parameters() if name.endswith("lm_head.weight"))
    reached = (
        0.0
        if head.grad is None
        else float(getattr(head.grad, "full_tensor", lambda: head.grad)().abs().max())
    )
    return {"own": own.item(), "summed": summed.item(), "reached": reached}


def main() -> None:
    dist.init_process_group("gloo")
    cases = {
        f"{kind}-{tied}": train_step(kind, tied)
        for kind in ("ddp", "fsdp2")
        for tied in (False, True)
    }
    report(cases=cases, weight_grad={kind: weight_grad_step(kind) for kind in ("ddp", "fsdp2")})
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(Path(__file__), 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_unequal_shares_add_up_to_one_process(
    ranks: list[dict[str, Any]], kind: str, tied: bool
) -> None:
    for rank in ranks:
        errors = rank["cases"][f"{kind}-{tied}"]
        assert len(errors) > 20
        assert {name: error for name, error in errors.items() if not error < 3e-6} == {}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_weight_grad_is_the_own_rank_s_part(ranks: list[dict[str, Any]], kind: str) -> None:
    """Autograd, where DDP and FSDP reduce gradients, brings none: who passes a buffer sums it."""
    for rank in ranks:
        errors = rank["weight_grad"][kind]
        assert errors["own"] > 0.1
        assert errors["summed"] < 3e-6
        assert errors["reached"] == 0


# -- one process

tied_or_not = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
ALL = list(range(ROWS))


@tied_or_not
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("what", ["layers", "everything"])
def test_activation_checkpointing(what: str, use_reentrant: bool, tied: bool) -> None:
    """Of the layers below the head, and of the whole forward, whose loss is then made twice."""
    expected = plain(tied)
    policy, rows = make_policy(tied), Rows()
    if what == "layers":
        policy.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        policy.train()
        output = rows.loss(policy, ALL)
        loss, losses = output.loss, output.objective_losses
    else:
        embedded = policy.model.get_input_embeddings()(rows.ids).requires_grad_()

        def forward(embeddings: Tensor) -> tuple[Tensor, Tensor]:
            # Reentrant checkpoints need an input that learns; token ids do not.
            with_ids = policy.model.get_decoder().forward
            policy.model.get_decoder().forward = lambda input_ids: with_ids(
                inputs_embeds=embeddings
            )
            try:
                output = rows.loss(policy, ALL)
            finally:
                del policy.model.get_decoder().forward
            return output.loss, output.objective_losses

        loss, losses = checkpoint(forward, embedded, use_reentrant=use_reentrant)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(losses, expected[1])
    assert_gradients(policy, expected[2])


@pytest.mark.thinned(2)
@tied_or_not
def test_compiled_in_one_graph_with_the_reweighter(tied: bool) -> None:
    rows = Rows()
    results = []
    for is_compiled in (False, True):
        policy, reweighter = make_policy(tied), RecapReweighter(K, window=1, temperature=0.5)

        def step(policy: nn.Module, reweighter: RecapReweighter, values: Tensor) -> Tensor:
            rows.weights = reweighter.update(values)
            return rows.loss(policy, ALL).loss

        run = torch.compile(step, fullgraph=True, backend="aot_eager") if is_compiled else step
        losses = []
        for scale in (1.0, 0.9, 0.5):
            loss = run(policy, reweighter, torch.tensor([1.0, 2.0, 3.0]) ** scale)
            loss.backward()
            losses.append(loss.item())
        results.append((losses, {n: p.grad for n, p in policy.named_parameters()}))
        assert reweighter.weights.ne(1).all()
    (plain_losses, gradients), (losses, _) = results
    assert losses == pytest.approx(plain_losses)
    assert_gradients(policy, gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_near_as_the_unfused_model(dtype: torch.dtype) -> None:
    """Log-probs and head gradient under autocast, against float32, beside those of the logits."""
    rows, exact = Rows(), make_policy(tied=False)
    counted = (rows.targets != -100).flatten()

    def unfused(policy: nn.Module) -> Tensor:
        logits = policy.model(input_ids=rows.ids).logits.float().flatten(0, 1) / CONFIG.temperature
        return logits.log_softmax(-1)[counted].gather(1, rows.targets.flatten()[counted, None])

    truth = unfused(exact).detach()[:, 0]
    errors, kinds = [], set()
    for is_fused in (False, True):
        with torch.autocast("cpu", dtype):
            if is_fused:
                output = rows.loss(exact, ALL)
                got = output.logprobs[counted]
                kinds.add(got.dtype)
            else:
                got = unfused(exact).detach()[:, 0]
        errors.append((got - truth).abs().mean().item())
    assert kinds == {torch.float32}
    assert 0 < errors[1] < 1.2 * errors[0]
    output.loss.backward()
    expected = plain(tied=False)[2]
    for name, parameter in exact.named_parameters():
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < (0.05 if dtype == torch.bfloat16 else 0.01), name


def train_in_half(scaled: bool | None, steps: int = 12) -> tuple[list[float], float]:
    """A few steps of AdamW on tiny losses: float32 (None), or float16 autocast with a scaler whose
    factor the loss is told (True) or not. Losses, and the share of zeros in the head's first
    gradient.
    """
    policy, rows = make_policy(tied=False), Rows()
    rows.denominators *= 1e6  # such as one micro-batch of very many
    rows.kl_denominator *= 1e6
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, eps=1e-12)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, enabled=scaled is not None)
    losses, zeros = [], torch.nan
    for _ in range(steps):
        rows.loss_scale = scaler.scale(torch.ones(())) if scaled else None
        with torch.autocast("cpu", torch.float16, enabled=scaled is not None):
            output = rows.loss(policy, ALL)
        scaler.scale(output.loss).backward()
        if not losses:
            zeros = (policy.model.lm_head.weight.grad == 0).float().mean().item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(output.loss.item() * 1e6)
    return losses, zeros


def test_float16_with_a_grad_scaler_trains_as_float32() -> None:
    exact, no_zeros = train_in_half(None)
    half, few_zeros = train_in_half(True)
    untold, zeros = train_in_half(False)
    assert no_zeros < 0.01
    assert few_zeros < 0.01
    assert zeros > 0.8  # gradients were made, and vanished, before the scaler's factor came
    assert exact[-1] < 0.2 * exact[0]
    assert half == pytest.approx(exact, rel=0.01)
    assert untold[-1] > 0.6 * untold[0]  # hardly learns


if __name__ == "__main__":
    main()
