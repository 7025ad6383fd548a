"""Settings that name a metric name one that the stage logs; else the error says what would be right."""

import pytest

from jaxrlhf.config import RunConfig
from jaxrlhf.errors import UserError
from jaxrlhf.stages.metric_names import check_metrics

CONFIG = {
    "run_dir": "run", "model": {"path": "none"},
    "sft": {"data": {"path": "d.jsonl"}, "evaluation": {"every": 5}},
    "reward_model": {"data": {"path": "d.jsonl"}},
    "ppo": {"data": {"path": "p.jsonl"}, "gold": "a:b", "evaluation": {"every": 5}},
}  # fmt: skip


def checked(stage=None, setting=None, metric=None, best=None):
    """Checks CONFIG with early stopping or a plateau on `metric`, or with checkpoints.best."""
    config = {**CONFIG, "checkpoints": {"best": best}}
    if stage is not None:
        watched = {"metric": metric, "mode": "highest"}
        plateau = {"schedule": "plateau", "plateau": watched}
        added = {"early_stopping": watched} if setting == "early_stopping" else {setting: plateau}
        if stage == "ppo" and setting != "early_stopping":
            added = {"update": added}
        config[stage] = config[stage] | added
    check_metrics(RunConfig.model_validate(config))


@pytest.mark.parametrize(
    ("stage", "setting", "metric"),
    [
        ("sft", "early_stopping", "evaluation/sft/loss"),
        ("sft", "optimizer", "evaluation/sft/perplexity"),
        ("reward_model", "early_stopping", "reward_model/accuracy"),
        ("ppo", "early_stopping", "evaluation/reward/gold"),
        ("ppo", "optimizer", "kl/k1"),
        ("ppo", "value_optimizer", "evaluation/length/mean"),
    ],
)
def test_a_metric_of_the_stage_is_accepted(stage, setting, metric):
    checked(stage, setting, metric)


@pytest.mark.parametrize(
    ("stage", "setting", "metric", "message"),
    [
        ("sft", "early_stopping", "evaluation/sft/los",
         "sft.early_stopping.metric: the stage sft does not log 'evaluation/sft/los'; "
         "did you mean evaluation/sft/loss?"),
        ("sft", "optimizer", "kl/k1", "sft.optimizer.plateau.metric: the stage sft does not log 'kl/k1'; give one of"),
        ("reward_model", "early_stopping", "evaluation/reward_model/accuracy",
         "give reward_model.evaluation.every, such as"),
        ("ppo", "value_optimizer", "reward/golden",
         "ppo.update.value_optimizer.plateau.metric: the stage ppo does not log 'reward/golden'; "
         "did you mean reward/gold"),
    ],
)  # fmt: skip
def test_another_metric_is_refused(stage, setting, metric, message):
    with pytest.raises(UserError) as error:
        checked(stage, setting, metric)
    assert message in str(error.value)


def test_the_best_checkpoint_may_be_by_an_evaluation():
    checked(best="evaluation/reward/gold")
    checked(best="evaluation/sft/loss")
    with pytest.raises(UserError, match="no stage logs 'evaluation/reward_model/loss'; give reward_model"):
        checked(best="evaluation/reward_model/loss")
