"""Task metrics of 1,000 outputs equal scikit-learn, seqeval, sacrebleu and rouge-score to 1e-9."""

import random
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs the extra jaxrlhf[test]")
pytest.importorskip("seqeval", reason="needs the extra jaxrlhf[test]")

import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support as entity_scores
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from jaxrlhf.evaluation.classification import confusion_matrix as our_confusion_matrix
from jaxrlhf.evaluation.classification import kind_metrics, label_metrics, tagged_entities
from jaxrlhf.evaluation.texts import bleu, chrf, rouge

ROWS = 1000
EXACT = {"abs": 1e-9, "rel": 0}
LABELS = ("ham", "spam", "urgent", "unseen")  # the last one is in no reference
WORDS = ["the", "a", "cat", "dog", "sat", "on", "under", "mat", "tree", "and", "then", "it", "was", ",", ".", "red"]


@pytest.fixture(scope="module")
def texts():
    """(texts, one to three references each); some texts are empty, exact, or have no word in common."""
    rng, texts, references = random.Random(0), [], []
    for _ in range(ROWS):
        reference = rng.choices(WORDS, k=rng.randint(1, 15))
        changed = [word if rng.random() < 0.7 else rng.choice(WORDS) for word in reference if rng.random() < 0.9]
        texts.append(" ".join(rng.choice([reference, [], ["zzz"]]) if rng.random() < 0.15 else changed))
        others = [" ".join(rng.choices(WORDS, k=8)) for _ in range(rng.randint(0, 2))]
        references.append([" ".join(reference), *others])
    return texts, references


def check(metrics, name, averages, library):
    ours = metrics.estimates()
    for average in averages:
        values = library(average)[:3]
        for metric, value in zip(("precision", "recall", "f1"), values):
            if average is None:
                assert [ours[f"{metric}/{kind}"] for kind in name] == pytest.approx(list(value), **EXACT)
            else:
                assert ours[f"{metric}_{average}"] == pytest.approx(value, **EXACT)


def test_labels_equal_scikit_learn():
    rng = random.Random(1)
    references = rng.choices(LABELS[:3], weights=[6, 3, 1], k=ROWS)
    predictions = [label if rng.random() < 0.6 else rng.choice([*LABELS, None]) for label in references]
    ours = label_metrics(predictions, references, LABELS)
    theirs = [str(p) for p in predictions]

    def library(average):
        return precision_recall_fscore_support(
            references, theirs, labels=LABELS, average=average, zero_division=0
        )

    check(ours, LABELS, ("micro", "macro", "weighted", None), library)
    assert ours.estimates()["accuracy"] == pytest.approx(accuracy_score(references, theirs), **EXACT)
    with_none = confusion_matrix(references, theirs, labels=[*LABELS, "None"])
    assert (our_confusion_matrix(predictions, references, LABELS) == with_none[:-1]).all()


def test_tags_equal_seqeval():
    rng = random.Random(2)
    tags = ["O", "O", *(f"{head}-{kind}" for head in "BIIES" for kind in ("PER", "ORG", "LOC"))]
    references = [rng.choices(tags, k=rng.randint(1, 12)) for _ in range(ROWS)]
    predictions = [[tag if rng.random() < 0.8 else rng.choice(tags) for tag in row] for row in references]
    for row in references:
        assert tagged_entities(row) == Counter(get_entities(row))
    ours = kind_metrics(*([tagged_entities(row) for row in side] for side in (predictions, references)))
    check(
        ours,
        ("LOC", "ORG", "PER"),
        ("micro", "macro", "weighted", None),
        lambda average: entity_scores(references, predictions, average=average, zero_division=0),
    )


def test_rouge_equals_rouge_score(texts):
    ours = rouge(*texts).estimates()
    scorer = RougeScorer(list(ours))
    theirs = [scorer.score_multi(several, text) for text, several in zip(*texts)]
    for name, value in ours.items():
        assert value == pytest.approx(np.mean([score[name].fmeasure for score in theirs]), **EXACT)


def streams(references):
    return [[row[i] if i < len(row) else None for row in references] for i in range(3)]


@pytest.mark.parametrize("rows", [ROWS, 1, 2, 3, 4, 5, 6])
def test_bleu_and_chrf_equal_sacrebleu(texts, rows):
    """Also of single texts, whose higher orders have no match or no n-gram."""
    several = [1, *range(40)] if rows < ROWS else [0]
    for start in several:
        some, references = (side[start : start + rows] for side in texts)
        wanted = sacrebleu.corpus_bleu(some, streams(references), force=True).score
        assert bleu(some, references).estimates()["bleu"] == pytest.approx(wanted, **EXACT)
        wanted = sacrebleu.corpus_chrf(some, streams(references)).score
        assert chrf(some, references).estimates()["chrf"] == pytest.approx(wanted, **EXACT)
        wanted = sacrebleu.corpus_chrf(some, streams(references), word_order=2, beta=1).score
        assert chrf(some, references, word_order=2, beta=1).estimates()["chrf"] == pytest.approx(wanted, **EXACT)


def test_a_resampled_corpus_metric_is_the_librarys(texts):
    """The sums of drawn rows give what sacrebleu gives for the corpus of these rows."""
    drawn = np.random.default_rng(0).integers(ROWS, size=300)
    some, references = ([side[i] for i in drawn] for side in texts)
    for ours, theirs in ((bleu, sacrebleu.corpus_bleu), (chrf, sacrebleu.corpus_chrf)):
        metrics = ours(*texts)
        resampled = metrics.value(metrics.rows[drawn].sum(axis=0))
        assert resampled[0] == pytest.approx(theirs(some, streams(references)).score, **EXACT)
