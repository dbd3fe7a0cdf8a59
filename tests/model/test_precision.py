"""What a model computes in where nobody has said so."""

from __future__ import annotations

import pytest
import torch

from recap_fast.config import ModelConfig, RolloutConfig
from recap_fast.model.precision import compute_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("instructions", "dtype"),
    [
        ("_is_avx512_bf16_supported", torch.bfloat16),
        ("_is_amx_tile_supported", torch.bfloat16),
        (None, torch.float32),
    ],
)
def test_a_cpu_computes_in_what_it_has_instructions_for(
    instructions: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda found=name == instructions: found)
    assert compute_dtype("auto", CPU) == dtype
    assert compute_dtype("auto", CUDA) == torch.bfloat16


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_name_is_that_dtype_everywhere(device: torch.device) -> None:
    assert compute_dtype("float32", device) == torch.float32
    assert compute_dtype("bfloat16", device) == torch.bfloat16


def test_nobody_has_to_say_it() -> None:
    assert ModelConfig(path="m").dtype == RolloutConfig().dtype == "auto"
