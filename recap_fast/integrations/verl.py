"""recap-fast inside verl 0.9.1: the head, the objectives' weights and the policy losses, by name.

verl imports this module in its driver and in every worker when it is told to, and then knows

- the advantage estimator "recap": K rewards a sequence, weighed by RECAP (`verl_advantages`);
- the policy losses "recap", "recap_gspo" and "recap_cispo" (`verl_losses`);
- the backend "recap_fast" of its fused kernels: our head in its models' forward (`verl_head`):

    python -m verl.trainer.main_ppo ... \\
        actor_rollout_ref.model.external_lib=recap_fast.integrations.verl \\
        algorithm.adv_estimator=recap '+algorithm.recap.objectives=[accuracy,format]' \\
        actor_rollout_ref.actor.policy_loss.loss_mode=recap \\
        actor_rollout_ref.model.use_fused_kernels=True \\
        actor_rollout_ref.model.fused_kernel_options.impl_backend=recap_fast

Each of the three can be used without the others. What is not chosen there works as before.
"""

from __future__ import annotations

import importlib.util

from recap_fast.integrations.peers import require_peer

require_peer("verl")

# The modules register themselves with verl, which must be there.
from recap_fast.integrations.verl_advantages import recap_advantages  # noqa: E402
from recap_fast.integrations.verl_head import FusedLinearForPPO  # noqa: E402
from recap_fast.integrations.verl_losses import (  # noqa: E402
    cispo_policy_loss,
    clip_policy_loss,
    gspo_policy_loss,
)

if importlib.util.find_spec("transfer_queue"):  # without it, verl has its legacy trainer alone
    import recap_fast.integrations.verl_trainer  # noqa: F401

__all__ = [
    "FusedLinearForPPO",
    "cispo_policy_loss",
    "clip_policy_loss",
    "gspo_policy_loss",
    "recap_advantages",
]
