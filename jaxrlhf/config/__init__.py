"""Every setting: its type, default, bounds and one line of description. No jax import.

What the step functions take stands in `steps.py`, where rows come from in `data.py`, where scores come from in
`rewards.py`, and what a run is made of in `run.py`. `reading.py` reads files and overrides, `table.py` has every setting
for help, and `faults.py` says what is wrong.
"""

from jaxrlhf.config.base import Overflow, Settings
from jaxrlhf.config.data import ChatSourceConfig, DemonstrationsConfig, PreferencesConfig, PromptsConfig, SourceConfig
from jaxrlhf.config.rewards import (
    ClassifierRewardConfig,
    FunctionRewardConfig,
    HTTPRewardConfig,
    ModelRewardConfig,
    RewardConfig,
    SumRewardConfig,
)
from jaxrlhf.config.run import (
    CheckpointsConfig,
    HealthConfig,
    MeshConfig,
    ModelConfig,
    NewModelConfig,
    PPOStageConfig,
    PretrainingConfig,
    RewardModelConfig,
    RunConfig,
    SFTConfig,
)
from jaxrlhf.config.steps import (
    AdapterConfig,
    AdvantageConfig,
    KLConfig,
    OptimizerConfig,
    PPOConfig,
    Sampling,
    ScoreConfig,
)

__all__ = [
    "AdapterConfig",
    "AdvantageConfig",
    "ChatSourceConfig",
    "CheckpointsConfig",
    "ClassifierRewardConfig",
    "DemonstrationsConfig",
    "FunctionRewardConfig",
    "HTTPRewardConfig",
    "HealthConfig",
    "KLConfig",
    "MeshConfig",
    "ModelConfig",
    "ModelRewardConfig",
    "NewModelConfig",
    "OptimizerConfig",
    "Overflow",
    "PPOConfig",
    "PPOStageConfig",
    "PreferencesConfig",
    "PretrainingConfig",
    "PromptsConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RunConfig",
    "SFTConfig",
    "Sampling",
    "ScoreConfig",
    "Settings",
    "SourceConfig",
    "SumRewardConfig",
]
