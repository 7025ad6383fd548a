"""Evaluation on held-out rows, one section for each stage. It changes no weights."""

from typing import Annotated

from pydantic import Field

from jaxrlhf.config.base import NonNegativeInt, PositiveInt, Settings
from jaxrlhf.config.data import DemonstrationsConfig, PreferencesConfig, PromptsConfig


class SFTEvaluationConfig(Settings):
    """Held-out loss and perplexity of the sft stage."""

    data: DemonstrationsConfig | None = Field(None, description="demonstrations to measure the loss on; null holds out rows of sft.data")
    heldout: NonNegativeInt = Field(64, description="rows of sft.data held out if data is null; at most a tenth of all rows; 0 measures nothing")


class RewardModelEvaluationConfig(Settings):
    """Held-out accuracy, loss, margin and calibration of the reward model."""

    data: PreferencesConfig | None = Field(None, description="preference pairs to measure accuracy on; null holds out pairs of reward_model.data")
    heldout: PositiveInt = Field(128, description="pairs of reward_model.data held out if data is null; at most a tenth of all pairs")


class PPOEvaluationConfig(Settings):
    """Reward, gold score, KL and length of completions of held-out prompts: the same prompts and random keys each time."""

    data: PromptsConfig | None = Field(None, description="held-out prompts; null uses ppo.data")
    prompts: Annotated[int, Field(ge=1, le=1_000_000)] = Field(128, description="number of prompts; if the source has fewer prompts, they are repeated")
