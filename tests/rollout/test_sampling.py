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
def test_top_p_within_keeps_the_published_tokens(p, expected):
    """The vectors of openai/lm-human-preferences, utils/test_core_utils.py (there 0 stands for 1e-9)."""
    logits = [[1, 1.01, 1.001, 0, 0, 0, 2]]
    assert np.flatnonzero(kept(logits, top_p=p, top_p_rule="within")[0]).tolist() == expected


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_within_is_the_largest_set_of_at_most_that_probability(logits, p):
    for row, possible in zip(softmax(logits), kept(logits, top_p=p, top_p_rule="within")):
        order = np.argsort(-row)
        count = max(1, np.searchsorted(np.cumsum(row[order]), p, side="right"))
        assert set(np.flatnonzero(possible)) == set(order[:count])


@pytest.mark.parametrize("p", [1e-9, 0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(logits, p):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.TopPLogitsWarper(p)(None, torch.from_numpy(logits)).numpy()
    np.testing.assert_array_equal(kept(logits, top_p=p), np.isfinite(theirs))


@pytest.mark.parametrize(
    ("probabilities", "reach", "within"),
    [([0.6, 0.35, 0.05], 2, 1), ([0.6, 0.2, 0.15, 0.05], 3, 2), ([0.85, 0.14, 0.01], 2, 1), ([0.95, 0.03, 0.02], 1, 1)],
)
def test_the_token_that_passes_top_p_stays_by_one_rule_and_goes_by_the_other(probabilities, reach, within):
    logits = np.log([probabilities])
    assert kept(logits, top_p=0.9).sum() == reach
    assert kept(logits, top_p=0.9, top_p_rule="within").sum() == within


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
        best = best[: np.searchsorted(np.cumsum(p), 0.8) + 1]
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


def test_all_draws_of_a_coarse_case_have_its_distribution():
    """Total variation below 1e-4 over 2^17 values of each number, at each place that the ones before it lead to.

    Tokens of 5e-7 to 0.6, some impossible, in a cube of 3 x 3 x 3.
    """
    logits = np.random.default_rng(5).normal(0, 4, 25).astype(np.float32)
    logits[[0, 7, 8, 24]] = -np.inf
    count = 2**17
    grid = ((np.arange(count) + 0.5) / count).astype(np.float32)
    rows = jnp.tile(logits, (count, 1))

    def shares(level, before):
        """place -> (probability, a number that leads there), of one of the three numbers after those `before` it."""
        uniforms = np.full((count, 3), 0.5, np.float32)
        uniforms[:, :level], uniforms[:, level] = before, grid
        tokens = np.asarray(draw_jit(rows, jnp.asarray(uniforms)))
        places = tokens % 3 if level == 0 else tokens % 9 if level == 1 else tokens
        found, first, counts = np.unique(places, return_index=True, return_counts=True)
        return [(place, number / count, grid[at]) for place, at, number in zip(found, first, counts)]

    drawn = np.zeros(25)
    for _, p, u in shares(0, []):
        for _, q, v in shares(1, [u]):
            for token, r, _ in shares(2, [u, v]):
                drawn[token] = p * q * r
    expected = softmax(logits)
    assert 0.5 * np.abs(drawn - expected).sum() < 1e-4
    assert (drawn[expected == 0] == 0).all() and (drawn[expected > 1e-4] > 0).all()


@pytest.mark.parametrize("stride", [1, 30, 900])
def test_rare_tokens_have_their_probability_wherever_they_stand(stride):
    """Seven tokens of 1 to 1e-12 of 27,000, apart in one of the three levels: the least likely come first, so that a
    number decides between them to a relative 1e-4, however small it is."""
    share = np.array([1.0, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12])
    for order in (np.arange(7), np.arange(7)[::-1], np.array([3, 0, 6, 2, 5, 1, 4])):
        logits = np.full(27_000, -np.inf, np.float32)
        logits[stride * order] = np.log(share)
        edges = np.cumsum((share / share.sum())[::-1])[:-1]
        for side, expected in ((1 - 1e-4, order[::-1][:-1]), (1 + 1e-4, order[::-1][1:])):
            uniforms = jnp.tile(jnp.asarray(side * edges, jnp.float32)[:, None], (1, 3))
            np.testing.assert_array_equal(draw_jit(jnp.tile(logits, (6, 1)), uniforms), stride * expected)


def test_uniform_numbers_have_all_their_digits_where_they_are_small():
    """Of 64 bits: one below 2^-10 is mostly no multiple of 2^-32, and those below 2^-k have a share of 2^-k."""
    numbers = np.asarray(row_uniforms(jax.random.key(1), 1000, 100)).astype(np.float64).ravel()
    small = numbers[numbers < 2**-10] * 2**32
    assert (small != np.round(small)).mean() > 0.7
    for k in range(1, 11):
        expected = numbers.size * 2.0**-k
        assert abs((numbers < 2.0**-k).sum() - expected) < 4 * np.sqrt(expected)
    assert numbers.max() < 1


@pytest.mark.parametrize("vocabulary", [7, 1000, 50_000])
def test_a_token_of_probability_0_is_never_drawn(vocabulary):
    """At both ends of the cumulative distribution and in its gaps, whatever the uniform number."""
    generator = np.random.default_rng(vocabulary)
    u = np.float32([0.0, 1e-45, NEARLY_1, 1 - 2**-23, *np.linspace(0, NEARLY_1, 60)])
    u = np.concatenate([np.tile(u[:, None], (1, 3)), generator.permuted(np.tile(u, (3, 1)), axis=1).T])
    logits = generator.normal(0, 3, (len(u), vocabulary)).astype(np.float32)
    impossible = generator.random(logits.shape) < 0.5
    impossible[:, [0, 1, -1, -2]] = True
    impossible[:, 3] = False
    tokens = np.asarray(draw_jit(jnp.where(impossible, -jnp.inf, logits), jnp.asarray(u)))
    assert tokens.dtype == np.int32 and (tokens >= 0).all() and (tokens < vocabulary).all()
    assert not impossible[np.arange(len(u)), tokens].any()


def test_a_certain_token_is_drawn_at_any_height():
    logits = np.full((3, 5), -np.inf, np.float32)
    logits[:, 2] = [-1e30, 0.0, 1e30]
    for u in (0.0, 0.5, NEARLY_1):
        np.testing.assert_array_equal(draw_jit(jnp.asarray(logits), jnp.full((3, 3), u, jnp.float32)), [2, 2, 2])


def test_a_rows_numbers_depend_on_its_index_and_step_alone():
    uniforms = jax.jit(row_uniforms, static_argnums=(1, 2))
    key = jax.random.key(0)
    many = np.asarray(uniforms(key, 16, 9))
    np.testing.assert_array_equal(uniforms(key, 3, 2), many[:3, :2])
    assert many.shape == (16, 9, 3) and len(np.unique(many)) == many.size
    assert (many >= 0).all() and (many < 1).all()
    assert not np.intersect1d(many, uniforms(jax.random.key(8), 16, 9)).size
