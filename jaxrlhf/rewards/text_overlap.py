"""ROUGE, BLEU and chrF as rewards. `library` lists these rewards.

The packages rouge-score and sacrebleu compute the scores, which are from 0 to 1. The optional extra `rewards` installs
both packages. They use no network here.
"""

from collections.abc import Sequence
from typing import Any

from jaxrlhf.rewards.columns import abstains_without, check_choice, check_number, optional_package, references

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# The other tokenizers of sacrebleu download a model or need further packages.
TOKENIZERS = ("13a", "intl", "zh", "char", "none")


@abstains_without("reference")
def rouge(
    completions: Sequence[str], reference: Sequence[Any], *, metric: str = "rougeL", stem: bool = False
) -> list[float]:
    """Returns ROUGE F1 (Lin 2004) against the column `reference`. The package rouge-score computes it.

    `metric` is rouge1, rouge2, rougeL or rougeLsum. For rougeLsum, each line must be one sentence. `stem` applies
    Porter's stemmer. Words consist only of a to z and 0 to 9, so `chrf` is better for other scripts.
    """
    check_choice("metric", metric, ROUGE)
    scorer = optional_package("rouge_score.rouge_scorer").RougeScorer([metric], use_stemmer=bool(stem))
    rows = zip(completions, references("reference", reference))
    return [float(scorer.score_multi(texts, text)[metric].fmeasure) for text, texts in rows]


@abstains_without("reference")
def bleu(
    completions: Sequence[str], reference: Sequence[Any], *, tokenize: str = "13a", lowercase: bool = False
) -> list[float]:
    """Returns sentence BLEU (Papineni et al. 2002) against the column `reference`. The package sacrebleu computes it.

    The score uses exponential smoothing, and n-gram orders up to the length of the sentence. `tokenize` is 13a, intl,
    zh, char or none.
    """
    check_choice("tokenize", tokenize, TOKENIZERS)
    scorer = optional_package("sacrebleu.metrics").BLEU(
        tokenize=tokenize, lowercase=bool(lowercase), smooth_method="exp", effective_order=True
    )
    return _sentences(scorer, completions, reference)


@abstains_without("reference")
def chrf(
    completions: Sequence[str],
    reference: Sequence[Any],
    *,
    char_order: int = 6,
    word_order: int = 0,
    beta: int = 2,
    lowercase: bool = False,
) -> list[float]:
    """Returns sentence chrF (Popović 2015) against the column `reference`. The package sacrebleu computes it.

    If `word_order` is 2, the score is chrF++. `beta` is the weight of recall.
    """
    check_number("char_order", char_order, 1, whole=True)
    check_number("word_order", word_order, 0, whole=True)
    check_number("beta", beta, 1, whole=True)
    scorer = optional_package("sacrebleu.metrics").CHRF(
        char_order=char_order, word_order=word_order, beta=beta, lowercase=bool(lowercase)
    )
    return _sentences(scorer, completions, reference)


def _sentences(scorer: Any, completions: Sequence[str], reference: Sequence[Any]) -> list[float]:
    rows = zip(completions, references("reference", reference))
    return [scorer.sentence_score(text, texts).score / 100 for text, texts in rows]
