"""Everything a run can be told, a model for each stage, and what reads it from YAML: `load_config`.

Unknown keys, wrong types and impossible combinations raise `ConfigError`, whose message names the
file, the key's path, what was wanted and, for a mistyped key, the nearest valid one.
"""

from __future__ import annotations

from recap_fast.config.data import DataConfig, ReviewConfig, RewardSpec, SourceConfig
from recap_fast.config.model import LoraConfig, ModelConfig
from recap_fast.config.reading import load_config, merge, save_config
from recap_fast.config.rollout import DynamicSamplingConfig, RolloutConfig, ServerConfig, check_url
from recap_fast.config.run import TrainConfig
from recap_fast.config.section import ConfigError, MissingGpuError
from recap_fast.config.training import OptimizerConfig, RewardsConfig, ReweightingConfig

__all__ = [
    "ConfigError",
    "DataConfig",
    "DynamicSamplingConfig",
    "LoraConfig",
    "MissingGpuError",
    "ModelConfig",
    "OptimizerConfig",
    "ReviewConfig",
    "RewardSpec",
    "RewardsConfig",
    "ReweightingConfig",
    "RolloutConfig",
    "ServerConfig",
    "SourceConfig",
    "TrainConfig",
    "check_url",
    "load_config",
    "merge",
    "save_config",
]
