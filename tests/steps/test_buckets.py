"""Answers cut to the length of the longest beside them: the same numbers at less work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import PPOConfig
from jaxrlhf.records import Rollout
from jaxrlhf.steps.microbatches import by_longest, shortest_first

KEY = jax.random.key(13)


def rollout_of(lengths, prompt=3, answer=10):
    """Answers of these lengths after prompts of `prompt` tokens."""
    mask = np.arange(answer) < np.array(lengths)[:, None]
    B = len(lengths)
    return Rollout(
        tokens=jnp.arange(B * (prompt + answer), dtype=jnp.int32).reshape(B, -1),
        mask=jnp.concatenate([jnp.ones((B, prompt), bool), mask], axis=1),
        response_mask=jnp.asarray(mask),
        sample_logprobs=jnp.zeros((B, answer)),
        ended=jnp.ones((B,), bool),
        temperature=jnp.ones((B,)),
    )


@pytest.mark.parametrize(
    "lengths, buckets, taken",
    [([1, 2], 4, 3), ([3, 0], 4, 3), ([4, 1], 4, 5), ([5, 8], 4, 8), ([9, 1], 4, 10), ([10], 4, 10), ([0, 0], 2, 5),
     ([2, 1], 1, 10), ([2, 1], 100, 2)],
)  # fmt: skip
def test_the_least_length_that_holds_the_longest_is_taken(lengths, buckets, taken):
    """Of 10 in four: 3, 5, 8, 10."""
    rows = rollout_of(lengths)

    def run(cut):
        assert cut.tokens.shape[1] - cut.response_mask.shape[1] == 3 and cut.mask.shape == cut.tokens.shape
        return jnp.int32(cut.response_mask.shape[1]), jnp.sum(cut.response_mask), cut.tokens[:, :4]

    size, real, tokens = jax.jit(lambda rows: by_longest(run, rows, buckets))(rows)
    assert (int(size), int(real)) == (taken, sum(lengths))
    np.testing.assert_array_equal(tokens, rows.tokens[:, :4])


def test_rows_of_like_length_stand_together():
    assert shortest_first(rollout_of([4, 0, 9, 4, 1])).tolist() == [1, 4, 0, 3, 2]


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("trunk", ["own", "policy"])
def test_annotate_says_the_same_of_cut_rows(programs, tiny, roles, sampled, microbatches, trunk):
    value = roles.value if trunk == "own" else {"score": roles.value["score"]}
    given = tiny, roles.policy, value, roles.reference, sampled
    whole, cut = (
        programs.annotate(*given, microbatches=microbatches, value_trunk=trunk, buckets=n) for n in (1, 3)
    )  # fmt: skip
    for name in ("logprobs", "ref_logprobs", "values"):
        np.testing.assert_allclose(getattr(cut, name), getattr(whole, name), rtol=1e-5, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("how, size", [("token", None), ("sequence", 2), ("constant", 2)])
def test_an_update_of_cut_rows_is_the_same(programs, start, tiny, experience, how, size):
    whole = PPOConfig(epochs=2, minibatches=1, microbatch_size=size, aggregation=how, entropy_coef=0.1)
    assert len(set(np.asarray(experience.response_mask).sum(1).tolist())) > 2
    old, new = (
        programs.update(start, tiny, experience, KEY, whole.model_copy(update={"buckets": n})) for n in (1, 3)
    )  # fmt: skip
    for part in ("policy", "value"):
        for a, b in zip(jax.tree.leaves(getattr(new[0], part)), jax.tree.leaves(getattr(old[0], part)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert set(new[1]) == set(old[1])
    for name in old[1]:
        np.testing.assert_allclose(new[1][name], old[1][name], rtol=2e-5, atol=2e-6, err_msg=name)
