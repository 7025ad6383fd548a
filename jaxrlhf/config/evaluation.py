"""Settings of evaluation on held-out rows (one section for each stage), early stopping and the plateau schedule.

Evaluation changes no weights. If a metric stops improving, early stopping ends the stage, and the plateau schedule
lowers the learning rate.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from jaxrlhf.config.base import EVALUATED, NonNegativeFloat, NonNegativeInt, PositiveInt, Settings
from jaxrlhf.config.data import DemonstrationsConfig, PreferencesConfig, PromptsConfig, not_streamed


class ImprovementConfig(Settings):
    """A metric that must improve."""

    metric: str = Field(description="metric to watch, such as evaluation/reward/gold; each step that logs it counts, with evaluation/ only the steps that are multiples of evaluation.every")
    mode: Literal["highest", "lowest"] = Field(description="whether the highest or the lowest value of metric is the best")
    patience: PositiveInt = Field(3, description="number of values in a row without improvement that has an effect")
    min_delta: NonNegativeFloat = Field(0.0, description="a value improves if it is better than the best one so far by more than this")


class PlateauConfig(ImprovementConfig):
    """Lowers the learning rate when a metric stops improving."""

    factor: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="the learning rate is multiplied by this")
    min_rate: NonNegativeFloat = Field(0.0, description="smallest learning rate")


def _every(unit: str) -> Any:
    text = f"{unit} between evaluations; there is also one at the end of the stage; null evaluates only at the end, outside metrics.jsonl"
    return Field(None, description=text, json_schema_extra=EVALUATED)


class SFTEvaluationConfig(Settings):
    """Loss and perplexity on held-out rows."""

    every: PositiveInt | None = _every("optimizer steps")
    data: Annotated[DemonstrationsConfig | None, AfterValidator(not_streamed)] = Field(None, description="demonstrations to measure the loss on; null holds out rows of sft.data")
    heldout: NonNegativeInt = Field(64, description="rows of sft.data held out if data is null; at most a tenth of all rows; 0 measures nothing")


class RewardModelEvaluationConfig(Settings):
    """Accuracy, loss, margin and calibration error on held-out pairs."""

    every: PositiveInt | None = _every("optimizer steps")
    data: Annotated[PreferencesConfig | None, AfterValidator(not_streamed)] = Field(None, description="preference pairs to measure accuracy on; null holds out pairs of reward_model.data")
    heldout: PositiveInt = Field(128, description="pairs of reward_model.data held out if data is null; at most a tenth of all pairs")


class PPOEvaluationConfig(Settings):
    """Reward, gold score, KL and length on held-out prompts. Prompts and random keys are the same each time."""

    every: PositiveInt | None = _every("iterations")
    data: Annotated[PromptsConfig | None, AfterValidator(not_streamed)] = Field(None, description="held-out prompts; null uses ppo.data")
    prompts: Annotated[int, Field(ge=1, le=1_000_000)] = Field(128, description="number of prompts; if the source has fewer prompts, they are repeated")
