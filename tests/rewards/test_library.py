"""The library of rewards against small references of its own, on examples and on whatever hypothesis writes."""

import json
import re
from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.rewards.library import (
    exact_match,
    json_validity,
    label_accuracy,
    length,
    multiple_choice,
    numeric_answer,
    regex_format,
    repetition,
    span_f1,
)

FEW = settings(max_examples=80, deadline=None)
WORDS = st.lists(st.sampled_from(["a", "b", "cat", "dog,", "Cat", "is"]), max_size=12).map(" ".join)

# ---------------------------------------------------------------- exact_match


@pytest.mark.parametrize(
    ("completion", "answer", "scores"),
    [  # none, strip, lower, squad
        ("Paris", "Paris", (1, 1, 1, 1)),
        (" Paris\n", "Paris", (0, 1, 1, 1)),
        ("paris", "Paris", (0, 0, 1, 1)),
        ("new  york", "New York", (0, 0, 1, 1)),
        ("The cat!", "a cat", (0, 0, 0, 1)),
        ("Paris, France", "Paris", (0, 0, 0, 0)),
        ("", "Paris", (0, 0, 0, 0)),
        ("4", 4, (1, 1, 1, 1)),
        ("two", ["2", "two"], (1, 1, 1, 1)),
    ],
)
def test_exact_match(completion, answer, scores):
    for normalize, score in zip(("none", "strip", "lower", "squad"), scores):
        assert exact_match([completion], [answer], normalize=normalize) == [score]


@FEW
@given(WORDS, WORDS)
def test_each_normalisation_accepts_what_the_one_before_does(completion, answer):
    scores = [exact_match([completion], [answer], normalize=n)[0] for n in ("none", "strip", "lower", "squad")]
    assert scores == sorted(scores)
    assert scores[0] == (completion == answer)
    assert scores[2] == (completion.lower().split() == answer.lower().split())


# ---------------------------------------------------------------- numeric_answer


