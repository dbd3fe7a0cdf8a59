"""The kernel of `group_advantages`, interpreted, against the eager formula in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recap_fast.kernels.advantages import BLOCK_IDS, group_advantages_kernel
from recap_fast.ops import group_advantages, reference
from recap_fast.ops.launch import Launch, launch, recording
from recap_fast.ops.triton_advantages import NORMALIZATIONS
from tests.no_sync import ForbidHostSync

NAN, INF = float("nan"), float("inf")
normalizations = st.sampled_from(sorted(NORMALIZATIONS))


def _rewards(generator: torch.Generator, s: int, k: int) -> Tensor:
    """Few values, so that some groups agree; a third absent; strided."""
    rewards = torch.randint(0, 4, (k, s), generator=generator).t() / 3
    rewards[torch.randint(0, 3, (s, k), generator=generator) == 0] = NAN
    return rewards


def _check(rewards: Tensor, groups: Tensor, normalize: str = "std") -> None:
    got = group_advantages(rewards, groups, normalize=normalize, impl="triton")
    expected = reference.group_advantages(rewards.double(), groups, normalize)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 9999),
    s=st.integers(0, 12),
    k=st.sampled_from([1, 2, 3, 8, 31, 32]),
    normalize=normalizations,
    ids=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8]),
)
def test_agrees_with_the_formula(
    seed: int, s: int, k: int, normalize: str, ids: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(-5, 5, (s,), generator=generator).mul(10).to(ids)
    _check(_rewards(generator, s, k), groups, normalize)


@pytest.mark.parametrize(("s", "k"), [(6, 100), (3, 3000), (0, 4), (4, 0)])
def test_any_number_of_objectives(s: int, k: int) -> None:
    _check(_rewards(torch.Generator().manual_seed(0), s, k), torch.arange(s) % 2)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("normalize", sorted(NORMALIZATIONS))
@pytest.mark.parametrize("block", [2, 64])
def test_groups_lie_anywhere(normalize: str, block: int) -> None:
    s, k, programs = 2 * BLOCK_IDS.value + 40, 3, 6
    generator = torch.Generator().manual_seed(block)
    rewards = _rewards(generator, s, k).contiguous()
    groups = torch.arange(7, 7 + s)
    # Neighbours; both ends; 128 from here on; next to nobody; over a border of two blocks of ids.
    groups[1], groups[s - 1] = int(groups[0]), int(groups[2])
    groups[torch.randperm(s - 10, generator=generator)[:127] + 8] = int(groups[3])
    groups[BLOCK_IDS.value - 1 : BLOCK_IDS.value + 1] = int(groups[5])
    advantages = torch.full((s, k), NAN)
    launch(
        group_advantages_kernel,
        (programs,),
        rewards.device,
        rewards_ptr=rewards,
        group_ids_ptr=groups,
        advantages_ptr=advantages,
        num_sequences=s,
        num_objectives=k,
        eps=1e-4,
        NORMALIZE=NORMALIZATIONS[normalize],
        BLOCK_K=4,
        BLOCK_S=block,
    )
    expected = reference.group_advantages(rewards.double(), groups, normalize)[:programs]
    torch.testing.assert_close(advantages[:programs].double(), expected, rtol=1e-6, atol=1e-7)
    assert advantages[programs:].isnan().all()


def test_a_small_spread_about_a_large_mean_is_not_lost() -> None:
    rewards = 1e6 + torch.tensor([[0.0], [0.0625], [0.125], [0.0]])
    _check(rewards, torch.zeros(4, dtype=torch.int64))
    _check(torch.tensor([[1e-30], [3e-30], [3e38], [-3e38]]), torch.tensor([0, 0, 1, 1]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of inf - inf
@pytest.mark.parametrize("normalize", sorted(NORMALIZATIONS))
def test_infinite_rewards_give_what_torch_gives(normalize: str) -> None:
    rewards = torch.tensor([[INF, 1.0, -INF], [1.0, 1.0, INF], [INF, INF, 0.0], [2.0, 1.0, 0.0]])
    groups = torch.tensor([0, 0, 1, 0])
    torch.testing.assert_close(
        group_advantages(rewards, groups, normalize=normalize, impl="triton"),
        group_advantages(rewards, groups, normalize=normalize, impl="torch"),
        equal_nan=True,
    )


def test_equal_members_are_equal_to_the_bit_and_runs_too() -> None:
    rewards = torch.rand(5, 2)[torch.tensor([0, 1, 2, 1, 0, 3, 1, 4])]
    groups = torch.tensor([4, 4, 9, 4, 4, 9, 4, 9])
    first, again = (group_advantages(rewards, groups, impl="triton") for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first[0], first[4])
    assert torch.equal(first[1], first[6])


def test_one_launch_without_a_sync() -> None:
    launches: list[Launch] = []
    rewards, groups = torch.rand(6, 2), torch.arange(6) // 3
    with ForbidHostSync(), recording(launches.append):
        group_advantages(rewards, groups, impl="triton")
    assert [launch.grid for launch in launches] == [(6,)]


@pytest.mark.gpu
@pytest.mark.parametrize(("s", "k"), [(1, 1), (64, 1), (700, 5), (4096, 32), (96, 200)])
@pytest.mark.parametrize("normalize", sorted(NORMALIZATIONS))
def test_on_cuda_agrees_with_the_formula(s: int, k: int, normalize: str) -> None:
    generator = torch.Generator().manual_seed(s)
    rewards = _rewards(generator, s, k).contiguous().cuda()
    groups = (torch.randperm(s, generator=generator) // 8).cuda()
    with ForbidHostSync("cuda"):
        got = group_advantages(rewards, groups, normalize=normalize)
    assert torch.equal(got, group_advantages(rewards, groups, normalize=normalize, impl="triton"))
    exact = group_advantages(rewards.double(), groups, normalize=normalize, impl="torch")
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
def test_a_captured_graph_follows_its_inputs() -> None:
    rewards, groups = torch.rand(64, 3, device="cuda"), torch.arange(64, device="cuda") // 8
    group_advantages(rewards, groups)  # compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = group_advantages(rewards, groups)
    for seed in range(3):
        rewards.copy_(torch.rand(64, 3, generator=torch.Generator().manual_seed(seed)))
        groups.copy_(groups.flip(0) + seed)
        graph.replay()
        assert torch.equal(replayed, group_advantages(rewards, groups))
