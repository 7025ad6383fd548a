"""ROUGE, BLEU and chrF as rewards, by the packages rouge-score and sacrebleu. Part of `library`.

Both come with the optional extra `rewards`, and neither needs a network as used here. All scores are from 0 to 1.
"""

from collections.abc import Sequence
from typing import Any

from jaxrlhf.rewards.columns import abstains_without, check_choice, check_number, optional_package, references

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# sacrebleu's other tokenizers download a model or need a package of their own.
TOKENIZERS = ("13a", "intl", "zh", "char", "none")


@abstains_without("reference")
def rouge(
    completions: Sequence[str], reference: Sequence[Any], *, metric: str = "rougeL", stem: bool = False
) -> list[float]:
    """ROUGE F1 (Lin 2004) against the column `reference`, as by the package rouge-score.

    metric: rouge1, rouge2, rougeL or rougeLsum (sentences parted by new lines). `stem`: Porter's stemmer. Its words
    are of a to z and 0 to 9 only: for other scripts take `chrf`.
    """
    check_choice("metric", metric, ROUGE)
    scorer = optional_package("rouge_score.rouge_scorer").RougeScorer([metric], use_stemmer=bool(stem))
    wanted = references("reference", reference)
    return [float(scorer.score_multi(texts, text)[metric].fmeasure) for text, texts in zip(completions, wanted)]


@abstains_without("reference")
def bleu(
    completions: Sequence[str], reference: Sequence[Any], *, tokenize: str = "13a", lowercase: bool = False
) -> list[float]:
    """BLEU of each sentence (Papineni et al. 2002) against the column `reference`, as by the package sacrebleu.

    Exponential smoothing, and only orders up to the sentence's length. tokenize: 13a, intl, zh, char or none.
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
    """chrF of each sentence (Popović 2015) against the column `reference`, as by the package sacrebleu.

    `word_order` 2 is chrF++; `beta` is the weight of recall.
    """
    check_number("char_order", char_order, 1, whole=True)
    check_number("word_order", word_order, 0, whole=True)
    check_number("beta", beta, 1, whole=True)
    scorer = optional_package("sacrebleu.metrics").CHRF(
        char_order=char_order, word_order=word_order, beta=beta, lowercase=bool(lowercase)
    )
    return _sentences(scorer, completions, reference)


def _sentences(scorer: Any, completions: Sequence[str], reference: Sequence[Any]) -> list[float]:
    wanted = references("reference", reference)
    return [scorer.sentence_score(text, texts).score / 100 for text, texts in zip(completions, wanted)]
