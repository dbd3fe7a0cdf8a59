"""verl's real configuration, as `python -m verl.trainer.main_ppo` loads it."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed here: see tools/verl_env.sh", allow_module_level=True)

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

README = Path(__file__).resolve().parents[2] / "README.md"
_COMMAND = re.search(
    r"^python -m verl\.trainer\.main_ppo (.*?)^```", README.read_text("utf-8"), re.S | re.M
)
assert _COMMAND is not None
CHOSEN = tuple(
    word
    for word in shlex.split(_COMMAND[1].replace("\\\n", " "))
    if "recap" in word or "use_fused_kernels" in word
)
"""What README tells a user to type beside a model and data."""


def ppo_config(*overrides: str) -> DictConfig:
    """ppo_trainer.yaml with overrides of the command line; sizes that verl asks for are given."""
    sizes = (
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.n=4",
    )
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*sizes, *overrides])
