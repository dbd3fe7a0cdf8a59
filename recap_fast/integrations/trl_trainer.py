"""GRPO by TRL 1.16 with each reward function an objective of its own weight.

Shapes: N completions of all processes, G completions of a prompt, K reward functions.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.trainer.utils import nanstd

from recap_fast.integrations.trl_head import completion_columns, use_recap_fast_head
from recap_fast.reweighting.recap import make_reweighter

__all__ = ["RecapGRPOTrainer", "objective_advantages"]

STATE = "recap_fast_reweighter.json"
"""In a checkpoint's folder. No *.safetensors there: vLLM would load it as weights of the model."""

MIN_DEVIATION = 1e-4  # TRL's, added to every standard deviation that divides

SCALES = ("group", "batch", "none")


class RecapGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with an objective a reward function, weighted by RECAP, and our fused head.

    The advantage of a completion is sum_k reward_weights_k lambda_k A_k, with A_k the rewards of
    function k normalised by themselves (`objective_advantages`, by `args.scale_rewards`) and lambda
    the reweighter's weights, mean 1. Once a generated training batch the reweighter takes in each
    function's mean reward over all processes; evaluation uses the weights as they are. Unlike
    TRL's "normalize_then_sum" (GDPO), the sum is not whitened: that would undo what lambda does.

    Rewards should be of one sign (`RecapReweighter` says why). Logged beside what TRL logs:
    `weight/<name>`, `rate/<name>` and `instability/<name>` of each reward function, the last two
    once they are known, `retention/<name>` with that parameter, and `frac_reward_zero_std` as the
    share of groups and functions without any deviation. Checkpoints hold the reweighter's state,
    and resuming continues from it.

    Args:
        arguments: as for `trl.GRPOTrainer`.
        reweighting: "recap", or another name in `recap_fast.reweighting.recap.REWEIGHTERS`;
            "uniform" leaves lambda at 1.
        reweighting_parameters: of that method, such as {"window": 10}; None: its defaults.
        keywords: as for `trl.GRPOTrainer`.

    Attributes:
        reweighter: its `weights`, `rates` and `instabilities` are [K] float32.
        objective_names: `reward_func_names`; a name that occurs again gets a number.

    Raises:
        ValueError: `args.multi_objective_aggregation` other than its default, an unknown
            `scale_rewards`, an unknown method or parameter, or what `use_recap_fast_head` refuses.
    """

    def __init__(
        self,
        *arguments: Any,
        reweighting: str = "recap",
        reweighting_parameters: dict[str, Any] | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        self._refuse_contradictions(reweighting_parameters or {})
        self.objective_names = _distinct(self.reward_func_names)
        self.reweighting = reweighting
        self.reweighter = make_reweighter(
            reweighting,
            len(self.reward_funcs),
            signals="reward",
            device=self.accelerator.device,
            **(reweighting_parameters or {}),
        )
        self._use_recap_fast_heads()

    def _refuse_contradictions(self, reweighting_parameters: dict[str, Any]) -> None:
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "RecapGRPOTrainer normalises each reward function and sums without whitening: "
                "wanted multi_objective_aggregation left at its default, "
                f"got {self.multi_objective_aggregation!r}"
            )
        if self.scale_rewards not in SCALES:
            raise ValueError(f"scale_rewards: wanted one of {SCALES}, got {self.scale_rewards!r}")
        for name in ("signals", "device"):
            if name in reweighting_parameters:
                raise ValueError(
                    f"reweighting_parameters: {name!r} is the trainer's own (rewards, on its "
                    f"device), got {reweighting_parameters[name]!r}"
                )

    def _use_recap_fast_heads(self) -> None:
        """Our head in the place of the one that TRL has just added, with TRL's arguments."""
        how = {
            "temperature": self.temperature,
            "cast_lm_head_to_fp32": self.args.cast_lm_head_to_fp32,
        }
        use_recap_fast_head(self.model, outputs=("log_probs", "entropy"), **how)
        if self.ref_model is not None:  # prepared already: FSDP 1 wraps it
            use_recap_fast_head(self.accelerator.unwrap_model(self.ref_model), **how)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *arguments: Any,
        **keywords: Any,
    ) -> Any:
        with completion_columns(logits_to_keep):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *arguments, **keywords
            )

    def _calculate_rewards(self, *arguments: Any, **keywords: Any) -> Tensor:
        """[N, K], NaN where a function gave None.

        Raises:
            ValueError: a reward is infinite: no group that it is in has a mean.
        """
        self._rewards = super()._calculate_rewards(*arguments, **keywords)
        # [N, K] of all processes, so that all of them stop.
        for name, infinite in zip(
            self.objective_names, self._rewards.isinf().sum(dim=0).tolist(), strict=True
        ):
            if infinite:
                raise ValueError(
                    f"reward function {name!r}: wanted finite rewards (None where it does not "
                    f"apply), got {infinite} infinite ones of {len(self._rewards)}"
                )
        return self._rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        group = self.num_generations if mode == "train" else self.num_generations_eval
        if mode == "train":
            self._update_weights(self._rewards)
        by_objective = objective_advantages(self._rewards, group, self.scale_rewards)
        weights = self.reward_weights.to(by_objective.device) * self.reweighter.weights
        advantages = (by_objective * weights).nansum(dim=1)  # [N]; 0 where no function scored
        count = len(output["advantages"])
        first = self.accelerator.process_index * count
        output["advantages"] = advantages[first : first + count]
        self._log_advantages(mode, group, advantages)
        return output

    def _update_weights(self, rewards: Tensor) -> None:
        """Take in the mean rewards of a training batch [N, K], and log what follows."""
        self.reweighter.update(
            rewards.nanmean(dim=0),
            present=~rewards.isnan().all(dim=0),
            deviations=nanstd(rewards, dim=0),
        )
        published = {
            "weight": self.reweighter.weights,
            "rate": self.reweighter.rates,
            "instability": self.reweighter.instabilities,
        }
        if self.reweighter.retentions is not None:
            published["retention"] = self.reweighter.retentions
        metrics = self._metrics["train"]
        for kind, values in published.items():
            for name, value in zip(self.objective_names, values.tolist(), strict=True):
                if value == value:  # NaN: not known yet, or never; loggers warn of a None
                    metrics[f"{kind}/{name}"].append(value)

    def _log_advantages(self, mode: str, group: int, advantages: Tensor) -> None:
        """Put ours [N] where TRL has just logged what its own aggregation gives."""
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())
        deviations = nanstd(self._rewards.view(-1, group, len(self.reward_funcs)), dim=1)
        known = deviations[~deviations.isnan()]
        share = known.isclose(torch.zeros_like(known)).float().mean() if group > 1 else 1.0
        self._metrics[mode]["frac_reward_zero_std"][-1] = float(share)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            content = {
                "method": self.reweighting,
                "objectives": self.objective_names,
                "state": {k: v.tolist() for k, v in self.reweighter.state_dict().items()},
            }
            path = Path(self._get_output_dir(trial=trial)) / folder / STATE
            path.write_text(json.dumps(content), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE
        text = path.read_text(encoding="utf-8") if path.is_file() else None
        # The main process's, so that all have the same weights whatever each one's disk holds.
        (text,) = broadcast_object_list([text])
        if text is None:
            warnings.warn(
                f"{checkpoint}: wanted {STATE}, got none (not a checkpoint of RecapGRPOTrainer): "
                "the objectives' weights start anew",
                stacklevel=2,
            )
            return
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: wanted JSON, got {error}") from error
        self._restore_weights(path, content)

    def _restore_weights(self, path: Path, content: dict[str, Any]) -> None:
        here = {"method": self.reweighting, "objectives": self.objective_names}
        for name, wanted in here.items():
            if content[name] != wanted:
                raise ValueError(f"{path}: wanted the {name} {wanted!r}, got {content[name]!r}")
        own = self.reweighter.state_dict()
        self.reweighter.load_state_dict(
            {
                name: torch.tensor(values, dtype=own[name].dtype if name in own else None)
                for name, values in content["state"].items()
            }
        )


def objective_advantages(rewards: Tensor, group: int, scale: str) -> Tensor:
    """Each reward function's advantages, as TRL normalises the one reward of GRPO.

    Args:
        rewards: [N, K] floating, the G completions of a prompt in successive rows; NaN where a
            function gave none.
        group: G.
        scale: "group": divide by the function's standard deviation within the group + 1e-4;
            "batch": by that over all N rows + 1e-4; "none": by nothing.

    Returns:
        [N, K], NaN where a reward is NaN, or alone in what deviates.
    """
    grouped = rewards.view(-1, group, rewards.shape[1])  # [N/G, G, K]
    centred = grouped - grouped.nanmean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (nanstd(grouped, dim=1, keepdim=True) + MIN_DEVIATION)
    elif scale == "batch":
        centred = centred / (nanstd(rewards, dim=0) + MIN_DEVIATION)
    return centred.view_as(rewards)


def _distinct(names: Iterable[str]) -> list[str]:
    """The names, a repeated one with a number: a, b, a_2."""
    distinct: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in distinct:
            number += 1
            candidate = f"{name}_{number}"
        distinct.append(candidate)
    return distinct
