"""Alarms of real runs that are set up to have a fault, and of metrics that no stage logs."""

import json

import pytest

from jaxrlhf.config import AlarmConfig, RunConfig
from jaxrlhf.errors import UserError
from jaxrlhf.stages.alarms import check_alarms, stage_alarms
from jaxrlhf.stages.run import run_stages

FEW = {"rank": 4, "target_modules": ["all-linear"]}
MODEL = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 64, "max_positions": 64}
REWARDS = """
import random
def brief(completions):
    return [-float(len(text.split())) for text in completions]
def noisy(completions):
    return [4.0 * text.split().count("it") for text in completions]
def gold(completions):
    return [len(set(text.split())) / 5 for text in completions]
"""


def settings(folder, reward="brief", **ppo):
    (folder / "rewards.py").write_text(REWARDS)
    rate = ppo.pop("learning_rate", 0.02)
    return RunConfig.model_validate({
        "run_dir": str(folder / "run"), "stages": ["ppo"], "model": {"new": MODEL},
        "ppo": {
            "data": {"path": "builtin:assistant-prompts", "limit": 32}, "iterations": 30, "batch_size": 16,
            "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 24}, "adapter": FEW, "value_adapter": FEW,
            "kl": {"coef": 0.0}, "reward": {"kind": "function", "function": f"{folder}/rewards.py:{reward}"},
            "update": {"epochs": 2, "minibatches": 1, "optimizer": {"learning_rate": rate}},
            "evaluation": {"prompts": 16}, "save_every": 100, "sample_every": 100,
        } | ppo,
    })  # fmt: skip


def alarms(folder):
    """The alarms in the metrics of a run."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {name.removeprefix("alarm/") for line in lines for name, value in line.items() if name.startswith("alarm/")}


@pytest.mark.slow
def test_a_huge_learning_rate(tmp_path, capsys):
    run_stages(settings(tmp_path, learning_rate=1.0, iterations=12))
    assert "kl_runs_away" in alarms(tmp_path)
    assert "ppo: alarm " in capsys.readouterr().err


@pytest.mark.slow
def test_a_reward_of_length(tmp_path):
    run_stages(settings(tmp_path, "brief"))
    assert "length_collapses" in alarms(tmp_path)


@pytest.mark.slow
def test_a_reward_that_is_not_what_is_wanted(tmp_path):
    """The reward counts one word, the gold score different words: both rise at first, then gold falls."""
    run_stages(settings(tmp_path, "noisy", gold=f"{tmp_path}/rewards.py:gold", iterations=40))
    assert "gold_falls" in alarms(tmp_path)


def test_names_of_metrics_are_checked(tmp_path):
    config = settings(tmp_path)

    def check(**alarm):
        check_alarms(RunConfig.model_validate(config.model_dump(by_alias=True) | {"alarms": ["ppo", alarm]}))

    check(metric="reward/score", falls_by=1.0, against="kl/k1")
    check(name="gold_falls", do="stop")  # a shipped alarm, though the run has no gold reward
    check(metric="seconds", above=60.0)
    check(metric="seconds", above=60.0, do="run", command=["cat"])
    with pytest.raises(UserError, match=r"^alarms\[1\].command: there is no program './nowhere'; give one that"):
        check(metric="seconds", above=60.0, do="run", command=["./nowhere"])
    with pytest.raises(UserError, match=r"^alarms\[1\].metric: no stage logs 'kl/k4'; did you mean kl/k"):
        check(metric="kl/k4", above=1.0)
    with pytest.raises(UserError, match=r"^alarms\[1\].against: no stage logs 'reward/gold'; it is"):
        check(metric="kl/k1", rises_by=1.0, against="reward/gold")
    with pytest.raises(UserError, match=r"^alarms\[1\].metric: the stage sft does not log 'kl/k1'"):
        check(metric="kl/k1", above=1.0, stage="sft")
    with pytest.raises(UserError, match=r"evaluation/reward/score.*give ppo.evaluation.every"):
        check(metric="evaluation/reward/score", below=0.0)


def test_health_and_alarms_do_not_say_the_same_thing(tmp_path):
    config = settings(tmp_path)
    limited = config.model_copy(update={"health": config.health.model_copy(update={"max_kl": 5.0})})
    watched = [set(stage_alarms(c, "ppo", {}, print).alarms) for c in (config, limited)]
    assert watched[0] - watched[1] == {"kl_runs_away"}


def test_the_gap_of_a_policy_that_is_behind_has_a_higher_limit(tmp_path):
    plain, behind = (stage_alarms(settings(tmp_path, **more), "ppo", {}, print).alarms["sampling_gap"].above
                     for more in ({}, {"async": 1}))  # fmt: skip
    assert plain < behind
    alarms = ("ppo", AlarmConfig(name="sampling_gap", above=0.1))
    own = settings(tmp_path, **{"async": 1}).model_copy(update={"alarms": alarms})
    assert stage_alarms(own, "ppo", {}, print).alarms["sampling_gap"].above == 0.1
