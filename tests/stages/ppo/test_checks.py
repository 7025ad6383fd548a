"""Combinations of PPO settings: derived defaults, errors and warnings."""

import pytest

from jaxrlhf.config import AdvantageConfig, PPOConfig, PPOStageConfig
from jaxrlhf.config.run import ASYNC_CAP
from jaxrlhf.errors import UserError
from jaxrlhf.stages.ppo.checks import check_algorithm
from jaxrlhf.stages.ppo.remarks import remarks

GROUP = {"samples_per_prompt": 8}
GRPO = {"advantage": {"estimator": "grpo"}, "sampling": GROUP}
ESTIMATORS = PPOStageConfig.model_fields["advantage"].annotation.model_fields["estimator"].annotation.__args__


def settings(**given):
    return PPOStageConfig.model_validate({"data": {"path": "p"}, **given})


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo", "pg"])
def test_defaults_are_neither_refused_nor_odd(loss, estimator):
    """Whatever algorithm is chosen, as long as nothing else is; but ReMax, whose KL we leave where it was."""
    config = settings(update={"loss": loss}, advantage={"estimator": estimator}, sampling=GROUP)
    check_algorithm(config)
    assert [line for line in remarks(config) if "remax" not in line] == []
    assert len(remarks(config)) == (estimator == "remax")


def test_a_policy_that_is_behind_gets_importance_weights():
    assert settings().update.importance_cap is None
    for update in ({}, {"epochs": 2}, PPOConfig(epochs=2)):
        config = settings(update=update, **{"async": 1})
        check_algorithm(config)
        assert config.update.importance_cap == ASYNC_CAP and remarks(config) == []
    assert settings(update={"importance_cap": 5.0}, **{"async": 1}).update.importance_cap == 5
    for update in ({"importance_cap": None}, PPOConfig(importance_cap=None)):
        assert settings(update=update, **{"async": 1}).update.importance_cap is None, "if the user says so"
    assert settings(**GRPO, **{"async": 1}).update.kl_loss == "k3", "beside the default of grpo"


@pytest.mark.parametrize(
    ("loss", "low", "high"), [("clip", 0.2, 0.2), ("gspo", 3e-4, 4e-4), ("cispo", 1.0, 4.0), ("pg", 0.2, 0.2)]
)
def test_a_loss_brings_its_bounds_and_settings_go_before(loss, low, high):
    for config in (settings(update={"loss": loss}).update, PPOConfig(loss=loss)):
        assert (config.clip_low, config.clip_high) == (low, high)
        assert loss != "pg" or (config.epochs, config.minibatches) == (1, 1)
    given = PPOConfig(loss=loss, clip_high=0.3, epochs=3)
    assert (given.clip_low, given.clip_high, given.epochs) == (low, 0.3, 3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_kl_of_grpo_stands_in_the_loss(estimator):
    expected = "k3" if estimator == "grpo" else None
    assert settings(advantage={"estimator": estimator}).update.kl_loss == expected
    made = PPOStageConfig(
        data={"path": "p"}, advantage=AdvantageConfig(estimator=estimator), update=PPOConfig(epochs=3)
    )
    assert made.update.kl_loss == expected and made.update.epochs == 3
    assert settings(advantage={"estimator": estimator}, update={"kl_loss": "k2"}).update.kl_loss == "k2"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"update": {"loss": "pg", "epochs": 2}}, "ppo.update.loss: pg has no ratio"),
        ({"update": {"loss": "pg", "minibatches": 4}}, "ppo.update.loss: pg has no ratio"),
        ({"update": {"kl_loss": "k1"}}, "ppo.update.kl_loss: the gradient of k1 in the loss is 0"),
        ({"update": {"kl_loss": "k2"}, "kl": {"estimator": "k3"}}, "ppo.kl.estimator: applies to KL in the reward"),
        ({**GRPO, "kl": {"estimator": "k2"}}, "ppo.kl.estimator: applies to KL in the reward"),
        ({**GRPO, "update": {"kl_loss": None}}, "ppo.update.kl_loss: grpo divides by the standard deviation"),
        ({"update": {"dual_clip": 1.2, "clip_high": 0.28}}, "ppo.update.dual_clip: must be above the clip of 1 + 0.28"),
        ({"update": {"dual_clip": 1.2}}, "ppo.update.dual_clip: must be above the clip of 1 + 0.2"),
    ],
)
def test_contradictions_are_errors(given, words):
    with pytest.raises(UserError) as error:
        check_algorithm(settings(**given))
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"update": {"loss": "pg", "epochs": 1, "minibatches": 1}},
        {"update": {"kl_loss": "k1"}, "kl": {"coef": 0.0}},
        {"update": {"dual_clip": 3.0}},
        {"kl": {"estimator": "k2", "coef": 0.0}},
        {**GRPO, "update": {"kl_loss": None}, "kl": {"coef": 0.0}},
    ],
)
def test_similar_settings_are_valid(given):
    check_algorithm(settings(**given))


