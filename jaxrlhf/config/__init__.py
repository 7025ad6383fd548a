"""All settings, with type, default, bounds and description. Does not import jax.

`steps.py` has the settings of the step functions, `control.py` of `jaxrlhf.PPO`, `data.py` of data sources, `rewards.py`
of rewards, and `run.py` of a run and its stages. `reading.py` reads files and overrides, `table.py` lists every setting,
and `faults.py` explains errors.
"""

from jaxrlhf.config.alarms import AlarmConfig
from jaxrlhf.config.base import Overflow, Settings
from jaxrlhf.config.data import (
    ChatSourceConfig,
    DemonstrationsConfig,
    DemonstrationsSourceConfig,
    PreferencesConfig,
    PreferencesSourceConfig,
    PromptsConfig,
    PromptsSourceConfig,
    ShotsConfig,
    SourceConfig,
)
from jaxrlhf.config.environment import EnvironmentConfig
from jaxrlhf.config.evaluation import (
    ImprovementConfig,
    PlateauConfig,
    PPOEvaluationConfig,
    RewardModelEvaluationConfig,
    SFTEvaluationConfig,
)
from jaxrlhf.config.model import ModelConfig, NewModelConfig
from jaxrlhf.config.rewards import (
    ClassifierRewardConfig,
    CodeTestsRewardConfig,
    FunctionRewardConfig,
    HTTPRewardConfig,
    JudgeRewardConfig,
    ModelRewardConfig,
    RewardConfig,
    SumRewardConfig,
)
from jaxrlhf.config.run import (
    CheckpointsConfig,
    HealthConfig,
    MeshConfig,
    PartMeshConfig,
    PPOStageConfig,
    PretrainingConfig,
    ProfileConfig,
    RewardModelConfig,
    RunConfig,
    SFTConfig,
    SuccessCurriculumConfig,
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
