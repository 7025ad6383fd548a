"""Checks a data file: what it holds, and which rows are faulty. This is the command `jaxrlhf data check`.

The file is read once, row by row. Hashes of its texts are kept, about 8 kB for a row of 220 words.
`FAULTS` lists what is a fault; the thresholds are the constants below and those of `similarity`.
"""

import itertools
import os.path
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxrlhf.curation.characters import odd_characters
from jaxrlhf.curation.reading import Content, Source, open_source
from jaxrlhf.curation.similarity import THRESHOLD, Sketches, digest
from jaxrlhf.data.sources import ENDINGS, Row, open_bytes
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.errors import UserError, short

FAULTS = {
    "unreadable": "lines that hold no row",
    "byte_order_mark": "byte order mark at the start of the file",
    "line_endings": "line endings of Windows and Unix in one file",
    "empty": "fields that are missing, null or empty",
    "unusable": "rows that no stage can use",
    "empty_prompt": "rows without a prompt, where most rows have one",
    "too_long": "rows longer than the limit of tokens",
    "control_characters": "control characters in a text",
    "invisible_marks": "byte order marks or direction overrides in a text",
    "replacement_characters": "characters that a wrong decoding has lost (U+FFFD)",
    "mojibake": "UTF-8 that was read as another encoding, such as Ã© for é",
    "mixed_line_ends": "line ends of Windows in texts, where other texts have those of Unix",
    "duplicate": "rows equal to an earlier row",
    "near_duplicate": "rows nearly equal to an earlier row",
    "same_responses": "chosen and rejected are equal",
    "conflicting_preferences": "pairs whose opposite is an earlier row",
    "conflicting_labels": "rows whose text has another label in an earlier row",
    "label_spelling": "labels that differ only in case, blanks or type",
    "label_balance": "labels that are too rare or too frequent to learn from",
    "leak": "rows of the other file whose prompt is in this file",
    "near_leak": "rows of the other file whose prompt is nearly one of this file",
}
FIRST = 5  # places that a fault lists
MOST_LABELS = 50  # responses are labels if there are at most this many, with ROWS_PER_LABEL rows each on average
ROWS_PER_LABEL = 10
LEAST_PER_LABEL = 3  # a label of fewer rows cannot be in a training, a validation and a test set
MOST_FREQUENT = 0.95  # share of the most frequent label, from which on always guessing it looks like success
CHUNK = 512  # rows that are tokenized together
_EMPTY = re.compile(r"is empty|is null|has no field|has an empty response|has no content|has no role")


@dataclass
class Fault:
    """Rows with the same fault. `first` holds the places of the first `FIRST` of them, each with an explanation."""

    code: str
    rows: int = 0
    first: list[str] = field(default_factory=list)


