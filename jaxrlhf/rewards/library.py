"""Rewards for common tasks. A config names a function as `jaxrlhf.rewards.library:NAME`.

The parameters of each function are `completions`, columns of the data, and options. The options are the keyword-only
parameters. The function returns one float per completion and uses no network. A model wrote the completions, so a
completion that cannot be parsed gets the lowest score and raises no error. A person wrote the columns and options, so
an unusable column or option raises a one-line ValueError. If the column of a row is None, the function returns None
for this row. Most columns may hold a list of acceptable texts. Then the best match counts.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import Context, Decimal
from typing import Any

from jaxrlhf.rewards.columns import abstains_without, check_choice, check_number, check_texts, reference, references
from jaxrlhf.rewards.entities import entity_f1
from jaxrlhf.rewards.relations import relation_f1
from jaxrlhf.rewards.structured import json_validity, span_f1
from jaxrlhf.rewards.text_overlap import bleu, chrf, rouge

__all__ = [
    "bleu",
    "chrf",
    "entity_f1",
    "exact_match",
    "json_validity",
    "label_accuracy",
    "length",
    "multiple_choice",
    "numeric_answer",
    "regex_format",
    "relation_f1",
    "repetition",
    "rouge",
    "span_f1",
]

# ---------------------------------------------------------------- exact text


@abstains_without("answer")
def exact_match(completions: Sequence[str], answer: Sequence[Any], *, normalize: str = "strip") -> list[float]:
    """Returns 1 if the completion equals the column `answer` or one text of the column's list, else 0.

    `normalize` is none, strip, lower or squad. "strip" removes blanks at both ends. "lower" also ignores case and
    merges blanks. "squad" also removes punctuation and English articles, as in SQuAD's evaluation (Rajpurkar et al.
    2016).
    """
    check_choice("normalize", normalize, tuple(NORMALIZERS))
    normal = NORMALIZERS[normalize]
    rows = zip(completions, references("answer", answer))
    return [float(normal(text) in map(normal, accepted)) for text, accepted in rows]


def _lower(text: str) -> str:
    return " ".join(text.casefold().split())


def _squad(text: str) -> str:
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


NORMALIZERS: dict[str, Callable[[str], str]] = {"none": str, "strip": str.strip, "lower": _lower, "squad": _squad}

# ---------------------------------------------------------------- a number

# A sign belongs to a number unless a number or a word precedes the sign. So the last number of "5-3" is 3.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]}])[-+\u2212])?(?:[$€£¥]\s?(?P<inner>[-+\u2212])?)?"
    r"(?P<digits>(?<![0-9])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?<![0-9])(?=\.[0-9]))"
    r"(?P<rest>(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}(?![\w]))?)"
)
UNTRAPPED = Context(prec=60, traps=[])  # a completion with a million digits must not raise
MARKED = re.compile(r"####[\s*_(\\]*?(?=[-+\u2212$€£¥.0-9])")
BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")


@abstains_without("answer")
def numeric_answer(
    completions: Sequence[str], answer: Sequence[Any], *, tolerance: float = 0.0, strict: bool = False
) -> list[float]:
    r"""Returns 1 if the completion's number equals the number in the column `answer`, else 0.

    The formats are those of GSM8K (Cobbe et al. 2021). The column's number follows `####`, is in `\boxed{}`, or is the
    whole column. The completion's number is the number after its first `####`, else the number in its last `\boxed{}`,
    else its last number. If `strict` is set, only a number after `####` counts. Signs, decimals, exponents, thousands
    separators (1,234 and 1{,}234) and currency signs are parsed. Fractions are not parsed. `tolerance` is absolute.
    """
    check_number("tolerance", tolerance, 0)
    expected = []
    for i, text in enumerate(reference("answer", answer)):
        number = _first_number(text, (_marked_number, _boxed_number, _whole_number))
        if number is None:
            raise ValueError(
                f"column answer, row {i} must be a number or have a number after #### or in \\boxed{{}}, "
                f"not {text[-40:]!r}"
            )
        expected.append(number)
    parsers = (_marked_number,) if strict else (_marked_number, _boxed_number, _last_number)
    return [
        float(_equal(_first_number(text, parsers), right, tolerance)) for text, right in zip(completions, expected)
    ]


def _equal(number: Decimal | None, right: Decimal, tolerance: float) -> bool:
    if number is None:
        return False
    return number == right or abs(UNTRAPPED.subtract(number, right)) <= Decimal(str(tolerance))


def _first_number(text: str, parsers: Sequence[Callable[[str], Decimal | None]]) -> Decimal | None:
    """Returns the result of the first parser that finds a number, or None."""
    return next((number for parse in parsers if (number := parse(text)) is not None), None)


def _whole_number(text: str) -> Decimal | None:
    match = NUMBER.fullmatch(_plain(text).strip().rstrip("."))
    return _decimal(match) if match else None


def _marked_number(text: str) -> Decimal | None:
    text = _plain(text)
    mark = MARKED.search(text)
    number = NUMBER.match(text, mark.end()) if mark else None
    return _decimal(number) if number else None


def _boxed_number(text: str) -> Decimal | None:
    boxes = BOXED.findall(_plain(text))
    return _last_number(boxes[-1]) if boxes else None


def _last_number(text: str) -> Decimal | None:
    numbers = list(NUMBER.finditer(_plain(text)))
    return _decimal(numbers[-1]) if numbers else None


def _plain(text: str) -> str:
    r"""Returns the text with ordinary thousands separators and currency signs instead of those of TeX."""
    return text.replace("{,}", ",").replace("\\,", "").replace("\\!", "").replace("\\$", "$")


def _decimal(match: re.Match) -> Decimal:
    sign = match["sign"] or match["inner"] or ""
    digits = match["digits"].replace(",", "") or "0"
    return Decimal(sign.replace("\u2212", "-") + digits + match["rest"])


# ---------------------------------------------------------------- a choice


@abstains_without("answer")
def multiple_choice(completions: Sequence[str], answer: Sequence[Any], *, letters: str = "ABCDE") -> list[float]:
    r"""Returns 1 if the completion chooses the letter of the column `answer`, else 0.

    The column holds a letter ("B", "(B)" or "B.") or the index of the choice, counted from 0. The completion's letter
    is searched in this order, and the first match counts:

    1. the last letter in `\boxed{}`
    2. the last letter after "answer" or "correct option", such as "the answer is (B)"
    3. a letter at the start, such as "B) blue"
    4. the last letter in brackets
    5. the last letter that is a word
    """
    if not isinstance(letters, str) or not re.fullmatch(r"[A-Z]{2,26}", letters):
        raise ValueError(f"letters must be 2 to 26 capital letters such as 'ABCD', not {letters!r}")
    expected = [_letter(value, letters, i) for i, value in enumerate(answer)]
    patterns = _choice_patterns(letters)
    return [float(_choice(text, patterns) == right) for text, right in zip(completions, expected)]


def _letter(value: Any, letters: str, row: int) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(letters):
        return letters[value]
    letter = value.strip().strip("().:").upper() if isinstance(value, str) else ""
    if len(letter) == 1 and letter in letters:
        return letter
    raise ValueError(f"column answer, row {row} must be one of {letters} or an index from 0, not {value!r}")


def _choice_patterns(letters: str) -> list[re.Pattern]:
    any_case, alone = f"[{letters}{letters.lower()}]", r"(?![\w'’])"
    return [
        re.compile(rf"\\boxed\s*\{{\s*(?:\\text\s*\{{)?\s*\(?({any_case})\)?[\s}}]"),
        re.compile(
            rf"(?i:\banswer|\b(?:correct|right|best)\s+(?:choice|option))(?i:\s+is)?[\s*:=]*\(?([{letters}]){alone}"
        ),
        re.compile(rf"\A\W*({any_case})(?=\s*\Z|[).:,\]*]|\s*\n)"),
        re.compile(rf"[(\[]({any_case})[)\]]"),
        # "A dog" and "I think" are not choices.
        re.compile(rf"(?<![\w'’])(?![AI]\s+[a-z])([{letters}]){alone}"),
    ]


def _choice(text: str, patterns: list[re.Pattern]) -> str | None:
    for pattern in patterns:
        if letters := pattern.findall(text):
            return letters[-1].upper()
    return None


@abstains_without("label")
def label_accuracy(
    completions: Sequence[str], label: Sequence[Any], *, labels: Sequence[str] | None = None, pick: str = "first"
) -> list[float]:
    """Returns 1 if the completion names the label of the column `label`, else 0.

    `labels` is the list of all labels. If it is None, the whole completion must be the label. Case and surrounding
    blanks and punctuation are then ignored.

    If `labels` is given, labels are searched as whole words in the completion. `pick` "first" or "last" takes the first
    or last label that is found. `pick` "only" takes the label if exactly one label is found. The column may also hold
    the label's index in `labels`, counted from 0.
    """
    predictions, expected = read_labels(completions, label, labels, pick)
    return [float(prediction == right) for prediction, right in zip(predictions, expected)]


def read_labels(
    completions: Sequence[str], label: Sequence[Any], labels: Sequence[str] | None = None, pick: str = "first"
) -> tuple[list[str | None], list[str]]:
    """Returns (the label of each completion or None, the label of the column `label`), as `label_accuracy` reads them.

    Without `labels`, the label of a completion is its whole text, without case and surrounding punctuation.
    """
    check_choice("pick", pick, ("first", "last", "only"))
    if labels is None:
        return [_bare(text) for text in completions], [_bare(right) for right in reference("label", label)]
    check_texts("labels", labels)
    known = {_lower(name) for name in labels}
    if not known or "" in known or len(known) < len(labels):
        raise ValueError(f"labels must be a list of different, non-empty texts, not {labels!r}")
    expected = [_known_label(value, labels, known, i) for i, value in enumerate(label)]
    longest = sorted(known, key=len, reverse=True)  # "not spam" before "spam"
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in longest))
    return [_named_label(text, pattern, pick) for text in completions], expected


def _bare(text: str) -> str:
    return _lower(text).strip(string.punctuation + string.whitespace)


def _known_label(value: Any, labels: Sequence[str], known: set[str], row: int) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
        return _lower(labels[value])
    if isinstance(value, str) and _lower(value) in known:
        return _lower(value)
    raise ValueError(f"column label, row {row} must be one of {', '.join(labels)} or an index from 0, not {value!r}")


def _named_label(text: str, pattern: re.Pattern, pick: str) -> str | None:
    names = pattern.findall(_lower(text))
    if not names or (pick == "only" and len(set(names)) > 1):
        return None
    return names[-1 if pick == "last" else 0]


# ---------------------------------------------------------------- form


def regex_format(completions: Sequence[str], *, pattern: str, mode: str = "full", strip: bool = True) -> list[float]:
    """Returns 1 if the completion matches the regular expression `pattern`, else 0.

    The pattern has the syntax of Python's `re`. A `.` does not match a newline unless the pattern begins with `(?s)`.
    If `mode` is "full", the whole completion must match. If `mode` is "search", any part may match. `strip` first
    removes blanks at both ends.
    """
    check_choice("mode", mode, ("full", "search"))
    try:
        expression = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    matches = expression.fullmatch if mode == "full" else expression.search
    return [float(matches(text.strip() if strip else text) is not None) for text in completions]


def length(
    completions: Sequence[str],
    *,
    target: int,
    unit: str = "words",
    side: str = "both",
    penalty: float | None = None,
    floor: float = -1.0,
) -> list[float]:
    """Returns 0 for a completion of `target` units. Each unit above or below the target subtracts `penalty`.

    `unit` is "words" or "characters". `side` "over" penalises only completions that are too long, "under" only those
    that are too short, and "both" penalises both. `penalty` None means 1 / target. `floor` is the lowest score.
    """
    check_number("target", target, 0, whole=True)
    check_choice("unit", unit, tuple(UNITS))
    check_choice("side", side, ("both", "over", "under"))
    if penalty is not None:
        check_number("penalty", penalty, 0)
    if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not -float("inf") < floor <= 0:
        raise ValueError(f"floor must be a number of at most 0, not {floor!r}")
    penalty = 1 / max(target, 1) if penalty is None else penalty
    excess = (len(UNITS[unit](text)) - target for text in completions)
    distance = {"both": abs, "over": lambda d: max(d, 0), "under": lambda d: max(-d, 0)}[side]
    return [max(float(floor), -penalty * distance(difference)) for difference in excess]


def repetition(completions: Sequence[str], *, n: int = 3, unit: str = "words") -> list[float]:
    """Returns minus the share of n-grams that repeat an earlier n-gram of the completion.

    The score is 0 without repetition and near -1 if the completion only repeats. `unit` is "words" or "characters".
    Case is ignored. A completion with fewer than n units scores 0.
    """
    check_number("n", n, 1, whole=True)
    check_choice("unit", unit, tuple(UNITS))
    return [-_repeated(UNITS[unit](text.lower()), n) for text in completions]


def _repeated(units: Sequence[str], n: int) -> float:
    grams: Iterable[tuple[str, ...]] = zip(*(units[i:] for i in range(n)))
    counts = Counter(grams)
    return 1 - len(counts) / counts.total() if counts else 0.0


UNITS: dict[str, Callable[[str], Sequence[str]]] = {"words": str.split, "characters": str.strip}
