"""Sampling from choices: every answer is one of them, as often as the policy says."""

import jax
import numpy as np
import pytest
from scipy.stats import chi2
from small_models import ANSWERS

from jaxrlhf.config import Sampling
from jaxrlhf.models.adapters import bind

TEXTS = ("a", "b", "c", "d", "e", "f")
R, N = 4, 400


@pytest.fixture(scope="module")
def answer(programs, tiny, roles, prompts, choices):
    """`answer(**sampling)`: (numbers of the choices i[8,N], the rollout)."""

    def run(**settings):
        sampling = Sampling(max_new_tokens=R, choices=TEXTS, samples_per_prompt=N, stop_tokens=(4,), **settings)
        rollout = jax.device_get(
            programs.rollout(tiny, roles.policy, prompts, jax.random.key(5), sampling, choices)
        )
        found = [
            ANSWERS.index(tuple(row[real].tolist()))
            for row, real in zip(rollout.tokens[:, -R:], rollout.response_mask)
        ]
        assert rollout.ended.all()
        return np.array(found).reshape(-1, N), rollout

    return run


@pytest.fixture(scope="module")
def probabilities(programs, tiny, roles, prompts):
    """`probabilities(temperature)`: f64[8,6], in numpy from one forward pass per choice."""

    def run(temperature):
        found = np.zeros((len(prompts.tokens), len(ANSWERS)))
        for number, answer in enumerate(ANSWERS):
            tail = np.tile(answer + (0,) * (R - len(answer)), (len(prompts.tokens), 1)).astype(np.int32)
            tokens = np.concatenate([prompts.tokens, tail], axis=1)
            mask = np.concatenate([prompts.mask, np.ones_like(tail, bool)], axis=1)
            logits = np.asarray(programs.forward(bind(tiny, roles.policy), tokens, mask), np.float64) / temperature
            for t, token in enumerate(answer):
                allowed = sorted({a[t] for a in ANSWERS if a[:t] == answer[:t]})
                weights = np.exp(logits[:, prompts.tokens.shape[1] + t - 1][:, allowed])
                found[:, number] += np.log(weights[:, allowed.index(token)] / weights.sum(1))
        return np.exp(found)

    return run


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_frequencies_are_the_probabilities(answer, probabilities, temperature):
    exact = probabilities(temperature)
    np.testing.assert_allclose(exact.sum(1), 1)
    found, rollout = answer(temperature=temperature)
    counts = np.stack([np.bincount(row, minlength=len(ANSWERS)) for row in found])
    often = N * exact >= 5
    cells = [np.append(x[often], x[~often].sum()) for x in (counts, N * exact)]
    statistic = ((cells[0] - cells[1]) ** 2 / cells[1]).sum()
    assert len(cells[0]) > 20
    low, high = chi2.ppf([1e-3, 1 - 1e-3], len(cells[0]) - len(exact))
    assert low < statistic < high
    wanted = np.log(exact[np.arange(len(exact))[:, None], found]).ravel()
    np.testing.assert_allclose(rollout.sample_logprobs.sum(1), wanted, atol=1e-5)


def test_slots_change_no_answer(answer):
    np.testing.assert_array_equal(answer(slots=24)[0], answer()[0])


def test_truncation_removes_allowed_tokens_and_greedy_takes_the_likeliest(answer, probabilities):
    exact = probabilities(1.0)
    beginnings = np.array([[answer[0] == token for answer in ANSWERS] for token in (5, 7, 10)])
    likeliest = np.array([5, 7, 10])[(exact @ beginnings.T).argmax(1)]
    for settings in ({"top_p": 1e-6}, {"temperature": 0.0}):
        found, _ = answer(**settings)
        first = np.array([answer[0] for answer in ANSWERS])[found]
        assert (first == likeliest[:, None]).all() and (found == found[:, :1]).all()
    np.testing.assert_array_equal(answer(top_p=1.0)[0], answer()[0])


def test_texts_without_their_tokens_are_refused(programs, tiny, prompts):
    with pytest.raises(ValueError, match="argument `choices`"):
        programs.rollout(tiny, None, prompts, jax.random.key(0), Sampling(max_new_tokens=2, choices=TEXTS))
