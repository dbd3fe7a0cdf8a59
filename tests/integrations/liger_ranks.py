"""One rank of test_liger.py: the loss of unequal shares of a batch, theirs beside ours."""

import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from torch import distributed as dist

from recap_fast.integrations.liger import FusedLinearGRPOLoss
from tests.processes import report

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
hidden, weight = torch.randn(2, 5, 8), torch.randn(17, 8)
ids, advantages = torch.randint(17, (2, 5)), torch.tensor([1.0, -0.5])
mask = torch.ones(2, 5)
mask[:, 1 + 3 * rank :] = 0
losses: dict[str, list[float]] = {}
for name, kind in (("ours", FusedLinearGRPOLoss), ("theirs", LigerFusedLinearGRPOLoss)):
    module = kind(use_ref_model=False, compiled=False)
    losses[name] = [
        module(hidden, weight, ids, mask, advantages, num_items_in_batch=items)[0].item()
        for items in (None, 30)
    ]
dist.destroy_process_group()
alone = FusedLinearGRPOLoss(use_ref_model=False)(hidden, weight, ids, mask, advantages)[0].item()
report(**losses, alone=alone)
