"""Chi-square test of `rollout.sampling.draw` on a large vocabulary, including rare tokens.

    python benchmarks/draw_statistics.py [--draws 10000000] [--vocabulary 151936] [--seed 0]

Prints a table for `benchmarks/README.md`. A token with at least 25 expected draws is a bin; rarer tokens are pooled in
order of probability. The table also counts draws of tokens below 2^-24, which one float32 number per draw cannot reach.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxrlhf.rollout.sampling import draw, row_uniforms

CHUNK = 50_000
EXPECTED = 25  # least number of expected draws per bin


def cases(vocabulary: int) -> dict[str, np.ndarray]:
    """Three kinds of logits, f32[vocabulary]."""
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 2.5, vocabulary)
    likely = np.arange(vocabulary) < 50
    return {
        "as of a language model": generator.permutation(np.where(likely, generator.normal(12, 2, vocabulary), noise)),
        "flat": generator.normal(0, 1, vocabulary),
        "one token at +18": np.where(np.arange(vocabulary) == vocabulary // 2, 18.0, noise),
    }


def drawn(logits: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Number of draws of each token, i64[vocabulary], with the random numbers that the rows of a rollout use."""
    logits = jnp.asarray(logits, jnp.float32)[None]

    @jax.jit
    def tokens(logits: jax.Array, key: jax.Array) -> jax.Array:
        uniforms = row_uniforms(key, CHUNK, 1)[:, 0]
        return jax.lax.map(lambda u: draw(logits, u[None])[0], uniforms, batch_size=500)

    counts, key = np.zeros(logits.shape[1], np.int64), jax.random.key(seed)
    for i in range(draws // CHUNK):
        counts += np.bincount(tokens(logits, jax.random.fold_in(key, i)), minlength=counts.size)
    return counts


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int, float]:
    """(statistic, degrees of freedom, p-value)."""
    order = np.argsort(probabilities)
    expected = np.cumsum(counts.sum() * probabilities[order])
    bins = np.zeros(order.size, int)
    start, number = 0.0, 0
    for i, total in enumerate(expected):  # the token that brings a bin to EXPECTED completes it
        bins[i] = number
        if total - start >= EXPECTED:
            start, number = total, number + 1
    bins = np.minimum(bins, number - 1)  # the remaining tokens join the last bin
    observed, expected_in_bin = (np.bincount(bins, x[order]) for x in (counts, counts.sum() * probabilities))
    statistic = float(((observed - expected_in_bin) ** 2 / expected_in_bin).sum())
    freedom = len(expected_in_bin) - 1
    return statistic, freedom, float(stats.chi2.sf(statistic, freedom))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10_000_000)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("| logits | draws | bins | chi-square | p | tokens below 2^-24 | expected of them | drawn | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, logits in cases(arguments.vocabulary).items():
        start = time.perf_counter()
        counts = drawn(logits, arguments.draws, arguments.seed)
        weights = np.exp(np.float64(np.float32(logits)) - logits.max())
        probabilities = weights / weights.sum()
        statistic, freedom, p = chi_square(counts, probabilities)
        rare = probabilities < 2**-24
        expected = counts.sum() * probabilities[rare].sum()
        print(
            f"| {name} | {counts.sum():,} | {freedom + 1:,} | {statistic:,.0f} | {p:.2f} | {rare.sum():,} | "
            f"{expected:,.0f} | {counts[rare].sum():,} | {time.perf_counter() - start:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
