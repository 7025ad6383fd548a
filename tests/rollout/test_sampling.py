import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config import Sampling
from jaxrlhf.rollout.sampling import draw, row_uniforms, truncate, truncates

truncate_jit = jax.jit(truncate)
draw_jit = jax.jit(draw)
NEARLY_1 = np.nextafter(np.float32(1), np.float32(0))


def kept(logits, **settings):
    """Which tokens of each row truncation leaves possible; what stays keeps its logit."""
    out = np.asarray(truncate_jit(jnp.asarray(logits, jnp.float32), Sampling(**settings)))
    possible = np.isfinite(out)
    np.testing.assert_array_equal(out[possible], np.asarray(logits, np.float32)[possible])
    assert (out[~possible] == -np.inf).all()
    return possible


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(0, 2, (50, 40)).astype(np.float32)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True), dtype=np.float64)
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.7, [1, 2, 6]), (0.6, [1, 6]), (0.5, [6]), (1e-9, [6]), (1.0, [0, 1, 2, 3, 4, 5, 6])],
)
def test_top_p_keeps_the_published_tokens(p, expected):
    """The vectors of openai/lm-human-preferences, utils/test_core_utils.py (there 0 stands for 1e-9)."""
    logits = [[1, 1.01, 1.001, 0, 0, 0, 2]]
    assert np.flatnonzero(kept(logits, top_p=p)[0]).tolist() == expected


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_is_the_largest_set_within_that_probability(logits, p):
    for row, possible in zip(softmax(logits), kept(logits, top_p=p)):
        order = np.argsort(-row)
        count = max(1, np.searchsorted(np.cumsum(row[order]), p, side="right"))
        assert set(np.flatnonzero(possible)) == set(order[:count])


def test_top_p_of_1_keeps_a_long_tail():
    """Rounded sums pass 1 before a vocabulary ends: the tail must stay all the same."""
    logits = np.random.default_rng(1).normal(0, 3, (4, 20000)).astype(np.float32)
    assert kept(logits, top_p=1.0).all()


@pytest.mark.parametrize("k", [1, 3, 39, 40, 100])
def test_top_k_keeps_the_k_likeliest(logits, k):
    for row, possible in zip(logits, kept(logits, top_k=k)):
        assert set(np.flatnonzero(possible)) == set(np.argsort(-row)[:k])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_min_p_keeps_those_at_least_this_likely_beside_the_likeliest(logits, p):
    probability = softmax(logits)
    floor = p * probability.max(-1, keepdims=True)
    assert (np.abs(probability - floor) > 1e-6).mean() > 0.9  # no case hangs on rounding
    np.testing.assert_array_equal(kept(logits, min_p=p), probability >= floor * (1 - 1e-9))


def test_the_three_apply_one_after_another(logits):
    """top-p counts in the distribution that top-k has left, min-p in what both have."""
    for row, possible in zip(logits, kept(logits, top_k=8, top_p=0.8, min_p=0.3)):
        best = np.argsort(-row)[:8]
        p = softmax(row[best])
        best = best[: max(1, np.searchsorted(np.cumsum(p), 0.8, side="right"))]
        best = best[row[best] >= row[best[0]] + np.log(0.3)]
        assert set(np.flatnonzero(possible)) == set(best)


def test_off_leaves_everything(logits):
    assert kept(logits).all() and not truncates(Sampling())
    assert all(map(truncates, (Sampling(top_k=1), Sampling(top_p=1.0), Sampling(min_p=0.0))))


def test_top_p_leaves_out_what_was_impossible_before():
    logits = [[0.0, -np.inf, 1.0, -np.inf]]
    for settings in ({"top_p": 1.0}, {"top_k": 3}, {"min_p": 0.0}, {"top_k": 3, "top_p": 1.0, "min_p": 0.0}):
        assert np.isfinite(np.asarray(truncate(jnp.array(logits), Sampling(**settings)))).tolist() == [
            [True, False, True, False]
        ]


