"""Where the value model starts, and what the policy would learn from that."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.running import gain_and_bias, init_moments, update_moments
from jaxrlhf.config import AdapterConfig, RunConfig, ScoreConfig
from jaxrlhf.errors import UserError
from jaxrlhf.models.adapters import SCORE, bind, init_adapter, scaled_head
from jaxrlhf.models.scoring import response_values
from jaxrlhf.records import Annotated
from jaxrlhf.rewards.model import score_rollout
from jaxrlhf.stages.ppo import stage as ppo
from jaxrlhf.stages.ppo.value import starting_value
from jaxrlhf.stages.roles import Roles
from jaxrlhf.steps.annotate import build_experience
from jaxrlhf.steps.scores import adjust_scores

OWN = {"kind": "model"}
COUNT = {"kind": "function", "function": "jaxrlhf.rewards.library:repetition"}


def run_of(reward, **settings):
    """A run with nothing but settings, and the list of lines that it prints."""
    config = RunConfig.model_validate(
        {"run_dir": "run", "model": {"path": "m"}, "stages": ["ppo"], "adapter": {"rank": 2},
         "ppo": {"data": {"path": "p"}, "reward": reward, **settings}},
    )  # fmt: skip
    said = []
    return SimpleNamespace(config=config, say=said.append), said


def start(base, adapters, reward=OWN, **settings):
    run, said = run_of(reward, **settings)
    return *starting_value(run, Roles(base, None, adapters)), said


def trunk(adapter):
    return {path: leaves for path, leaves in adapter.items() if path != SCORE}


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        bool(np.array_equal(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


@pytest.fixture(scope="module")
def reward(tiny, make_adapter):
    return make_adapter(tiny, 5, head="reward")


def sum_of(*weights):
    """A sum of the run's own reward and others, by weight."""
    kinds = [OWN, COUNT, COUNT]
    return {"kind": "sum", "parts": {f"p{i}": kinds[i] | {"weight": w} for i, w in enumerate(weights)}}


@pytest.mark.parametrize(
    ("of", "normalise", "gain"),
    [(OWN, "none", 1.0), (OWN, "initial", 1.0), (sum_of(2.0), "none", 2.0), (sum_of(0.5, 0.0), "initial", 0.5)],
)
def test_where_the_reward_is_the_adapter_the_value_starts_from_all_of_it(tiny, reward, of, normalise, gain):
    value, predicts_scores, said = start(tiny, {"reward": reward}, of, score={"normalise": normalise})
    assert predicts_scores and not said
    assert same(trunk(value), trunk(reward))
    np.testing.assert_array_equal(value[SCORE]["kernel"], gain * reward[SCORE]["kernel"])
    np.testing.assert_array_equal(value[SCORE]["bias"], np.zeros(1, np.float32))


@pytest.mark.parametrize(
    ("of", "normalise", "why"),
    [
        (OWN, "running", "ppo.score.normalise is running"),
        (OWN, "batch", "ppo.score.normalise is batch"),
        (COUNT, "none", "the reward is not only the score of the reward adapter"),
        (OWN | {"path": "elsewhere"}, "none", "the reward is not only the score of the reward adapter"),
        (sum_of(1.0, 0.1), "none", "the reward is not only the score of the reward adapter"),
        (sum_of(0.0, 1.0), "none", "the reward is not only the score of the reward adapter"),
    ],
)
def test_other_rewards_use_its_trunk_with_a_head_of_0(tiny, reward, of, normalise, why):
    value, predicts_scores, said = start(tiny, {"reward": reward}, of, score={"normalise": normalise})
    assert not predicts_scores and same(trunk(value), trunk(reward))
    assert set(value[SCORE]) == {"kernel", "bias"} and not any(leaf.any() for leaf in value[SCORE].values())
    assert said == [f"ppo: the value model starts from the reward adapter's trunk with a head of 0, because {why}"]


def test_a_full_reward_adapter_does_not_make_the_value_full(tiny):
    whole = init_adapter(tiny, AdapterConfig(kind="full"), jax.random.key(1), "reward")
    value, predicts_scores, said = start(tiny, {"reward": whole})
    fresh, _, nothing = start(tiny, {})
    assert same(value, fresh) and not predicts_scores and not nothing
    assert len(said) == 1 and "give ppo.value_adapter.kind=full" in said[0]
    value, predicts_scores, said = start(tiny, {"reward": whole}, value_adapter={"kind": "full"})
    assert predicts_scores and not said and same(trunk(value), trunk(whole))


