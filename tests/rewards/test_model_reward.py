import jax
import numpy as np
import pytest

from jaxrlhf.models.adapters import bind
from jaxrlhf.models.scoring import sequence_scores
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.rewards.model import ModelReward, score_rollout


@pytest.fixture(scope="module")
def reward(tiny, make_adapter):
    return ModelReward(tiny, make_adapter(tiny, 4, head="reward"))


def scored(reward, rollout):
    return np.asarray(reward(Completions(rollout, [""] * 8, [{}] * 8, None)))


def test_scores_are_those_of_whole_sequences(tiny, reward, sampled):
    got = scored(reward, sampled)
    want = jax.jit(sequence_scores)(bind(tiny, reward.adapter), sampled.tokens, sampled.mask)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert got.shape == (8,) and got.dtype == np.float32 and got.std() > 0.1


@pytest.mark.parametrize(("size", "loops"), [(2, 1), (4, 1), (8, 0), (3, 0)], ids=["2", "4", "whole", "uneven"])
def test_rows_go_through_so_many_at_a_time(tiny, reward, sampled, size, loops):
    parted = ModelReward(tiny, reward.adapter, microbatch_size=size)
    np.testing.assert_allclose(scored(parted, sampled), scored(reward, sampled), atol=1e-5)
    jaxpr = jax.make_jaxpr(score_rollout, static_argnums=3)(tiny, reward.adapter, sampled, size)
    assert sum(equation.primitive.name == "scan" for equation in jaxpr.eqns) == loops


def test_the_score_stands_at_the_last_real_token(tiny, reward, sampled):
    """At the stop token of an answer that ended, at the last token of one that did not; one compile for all."""
    got = scored(reward, sampled)
    mask = np.asarray(sampled.mask)
    past = np.where(mask, sampled.tokens, 11)  # padding on both sides
    np.testing.assert_array_equal(scored(reward, sampled.replace(tokens=past)), got)
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
    assert len(set(last.tolist())) > 2 and sampled.ended.any() and not sampled.ended.all()
    other = np.array(sampled.tokens)
    other[np.arange(8), last] = (other[np.arange(8), last] + 1) % 12
    assert (np.abs(scored(reward, sampled.replace(tokens=other)) - got) > 1e-4).all()
    assert reward.program.compiles == 1
