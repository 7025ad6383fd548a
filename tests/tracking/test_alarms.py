"""Alarms: when they begin and end, what they do, and each shipped alarm on a series made to have its fault."""

import csv
import gzip
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxrlhf.config.alarms import SETS, SHIPPED, AlarmConfig, alarms_of
from jaxrlhf.tracking import alarms as module
from jaxrlhf.tracking.alarms import Alarms

QUICKSTART = Path(__file__).parent / "quickstart_ppo.csv.gz"


def alarm(**keys):
    return AlarmConfig.model_validate(keys)


def play(alarms, series, saved=None, first=1):
    """(steps in which each alarm begins, lines said, the Alarms)."""
    said = []
    watched = Alarms("ppo", {a.title: a for a in alarms}, saved or {}, said.append)
    begun = {}
    for step, metrics in enumerate(series, start=first):
        before = watched.active
        watched.observe(step, metrics)
        for name in watched.active:
            if name not in before:
                begun.setdefault(name, []).append(step)
    return begun, said, watched


def of(values, name="kl/k1"):
    return [{name: value} for value in values]


def test_above_for_begins_once_and_ends_after_as_many_values_within():
    watched = Alarms("ppo", {"x": alarm(name="x", metric="kl/k1", above=1.0, **{"for": 2})}, {}, (said := []).append)
    found = [watched.observe(i, m).get("alarm/x") for i, m in enumerate(of([0, 2, 0, 2, 2, 2, 0, 2, 0, 0, 0]), start=1)]
    assert found == [None, None, None, None, 1, 1, 1, 1, 1, 0, None]
    assert said == ["ppo: alarm x: kl/k1 is 2, above 1 since step 4"]


def test_below_and_over_compare_the_mean_of_the_latest_values():
    begun, said, _ = play([alarm(metric="a", below=0.0, over=3)], of([-5, -5, 1, 1, 1, -5], "a"))
    assert begun == {"a_below_0": [3, 6]}, "not before there are three values; -3, -1, 1, -1"
    assert said[0] == "ppo: alarm a_below_0: a is -3 (mean of 3 values), below 0 since step 3"


def test_changes_are_from_the_lowest_or_highest_so_far():
    assert play([alarm(metric="kl/k1", rises_by=2.0)], of([5, 3, 4.9, 5.1]))[0] == {"kl_k1_rises_by_2": [4]}
    assert play([alarm(metric="kl/k1", falls_by="50%")], of([1, 4, 2.1, 1.9]))[0] == {"kl_k1_falls_by_50%": [4]}
    assert play([alarm(metric="kl/k1", falls_by="50%")], of([-2, -2.9, -3.1]))[0] == {"kl_k1_falls_by_50%": [3]}


def test_against_needs_the_other_metric_to_have_moved_the_other_way():
    rule = alarm(name="x", metric="gold", falls_by=1.0, against="reward")
    both = [{"gold": g, "reward": r} for g, r in ((1, 1), (3, 2), (1, 1), (1, 3))]
    assert play([rule], both)[0] == {"x": [4]}
    assert "while reward is higher than at that value" in play([rule], both)[1][0]


def test_steps_without_the_metric_and_nan_are_passed_over():
    rule = alarm(name="x", metric="kl/k1", above=1.0, **{"for": 2})
    series = [{"kl/k1": 2.0}, {}, {"kl/k1": math.nan}, {"kl/k1": math.inf}]
    assert play([rule], series)[0] == {"x": [4]}


@pytest.mark.parametrize("cut", range(1, 12))
def test_resuming_at_any_step_gives_the_same_alarms(cut):
    rules = [
        alarm(name="a", metric="kl/k1", above=1.0, over=2, **{"for": 2}),
        alarm(name="b", metric="kl/k1", falls_by="60%", over=2, against="reward", **{"for": 2}),
    ]
    series = [{"kl/k1": k, "reward": r} for k, r in zip([0, 3, 2, 2, 0, 1, 0, 0, 2, 2, 2, 0], range(12))]
    begun, said, whole = play(rules, series)
    one, said_one, before = play(rules, series[:cut])
    saved = json.loads(json.dumps(before.notes()))
    two, said_two, after = play(rules, series[cut:], saved, cut + 1)
    assert {name: one.get(name, []) + two.get(name, []) for name in ("a", "b")} == begun and len(begun) == 2
    assert said_one + said_two == said and after.notes() == whole.notes()


def test_an_alarm_that_is_changed_begins_anew_with_the_values_it_has_seen():
    before = play([alarm(name="x", metric="kl/k1", falls_by=1.0, over=2)], of([9, 9, 5, 5]))[2].notes()
    begun, said, after = play([alarm(name="x", metric="kl/k1", falls_by=2.0, over=2, do="stop")], of([5]), before, 5)
    assert begun == {"x": [5]} and after.action() == "stop" and "9" in said[0]
    begun, said, _ = play([alarm(name="x", metric="kl/k1", falls_by=2.0, over=1)], of([5]), before, 5)
    assert begun == {}, "another mean: nothing is known of it"


