"""Many reweighters as one: the same code on state with a leading dimension for the runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recap_fast.reweighting.recap import Reweighter


def stack(reweighters: Sequence[Reweighter]) -> Reweighter:
    """One reweighter whose `update` takes values [R, K] and does what R of them do on [K].

    Every state entry [K, ...] becomes [R, K, ...]. Numbers in which the reweighters differ
    (temperature, alpha, max_rate, ...) become [R, 1] float64. On CPU tensors only: RECAP's kernel
    knows one run. The first of `reweighters` is turned into the result; the others stay as they
    are.

    Raises:
        ValueError: they are of several methods, or differ in more than numbers and state (window,
            signals, std, fixed weights, alpha where only some have None).
    """
    result = reweighters[0]
    if any(type(other) is not type(result) for other in reweighters):
        raise ValueError("stack takes reweighters of one method")
    states = [other.state_dict() for other in reweighters]
    if any(set(state) != set(states[0]) for state in states):
        raise ValueError("stack: retention must be 0 in all or in none")
    entries = {id(entry): name for name, entry in result._state.items()}
    for attribute, value in list(vars(result).items()):
        given = [getattr(other, attribute) for other in reweighters]
        if id(value) in entries:
            name = entries[id(value)]
            result._state[name] = torch.stack([state[name] for state in states])
            setattr(result, attribute, result._state[name])
        elif isinstance(value, Tensor):
            if not all(torch.equal(value, other) for other in given):
                raise ValueError(f"stack: {attribute} must be the same in all")
        elif attribute != "_state" and any(other != value for other in given):
            setattr(result, attribute, _column(attribute, given))
    return result


def _column(name: str, given: Sequence[Any]) -> Tensor:
    if name == "max_rate":  # no clamp is a clamp to infinity
        given = [math.inf if one is None else one for one in given]
    if name == "window" or not all(isinstance(one, float | int) for one in given):
        raise ValueError(
            f"stack: {name} must be the same in all, got {sorted(set(map(str, given)))}"
        )
    return torch.tensor([[float(one)] for one in given], dtype=torch.float64)