@dataclass
class Report:
    """The result of a check."""

    path: str
    kind: str
    rows: int = 0
    usable: int = 0
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)  # "characters" and "tokens": median, p95, longest
    labels: dict[str, int] = field(default_factory=dict)  # the most frequent label first
    faults: dict[str, Fault] = field(default_factory=dict)

    def add(self, code: str, where: str, detail: str = "") -> None:
        fault = self.faults.setdefault(code, Fault(code))
        fault.rows += 1
        if len(fault.first) < FIRST:
            fault.first.append(f"{where}: {detail}" if detail else where)

    def as_json(self) -> dict[str, Any]:
        faults = [
            {"code": code, "what": FAULTS[code], "rows": self.faults[code].rows, "first": self.faults[code].first}
            for code in FAULTS
            if code in self.faults
        ]
        return {
            "path": self.path, "kind": self.kind, "rows": self.rows, "usable": self.usable, "lengths": self.lengths,
            "labels": self.labels, "faults": faults,
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.rows:,} rows of {self.kind}, {self.usable:,} usable"]
        for unit, sizes in self.lengths.items():
            lines.append(f"  {unit} per row: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
        if self.labels:
            shown = [f"{label} {count:,}" for label, count in itertools.islice(self.labels.items(), 10)]
            more = f", {len(self.labels) - 10} more" if len(self.labels) > 10 else ""
            lines.append(f"  labels: {', '.join(shown)}{more}")
        for code in FAULTS:
            if fault := self.faults.get(code):
                lines.append(f"  {fault.rows:>7,}  {FAULTS[code]} ({code})")
                lines += [f"           {place}" for place in fault.first]
        if not self.faults:
            lines.append("  no faults")
        return "\n".join(lines)


def check(
    path: str,
    *,
    kind: str | None = None,
    settings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    max_tokens: int | None = None,
    against: Sequence[str] = (),
    similarity: float = THRESHOLD,
) -> Report:
    """Returns the faults of a file and what it holds.

    kind        a key of `reading.KINDS`; None means the kind whose fields the first rows have
    settings    settings of the source, such as "response_field=answer"
    tokenizer   counts tokens as the stages do; rows of more than `max_tokens` are faults
    against     other files, such as the test set; a prompt that is in both is a fault
    similarity  texts with at least this Jaccard similarity of word triples are near-duplicates

    Raises UserError if a file cannot be read, or if its rows have the fields of no kind of data.
    """
    unreadable: list[UserError] = []
    source = open_source(path, kind, settings, unreadable.append)
    report = Report(path, source.kind)
    _check_bytes(report, source)
    rows = _Rows(report, keep_prompts=bool(against))
    lengths = _Lengths(report, tokenizer, max_tokens)
    for row in source.rows:
        report.rows += 1
        try:
            content = source.read(row)
            lengths.add(row, content)
        except UserError as error:
            message = _without_place(error, row.where)
            report.add("empty" if _EMPTY.search(message) else "unusable", _short_place(row.where), message)
            continue
        report.usable += 1
        rows.add(row, content)
    for error in unreadable:
        report.rows += 1
        report.add("unreadable", str(error).split("; ")[0].removeprefix(os.path.join(os.path.dirname(path), "")))
    lengths.finish()
    rows.finish(similarity)
    for other in against:
        rows.compare(other, settings, similarity)
    return report


class _Rows:
    """Collects the usable rows and compares them with each other. Texts are kept as hashes."""

    def __init__(self, report: Report, keep_prompts: bool):
        self.report = report
        self.first: dict[int, int] = {}  # digest of a row -> its number
        self.places: list[str] = []
        self.sketches, self.sketched = Sketches(), array("q")  # the sketch of row number sketched[i]
        self.pairs: dict[int, tuple[int, int]] = {}  # digest of the two responses in any order -> (chosen, row)
        self.labels: Counter = Counter()
        self.answers: Counter | None = Counter()  # responses; None if there are too many to be labels
        self.labelled: dict[int, tuple[Any, int]] = {}  # digest of a prompt -> (label, row)
        self.conflicts: list[tuple[int, str]] = []
        self.unprompted: list[int] = []
        self.crlf: list[int] = []
        self.unix = False
        self.prompts: dict[int, int] = {}
        self.prompt_sketches = Sketches() if keep_prompts else None
        self.prompt_rows = array("q")

    def add(self, row: Row, content: Content) -> None:
        number, where = len(self.places), _short_place(row.where)
        self.places.append(where)
        texts = content.texts
        for text in texts:
            for code, found in odd_characters(text):
                self.report.add(code, where, found)
        if any("\r\n" in text for text in texts):
            self.crlf.append(number)
        self.unix |= any(re.search(r"(?<!\r)\n", text) is not None for text in texts)
        if not content.prompt.strip():
            self.unprompted.append(number)
        earlier = self.first.setdefault(content.key, number)
        if earlier != number:
            self.report.add("duplicate", where, f"as {self.places[earlier]}")
        elif not content.others:
            self.sketches.add(*texts)
            self.sketched.append(number)
        if len(content.responses) == 2:
            self._pair(number, content)
        self._label(number, content)
        if self.prompt_sketches is not None:
            first = self.prompts.setdefault(digest(content.subject.strip()), number)
            if first == number:
                self.prompt_sketches.add(content.subject)
                self.prompt_rows.append(number)

    def _pair(self, number: int, content: Content) -> None:
        chosen, rejected = (digest(content.prompt.strip(), text.strip()) for text in content.responses)
        if chosen == rejected:
            self.report.add("same_responses", self.places[number])
            return
        winner, row = self.pairs.setdefault(digest(*map(str, sorted((chosen, rejected)))), (chosen, number))
        if winner != chosen:
            self.report.add("conflicting_preferences", self.places[number], f"the opposite of {self.places[row]}")

    def _label(self, number: int, content: Content) -> None:
        label = content.label
        if label is not None:
            self.labels[label, type(label).__name__] += 1
        elif self.answers is not None and len(content.responses) == 1 and content.prompt:
            label = content.responses[0]
            self.answers[label, "str"] += 1
            if len(self.answers) > MOST_LABELS:
                self.answers = None
        if label is None or (content.label is None and self.answers is None):
            return
        known, row = self.labelled.setdefault(digest(content.prompt.strip()), (label, number))
        if known != label:
            self.conflicts.append((number, f"{short(label)}, but {short(known)} in {self.places[row]}"))

    def finish(self, similarity: float) -> None:
        """Adds the faults that can be found only after the last row."""
        report, count = self.report, len(self.places)
        if self.unix:
            for number in self.crlf:
                report.add("mixed_line_ends", self.places[number])
        if 2 * len(self.unprompted) < count:
            for number in self.unprompted:
                report.add("empty_prompt", self.places[number])
        seen = set()
        for j, i in sorted((j, i) for i, j in self.sketches.pairs(similarity)):
            if j not in seen:
                seen.add(j)
                one, other = self.places[self.sketched[i]], self.places[self.sketched[j]]
                report.add("near_duplicate", other, f"nearly as {one}")
        if not self.labels and self.answers and count >= ROWS_PER_LABEL * len(self.answers):
            self.labels = self.answers
        if self.labels:
            for number, detail in self.conflicts:
                report.add("conflicting_labels", self.places[number], detail)
            self._balance()

    def _balance(self) -> None:
        report, total = self.report, self.labels.total()
        for (label, _), count in self.labels.most_common():
            report.labels[str(label)] = report.labels.get(str(label), 0) + count
        spellings: dict[str, list[Any]] = {}
        for label, _ in self.labels:
            spellings.setdefault(" ".join(str(label).casefold().split()), []).append(label)
        for spelled in spellings.values():
            if len(spelled) > 1:
                report.add("label_spelling", f"labels {', '.join(map(repr, spelled))}")
        (top, _), most = self.labels.most_common(1)[0]
        if total >= 2 * ROWS_PER_LABEL and most >= MOST_FREQUENT * total:
            report.add("label_balance", f"label {top!r}", f"{most:,} of {total:,} rows")
        if total >= ROWS_PER_LABEL * len(self.labels):
            for (label, _), rows in self.labels.items():
                if rows < LEAST_PER_LABEL:
                    report.add("label_balance", f"label {label!r}", f"{rows} of {total:,} rows")

    def compare(self, path: str, settings: Sequence[str], similarity: float) -> None:
        """Adds the rows of another file whose prompt is in this file. Rows that cannot be read are skipped."""
        other = open_source(path, None, settings, lambda error: None)
        both, places = self.prompt_sketches, []
        assert both is not None
        own = len(both)
        for row in other.rows:
            try:
                subject = other.read(row).subject
            except UserError:
                continue
            number = self.prompts.get(digest(subject.strip()))
            if number is not None:
                self.report.add("leak", _short_place(row.where), f"as {self.places[number]}")
            else:
                both.add(subject)
                places.append(_short_place(row.where))
        near = ((i, j) for i, j in both.pairs(similarity) if i < own <= j)
        for j, group in itertools.groupby(sorted((j, i) for i, j in near), key=lambda pair: pair[0]):
            first = min(i for _, i in group)
            self.report.add("near_leak", places[j - own], f"nearly as {self.places[self.prompt_rows[first]]}")
        both.truncate(own)


class _Lengths:
    """Lengths of rows in characters and, with a tokenizer, in tokens as the stages count them."""

    def __init__(self, report: Report, tokenizer: Tokenizer | None, max_tokens: int | None):
        self.report, self.tokenizer, self.max_tokens = report, tokenizer, max_tokens
        self.characters, self.tokens = array("q"), array("q")
        self.waiting: list[tuple[str, list]] = []

    def add(self, row: Row, content: Content) -> None:
        """Counts a row. Raises UserError if the chat template refuses it."""
        if self.tokenizer is not None:
            chats, place = self.tokenizer.chats, f"{row.where}: "
            rendered = [
                (chats.rendered_prompt(prompt, place), None)
                if response is None
                else chats.rendered_pair(prompt, response, place)
                for prompt, response in content.pairs
            ]
            self.waiting.append((_short_place(row.where), rendered))
            if len(self.waiting) == CHUNK:
                self._count()
        longest = max(map(len, content.responses), default=0)
        self.characters.append(len(content.prompt) + longest)

    def _count(self) -> None:
        pairs = [pair for _, pairs in self.waiting for pair in pairs]
        ends = [response is None for _, response in pairs]
        alone = self.tokenizer.encode_prompts([prompt for prompt, response in pairs if response is None])
        joint = self.tokenizer.encode_pairs([pair for pair in pairs if pair[1] is not None])
        sizes = iter([len(next(alone)) if end else sum(map(len, next(joint))) for end in ends])
        for where, pairs in self.waiting:
            size = max(next(sizes) for _ in pairs)
            self.tokens.append(size)
            if self.max_tokens is not None and size > self.max_tokens:
                self.report.add("too_long", where, f"{size} tokens")
        self.waiting = []

    def finish(self) -> None:
        if self.waiting:
            self._count()
        for unit, sizes in (("characters", self.characters), ("tokens", self.tokens)):
            if sizes:
                median, p95 = np.percentile(sizes, [50, 95], method="nearest").tolist()
                self.report.lengths[unit] = {"median": int(median), "p95": int(p95), "longest": max(sizes)}


def _check_bytes(report: Report, source: Source) -> None:
    """Adds faults that can be seen only in the bytes of a text file: byte order mark, mixed line endings."""
    path = os.path.expanduser(source.path)
    ending = os.path.splitext(path.removesuffix(".gz"))[1].lower()
    if not os.path.isfile(path) or ENDINGS.get(ending) not in ("json", "jsonl", "csv"):
        return
    windows = unix = 0
    with open_bytes(path) as file:
        for number, line in enumerate(file):
            if number == 0 and line.startswith(b"\xef\xbb\xbf"):
                report.add("byte_order_mark", f"{os.path.basename(path)}:1")
            windows += line.endswith(b"\r\n")
            unix += line.endswith(b"\n") and not line.endswith(b"\r\n")
    if windows and unix and ENDINGS[ending] == "jsonl":  # a cell of a table may hold other line ends than the rows
        report.add("line_endings", os.path.basename(path), f"{windows:,} of Windows, {unix:,} of Unix")


def _short_place(where: str) -> str:
    return os.path.basename(where)


def _without_place(error: UserError, where: str) -> str:
    return str(error).removeprefix(f"{where}: ").split("; ")[0]