def test_a_stop_that_is_not_changed_stops_again():
    rule = alarm(name="x", metric="kl/k1", above=1.0, do="stop")
    saved = play([rule], of([2]))[2].notes()
    assert Alarms("ppo", {"x": rule}, saved, print).action() == "stop"
    assert Alarms("ppo", {"x": alarm(name="x", metric="kl/k1", above=1.0)}, saved, print).action() is None


def commands(tmp_path, code):
    """The lines said about a command that runs `code` with the path of a file."""
    command = [sys.executable, "-c", code, str(tmp_path / "to")]
    rule = alarm(name="x", metric="kl/k1", above=1.0, do="run", command=command)
    said = []
    watched = Alarms("ppo", {"x": rule}, {}, said.append, str(tmp_path))
    began = time.perf_counter()
    watched.observe(7, {"kl/k1": 2.0})
    assert time.perf_counter() - began < 1, "in the background"
    watched.close()
    return said[1:]


def test_a_command_gets_the_alarm_as_json(tmp_path):
    assert commands(tmp_path, "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())") == []
    found = json.loads((tmp_path / "to").read_text())
    assert found == {
        "alarm": "x", "stage": "ppo", "step": 7, "since": 7, "metric": "kl/k1", "value": 2.0, "above": 1.0, "over": 1,
        "for": 1, "run_dir": str(tmp_path), "message": "ppo: alarm x: kl/k1 is 2, above 1 since step 7",
    }  # fmt: skip


def test_a_command_that_fails_is_one_line(tmp_path, monkeypatch):
    python = f"ppo: alarm x: command {sys.executable}"
    fails = "import sys; print('a'); sys.exit('no\\nmail')"
    assert commands(tmp_path, fails) == [f"{python} failed with status 1: mail"]
    monkeypatch.setattr(module, "TIME_LIMIT", 0.3)
    assert commands(tmp_path, "import time; time.sleep(60)") == [f"{python} took more than 0.3 s and was ended"]
    monkeypatch.setattr(sys, "executable", "/none/here")
    assert commands(tmp_path, "") == ["ppo: alarm x: command /none/here cannot be started: No such file or directory"]


# ---------------------------------------------------------------- the shipped set

STEPS = np.arange(60)
FAULTS = {  # alarm -> the series of its metrics that a run with this fault has
    "kl_runs_away": {"kl/per_token": STEPS * 0.05},
    "length_collapses": {"length/mean": 40 * 0.9**STEPS},
    "length_explodes": {"length/mean": 40 * 1.05**STEPS},
    "unfinished": {"length/eos_share": 1 - STEPS / 60},
    "entropy_collapses": {"policy/entropy": 2 * 0.9**STEPS},
    "gold_falls": {"reward/gold": np.sin(STEPS / 20), "reward/score": STEPS * 0.1},
    "evaluation_gold_falls": {"evaluation/reward/gold": np.sin(STEPS / 20), "evaluation/reward/score": STEPS * 0.1},
    "value_does_not_fit": {"value/explained_variance": 0 * STEPS - 0.3},
    "policy_jumps": {"policy/approx_kl": 0.01 + STEPS * 0.005},
    "clips_high": {"policy/clip_high": STEPS / 60},
    "clips_low": {"policy/clip_low": STEPS / 60},
    "sampling_gap": {"gap/logprob_mean": STEPS * 0.002},
    "first_ratio": {"policy/first_ratio_error": 0 * STEPS + 0.01},
}


@pytest.mark.parametrize("name", SHIPPED)
def test_each_shipped_alarm_fires_on_its_fault_and_on_no_other(name):
    series = [{metric: float(values[i]) for metric, values in FAULTS[name].items()} for i in STEPS]
    begun, said, _ = play(SETS["ppo"], series)
    assert list(begun) == [name] and len(begun[name]) == 1
    assert "; " in said[0], "and says what to do about it"


def quickstart():
    """The metrics of the shipped alarms in a quickstart run (seed 2), six digits."""
    with gzip.open(QUICKSTART, "rt") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items()} for row in rows]


def test_no_shipped_alarm_fires_on_the_quickstart():
    series = quickstart()
    begun, said, watched = play(SETS["ppo"], series)
    assert begun == {} and said == [] and len(series) == 70
    logged = {a.metric for a in SETS["ppo"] if not a.metric.startswith("evaluation/")}
    assert logged <= series[0].keys(), "every one had something to look at"
    assert all(len(watched.states[a.name].latest) == a.over for a in SETS["ppo"] if a.metric in logged)


def test_sets_and_names():
    assert alarms_of(("ppo",), "sft") == {} and list(alarms_of(("ppo",), "ppo")) == list(SHIPPED)
    mine = alarms_of(("ppo", alarm(name="kl_runs_away", do="stop")), "ppo")["kl_runs_away"]
    assert mine == SHIPPED["kl_runs_away"].model_copy(update={"do": "stop"})
    other = alarms_of(("ppo", alarm(name="kl_runs_away", below=2.0)), "ppo")["kl_runs_away"]
    assert (other.limit, other.over, other.metric) == (("below", 2.0), 3, "kl/per_token")
    two = alarms_of((alarm(metric="a", above=1.0), alarm(metric="a", above=2.0, stage="sft")), "sft")
    assert list(two) == ["a_above_1", "a_above_2"]