def test_a_full_value_starts_from_a_lora_reward(tiny, reward):
    value, predicts_scores, _ = start(tiny, {"reward": reward}, value_adapter={"kind": "full"})
    assert predicts_scores and not any("lora_a" in leaves for leaves in value.values())


@pytest.mark.parametrize(
    "given", [{"value_from": "fresh"}, {"update": {"value_trunk": "policy"}}, {"advantage": {"estimator": "reinforce"}}]
)
def test_settings_that_do_not_use_the_reward_adapter(tiny, reward, given):
    value, predicts_scores, said = start(tiny, {"reward": reward}, **given)
    assert not predicts_scores and not said
    assert value is None if "advantage" in given else not value[SCORE]["kernel"].any()


@pytest.mark.parametrize("name", ["policy", "reference"])
def test_a_policy_of_lora_pairs_does_not_start_from_whole_weights(tiny, make_adapter, name):
    whole = init_adapter(tiny, AdapterConfig(kind="full"), jax.random.key(1))
    given = {"policy": None, "reference": None}
    run, _ = run_of(OWN, **{name: "folder"})
    with pytest.raises(UserError, match=rf"ppo.{name}: .*folder holds full weights.* give ppo.adapter.kind=full"):
        ppo._check_kinds(run, SimpleNamespace(**given | {name: whole}))
    ppo._check_kinds(run, SimpleNamespace(**given | {name: make_adapter(tiny, 1)}))
    ppo._check_kinds(run, SimpleNamespace(policy=make_adapter(tiny, 1), reference=whole))  # which is not trained
    run, _ = run_of(OWN, adapter={"kind": "full"}, **{name: "folder"})
    ppo._check_kinds(run, SimpleNamespace(**given | {name: whole}))


def test_a_starting_adapter_keeps_its_rank(tiny, make_adapter):
    adapter = make_adapter(tiny, 1, rank=2)
    assert ppo._kept_rank(adapter, AdapterConfig(rank=2)) is None
    assert ppo._kept_rank({}, AdapterConfig(rank=2)) is None
    assert "keeps rank 2" in ppo._kept_rank(adapter, AdapterConfig(rank=16))


@pytest.fixture(scope="module")
def scale_three(tiny, make_adapter, sampled):
    """A reward adapter whose scores lie around 3 whatever the answer, and its scores of `sampled`."""
    reward = make_adapter(tiny, 5, head="reward", targets=("down_proj",))
    reward[SCORE]["kernel"] *= 0.05
    reward = scaled_head(reward, 1.0, 3.0)
    scores = jax.jit(score_rollout)(tiny, reward, sampled)
    assert abs(float(scores.mean()) - 3) < 0.1 and float(scores.std()) > 0.02
    return reward, scores


@pytest.mark.parametrize("normalise", ["none", "initial", "running"])
def test_at_the_start_ending_is_neither_good_nor_bad(tiny, sampled, scale_three, normalise):
    """Nothing is to be learnt about ending where scores do not depend on it.

    With the value at 3 beside normalised scores of mean 0 the last token of every answer would have an advantage of -3,
    in deviations of the score, and the policy would learn not to end.
    """
    reward, scores = scale_three
    moments = init_moments() if normalise == "none" else update_moments(init_moments(), scores)
    value, predicts_scores, _ = start(tiny, {"reward": reward}, score={"normalise": normalise})
    if normalise == "initial":
        assert predicts_scores
        value = scaled_head(value, *gain_and_bias(moments))
    given = (sampled.tokens, sampled.mask, sampled.response_mask)
    zeros, last = jnp.zeros(sampled.response_mask.shape), jnp.sum(sampled.response_mask, axis=1) - 1

    def last_advantage(value):
        """The mean advantage of last tokens, in deviations of the scores."""
        values = jax.jit(lambda value: response_values(bind(tiny, value), *given))(value)
        adjusted = adjust_scores(scores, sampled, moments, ScoreConfig(normalise=normalise))
        noted = Annotated(zeros, zeros, values)
        experience, _ = build_experience(sampled, noted, adjusted, 0.0, whiten_advantages=False)
        of_last = experience.advantages[jnp.arange(len(scores)), last]
        return float(jnp.mean(of_last) / jnp.std(adjusted))

    started = last_advantage(value)
    assert abs(started) < 1.0
    if normalise != "none":
        assert last_advantage(reward) < started - 2.0 and last_advantage(reward) < -2.0
