"""Task metrics: they compare completions with a column of the data. Each task reads a completion in its own way."""

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

Options = Mapping[str, Any]  # labels, pick, ignore_case, normalize, tokenize; a task uses only some of them
Texts, Column = Sequence[str], Sequence[Any]


def classification(texts: Texts, column: Column, options: Options) -> Metrics:
    """Returns accuracy, precision, recall and F1 of the labels that the completions name."""
    return label_metrics(*_labels(texts, column, options))


def confusion(texts: Texts, column: Column, options: Options) -> dict[str, Any]:
    """Returns the labels, and the counts of references (rows) by predictions (columns).

    The last column is "no label".
    """
    predictions, expected, labels = _labels(texts, column, options)
    return {"labels": labels, "counts": confusion_matrix(predictions, expected, labels).tolist()}


def _labels(texts: Texts, column: Column, options: Options) -> tuple[list[str | None], list[str], list[str]]:
    """Returns (the label of each completion, the expected labels, all labels)."""
    labels = options["labels"]
    predictions, expected = read_labels(texts, column, labels, options["pick"])
    # If `labels` is given, labels are read in lower case, so the known labels must be in lower case too.
    known = sorted(set(expected)) if labels is None else [" ".join(name.casefold().split()) for name in labels]
    return predictions, expected, known


def entities(texts: Texts, column: Column, options: Options) -> Metrics:
    """Returns precision, recall and F1 of entities (type, text).

    Completions list them as JSON or as lines `TYPE: text`.
    """
    return kind_metrics(*read_entities(texts, column, options["ignore_case"]))


def tags(texts: Texts, column: Column, options: Options) -> Metrics:
    """Returns precision, recall and F1 of the spans in a row of tags such as `O B-PER I-PER`, separated by blanks.

    A completion with too few tags is padded with `O`. If it has too many, the last ones are cut.
    """
    wanted = [_tags(value, i) for i, value in enumerate(column)]
    found = [(text.split() + ["O"] * len(row))[: len(row)] for text, row in zip(texts, wanted)]
    return kind_metrics([tagged_entities(row) for row in found], [tagged_entities(row) for row in wanted])


def _tags(value: Any, row: int) -> list[str]:
    tags = value.split() if isinstance(value, str) else value
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(
            f"column tags, row {row} must be a list of tags, or text with tags separated by blanks, not {value!r:.60}"
        )
    return tags


def _by_reference(function: Callable[..., Metrics], *names: str) -> Callable[[Texts, Column, Options], Metrics]:
    def task(texts: Texts, column: Column, options: Options) -> Metrics:
        return function(texts, references("reference", column), **{name: options[name] for name in names})

    return task


def _by_row(name: str, function: Callable[..., list], *names: str) -> Callable[[Texts, Column, Options], Metrics]:
    """Returns a task whose metric is the mean of a reward function of the library."""

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
"""Name of a task -> (the column that the task reads by default, its function)."""


class Task:
    """A task with its column and options, for given rows of data."""

    def __init__(self, spec: str, rows: Sequence[Mapping[str, Any]], options: Options):
        """`spec` is NAME or NAME:COLUMN. Raises `UserError` for a name, column, value or option that cannot be used.

        Rows in which the column is missing or null are left out.
        """
        self.name, _, column = spec.partition(":")
        if self.name not in TASKS:
            raise UserError(f"--task {self.name}: must be one of {', '.join(TASKS)}, as NAME or NAME:COLUMN")
        default, self.function = TASKS[self.name]
        self.column, self.options, self.count = column or default, options, len(rows)
        values = [row.get(self.column) for row in rows]
        self.numbers = np.array([i for i, value in enumerate(values) if value is not None], np.int64)
        if not len(self.numbers):
            names = ", ".join(sorted(set().union(*rows))) or "none"
            raise UserError(
                f"--task {self.name}: the data has no column {self.column}; it has {names}; give --task "
                f"{self.name}:COLUMN"
            )
        self.values = [values[i] for i in self.numbers]
        try:
            self.function([""] * len(self.values), self.values, options)
        except (UserError, ValueError) as error:
            where = str(error).replace(f"column {default},", f"column {self.column},")
            raise UserError(f"--task {self.name}: {where}") from None

    def __call__(self, texts: Sequence[str]) -> Metrics:
        """Returns the metrics of all completions, with names NAME/METRIC."""
        found = self.function([texts[i] for i in self.numbers], self.values, self.options)
        return found.of_some(self.numbers, self.count).named(self.name)

    def labels_among(self, choices: Sequence[str]) -> np.ndarray:
        """Returns the index in `choices` of the label of each row, i64[rows]; -1 for rows without a label.

        The task must be a classification task. Raises `UserError` if the label of a row is not among the choices.
        """
        labels, pick = self.options["labels"], self.options["pick"]
        _, expected = read_labels([""] * len(self.values), self.values, labels, pick)
        names, _ = read_labels(choices, self.values[:1] * len(choices), labels, pick)
        if len({*names}) < len(names):
            raise UserError(f"--task {self.name}: several choices name the same label: {', '.join(map(repr, names))}")
        found = np.full(self.count, -1, np.int64)
        for number, label in zip(self.numbers, expected):
            if label not in names:
                known = ", ".join(map(repr, names))
                raise UserError(
                    f"--task {self.name}: column {self.column}, row {number + 1}: the label {label!r} is not one of "
                    f"the choices {known}"
                )
            found[number] = names.index(label)
        return found

    def confusion(self, texts: Sequence[str]) -> dict[str, Any] | None:
        """Returns the confusion matrix of a classification task, else None."""
        if self.name != "classification":
            return None
        return confusion([texts[i] for i in self.numbers], self.values, self.options)
