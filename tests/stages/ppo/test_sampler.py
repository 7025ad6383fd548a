"""Metrics of rewards that abstain."""

from types import SimpleNamespace

import numpy as np

from jaxrlhf.rewards.completions import Completions, with_abstained
from jaxrlhf.rewards.composed import ComposedReward
from jaxrlhf.stages.ppo.sampler import Sampler

COMPLETIONS = Completions(None, ["a", "b", "c"], [{}] * 3, None)


class Given:
    """A reward of these scores; None abstains."""

    may_abstain = True

    def __init__(self, name, *scores):
        self.name, self.scores = name, scores

    def __call__(self, completions):
        numbers = np.float32([0 if score is None else score for score in self.scores])
        return with_abstained(numbers, np.array([score is None for score in self.scores]))


def sampler_of(reward, gold=None):
    """A sampler that can only score, and the list of lines that it prints."""
    sampler, said = Sampler.__new__(Sampler), []
    sampler.reward, sampler.gold, sampler.run, sampler._warned = reward, gold, SimpleNamespace(say=said.append), set()
    return sampler, said


def test_an_abstaining_reward_counts_0_and_its_share_is_a_metric():
    sampler, said = sampler_of(Given("half", 0.5, None, 2.0), gold=Given("gold", None, 1.0, 1.0))
    rows, inside = sampler.reward_metrics(COMPLETIONS)
    assert inside is None
    expected = {
        "reward/score": [0.5, 0, 2], "reward/abstained": [0, 1, 0],
        "reward/gold": [0, 1, 1], "reward/gold_abstained": [1, 0, 0],
    }  # fmt: skip
    assert set(rows) == set(expected) and not said
    for name, values in expected.items():
        assert rows[name].dtype == np.float32 and not isinstance(rows[name], np.ma.MaskedArray)
        np.testing.assert_array_equal(rows[name], np.float32(values), err_msg=name)


def test_each_part_of_a_sum_has_its_own_metrics():
    parts = {"a": (Given("first", 1.0, None, None), 1.0), "b": (Given("second", 2.0, 2.0, None), 0.5)}
    rows, _ = sampler_of(ComposedReward(parts))[0].reward_metrics(COMPLETIONS)
    np.testing.assert_array_equal(rows["reward/score"], np.float32([2, 1, 0]))
    np.testing.assert_array_equal(rows["reward/a_abstained"], [0, 1, 1])
    np.testing.assert_array_equal(rows["reward/b_abstained"], [0, 0, 1])
    np.testing.assert_array_equal(rows["reward/abstained"], [0, 0, 1])


def test_a_reward_that_abstains_on_a_whole_batch_is_reported_once():
    sampler, said = sampler_of(Given("silent", None, None, None))
    for _ in range(2):
        np.testing.assert_array_equal(sampler.reward_metrics(COMPLETIONS)[0]["reward/score"], [0, 0, 0])
    assert said == [
        "ppo: silent abstained on all 3 completions of a batch, so their scores are 0 (see the metric reward/abstained)"
    ]
