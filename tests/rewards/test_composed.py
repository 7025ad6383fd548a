import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.errors import UserError
from jaxrlhf.rewards.completions import Completions, abstained_rows, may_abstain
from jaxrlhf.rewards.composed import ComposedReward
from jaxrlhf.rewards.functions import FunctionReward, RewardFault


class Fixed:
    name = "fixed"

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, completions):
        if isinstance(self.scores, BaseException):
            raise self.scores
        return self.scores


COMPLETIONS = Completions(None, ["a", "b", "c"], [{}] * 3, None)


def test_the_score_is_the_weighted_sum_and_parts_are_known_by_name():
    on_device, on_host = jnp.array([1.0, -2.0, 0.5]), np.float32([0.25, 4.0, 1e6])
    reward = ComposedReward(
        {"model": (Fixed(on_device), 1.5), "length": (Fixed(on_host), -0.5), "seen": (Fixed(on_host), 0)}
    )
    scores, parts = reward.scores_and_parts(COMPLETIONS)
    expected = [1.5 * a - 0.5 * b for a, b in zip([1.0, -2.0, 0.5], [0.25, 4.0, 1e6])]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert scores.dtype == np.float32
    assert list(parts) == ["model", "length", "seen"]
    np.testing.assert_array_equal(parts["model"], on_device)
    np.testing.assert_array_equal(parts["seen"], on_host)
    np.testing.assert_array_equal(reward(COMPLETIONS), scores)
    assert reward.name == "1.5 model + -0.5 length + 0 seen"


def test_one_part_of_weight_one_is_that_part():
    values = np.random.default_rng(0).standard_normal(3).astype(np.float32)
    np.testing.assert_array_equal(ComposedReward({"only": (Fixed(values), 1.0)})(COMPLETIONS), values)


def test_the_device_computes_while_another_part_waits():
    order = []

    class Noted(Fixed):
        def __call__(self, completions):
            order.append("called")
            return self.scores

    class Fetched:
        """What `device_get` takes to the host when it is asked for."""

        def __array__(self, *_, **__):
            order.append("fetched")
            return np.zeros(3, np.float32)

    ComposedReward({"a": (Noted(Fetched()), 1.0), "b": (Noted(np.zeros(3)), 1.0)})(COMPLETIONS)
    assert order[:2] == ["called", "called"] and "fetched" in order


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (RewardFault("reward server http://x: status 500"), "reward part bad: reward server http://x: status 500"),
        (ValueError("one\ntwo"), "reward part bad raised ValueError: one"),
        (np.float32([1, np.nan, 2]), "reward part bad returned nan for completion 1 of 3"),
        (jnp.array([1, 2, jnp.inf]), "reward part bad returned inf for completion 2 of 3"),
        (np.zeros(2), "reward part bad returned shape (2,) for 3 completions"),
        (np.zeros((3, 1)), "reward part bad returned shape (3, 1) for 3 completions"),
        (["1", "2", "3"], "reward part bad returned no list of numbers"),
    ],
)
def test_a_part_that_fails_is_named(bad, words):
    with pytest.raises(RewardFault) as fault:
        ComposedReward({"good": (Fixed(np.zeros(3)), 1.0), "bad": (Fixed(bad), 0.0)})(COMPLETIONS)
    assert words in str(fault.value) and "\n" not in str(fault.value)


def test_stopping_is_no_fault_of_a_part():
    for error in (KeyboardInterrupt(), UserError("needs a package")):
        with pytest.raises(type(error)):
            ComposedReward({"a": (Fixed(error), 1.0)})(COMPLETIONS)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "there are no parts"),
        ({"score": (Fixed(0), 1.0)}, "'score'"),
        ({"a/b": (Fixed(0), 1.0)}, "'a/b'"),
        ({"": (Fixed(0), 1.0)}, "''"),
        ({"a": (Fixed(0), float("nan"))}, "weight must be a finite number, not nan"),
        ({"a": (Fixed(0), "1")}, "weight must be a finite number, not '1'"),
    ],
)
def test_names_and_weights_that_cannot_be(parts, words):
    with pytest.raises(UserError, match=words):
        ComposedReward(parts)


def test_parts_stay_on_the_host():
    scores, parts = ComposedReward({"a": (Fixed(jnp.ones(3)), 2.0)}).scores_and_parts(COMPLETIONS)
    assert not any(isinstance(values, jax.Array) for values in (scores, *parts.values()))


def test_a_part_that_abstains_counts_0_and_the_others_stay():
    first = np.ma.MaskedArray(np.float32([0, 2, 0]), [True, False, True])
    second = np.ma.MaskedArray(np.float32([3, 0, 0]), [False, True, True])
    parts = {"a": (Fixed(first), 2.0), "b": (Fixed(second), -1.0), "seen": (Fixed(np.float32([5, 5, 5])), 0)}
    scores, by_name = ComposedReward(parts).scores_and_parts(COMPLETIONS)
    np.testing.assert_array_equal(np.asarray(scores), np.float32([-3, 4, 0]))
    # A part that is only measured does not make up for those that abstain.
    np.testing.assert_array_equal(abstained_rows(scores), [False, False, True])
    for name, given in (("a", first), ("b", second)):
        np.testing.assert_array_equal(abstained_rows(by_name[name]), given.mask)
    assert not may_abstain(ComposedReward(parts))
    asked = FunctionReward("jaxrlhf.rewards.library:exact_match", "here")
    assert may_abstain(ComposedReward({"asked": (asked, 1.0), "seen": (Fixed(first), 0)}))


@pytest.mark.parametrize("name", ["abstained", "a_abstained", "score_std"])
def test_no_part_takes_the_name_of_another_metric(name):
    with pytest.raises(UserError, match=rf"reward part '{name}': a name must"):
        ComposedReward({name: (Fixed([1.0]), 1.0)})
