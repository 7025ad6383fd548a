"""ROUGE, BLEU and chrF as the packages compute them, against the formulas of the papers."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rouge_score", reason="needs the extra jaxrlhf[rewards]")
pytest.importorskip("sacrebleu", reason="needs the extra jaxrlhf[rewards]")

from jaxrlhf.rewards.library import bleu, chrf, rouge

FEW = settings(max_examples=60, deadline=None)
TEXT = st.lists(st.sampled_from(["the", "cat", "sat", "on", "mat", "dogs"]), max_size=9).map(" ".join)
SOME = TEXT.filter(bool)


def grams(units, n):
    return Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1))


def f1(overlap, found, wanted):
    return 2 * overlap / (found + wanted) if overlap else 0.0


def longest_common(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        last, row = row, [0]
        for j, y in enumerate(b):
            row.append(last[j] + 1 if x == y else max(last[j + 1], row[j]))
    return row[-1]


@FEW
@given(TEXT, SOME)
def test_rouge(text, reference):
    a, b = text.split(), reference.split()
    for n, metric in ((1, "rouge1"), (2, "rouge2")):
        found, wanted = grams(a, n), grams(b, n)
        expected = f1((found & wanted).total(), found.total(), wanted.total())
        assert rouge([text], [reference], metric=metric)[0] == pytest.approx(expected)
    assert rouge([text], [reference])[0] == pytest.approx(f1(longest_common(a, b), len(a), len(b)))


def sentence_bleu(hypothesis, reference):
    """Papineni et al. 2002, with exponential smoothing (Chen and Cherry 2014, method 3) and effective order."""
    if not (grams(hypothesis, 1) & grams(reference, 1)):
        return 0.0
    logs, missed = [], 0
    for n in range(1, 5):
        found = grams(hypothesis, n)
        if not found:
            break
        right = (found & grams(reference, n)).total()
        missed += right == 0
        logs.append(math.log((right or 2.0**-missed) / found.total()))
    brevity = min(0.0, 1 - len(reference) / len(hypothesis))
    return math.exp(brevity + sum(logs) / len(logs))


@FEW
@given(TEXT, SOME)
def test_bleu(text, reference):
    assert bleu([text], [reference])[0] == pytest.approx(sentence_bleu(text.split(), reference.split()))


def sentence_chrf(hypothesis, reference, beta=2):
    """Popović 2015: precision and recall are means over the orders that both texts have."""
    a, b = hypothesis.replace(" ", ""), reference.replace(" ", "")
    orders = [n for n in range(1, 7) if min(len(a), len(b)) >= n]
    if not orders:
        return 0.0
    overlaps = [(grams(a, n) & grams(b, n)).total() for n in orders]
    precision = sum(o / grams(a, n).total() for o, n in zip(overlaps, orders)) / len(orders)
    recall = sum(o / grams(b, n).total() for o, n in zip(overlaps, orders)) / len(orders)
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall) if precision else 0.0


@FEW
@given(TEXT, SOME)
def test_chrf(text, reference):
    assert chrf([text], [reference])[0] == pytest.approx(sentence_chrf(text, reference))
    assert chrf([text], [reference], beta=1)[0] == pytest.approx(sentence_chrf(text, reference, beta=1))


@FEW
@given(TEXT, SOME, SOME)
def test_of_several_references_the_best_counts(text, one, other):
    for score in (rouge, chrf):
        best = max(score([text], [one])[0], score([text], [other])[0])
        assert score([text], [[one, other]])[0] == pytest.approx(best)
    for score in (rouge, bleu, chrf):  # BLEU takes its n-grams from all references
        assert score([one], [[other, one]])[0] == pytest.approx(1.0)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_any_text_has_a_score(text, reference):
    for score in (rouge, bleu, chrf):
        assert 0.0 <= score([text], [reference])[0] <= 1.0 + 1e-9


def test_options():
    assert rouge(["running dogs"], ["run dog"]) == [0.0] and rouge(["running dogs"], ["run dog"], stem=True) == [1.0]
    assert bleu(["The Cat"], ["the cat"]) == [0.0]
    assert bleu(["The Cat"], ["the cat"], lowercase=True) == [pytest.approx(1.0)]
    assert bleu(["猫在这里"], ["猫在这里"], tokenize="zh") == [pytest.approx(1.0)]
    assert chrf(["猫在这里"], ["猫在那里"])[0] > 0.2
    assert chrf(["the cat sat"], ["sat the cat"], word_order=2) != chrf(["the cat sat"], ["sat the cat"])


@pytest.mark.parametrize("score", [rouge, bleu, chrf])
def test_a_row_without_its_reference_is_named(score):
    assert score(["x", "x", "y"], ["x", None, "x"]) == [score(["x"], ["x"])[0], None, score(["y"], ["x"])[0]]
    for bad in ([], [None], {"a": 1}):
        with pytest.raises(ValueError, match=r"\Acolumn reference, row 1 [^\n]*\Z"):
            score(["x", "x"], ["x", bad])
