"""Task metrics: completions against a column of the data, each task with its own reading of the completion."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrlhf.errors import UserError
from jaxrlhf.evaluation.bootstrap import Metrics, mean
from jaxrlhf.evaluation.classification import confusion_matrix, kind_metrics, label_metrics, tagged_entities
from jaxrlhf.evaluation.texts import bleu, chrf, rouge
from jaxrlhf.rewards.columns import references
from jaxrlhf.rewards.library import exact_match, multiple_choice, numeric_answer, read_labels
from jaxrlhf.rewards.structured import read_entities

Options = Mapping[str, Any]  # labels, pick, ignore_case, normalize, tokenize; a task reads its own
Texts, Column = Sequence[str], Sequence[Any]


def classification(texts: Texts, column: Column, options: Options) -> Metrics:
    """Accuracy, precision, recall and F1 of the label that a completion names."""
    return label_metrics(*_labels(texts, column, options))


def confusion(texts: Texts, column: Column, options: Options) -> dict[str, Any]:
    """The labels, and the counts of references (rows) by predictions (columns; the last one: no label)."""
    predictions, expected, labels = _labels(texts, column, options)
    return {"labels": labels, "counts": confusion_matrix(predictions, expected, labels).tolist()}


def _labels(texts: Texts, column: Column, options: Options) -> tuple[list[str | None], list[str], list[str]]:
    """(the label of each completion, the expected labels, all labels)."""
    labels = options["labels"]
    predictions, expected = read_labels(texts, column, labels, options["pick"])
    # With `labels` the labels are compared in lower case, as they are read.
    known = sorted(set(expected)) if labels is None else [" ".join(name.casefold().split()) for name in labels]
    return predictions, expected, known


def entities(texts: Texts, column: Column, options: Options) -> Metrics:
    """Precision, recall and F1 of entities (type, text), listed as JSON or as lines `TYPE: text`."""
    return kind_metrics(*read_entities(texts, column, options["ignore_case"]))


def tags(texts: Texts, column: Column, options: Options) -> Metrics:
    """Precision, recall and F1 of the spans in a row of tags such as `O B-PER I-PER`, separated by blanks.

    A completion with too few tags is filled up with O, and one with too many is cut.
    """
    wanted = [_tags(value, i) for i, value in enumerate(column)]
    found = [(text.split() + ["O"] * len(row))[: len(row)] for text, row in zip(texts, wanted)]
    return kind_metrics([tagged_entities(row) for row in found], [tagged_entities(row) for row in wanted])


def _tags(value: Any, row: int) -> list[str]:
    tags = value.split() if isinstance(value, str) else value
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"column tags, row {row} must be tags with blanks between or a list, not {value!r:.60}")
    return tags


def _by_reference(function: Callable[..., Metrics], *names: str) -> Callable[[Texts, Column, Options], Metrics]:
    def task(texts: Texts, column: Column, options: Options) -> Metrics:
        return function(texts, references("reference", column), **{name: options[name] for name in names})

    return task


def _by_row(name: str, function: Callable[..., list], *names: str) -> Callable[[Texts, Column, Options], Metrics]:
    """The mean of a reward function of the library."""

    def task(texts: Texts, column: Column, options: Options) -> Metrics:
        return mean(name, np.array(function(texts, column, **{name: options[name] for name in names}), np.float64))

    return task


TASKS: dict[str, tuple[str, Callable[[Texts, Column, Options], Metrics]]] = {
    "classification": ("label", classification),
    "entities": ("entities", entities),
    "tags": ("tags", tags),
    "rouge": ("reference", _by_reference(rouge)),
    "bleu": ("reference", _by_reference(bleu, "tokenize")),
    "chrf": ("reference", _by_reference(chrf)),
    "exact_match": ("answer", _by_row("exact_match", exact_match, "normalize")),
    "numeric": ("answer", _by_row("accuracy", numeric_answer)),
    "multiple_choice": ("answer", _by_row("accuracy", multiple_choice)),
}
"""Name -> (the column that it reads by default, the task)."""


class Task:
    """A task with its column and options, bound to the rows of the data."""

    def __init__(self, spec: str, rows: Sequence[Mapping[str, Any]], options: Options):
        """`spec` is NAME or NAME:COLUMN. Raises `UserError` for a name, column, value or option that cannot be used.

        A row whose column is missing or null does not count.
        """
        self.name, _, column = spec.partition(":")
        if self.name not in TASKS:
            raise UserError(f"--task {self.name}: must be one of {', '.join(TASKS)}, each with or without :COLUMN")
        default, self.function = TASKS[self.name]
        self.column, self.options, self.count = column or default, options, len(rows)
        values = [row.get(self.column) for row in rows]
        self.numbers = np.array([i for i, value in enumerate(values) if value is not None], np.int64)
        if not len(self.numbers):
            names = ", ".join(sorted(set().union(*rows))) or "none"
            raise UserError(
                f"--task {self.name}: the data has no column {self.column}; it has {names} (--task {self.name}:COLUMN)"
            )
        self.values = [values[i] for i in self.numbers]
        try:
            self.function([""] * len(self.values), self.values, options)
        except (UserError, ValueError) as error:
            where = str(error).replace(f"column {default},", f"column {self.column},")
            raise UserError(f"--task {self.name}: {where}") from None

    def __call__(self, texts: Sequence[str]) -> Metrics:
        """The metrics of all completions, as NAME/METRIC."""
        found = self.function([texts[i] for i in self.numbers], self.values, self.options)
        return found.of_some(self.numbers, self.count).named(self.name)

    def confusion(self, texts: Sequence[str]) -> dict[str, Any] | None:
        """The confusion matrix of a classification, else None."""
        if self.name != "classification":
            return None
        return confusion([texts[i] for i in self.numbers], self.values, self.options)
