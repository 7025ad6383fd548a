"""ROUGE, BLEU and chrF of N completions, as the packages rouge-score and sacrebleu define them.

The packages read the texts once, row by row. This module computes the corpus metrics BLEU and chrF from the summed
counts of rows, for all resamples together. sacrebleu would compute them for one corpus per call.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from jaxrlhf.evaluation.bootstrap import Metrics, ratio
from jaxrlhf.rewards.columns import check_choice, optional_package
from jaxrlhf.rewards.text_overlap import ROUGE, TOKENIZERS

ORDER = 4  # largest n of BLEU's n-grams


def rouge(texts: Sequence[str], references: Sequence[Sequence[str]], stem: bool = False) -> Metrics:
    """Returns the mean F1 of ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum (Lin 2004), from 0 to 1.

    If a completion has several references, the best one counts for each metric.
    """
    scorer = optional_package("rouge_score.rouge_scorer").RougeScorer(list(ROUGE), use_stemmer=stem)
    scores = [scorer.score_multi(several, text) for text, several in zip(texts, references)]
    rows = np.array([[*(score[name].fmeasure for name in ROUGE), 1.0] for score in scores]).reshape(-1, len(ROUGE) + 1)
    return Metrics(ROUGE, rows, lambda sums: ratio(sums[..., :-1], sums[..., -1:], np.nan))


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]], tokenize: str = "13a") -> Metrics:
    """Returns corpus BLEU (Papineni et al. 2002) from 0 to 100.

    It equals sacrebleu's `corpus_bleu` with order 4 and exponential smoothing. `tokenize` is 13a, intl, zh, char or
    none.
    """
    check_choice("tokenize", tokenize, TOKENIZERS)
    scorer = optional_package("sacrebleu.metrics").BLEU(tokenize=tokenize, force=True)
    return Metrics(("bleu",), _statistics(scorer, texts, references, 2 + 2 * ORDER), _bleu)


def _bleu(sums: np.ndarray) -> np.ndarray:
    """Returns BLEU f64[...,1] from sums f64[...,10]: length, reference length, matched n-grams (4), n-grams (4)."""
    length, wanted = sums[..., 0], sums[..., 1]
    right, found = sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER :]
    # Chen and Cherry (2014), method 3: the k-th order without a match gets 2^-k matches.
    right = np.where(right > 0, right, 0.5 ** np.cumsum(right == 0, axis=-1))
    logs = np.log(ratio(right, found, 1.0)).mean(axis=-1)
    brevity = np.minimum(0.0, 1 - ratio(wanted, length, np.inf))
    defined = (found > 0).all(axis=-1) & (sums[..., 2 : 2 + ORDER] > 0).any(axis=-1)
    return np.where(defined, 100 * np.exp(brevity + logs), 0.0)[..., None]


def chrf(
    texts: Sequence[str], references: Sequence[Sequence[str]], word_order: int = 0, beta: int = 2
) -> Metrics:
    """Returns corpus chrF (Popović 2015) from 0 to 100. It equals sacrebleu's `corpus_chrf`.

    `word_order` 2 gives chrF++.
    """
    scorer = optional_package("sacrebleu.metrics").CHRF(word_order=word_order, beta=beta)

    def value(sums: np.ndarray) -> np.ndarray:
        """Returns chrF f64[...,1]: the F score of mean precision and recall, over the n-gram orders in both texts."""
        found, wanted, right = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
        both = (found > 0) & (wanted > 0)
        orders = both.sum(axis=-1)
        precision = ratio((ratio(right, found) * both).sum(axis=-1), orders)
        recall = ratio((ratio(right, wanted) * both).sum(axis=-1), orders)
        return 100 * ratio((1 + beta**2) * precision * recall, beta**2 * precision + recall)[..., None]

    return Metrics(("chrf",), _statistics(scorer, texts, references, 3 * scorer.order), value)


def _statistics(scorer, texts: Sequence[str], references: Sequence[Sequence[str]], width: int) -> np.ndarray:
    """Returns sacrebleu's counts of each row, f64[N,width].

    The i-th list for sacrebleu holds every row's i-th reference or None.
    """
    streams = list(itertools.zip_longest(*references)) or [[]]
    return np.array(scorer._extract_corpus_statistics(list(texts), streams), np.float64).reshape(-1, width)
