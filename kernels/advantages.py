"""Group-relative advantages of one sequence, for all objectives at once.

Mirrors `recap_fast/ops/advantages.py`, which gives the meaning. Shapes: S sequences, K objectives.
"""

import triton
import triton.language as tl

# How advantages are normalised.
STD = tl.constexpr(0)
NONE = tl.constexpr(1)
LEAVE_ONE_OUT = tl.constexpr(2)

BLOCK_IDS = tl.constexpr(256)


@triton.jit
def group_extent(group_ids_ptr, group, num_sequences):
    """The first row of a group, and the row after its last."""
    first = tl.zeros([BLOCK_IDS], tl.int32) + num_sequences
    end = tl.zeros([BLOCK_IDS], tl.int32)
    for start in range(0, num_sequences, BLOCK_IDS):
        rows = start + tl.arange(0, BLOCK_IDS)
        ids = tl.load(group_ids_ptr + rows, mask=rows < num_sequences, other=0)
        is_member = (rows < num_sequences) & (ids == group)
        first = tl.where(is_member & (first == num_sequences), rows, first)
        end = tl.where(is_member, rows + 1, end)
    return tl.min(first, axis=0), tl.max(end, axis=0)


@triton.jit
def load_group(
    rewards_ptr,
    group_ids_ptr,
    group,
    start,
    end,
    num_objectives,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Rewards [BLOCK_S, BLOCK_K] from row `start`, and which are there and belong to `group`."""
    rows = start + tl.arange(0, BLOCK_S)
    objectives = tl.arange(0, BLOCK_K)
    ids = tl.load(group_ids_ptr + rows, mask=rows < end, other=0)
    is_member = (rows < end) & (ids == group)
    cells = rows[:, None].to(tl.int64) * num_objectives + objectives[None, :]
    wanted = is_member[:, None] & (objectives[None, :] < num_objectives)
    rewards = tl.load(rewards_ptr + cells, mask=wanted, other=float("nan"))
    return rewards, rewards == rewards


@triton.jit
def group_advantage(
    rewards_ptr,  # [S, K] float32, NaN where absent
    group_ids_ptr,  # [S] integers
    sequence,
    num_sequences,
    num_objectives,
    eps,
    NORMALIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """(advantage [BLOCK_K] float32, present [BLOCK_K]) of a sequence; 0 where absent.

    Scans all ids, then the rewards between the group's first row and its last: twice, for sums and
    extremes, and for squares about the mean. So neighbours, as the rollouts of a prompt mostly are,
    cost one block, and a group may still lie anywhere. Sums are float64, as in the other
    implementations, so that equal rewards have exactly their mean.
    """
    objectives = tl.arange(0, BLOCK_K)
    group = tl.load(group_ids_ptr + sequence)
    first, end = group_extent(group_ids_ptr, group, num_sequences)
    count = tl.zeros([BLOCK_K], tl.int32)
    total = tl.zeros([BLOCK_K], tl.float64)
    lowest = tl.full([BLOCK_K], float("inf"), tl.float32)
    highest = tl.full([BLOCK_K], float("-inf"), tl.float32)
    for start in range(first, end, BLOCK_S):
        rewards, present = load_group(
            rewards_ptr, group_ids_ptr, group, start, end, num_objectives, BLOCK_K, BLOCK_S
        )
        count += tl.sum(present.to(tl.int32), axis=0)
        total += tl.sum(tl.where(present, rewards, 0.0).to(tl.float64), axis=0)
        lowest = tl.minimum(lowest, tl.min(tl.where(present, rewards, float("inf")), axis=0))
        highest = tl.maximum(highest, tl.max(tl.where(present, rewards, float("-inf")), axis=0))
    mean = total / tl.where(count > 0, count, 1)
    others = tl.where(count > 1, count - 1, 1).to(tl.float64)
    own = tl.load(
        rewards_ptr + sequence.to(tl.int64) * num_objectives + objectives,
        mask=objectives < num_objectives,
        other=float("nan"),
    )
    present = own == own
    advantage = own - mean
    if NORMALIZE == STD:
        squares = tl.zeros([BLOCK_K], tl.float64)
        for start in range(first, end, BLOCK_S):
            rewards, is_there = load_group(
                rewards_ptr, group_ids_ptr, group, start, end, num_objectives, BLOCK_K, BLOCK_S
            )
            centred = tl.where(is_there, rewards - mean[None, :], 0.0)
            squares += tl.sum(centred * centred, axis=0)
        advantage = advantage / (tl.sqrt(squares / others) + eps)
    elif NORMALIZE == LEAVE_ONE_OUT:
        advantage = advantage * count / others
    advantage = tl.where(present & (lowest < highest), advantage, 0.0)
    return advantage.to(tl.float32), present


@triton.jit(do_not_specialize=["num_sequences"])
def group_advantages_kernel(
    rewards_ptr,  # [S, K] float32, NaN where absent
    group_ids_ptr,  # [S] integers
    advantages_ptr,  # [S, K] float32
    num_sequences,
    num_objectives,
    eps: tl.float64,
    NORMALIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program per sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    objectives = tl.arange(0, BLOCK_K)
    advantage, _ = group_advantage(
        rewards_ptr,
        group_ids_ptr,
        sequence,
        num_sequences,
        num_objectives,
        eps,
        NORMALIZE,
        BLOCK_K,
        BLOCK_S,
    )
    tl.store(
        advantages_ptr + sequence * num_objectives + objectives,
        advantage,
        mask=objectives < num_objectives,
    )
