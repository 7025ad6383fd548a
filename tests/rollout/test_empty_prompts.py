"""Rows without a prompt, such as episodes that are over: they are not decoded, and other rows do not see them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import Sampling
from jaxrlhf.records import Prompts


@pytest.mark.parametrize("slots", [None, 2])
def test_rows_without_a_prompt_are_empty_and_change_no_other_row(programs, tiny, roles, prompts, slots):
    sampling = Sampling(max_new_tokens=6, slots=slots)
    empty = np.isin(np.arange(8), (0, 1, 2, 5, 7))  # with two slots, a whole pass has only empty rows
    some = Prompts(prompts.tokens, prompts.mask & ~jnp.asarray(empty)[:, None])
    whole, part = (programs.rollout(tiny, roles.policy, rows, jax.random.key(5), sampling) for rows in (prompts, some))
    for name in ("tokens", "response_mask", "ended"):
        np.testing.assert_array_equal(getattr(whole, name)[~empty], getattr(part, name)[~empty])
    # With slots, rows meet other rows in a step, and products round differently.
    np.testing.assert_allclose(whole.sample_logprobs[~empty], part.sample_logprobs[~empty], atol=1e-5 if slots else 0)
    assert not part.mask[empty].any() and not part.ended[empty].any()
    assert not part.response_mask[empty].any() and not part.sample_logprobs[empty].any()
    assert np.isfinite(part.sample_logprobs).all()
    none = Prompts(prompts.tokens, jnp.zeros_like(prompts.mask))
    assert not programs.rollout(tiny, roles.policy, none, jax.random.key(5), sampling).mask.any()