def number_of(text):
    """The number that a completion is taken to give: the one reference answer with which it scores 1."""
    candidates = {m.replace(",", "") for m in re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", text)}
    candidates |= {c.lstrip("-") for c in candidates} | {"-" + c.lstrip("-") for c in candidates}
    hits = {Decimal(c) for c in candidates if numeric_answer([text], [c]) == [1.0]}
    assert len(hits) <= 1, hits
    return hits.pop() if hits else None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9 + 9 = <<9+9=18>>18\n#### 18", 18),
        ("#### 18\nQ: another?\n#### 7", 18),
        ("so 5, and then 20.", 20),
        ("####\n7", 7),
        ("#### $1,234,567.50", "1234567.50"),
        ("#### **18**", 18),
        ("#### none, but 3", 3),
        ("The answer is -5.", -5),
        ("It costs -$5.", -5),
        ("It costs $-5.", -5),
        ("It costs \\$12", 12),
        ("5-3", 3),
        ("(5)-3", 3),
        ("3 - 4", 4),
        ("x=-3", -3),
        ("−4", -4),  # the minus sign of typesetters
        ("-.5", "-0.5"),
        ("100%", 100),
        ("12:30", 30),
        ("in \\boxed{42} of 50", 42),
        ("\\boxed{1} then \\boxed{2}", 2),
        ("\\boxed{\\text{about } 7} or 8", 7),
        ("#### 3 \\boxed{4}", 3),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_of_a_completion(text, number):
    assert number_of(text) == (None if number is None else Decimal(number))


def test_other_signs_and_separators():
    assert (
        numeric_answer(["−4", "1{,}234 is it", "1\\,234", "1.5e3", "2e", "#### €7"], [-4, 1234, 1234, 1500, 2, 7])
        == [1] * 6
    )
    assert numeric_answer(["12"] * 5, ["#### 12", "12.0", "$12.", "\\boxed{12}", 12.0]) == [1] * 5


@FEW
@given(
    st.decimals(-(10**9), 10**9, places=3),
    st.sampled_from(["{}", "{}.", "It is {} now.", "first 77, then ${}", "\\boxed{{{}}}", "#### {}\n#### 77", "= {}%"]),
    st.booleans(),
)
def test_a_number_is_read_however_it_is_written(number, form, separators):
    written = f"{number:,}" if separators else f"{number}"
    text = form.format(written)
    assert numeric_answer([text], [str(number)]) == [1.0]
    assert numeric_answer([text], [f"so\n#### {written}"]) == [1.0]
    assert numeric_answer([text], [str(number + 1)]) == [0.0]
    assert numeric_answer([text], [str(number + Decimal("0.3"))], tolerance=0.3) == [1.0]
    assert numeric_answer([text], [str(number + Decimal("0.301"))], tolerance=0.3) == [0.0]
    assert numeric_answer([text], [str(number)], strict=True) == [float("####" in form)]


def test_numbers_of_any_size_raise_nothing():
    huge = ["9" * 1_100_000, "1e999", "1e-999", "1e9999", "#### " + "1," * 1000, "." * 1000, "-" * 1000, "#" * 1000]
    assert numeric_answer(huge, [5] * len(huge), tolerance=1.0) == [0.0] * len(huge)


def test_reference_solutions_of_gsm8k_are_right(texts):
    for file in ("train.jsonl", "test.jsonl"):
        lines = (texts / "gsm8k" / file).read_text().splitlines()
        solutions, count = [json.loads(line)["answer"] for line in lines], len(lines)
        assert numeric_answer(solutions, solutions) == [1.0] * count
        assert numeric_answer(solutions, solutions, strict=True) == [1.0] * count
        finals = [solution.split("#### ")[1] for solution in solutions]
        assert numeric_answer([f"The answer is ${final}." for final in finals], solutions) == [1.0] * count
        # Another row's solution is right where its number is the same, and only there.
        numbers = [int(final.replace(",", "")) for final in finals]
        shifted = solutions[1:] + solutions[:1]
        assert numeric_answer(shifted, solutions) == [float(a == b) for a, b in zip(numbers[1:] + numbers[:1], numbers)]


# ---------------------------------------------------------------- multiple_choice and label_accuracy


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b", "B"),
        ("(c)", "C"),
        ("B) blue", "B"),
        ("D. none of them", "D"),
        ("A\nBecause it is A", "A"),
        ("The answer is B.", "B"),
        ("The answer is A because B is wrong.", "A"),
        ("**Answer:** (C)", "C"),
        ("Answer: A? No, answer: D", "D"),
        ("The correct option is A, not B", "A"),
        ("\\boxed{B}", "B"),
        ("\\boxed{\\text{(D)}} and not A", "D"),
        ("I weigh (A) and (B): (B)", "B"),
        ("A dog is what B shows", "B"),
        ("I think D", "D"),
        ("A dog", None),
        ("the answer is a dog", None),
        ("blue", None),
        ("Bee or CAB", None),
        ("F", None),
        ("", None),
    ],
)
def test_the_letter_of_a_completion(text, letter):
    scores = multiple_choice([text] * 5, list("ABCDE"))
    assert scores == [float(letter == other) for other in "ABCDE"]


def test_the_column_of_a_choice_holds_a_letter_or_an_index():
    assert multiple_choice(["C"] * 5, ["C", "(c)", "C.", 2, " C "]) == [1] * 5
    assert multiple_choice(["J", "F"], ["J", 5], letters="ABCDEFGHIJ") == [1, 1]


@pytest.mark.parametrize(
    ("text", "first", "last", "only"),
    [
        ("Spam.", "spam", "spam", "spam"),
        ("It is not spam", "not spam", "not spam", "not spam"),
        ("spam, or rather NOT  spam", "spam", "not spam", None),
        ("spam spam", "spam", "spam", "spam"),
        ("spammer", None, None, None),
        ("", None, None, None),
    ],
)
def test_the_label_of_a_completion(text, first, last, only):
    labels = ["spam", "not spam"]
    for pick, named in (("first", first), ("last", last), ("only", only)):
        assert label_accuracy([text] * 2, labels, labels=labels, pick=pick) == [
            float(named == label) for label in labels
        ]
        assert label_accuracy([text] * 2, [0, 1], labels=labels, pick=pick) == [
            float(named == label) for label in labels
        ]