def test_draws_are_distributed_as_softmax():
    """Pearson's chi-square of 20,000 draws: below the 0.999 quantile for 9 degrees of freedom."""
    logits = np.random.default_rng(2).normal(0, 1.5, 10).astype(np.float32)
    count = 20_000
    uniforms = row_uniforms(jax.random.key(0), count, 1)[:, 0]
    tokens = np.asarray(draw_jit(jnp.tile(logits, (count, 1)), uniforms))
    expected = count * softmax(logits)
    observed = np.bincount(tokens, minlength=10)
    assert ((observed - expected) ** 2 / expected).sum() < 27.88
    assert (observed > 0).all()


def test_draws_invert_the_cumulative_distribution(logits):
    u = np.random.default_rng(3).random(50).astype(np.float32)
    u[:10] = 0  # the first token that is possible
    logits = np.where(np.arange(40) < np.arange(50)[:, None] % 5, -np.inf, logits)
    cumulative = np.cumsum(softmax(logits), -1)
    assert np.abs(cumulative - u[:, None])[10:].min() > 1e-5  # no case hangs on rounding
    expected = [np.searchsorted(c, x, side="right") for c, x in zip(cumulative, u)]
    tokens = draw_jit(jnp.asarray(logits), jnp.asarray(u))
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("vocabulary", [7, 1000, 50_000])
def test_a_token_of_probability_0_is_never_drawn(vocabulary):
    """At both ends of the cumulative distribution and in its gaps, whatever the uniform number."""
    generator = np.random.default_rng(vocabulary)
    u = np.float32([0.0, 1e-45, NEARLY_1, 1 - 2**-23, *np.linspace(0, NEARLY_1, 60)])
    logits = generator.normal(0, 3, (len(u), vocabulary)).astype(np.float32)
    impossible = generator.random(logits.shape) < 0.5
    impossible[:, [0, 1, -1, -2]] = True
    impossible[:, 3] = False
    tokens = np.asarray(draw_jit(jnp.where(impossible, -jnp.inf, logits), jnp.asarray(u)))
    assert not impossible[np.arange(len(u)), tokens].any()


def test_nor_where_rounding_moves_the_cumulative_sum():
    """Sums in parallel may rise a little over a token of probability 0: numbers aimed there find another one."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, 50_000).astype(np.float32)
    impossible = generator.random(logits.shape) < 0.5
    logits = jnp.where(impossible, -jnp.inf, logits)
    cumulative = np.asarray(jax.jit(lambda x: jnp.cumsum(jnp.exp(x - jnp.max(x))))(logits))
    at = np.flatnonzero((np.diff(cumulative) > 0) & impossible[1:])[:50]
    if not at.size:
        pytest.skip("sums are in order on this device")
    middle = (cumulative[at].astype(np.float64) + cumulative[at + 1]) / 2 / cumulative[-1]
    u = np.concatenate([middle, cumulative[at] / cumulative[-1], cumulative[at + 1] / cumulative[-1]])
    tokens = np.asarray(draw_jit(jnp.tile(logits, (len(u), 1)), jnp.asarray(u, jnp.float32)))
    assert not impossible[tokens].any()


def test_a_certain_token_is_drawn_at_any_height():
    logits = np.full((3, 5), -np.inf, np.float32)
    logits[:, 2] = [-1e30, 0.0, 1e30]
    for u in (0.0, 0.5, NEARLY_1):
        np.testing.assert_array_equal(draw_jit(jnp.asarray(logits), jnp.full(3, u, jnp.float32)), [2, 2, 2])


def test_a_rows_numbers_depend_on_its_index_and_step_alone():
    uniforms = jax.jit(row_uniforms, static_argnums=(1, 2))
    key = jax.random.key(0)
    many = np.asarray(uniforms(key, 16, 9))
    np.testing.assert_array_equal(uniforms(key, 3, 2), many[:3, :2])
    assert len(np.unique(many)) == many.size
    assert (many >= 0).all() and (many < 1).all()
    assert not np.intersect1d(many, uniforms(jax.random.key(8), 16, 9)).size
