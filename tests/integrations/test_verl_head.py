"""Our head against verl's, alone and in a model that verl has patched."""

from __future__ import annotations

from tests.integrations.verl_config import ppo_config  # skips where there is no verl

# isort: split
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from verl.models.transformers import monkey_patch
from verl.utils.experimental import torch_functional

import recap_fast.integrations.verl  # noqa: F401  adds the backend
from recap_fast.integrations import verl_head
from recap_fast.integrations.verl_head import FusedLinearForPPO
from tests.processes import run_ranks

THEIRS = verl_head._THEIR_HEAD
H, V = 24, 301


def head_inputs(*rows: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    hidden = torch.randn(*rows, H, dtype=dtype)
    weight = torch.randn(V, H, dtype=dtype) / 3
    return [hidden, weight, torch.randint(V, rows)]


def run(head: torch.nn.Module, given: list[Tensor], temperature: float) -> list[Tensor]:
    """Log-probs, entropies, and the gradients of the hidden states and the weight, in float32."""
    hidden, weight = (tensor.clone().requires_grad_() for tensor in given[:2])
    logprobs, entropy = head(hidden, weight, given[2], temperature)
    assert logprobs.shape == entropy.shape == given[2].shape
    generator = torch.Generator().manual_seed(1)
    factors = torch.rand(2, *logprobs.shape, generator=generator).to(logprobs.dtype)
    (factors[0] * logprobs + factors[1] * entropy).sum().backward()
    return [x.detach().float() for x in (logprobs, entropy, hidden.grad, weight.grad)]


def oracle(given: list[Tensor], temperature: float) -> list[Tensor]:
    def head(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Any:
        every = (hidden @ weight.T / temperature).log_softmax(-1)
        chosen = every.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return chosen, -(every.exp() * every).sum(-1)

    return run(head, [given[0].double(), given[1].double(), given[2]], temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [(3, 37), (1, 600), (129,)])
def test_values_and_gradients_are_verls(rows: tuple[int, ...], temperature: float) -> None:
    given = head_inputs(*rows)
    ours = run(FusedLinearForPPO(), given, temperature)
    theirs = run(THEIRS(), given, temperature)
    for mine, their, truth in zip(ours, theirs, oracle(given, temperature), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=2e-5)


def test_in_bfloat16_no_further_from_the_truth_than_verls() -> None:
    given = head_inputs(2, 64, dtype=torch.bfloat16)
    ours, theirs = run(FusedLinearForPPO(), given, 0.9), run(THEIRS(), given, 0.9)
    for mine, their, truth in zip(ours, theirs, oracle(given, 0.9), strict=True):
        assert (mine - truth).square().mean() <= 1.2 * (their - truth).square().mean()


def test_labels_of_other_integer_types_are_taken() -> None:
    hidden, weight, targets = head_inputs(2, 5)
    wide, narrow = (FusedLinearForPPO(chunk_size=3)(hidden, weight, x) for x in (
        targets, targets.int(),
    ))  # fmt: skip
    assert wide[0].equal(narrow[0])


def test_what_does_not_fit_is_named() -> None:
    hidden, weight, targets = head_inputs(2, 5)
    with pytest.raises(ValueError, match="temperature: wanted one number, got a tensor"):
        FusedLinearForPPO()(hidden, weight, targets, torch.ones(2))
    with pytest.raises(ValueError, match=r"input_ids: wanted \[2, 5\], got \[2, 4\]"):
        FusedLinearForPPO()(hidden, weight, targets[:, 1:])
    with pytest.raises(ValueError, match="Unsupported FusedLinearForPPO backend: triton"):
        FusedLinearForPPO(impl_backend="triton")


def test_the_other_backends_stay_verls(count: list[int]) -> None:
    given = head_inputs(2, 5)
    wanted = run(THEIRS(), given, 0.7)
    for options in ({}, {"impl_backend": "torch"}, {"impl_backend": "liger"}):
        made = torch_functional.FusedLinearForPPO(**options)
        assert isinstance(made, THEIRS)
        assert made.impl_backend == options.get("impl_backend", "torch")
        assert all(map(torch.equal, run(made, given, 0.7), wanted))  # liger is not installed
    assert count == []
    run(torch_functional.FusedLinearForPPO(impl_backend="recap_fast"), given, 0.7)
    assert count == [10]
    with pytest.raises(ValueError, match="Unsupported FusedLinearForPPO backend"):
        torch_functional.FusedLinearForPPO(impl_backend="quick")


def tiny_model(kind: str = "Qwen2", tied: bool = False, **others: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=V, hidden_size=H, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        tie_word_embeddings=tied, pad_token_id=0, bos_token_id=0, eos_token_id=0, **others,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each call of our head; and the classes' forward is put back after the test."""
    calls: list[int] = []
    ours = verl_head.linear_logprobs

    def counted(hidden: Tensor, *others: Any, **options: Any) -> Any:
        calls.append(hidden.shape[0])
        return ours(hidden, *others, **options)

    monkeypatch.setattr(verl_head, "linear_logprobs", counted)
    for kind in (transformers.Qwen2ForCausalLM, transformers.LlamaForCausalLM):
        monkeypatch.setattr(kind, "forward", kind.forward)
    return calls


def step(model: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    output = model(**batch, return_dict=True, use_cache=False, temperature=0.8)
    (output.log_probs.sum() - 0.1 * output.entropy.sum()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return output, gradients


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "tied"), [("Qwen2", False), ("Qwen2", True), ("Llama", False)])
def test_a_model_patched_by_verl_computes_the_same(
    kind: str, tied: bool, packed: bool, count: list[int]
) -> None:
    model = tiny_model(kind, tied)
    ids = torch.randint(V, (1, 20) if packed else (3, 9))
    batch: dict[str, Any] = {"input_ids": ids}
    if packed:  # as verl's engine sends it, labels included
        batch["position_ids"] = torch.cat([torch.arange(12), torch.arange(8)]).unsqueeze(0)
        batch["shift_labels"] = ids.roll(-1, dims=1)
    results = []
    for backend, calls in (("torch", 0), ("recap_fast", 1)):
        monkey_patch.patch_forward_with_backends(model, True, backend)
        results.append(step(model, batch))
        assert len(count) == calls
    (theirs, their_gradients), (ours, our_gradients) = results
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_gradients, their_gradients, rtol=1e-4, atol=1e-4)
    assert their_gradients["model.embed_tokens.weight"].abs().max() > 1e-2


def test_verls_own_entry_reaches_it(count: list[int]) -> None:
    """`apply_monkey_patch`, as the FSDP engine calls it, with the backend of verl's config."""
    options = ppo_config(
        "actor_rollout_ref.model.fused_kernel_options.impl_backend=recap_fast"
    ).actor_rollout_ref.model.fused_kernel_options
    model = tiny_model()
    monkey_patch.apply_monkey_patch(
        model,
        use_remove_padding=False,
        use_fused_kernels=True,
        fused_kernels_backend=options.get("impl_backend"),
    )
    step(model, {"input_ids": torch.randint(V, (2, 6))})
    assert count == [12]


FALCON_H1 = {
    "lm_head_multiplier": 0.5, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8,
    "mamba_d_state": 8, "mamba_n_groups": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "others", "name"),
    [
        ("Gemma2", {"final_logit_softcapping": 30.0, "head_dim": 8}, r"capped at 30\.0"),
        ("Granite", {"logits_scaling": 8.0}, r"multiplied by 0\.125"),
        ("Cohere", {"logit_scale": 0.25}, r"multiplied by 0\.25"),
        ("FalconH1", FALCON_H1, r"multiplied by 0\.5"),
        ("Phi", {}, "a bias in its lm_head"),
    ],
)
def test_models_with_more_than_a_matrix_in_their_head_are_refused(
    kind: str, others: dict[str, Any], name: str
) -> None:
    model = tiny_model(kind, **others)
    before = type(model).forward
    with pytest.raises(ValueError, match=name):
        monkey_patch.patch_forward_with_backends(model, True, "recap_fast")
    assert type(model).forward is before


def test_under_verls_fsdp2_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    """The head a unit of its own, as verl makes it, and tied to the embedding in the root's."""
    ranks = run_ranks(Path(__file__).parent / "verl_fsdp2.py", 2, tmp_path)
    for reported in ranks:
        assert reported["separate_units"] == {"untied": True, "tied": False}
        for error, gradient in zip(
            reported["errors"].values(), reported["gradients"].values(), strict=True
        ):
            assert error < 1e-5
            assert gradient > 1e-2
        assert "of a head [301, 32]" in reported["refused"]
        assert "DTensor" in reported["theirs"]  # verl's backends: what ours mends