def test_without_labels_the_whole_completion_is_the_label():
    texts = [" Positive.", "**positive**", "positive, I think", "negative", "3"]
    assert label_accuracy(texts, ["positive"] * 4 + [3]) == [1, 1, 0, 0, 1]


# ---------------------------------------------------------------- form


def test_regex_format():
    texts = ["<think>a</think>\n<answer>b</answer>", " <answer>b</answer> ", "so <answer>b</answer>", ""]
    pattern = r"(?s)(<think>.*</think>\s*)?<answer>.*</answer>"
    assert regex_format(texts, pattern=pattern) == [1, 1, 0, 0]
    assert regex_format(texts, pattern=pattern, strip=False) == [1, 0, 0, 0]
    assert regex_format(texts, pattern=pattern, mode="search") == [1, 1, 1, 0]


@FEW
@given(WORDS, st.integers(0, 8), st.sampled_from(["words", "characters"]))
def test_length(text, target, unit):
    count = len(text.split()) if unit == "words" else len(text)
    both, over, under = (
        length([text], target=target, unit=unit, side=s, floor=-1e9)[0] for s in ("both", "over", "under")
    )
    assert both == pytest.approx(-abs(count - target) / max(target, 1))
    assert both == over + under and (over == 0 or under == 0)
    assert (over < 0) == (count > target)
    assert length([text], target=target, unit=unit, penalty=0.5) == [max(-1.0, -0.5 * abs(count - target))]
    assert length([text + " one two"], target=target, side="over", penalty=0.5, floor=-0.25)[0] >= -0.25


@FEW
@given(WORDS, st.integers(1, 4), st.sampled_from(["words", "characters"]))
def test_repetition(text, n, unit):
    units = text.lower().split() if unit == "words" else list(text.lower().strip())
    grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    repeats = sum(gram in grams[:i] for i, gram in enumerate(grams))
    expected = -repeats / len(grams) if grams else 0.0
    assert repetition([text], n=n, unit=unit)[0] == pytest.approx(expected)


# ---------------------------------------------------------------- JSON

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


@FEW
@given(JSON)
def test_what_is_json_is_valid_and_what_is_cut_off_is_not(value):
    text = json.dumps(value)
    assert json_validity([f" {text}\n"]) == [1.0]
    assert json_validity([text], kind="object") == [float(isinstance(value, dict))]
    assert json_validity([text], kind="array") == [float(isinstance(value, list))]
    assert json_validity([text], required=["a", "b"]) == [float(isinstance(value, dict) and {"a", "b"} <= set(value))]
    assert json_validity([f"```json\n{text}\n```"], fenced=True) == [1.0]
    assert json_validity([f"```json\n{text}\n```", text + "]"]) == [0.0, 0.0]
    if isinstance(value, (dict, list, str)):
        assert json_validity([text[:-1]]) == [0.0]


def test_what_python_reads_and_json_is_not():
    assert json_validity(["NaN", "[Infinity]", "{'a': 1}", "[1,]", "", "[" * 100_000, "yes"]) == [0.0] * 7


# ---------------------------------------------------------------- entities

ENTITIES = st.lists(
    st.tuples(st.sampled_from(["person", "place"]), st.sampled_from(["Ada", "New York", "Li"])), max_size=5
)


def as_lines(spans):
    return "\n".join(f"- {kind}: {text}" for kind, text in spans)


def as_objects(spans):
    return json.dumps([{"type": kind, "text": text, "start": 3} for kind, text in spans])


def as_groups(spans):
    groups = {}
    for kind, text in spans:
        groups.setdefault(kind, []).append(text)
    return json.dumps(groups)


FORMS = [as_lines, as_objects, as_groups, lambda spans: json.dumps(spans), lambda s: f"```json\n{as_objects(s)}\n```"]


@FEW
@given(
    ENTITIES, ENTITIES, st.sampled_from(FORMS), st.sampled_from([*FORMS, list, lambda s: [f"{k}: {t}" for k, t in s]])
)
def test_span_f1_is_that_of_counts_in_every_form(found, wanted, write, keep):
    right = 0
    left = list(wanted)
    for span in found:
        if span in left:
            left.remove(span)
            right += 1
    precision, recall = right / max(len(found), 1), right / max(len(wanted), 1)
    expected = 1.0 if not found and not wanted else 2 * precision * recall / ((precision + recall) or 1)
    assert span_f1([write(found)], [keep(wanted)])[0] == pytest.approx(expected)


