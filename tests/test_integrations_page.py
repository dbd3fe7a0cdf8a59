"""The Python of docs/integrations.md runs as printed, beside what its reader has already."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_readme import AFTER_LIGER, AFTER_TRL, BEFORE_TRL, ROOT

PAGE = (ROOT / "docs" / "integrations.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.S | re.M)

HEAD = """
from trl import GRPOTrainer
rewards = [accuracy, brevity]
"""
AFTER_HEAD = """
assert trainer.model.forward.__func__.__code__.co_filename.endswith("trl_head.py")
assert "entropy" in trainer.state.log_history[0]
"""
FORMAT = """
def answer_format(completions, **_): return [1 / (1 + len(text)) for text in completions]
"""
LIGER = """
import torch
loss, _ = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)(
    torch.randn(2, 3, 8), torch.randn(17, 8, requires_grad=True),
    torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3), torch.randn(2),
)
loss.backward()
"""
LOOP = """
import torch
from recap_fast.reweighting import make_reweighter
loss_a, loss_b, policy_loss = torch.tensor([1.0, 2.0, 3.0], requires_grad=True).unbind()
reward = torch.rand(8)
leaves = [loss_a, loss_b, policy_loss]
for leaf in leaves: leaf.retain_grad()
"""
AFTER_LOOP = """
torch.testing.assert_close(torch.stack([leaf.grad for leaf in leaves]), weights / 3)
"""
SCALER = """
import torch
from recap_fast import fused_linear_policy_loss
device = "cuda" if torch.cuda.is_available() else "cpu"
scaler = torch.amp.GradScaler(device)
weight = torch.randn(17, 8, device=device, requires_grad=True)
hidden, targets = torch.randn(6, 8, device=device), torch.arange(6, device=device)
rest = {
    "sequence_ids": torch.zeros(6, dtype=torch.int64, device=device),
    "advantages": torch.ones(1, 1, device=device),
    "objective_weights": torch.ones(1, device=device),
}
"""
AFTER_SCALER = """
scaled = weight.grad.clone()
weight.grad = None
fused_linear_policy_loss(hidden, weight, targets, **rest).loss.backward()
torch.testing.assert_close(scaled, weight.grad * scaler.get_scale())
"""
AROUND = {
    "from recap_fast.integrations.trl import use_recap_fast_head": (BEFORE_TRL + HEAD, AFTER_HEAD),
    "from recap_fast.integrations.trl import RecapGRPOTrainer": (
        BEFORE_TRL + FORMAT,
        AFTER_TRL.replace("brevity", "answer_format"),
    ),
    "from recap_fast.integrations.liger import FusedLinearGRPOLoss as": ("", LIGER),
    "import liger_kernel.chunked_loss": ("", AFTER_LIGER),
    "reweighter = make_reweighter": (LOOP, AFTER_LOOP),
    "loss_scale = scaler.scale": (SCALER, AFTER_SCALER),
}
"""First words of a block -> what stands before it in a user's program, and what must hold after."""


def test_every_block_is_run() -> None:
    for block in BLOCKS:
        assert sum(block.startswith(first) for first in AROUND) == 1, block


@pytest.mark.parametrize("first", AROUND)
def test_the_code_does_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    theirs = liger.LigerFusedLinearGRPOLoss
    monkeypatch.setattr(liger, "LigerFusedLinearGRPOLoss", theirs)  # and put back afterwards
    (code,) = [block for block in BLOCKS if block.startswith(first)]
    before, after = AROUND[first]
    code = code.replace('device="cuda"', "device=device").replace("...", "**rest")
    exec(compile(before + code + after, first, "exec"), {"folder": tmp_path})  # noqa: S102
