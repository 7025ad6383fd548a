"""Precision, recall and F1 of each kind and on average, accuracy, and the confusion matrix.

A kind is a label or an entity type. The definitions are those of scikit-learn and seqeval with `zero_division=0`: 0
divided by 0 is 0. For a kind with `right` correct predictions, `found` predictions and `wanted` references:

    precision = right / found    recall = right / wanted    F1 = 2 right / (found + wanted)

Averages: micro is computed from the sums over kinds, macro is the mean over kinds, and weighted is the mean over kinds
with the weights `wanted`.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxrlhf.evaluation.bootstrap import Metrics, ratio

AVERAGES = ("micro", "macro", "weighted")


def label_metrics(predictions: Sequence[str | None], references: Sequence[str], labels: Sequence[str]) -> Metrics:
    """Returns accuracy, and precision, recall and F1 of each label in `labels`.

    Every reference must be one of `labels`. A prediction that is not a label, such as None, is wrong. It lowers the
    recall of its reference, but no label's precision. This equals scikit-learn's `precision_recall_fscore_support` with
    the argument `labels`.
    """
    by_kind = kind_metrics([_one(p) for p in predictions], [_one(r) for r in references], labels)
    right = np.array([[p == r, 1.0] for p, r in zip(predictions, references)], np.float64).reshape(-1, 2)

    def value(sums: np.ndarray) -> np.ndarray:
        return np.concatenate([ratio(sums[..., :1], sums[..., 1:2], np.nan), by_kind.value(sums[..., 2:])], axis=-1)

    return Metrics(("accuracy", *by_kind.names), np.concatenate([right, by_kind.rows], axis=1), value)


def _one(label: str | None) -> Counter:
    return Counter() if label is None else Counter([(label,)])


def confusion_matrix(
    predictions: Sequence[str | None], references: Sequence[str], labels: Sequence[str]
) -> np.ndarray:
    """Returns counts i64[L,L+1] of references (rows) by predictions (columns).

    The last column counts predictions that are no label.
    """
    number = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels) + 1), np.int64)
    for prediction, reference in zip(predictions, references):
        counts[number[reference], number.get(prediction, len(labels))] += 1
    return counts


def kind_metrics(
    predictions: Sequence[Counter], references: Sequence[Counter], kinds: Sequence[str] | None = None
) -> Metrics:
    """Returns precision, recall and F1 of N rows of items (kind, ...).

    A predicted item is right if it is one of the references of its row. Repeated items count separately. If `kinds` is
    None, the kinds are those of references and predictions, sorted, as in seqeval. Items of other kinds do not count.
    """
    if kinds is None:
        kinds = sorted({item[0] for row in (*predictions, *references) for item in row})
    number = {kind: i for i, kind in enumerate(kinds)}
    rows = np.zeros((len(references), 3, len(kinds)))
    for n, (prediction, reference) in enumerate(zip(predictions, references)):
        for place, items in enumerate((prediction & reference, prediction, reference)):
            for item, count in items.items():
                if item[0] in number:
                    rows[n, place, number[item[0]]] += count
    names = [f"{metric}_{average}" for average in AVERAGES for metric in ("precision", "recall", "f1")]
    names += [f"{metric}/{kind}" for kind in kinds for metric in ("precision", "recall", "f1")]
    return Metrics(tuple(names), rows.reshape(len(references), 3 * len(kinds)), _averaged)


def _averaged(sums: np.ndarray) -> np.ndarray:
    """Returns averages and then each kind's metrics, f64[...,9+3L], of sums (right, found, wanted) f64[...,3L]."""
    counts = sums.reshape(*sums.shape[:-1], 3, -1)
    of_kinds = _precision_recall_f1(counts)  # [...,3,L]
    wanted = counts[..., 2:3, :]
    micro = _precision_recall_f1(counts.sum(axis=-1, keepdims=True))[..., 0]
    L = counts.shape[-1]
    macro = of_kinds.sum(axis=-1) / max(L, 1)
    weighted = ratio((of_kinds * wanted).sum(axis=-1), wanted.sum(axis=-1))
    return np.concatenate([micro, macro, weighted, of_kinds.swapaxes(-1, -2).reshape(*sums.shape[:-1], 3 * L)], axis=-1)


def _precision_recall_f1(counts: np.ndarray) -> np.ndarray:
    """Returns precision, recall and F1, f64[...,3,L], from counts (right, found, wanted) f64[...,3,L]."""
    right, found, wanted = np.moveaxis(counts, -2, 0)
    return np.stack([ratio(right, found), ratio(right, wanted), ratio(2 * right, found + wanted)], axis=-2)


# ---------------------------------------------------------------- entities


TAG = re.compile(r"([BIES])-(.+)")


def tagged_entities(tags: Sequence[str]) -> Counter:
    """Returns the entities (type, first, last) of a row of tags with prefixes B, I, E and S (schemes BIO and IOBES).

    As in seqeval's default mode, an I- tag begins an entity if no entity of its type continues there. Any other tag
    counts as O.
    """
    entities: Counter = Counter()
    start, last_head, last_kind = 0, "O", ""
    for i, tag in enumerate([*tags, "O"]):
        match = TAG.fullmatch(tag)
        head, kind = match.groups() if match else ("O", "")
        begins = head != "O" and (head in "BS" or last_head in "OES" or kind != last_kind)
        if last_head != "O" and (begins or head == "O"):
            entities[(last_kind, start, i - 1)] += 1
        start = i if begins else start
        last_head, last_kind = head, kind
    return entities