def test_what_counts_as_the_same_entity():
    wanted = ["person: Ada Lovelace"]
    texts = [
        "PERSON:  Ada   Lovelace",
        "person: ada lovelace",
        "place: Ada Lovelace",
        "Ada Lovelace",
        "Here they are:\n1. person: Ada Lovelace",
    ]
    assert span_f1(texts, wanted * 5) == [1, 0, 0, 0, 1]
    assert span_f1(texts[1:2], wanted, ignore_case=True) == [1]
    assert span_f1(["nothing here", "person: Li"], ["", []]) == [1, 0]
    assert span_f1(['{"type": "person", "text": "Ada"}'], [{"type": "person", "text": "Ada"}]) == [1]
    assert Counter(span_f1(["x"] * 2, [[["person", "Ada"]], [("person", "Ada")]])) == {0.0: 2}


# ---------------------------------------------------------------- all of them

ALL = {
    "exact_match": lambda texts: exact_match(texts, ["4"] * len(texts), normalize="squad"),
    "numeric_answer": lambda texts: numeric_answer(texts, ["#### 4"] * len(texts)),
    "multiple_choice": lambda texts: multiple_choice(texts, ["A"] * len(texts)),
    "label_accuracy": lambda texts: label_accuracy(texts, ["a"] * len(texts), labels=["a", "b"]),
    "regex_format": lambda texts: regex_format(texts, pattern="a+"),
    "length": lambda texts: length(texts, target=3),
    "repetition": repetition,
    "json_validity": lambda texts: json_validity(texts, fenced=True),
    "span_f1": lambda texts: span_f1(texts, ["a: b"] * len(texts)),
}
ODD = st.lists(
    st.text(st.sampled_from('aA1.,-$#\\boxed{}()[]":;`\n é\u2212\ud800٣'), max_size=30) | st.text(max_size=8),
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(ODD)
def test_no_completion_raises(texts):
    for name, score in ALL.items():
        low, high = (-1.0, 0.0) if name in ("length", "repetition") else (0.0, 1.0)
        scores = score(texts)
        assert len(scores) == len(texts) and all(type(s) is float and low <= s <= high for s in scores), name


@pytest.mark.parametrize(
    ("score", "column", "good", "bad"),
    [
        (exact_match, "answer", "a", ([], [None], {"a": 1}, b"a")),
        (numeric_answer, "answer", "4", ("none", "4 or 5", "#### x", ["4"], float("nan"), "")),
        (multiple_choice, "answer", "A", ("F", "AB", "", 5, -1, True, ["A"])),
        (label_accuracy, "label", "a", (["a"],)),
        (lambda c, v: label_accuracy(c, v, labels=["a", "b"]), "label", "b", ("c", 2, True, ["a"])),
        (span_f1, "entities", "a: b", ("no entity", 3, [["a"]], ["a"], [{"type": "a"}], [None], "[1]")),
    ],
)
def test_a_row_that_cannot_be_used_is_named(score, column, good, bad):
    assert len(score(["x", "x"], [good, good])) == 2
    for value in bad:
        for before in (good, None):
            with pytest.raises(ValueError, match=rf"\Acolumn {column}, row 2 [^\n]*\Z"):
                score(["x", "x", "x"], [good, before, value])


@pytest.mark.parametrize(
    ("score", "right"),
    [(exact_match, "a"), (numeric_answer, "4"), (multiple_choice, "A"), (label_accuracy, "a"), (span_f1, "a: b")],
)
def test_a_row_without_a_reference_has_no_score_and_changes_no_other(score, right):
    texts, answers = [right, "what", right, "?"], [None, right, right, None]
    (wrong,), (one,) = score(["what"], [right]), score([right], [right])
    assert score(texts, answers) == [None, wrong, one, None] and wrong < one == 1.0
    assert score(texts, [None] * 4) == [None] * 4
    with pytest.raises((TypeError, ValueError)):  # options are checked all the same
        score(texts, [None] * 4, no_such_option=1)
