"""recap-fast inside TRL 1.16.

- `use_recap_fast_head`: our fused head in the place of TRL's, in any of its trainers (`trl_head`);
- `RecapGRPOTrainer`: its GRPOTrainer with an objective a reward function (`trl_trainer`).
"""

from __future__ import annotations

from recap_fast.integrations.peers import require_peer

require_peer("trl")

# The modules import TRL, which must be there.
from recap_fast.integrations.trl_head import completion_columns, use_recap_fast_head  # noqa: E402
from recap_fast.integrations.trl_trainer import RecapGRPOTrainer  # noqa: E402

__all__ = ["RecapGRPOTrainer", "completion_columns", "use_recap_fast_head"]
