"""Group-relative advantages of one sequence, for all objectives at once.

Mirrors `recap_fast/ops/advantages.py`, which gives the meaning. Shapes: S sequences, K objectives.
"""

import triton
import triton.language as tl

# How advantages are normalised.
STD = tl.constexpr(0)
NONE = tl.constexpr(1)
LEAVE_ONE_OUT = tl.constexpr(2)


@triton.jit
def load_group(
    rewards_ptr,
    group_ids_ptr,
    group,
    start,
    num_sequences,
    num_objectives,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Rewards [BLOCK_S, BLOCK_K] in float64 from row `start`, and which are present in `group`."""
    rows = start + tl.arange(0, BLOCK_S)
    objectives = tl.arange(0, BLOCK_K)
    ids = tl.load(group_ids_ptr + rows, mask=rows < num_sequences, other=0)
    is_member = (rows < num_sequences) & (ids == group)
    cells = rows[:, None].to(tl.int64) * num_objectives + objectives[None, :]
    wanted = is_member[:, None] & (objectives[None, :] < num_objectives)
    rewards = tl.load(rewards_ptr + cells, mask=wanted, other=float("nan")).to(tl.float64)
    return rewards, rewards == rewards


@triton.jit
def group_advantage(
    rewards_ptr,  # [S, K], NaN where absent
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

    Scans all sequences twice: sums and extremes, then squares about the mean. Sums are float64,
    as in the other implementations, so that equal rewards have exactly their mean.
    """
    objectives = tl.arange(0, BLOCK_K)
    group = tl.load(group_ids_ptr + sequence)
    count = tl.zeros([BLOCK_K], tl.float64)
    total = tl.zeros([BLOCK_K], tl.float64)
    lowest = tl.full([BLOCK_K], float("inf"), tl.float64)
    highest = tl.full([BLOCK_K], float("-inf"), tl.float64)
    for start in range(0, num_sequences, BLOCK_S):
        rewards, present = load_group(
            rewards_ptr, group_ids_ptr, group, start, num_sequences, num_objectives,
            BLOCK_K, BLOCK_S,
        )  # fmt: skip
        count += tl.sum(tl.where(present, 1.0, 0.0).to(tl.float64), axis=0)
        total += tl.sum(tl.where(present, rewards, 0.0), axis=0)
        lowest = tl.minimum(lowest, tl.min(tl.where(present, rewards, float("inf")), axis=0))
        highest = tl.maximum(highest, tl.max(tl.where(present, rewards, float("-inf")), axis=0))
    mean = total / tl.where(count > 0, count, 1.0)
    squares = tl.zeros([BLOCK_K], tl.float64)
    if NORMALIZE == STD:
        for start in range(0, num_sequences, BLOCK_S):
            rewards, present = load_group(
                rewards_ptr, group_ids_ptr, group, start, num_sequences, num_objectives,
                BLOCK_K, BLOCK_S,
            )  # fmt: skip
            centred = tl.where(present, rewards - mean[None, :], 0.0)
            squares += tl.sum(centred * centred, axis=0)
    own = tl.load(
        rewards_ptr + sequence.to(tl.int64) * num_objectives + objectives,
        mask=objectives < num_objectives,
        other=float("nan"),
    ).to(tl.float64)
    present = own == own
    others = tl.where(count > 1, count - 1, 1.0)
    advantage = own - mean
    if NORMALIZE == STD:
        advantage = advantage / (tl.sqrt(squares / others) + eps)
    elif NORMALIZE == LEAVE_ONE_OUT:
        advantage = advantage * count / others
    advantage = tl.where(present & (lowest < highest), advantage, 0.0)
    return advantage.to(tl.float32), present


@triton.jit
def group_advantages_kernel(
    rewards_ptr,  # [S, K] float32, NaN where absent
    group_ids_ptr,  # [S] integers
    advantages_ptr,  # [S, K] float32
    num_sequences,
    num_objectives,
    eps,
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
