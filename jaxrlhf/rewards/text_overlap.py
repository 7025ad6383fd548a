"""ROUGE, BLEU and chrF as rewards, computed by the packages rouge-score and sacrebleu. Part of `library`.

The optional extra `rewards` installs both packages. They use no network here. All scores are from 0 to 1.
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
    """ROUGE F1 (Lin 2004) against the column `reference`, computed by rouge-score.

    metric: rouge1, rouge2, rougeL or rougeLsum (one sentence per line). `stem` applies Porter's stemmer. Words consist
    of a to z and 0 to 9 only; use `chrf` for other scripts.
    """
    check_choice("metric", metric, ROUGE)
    scorer = optional_package("rouge_score.rouge_scorer").RougeScorer([metric], use_stemmer=bool(stem))
    rows = zip(completions, references("reference", reference))
    return [float(scorer.score_multi(texts, text)[metric].fmeasure) for text, texts in rows]


@abstains_without("reference")
def bleu(
    completions: Sequence[str], reference: Sequence[Any], *, tokenize: str = "13a", lowercase: bool = False
) -> list[float]:
    """Sentence BLEU (Papineni et al. 2002) against the column `reference`, computed by sacrebleu.

    It uses exponential smoothing, and n-gram orders up to the sentence's length. tokenize: 13a, intl, zh, char or none.
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
    """Sentence chrF (Popović 2015) against the column `reference`, computed by sacrebleu.

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
    rows = zip(completions, references("reference", reference))
    return [scorer.sentence_score(text, texts).score / 100 for text, texts in rows]
