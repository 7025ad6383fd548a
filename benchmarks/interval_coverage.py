"""How often the intervals of `jaxrlhf evaluate` contain the true value: should be 95 in 100.

    python benchmarks/interval_coverage.py [--rows 1000] [--trials 2000] [--resamples 1000]

A population of 4,000 rows of made-up outputs has metrics that are known. Each trial draws rows from it with
replacement, and computes the intervals from these rows alone. The standard error of a coverage is
sqrt(0.95 * 0.05 / trials): 0.5% with 2,000 trials. It runs on one core in about 15 minutes.
"""

import argparse
import dataclasses
import random
import time

import numpy as np

from jaxrlhf.evaluation.bootstrap import Metrics, difference, intervals, mean
from jaxrlhf.evaluation.classification import kind_metrics, label_metrics, tagged_entities
from jaxrlhf.evaluation.preference import win_rate, wins_by_score
from jaxrlhf.evaluation.probabilities import calibration, perplexity
from jaxrlhf.evaluation.texts import bleu, chrf, rouge

POPULATION = 4000
WORDS = [f"w{i}" for i in range(60)]
TAGS = ["O", "O", "O", "B-PER", "I-PER", "B-ORG", "I-ORG"]


def population(seed: int = 0) -> list[Metrics]:
    """The metrics of a population of outputs; the quality of a row differs, as that of a model's outputs does."""
    rng, draws = random.Random(seed), np.random.default_rng(seed)
    quality = [rng.betavariate(3, 1) for _ in range(POPULATION)]

    def spoilt(items: list[str], choices: list[str], q: float) -> list[str]:
        return [item if rng.random() < q else rng.choice(choices) for item in items]

    references = [rng.choices(WORDS, k=rng.randint(4, 25)) for _ in quality]
    texts = [spoilt([w for w in row if rng.random() < 0.97], WORDS, q) for row, q in zip(references, quality)]
    texts = [" ".join(row) for row in texts]
    several = [[" ".join(row)] for row in references]
    labels = rng.choices(["often", "less", "rare"], weights=[6, 3, 1], k=POPULATION)
    answers = [spoilt([label], ["often", "less", "rare", ""], q)[0] for label, q in zip(labels, quality)]
    tags = [rng.choices(TAGS, k=rng.randint(3, 20)) for _ in quality]
    found = [spoilt(row, TAGS, q) for row, q in zip(tags, quality)]
    scores, others = np.round(draws.normal(0.3, 1, POPULATION), 1), np.round(draws.normal(0, 1, POPULATION), 1)
    lengths, other_lengths = draws.geometric(0.05, POPULATION), draws.geometric(0.05, POPULATION)
    tokens = draws.geometric(0.03, POPULATION)
    confidence = draws.uniform(0.5, 1, POPULATION)
    right = (draws.random(POPULATION) < confidence - 0.1).astype(float)
    return [
        label_metrics(answers, labels, ["often", "less", "rare"]).named("classification"),
        kind_metrics(*([tagged_entities(row) for row in side] for side in (found, tags))).named("tags"),
        rouge(texts, several).named("rouge"),
        bleu(texts, several),
        chrf(texts, several),
        perplexity(draws.gamma(2.0, 1.2, POPULATION) * tokens, tokens).named("text"),
        mean("reward (normal)", scores),
        mean("KL (skewed)", draws.exponential(5, POPULATION) ** 1.5),
        mean("length (geometric)", lengths),
        mean("share of 2%", draws.random(POPULATION) < 0.02),
        win_rate(wins_by_score(scores, others), lengths, other_lengths),
        difference(mean("paired difference of rewards", scores + others), mean("paired difference of rewards", others)),
        calibration(confidence, right),
    ]


def coverage(metrics: list[Metrics], rows: int, trials: int, resamples: int, method: str) -> dict[str, float]:
    """The share of trials whose interval contains the population's value, by metric."""
    truth = {name: value for one in metrics for name, value in one.estimates().items()}
    hits = dict.fromkeys(truth, 0)
    draws = np.random.default_rng(1)
    for trial in range(trials):
        numbers = draws.integers(POPULATION, size=rows)
        sample = [dataclasses.replace(one, rows=one.rows[numbers]) for one in metrics]
        for found in intervals(sample, resamples, method=method, seed=trial):
            for name, bounds in found.items():
                hits[name] += bounds.low <= truth[name] <= bounds.high
    return {name: count / trials for name, count in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 1000), ("trials", 2000), ("resamples", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    metrics, began = population(), time.time()
    of_method = {
        method: coverage(metrics, arguments.rows, arguments.trials, arguments.resamples, method)
        for method in ("bca", "percentile")
    }
    print(f"coverage of 95% intervals: {arguments}, {time.time() - began:.0f} s")
    print(f"{'':40}{'bca':>12}{'percentile':>12}")
    for name in of_method["bca"]:
        print(f"{name:40}" + "".join(f"{shares[name]:12.1%}" for shares in of_method.values()))


if __name__ == "__main__":
    main()