def idle(*names):
    return "these settings have no effect: " + ", ".join(names)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"update": {"loss": "gspo", "clip_low": 0.2, "clip_high": 0.2}}, "gspo clips one ratio per completion"),
        ({"update": {"loss": "cispo", "clip_low": 0.2}}, "the CISPO paper has no lower bound"),
        ({"kl": {"estimator": "k2"}}, "ppo.kl.estimator=k2 is used in the reward"),
        ({"kl": {"estimator": "k3"}}, "ppo.kl.estimator=k3 is used in the reward"),
        ({"advantage": {"estimator": "remax"}}, "remax subtracts the score of the greedy completion"),
        ({"advantage": {"estimator": "dr_grpo", "whiten_advantages": True}}, "ppo.advantage.whiten_advantages divides"),
        ({"resample": 2, "sampling": GROUP}, "ppo.resample replaces groups with equal scores"),
        ({"update": {"value_coef": 0.5}}, "ppo.update.value_coef: Adam removes the scale"),
        (
            {**GRPO, "advantage": {"estimator": "grpo", "lam": 0.9, "gamma": 0.9}, "value_from": "fresh"},
            idle(
                "ppo.advantage.lam (grpo has no value model)", "ppo.value_from (grpo has no value model)",
                "ppo.advantage.gamma (grpo treats a completion as one action)",
            ),
        ),
        (
            {"advantage": {"estimator": "reinforce"}, "update": {"value_coef": 0.5, "value_clip": 0.7}},
            idle(*(f"ppo.update.{name} (reinforce has no value model)" for name in ("value_clip", "value_coef"))),
        ),
        (
            {"update": {"value_trunk": "policy"}, "value_from": "fresh"},
            idle("ppo.value_from (ppo.update.value_trunk is policy)"),
        ),
        ({"update": {"loss": "pg", "clip_low": 0.1}}, idle("ppo.update.clip_low (pg has no ratio)")),
        ({"score": {"initial_completions": 9}}, idle("ppo.score.initial_completions (ppo.score.normalise is none)")),
        ({"kl": {"horizon": 5}}, idle("ppo.kl.horizon (there is no ppo.kl.target)")),
        (
            {"update": {"mask_truncated": True}, "score": {"missing_eos_penalty": 1.0}},
            idle("ppo.score.missing_eos_penalty (ppo.update.mask_truncated masks completions that did not end)"),
        ),
    ],
)  # fmt: skip
def test_unusual_or_unused_settings_are_reported(given, words):
    said = remarks(settings(**given))
    assert len(said) == 1 and said[0].startswith(words) and "\n" not in said[0]


@pytest.mark.parametrize(
    "given",
    [
        {"update": {"loss": "gspo", "clip_low": 1e-3, "clip_high": 1e-3}},
        {"kl": {"estimator": "k2", "coef": 0.0}},
        {"update": {"value_coef": 0.5, "value_trunk": "policy"}},
        {"update": {"value_coef": 0.0}},
        {"resample": 2, **GRPO},
        {"kl": {"horizon": 5, "target": 6.0}},
        {"update": {"mask_truncated": True}, "score": {"missing_eos_penalty": 1.0}, **GRPO},
        {"advantage": {"gamma": 0.9, "lam": 0.9}, "value_from": "fresh"},
    ],
)
def test_what_is_in_order_is_not_said(given):
    assert remarks(settings(**given)) == []
