"""Early stopping and plateaus on given values; torch's ReduceLROnPlateau is the reference."""

import json

import numpy as np
import pytest

from jaxrlhf.config import ImprovementConfig, OptimizerConfig
from jaxrlhf.stages.improvement import Watch

METRIC = "evaluation/sft/loss"
NAN = float("nan")


def stopped(values, **settings):
    """The step after which early stopping ends a stage that logs `values`, and the step of the best value."""
    watch = Watch(ImprovementConfig(metric=METRIC, **settings), {}, {})
    for step, value in enumerate(values, start=1):
        watch.observe(step, {} if value is None else {METRIC: value})
        if watch.stops:
            return step, watch.early_stopping.best_step
    return None, watch.early_stopping.best_step


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ([3, 2, 1, 1.5, 1.2, 1.1], {"mode": "lowest", "patience": 3}, (6, 3)),
        ([3, 2, 1, 1.5, 0.9, 1.1, 1, 0.9], {"mode": "lowest", "patience": 3}, (8, 5)),  # 0.9 again is no better
        ([1, 2, 3, 2, 2], {"mode": "highest", "patience": 2}, (5, 3)),
        ([1, 2, 3, 2, 2], {"mode": "highest", "patience": 3}, (None, 3)),
        ([1, None, None, None, 2, None, 1], {"mode": "highest", "patience": 1}, (7, 5)),  # only values count
        ([1, 1.1, 1.2, 1.3], {"mode": "highest", "patience": 2, "min_delta": 0.25}, (3, 1)),
        ([1, 1.2, 1.3], {"mode": "highest", "patience": 2, "min_delta": 0.25}, (None, 3)),  # than the best
        ([NAN, 1, NAN, NAN], {"mode": "lowest", "patience": 2}, (4, 2)),
        ([NAN, NAN], {"mode": "highest", "patience": 2}, (2, 0)),
        ([-2, -1, -1.5], {"mode": "highest", "patience": 1}, (3, 2)),
    ],
)
def test_the_stage_ends_after_patience_values_without_improvement(values, settings, expected):
    assert stopped(values, **settings) == expected


@pytest.mark.parametrize("mode", ["highest", "lowest"])
@pytest.mark.parametrize(("patience", "factor", "min_delta", "min_rate"), [(1, 0.1, 0.0, 0.0), (3, 0.5, 0.2, 0.02)])
def test_rates_equal_torch(mode, patience, factor, min_delta, min_rate):
    """torch's patience is the number of values that it ignores: one less."""
    torch = pytest.importorskip("torch", reason="torch is the reference")
    values = np.random.default_rng(5).standard_normal(60).cumsum().tolist()
    values[7] = NAN
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        theirs, "max" if mode == "highest" else "min", factor, patience - 1, min_delta, "abs", min_lr=min_rate, eps=0
    )
    plateau = {"metric": METRIC, "mode": mode, "patience": patience, "factor": factor, "min_delta": min_delta}
    ours = OptimizerConfig.model_validate(
        {"learning_rate": 0.4, "schedule": "plateau", "plateau": plateau | {"min_rate": min_rate}}
    )
    watch, rates = Watch(None, {"optimizer": ours}, {}), []
    for step, value in enumerate(values, start=1):
        schedule.step(value)
        watch.observe(step, {METRIC: value})
        watch = Watch(None, {"optimizer": ours}, json.loads(json.dumps(watch.notes())))  # as after a resume
        rates.append(watch.optimizers["optimizer"].learning_rate)
        assert rates[-1] == theirs.param_groups[0]["lr"]
    assert len(set(rates)) > 3 and min(rates) >= min_rate


def test_each_optimizer_has_a_rate_of_its_own():
    plateau = {"mode": "lowest", "patience": 1}

    def optimizer(metric):
        return OptimizerConfig.model_validate(
            {"learning_rate": 1.0, "schedule": "plateau", "plateau": plateau | {"metric": metric}}
        )

    watch = Watch(None, {"optimizer": optimizer("a"), "value_optimizer": optimizer("b"), "x": OptimizerConfig()}, {})
    assert watch.observe(1, {"a": 1.0, "b": 1.0}) == []
    (line,) = watch.observe(2, {"a": 0.5, "b": 1.0})
    lowered = "value_optimizer: learning rate lowered to 0.5 after step 2, because b has not improved in 1 value"
    assert line.startswith(lowered)
    assert [watch.optimizers[name].learning_rate for name in ("optimizer", "value_optimizer", "x")] == [1.0, 0.5, None]


def test_a_rate_at_its_lowest_is_not_reported_again():
    plateau = {"metric": "a", "mode": "lowest", "patience": 1, "min_rate": 0.5}
    optimizer = OptimizerConfig.model_validate({"learning_rate": 1.0, "schedule": "plateau", "plateau": plateau})
    watch = Watch(None, {"optimizer": optimizer}, {})
    assert [len(watch.observe(step, {"a": 1.0})) for step in range(1, 5)] == [0, 1, 0, 0]


@pytest.mark.parametrize("settings", [{"schedule": "plateau"}, {"plateau": {"metric": "a", "mode": "lowest"}}])
def test_schedule_and_section_belong_together(settings):
    with pytest.raises(ValueError, match="schedule: plateau and the section plateau belong together"):
        OptimizerConfig.model_validate(settings)
