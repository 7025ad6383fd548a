"""The curriculum by success draws what the policy can learn from, and continues from its counts."""

import json

import numpy as np
import pytest
from pydantic import ValidationError

from jaxrlhf.config import PPOStageConfig
from jaxrlhf.data.order import batch_rows
from jaxrlhf.data.success import Success

EASY, HARD, IMPOSSIBLE = 60, 20, 120
COUNT, BATCH, GROUP = EASY + HARD + IMPOSSIBLE, 20, 4


def test_estimates_and_counts():
    success = Success(3, solved_at=0.5, decay=0.5)
    assert success.estimates().tolist() == [0.5] * 3
    success.observe(np.array([2, 0]), np.array([1, 0.5, 0.4, 0, 0, 0, 0, 0], np.float32))
    assert success.estimates().tolist() == [0.1, 0.5, 0.5]
    success.observe(np.array([2, 2]), np.array([1, 1, 1, 1, 0, 0, 1, 1], np.float32))
    assert success.solved.tolist() == [0, 0, 7] and success.tried.tolist() == [4, 0, 10]
    metrics = success.metrics()
    assert metrics["curriculum/seen"] == pytest.approx(2 / 3) and metrics["curriculum/partly_solved"] == 0.5


def test_draws_follow_the_learnability():
    success = Success(4, 1.0, 1.0)
    success.solved[:], success.tried[:] = [0, 49, 98, 9], [98, 98, 98, 98]
    p = success.estimates()
    weights = p * (1 - p)
    drawn = np.bincount([success.choose(0, draw, 1)[0] for draw in range(4000)], minlength=4) / 4000
    # The shares of a draw of one are the weights, up to the evenly spaced numbers of four prompts.
    assert drawn[1] > drawn[3] > drawn[0] and abs(drawn[0] - drawn[2]) < 0.03
    assert drawn[1] == pytest.approx(weights[1] / weights.sum(), abs=0.1)
    for draw in range(5):
        assert sorted(success.choose(1, draw, 4)) == [0, 1, 2, 3] and len(success.choose(1, draw, 9)) == 9
        assert (success.choose(1, draw, 4) == success.choose(1, draw, 4)).all()
    assert any((success.choose(1, 0, 4) != success.choose(seed, 0, 4)).any() for seed in range(2, 6))


def iterations_to_learn(success, seed):
    """Iterations until 90% of the hard prompts are solved most of the time. The policy learns from mixed groups.

    A hard prompt is solved with probability sigmoid(skill). A group raises its prompt's skill by the variance of its
    scores, as a policy gradient does. Easy prompts are always solved, impossible ones never.
    """
    random, skill = np.random.default_rng(seed), np.full(HARD, -2.0)
    for iteration in range(2000):
        rows = batch_rows(seed, iteration, BATCH, COUNT) if success is None else success.choose(seed, iteration, BATCH)
        probability = np.concatenate([np.ones(EASY), 1 / (1 + np.exp(-skill)), np.zeros(IMPOSSIBLE)])
        scores = (random.random((BATCH, GROUP)) < probability[rows, None]).astype(np.float32)
        hard = (rows >= EASY) & (rows < EASY + HARD)
        skill[rows[hard] - EASY] += 2 * scores[hard].var(1)
        if success is not None:
            success.observe(rows, scores.reshape(-1))
        if (skill > 1).mean() >= 0.9:
            return iteration + 1
    raise AssertionError("not learnt")


def test_hard_prompts_are_learnt_in_fewer_iterations_than_with_uniform_draws():
    uniform = [iterations_to_learn(None, seed) for seed in range(5)]
    preferred = [iterations_to_learn(Success(COUNT, 1.0, 0.9), seed) for seed in range(5)]
    assert max(preferred) < min(uniform) and sum(preferred) < 0.65 * sum(uniform), (preferred, uniform)


def test_the_counts_of_a_checkpoint_give_the_same_draws():
    random, success = np.random.default_rng(0), Success(30, 1.0, 0.9)
    for draw in range(6):
        rows = success.choose(3, draw, 8)
        success.observe(rows, random.integers(0, 2, 16).astype(np.float32))
    resumed = Success(30, 1.0, 0.9)
    resumed.resume(json.loads(json.dumps(success.notes(6))))
    assert np.array_equal(resumed.solved, success.solved) and np.array_equal(resumed.tried, success.tried)
    assert np.array_equal(resumed.choose(3, 6, 8), success.choose(3, 6, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"async": 1}, "success_curriculum needs the scores before the next prompts are drawn"),
        ({"data": {"path": "a", "streaming": True}}, "success_curriculum needs all prompts in memory"),
        ({"data": {"path": "a", "curriculum": "level"}}, "both order the prompts"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValidationError, match=message):
        PPOStageConfig.model_validate({"data": {"path": "a"}, "success_curriculum": {}} | settings)
