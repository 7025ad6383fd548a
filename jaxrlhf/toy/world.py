"""The assistant world: generated data sets of questions and answers with a known gold score.

The builtin data sets are `assistant-demonstrations`, `assistant-preferences` and `assistant-prompts`. `gold_score` is
the true score. A reward model only estimates the true score. No model is trained on the gold score.

Demonstrations imitate people of mixed quality. 62% of them are right, 35% are polite and 45% are short, independently
of each other. So a perfect imitation scores about 0.55. The preferences teach the rest. For each question, the right
value is by far the most frequent value. Each fact occurs in the preferences.

Every split of a data set is a fixed sequence of rows from a constant seed. A limit shortens or extends this sequence.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from jaxrlhf.toy.facts import (
    LEADS,
    NEUTRAL_CLOSERS,
    NEUTRAL_OPENERS,
    POLITE_CLOSERS,
    POLITE_OPENERS,
    RUDE_CLOSERS,
    RUDE_OPENERS,
    TAILS,
)
from jaxrlhf.toy.language import (
    OPENERS,
    QUESTIONS,
    SEED,
    SPLITS,
    VOCABULARY,
    Question,
    Random,
    gold,
    gold_score,
    parse,
    pick,
    take,
)

__all__ = ["BUILTIN", "VOCABULARY", "gold_score"]

MAX_ANSWER_WORDS = 16
QUALITY = {"right": 0.62, "polite": 0.35, "short": 0.45}  # share of demonstrations with each feature

CHANGED = {"right": 0.6, "polite": 0.45, "short": 0.45}  # probability that two answers of a pair differ in a feature
# In this share of pairs, the two answers use the same words for the features in which they agree. In the other pairs,
# the two answers are drawn separately.
SHARED_WORDS = 0.75
BROKEN_SHARE = 0.2  # share of pairs that consist of a broken text and a proper answer
# A broken text is made from the proper answer, or from an answer that is better than most. A policy finds loopholes
# near good answers.
BROKEN_QUALITY = {"right": 0.75, "polite": 0.75, "short": 0.75}
PROPER_GOLD = 0.2  # smallest gold score of the proper answer in a pair with a broken text
TRAIN_GAP, TEST_GAP = 0.05, 0.15  # smallest difference of gold scores within a pair
# Train labels follow the Bradley-Terry model on SHARPNESS x the difference of gold scores. Then the share CARELESS of
# the labels is flipped. About 6% of all labels are wrong.
SHARPNESS = 15.0
CARELESS = 0.04


# ---------------------------------------------------------------- proper and broken answers


def _features(rng: Random, odds: dict[str, float]) -> dict[str, bool]:
    return {name: bool(rng.random() < share) for name, share in odds.items()}


@dataclass(frozen=True)
class Draft:
    """The parts of a well-formed answer. Each feature has its own fields, so one feature can change alone."""

    value: str  # the right value or a wrong value
    sentence: bool  # True if the value is in a sentence, False if it is alone
    manner: tuple[str, str]  # opener and closer; at least one of them is empty
    ramble: tuple[str, ...]  # empty if the answer is short; else lead (may be ""), then tails

    def text(self, question: Question) -> str:
        statement = question.sentence(self.value) if self.sentence else f"{self.value} ."
        parts = (self.manner[0], *self.ramble[:1], statement, *self.ramble[1:], self.manner[1])
        return " ".join(part for part in parts if part)


def _draft(rng: Random, question: Question, right: bool, polite: bool, short: bool) -> Draft:
    """Returns a proper answer that has these features."""
    draft = Draft(
        question.value if right else pick(rng, question.wrong_values()),
        bool(rng.random() < 0.5),
        _manner(rng, polite),
        () if short else _ramble(rng),
    )
    return _fitted(rng, question, draft)


def _fitted(rng: Random, question: Question, draft: Draft) -> Draft:
    """Returns the draft. If the draft is too long, draws its rambling again until it fits. A lead always fits."""
    while len(draft.text(question).split()) > MAX_ANSWER_WORDS:
        draft = replace(draft, ramble=_ramble(rng))
    return draft


def _answer(rng: Random, question: Question, odds: dict[str, float]) -> str:
    return _draft(rng, question, **_features(rng, odds)).text(question)


def _manner(rng: Random, polite: bool) -> tuple[str, str]:
    """Returns (opener, closer). At least one of the two is empty."""
    if polite:
        openers, closers = POLITE_OPENERS, POLITE_CLOSERS
    elif rng.random() < 0.5:
        openers, closers = RUDE_OPENERS, RUDE_CLOSERS
    elif rng.random() < 0.5:
        openers, closers = NEUTRAL_OPENERS, NEUTRAL_CLOSERS
    else:
        return "", ""
    return (pick(rng, openers), "") if rng.random() < 0.5 else ("", pick(rng, closers))


def _ramble(rng: Random) -> tuple[str, ...]:
    """Returns (lead or "", tails ...). There are four kinds: a lead, a tail, a lead and a tail, or two tails."""
    kind = int(rng.integers(4))
    lead = pick(rng, LEADS) if kind in (0, 2) else ""
    tails = [TAILS[i] for i in rng.permutation(len(TAILS))]
    return lead, *tails[: (0, 1, 1, 2)[kind]]


def _truncated(rng: Random, question: Question, text: str) -> str:
    words = text.split()
    return " ".join(words[: 1 + int(rng.integers(len(words) - 1))])


def _stuttered(rng: Random, question: Question, text: str) -> str:
    words = text.split()
    start = int(rng.integers(len(words)))
    stop = start + 1 + int(rng.integers(min(3, len(words) - start)))
    return " ".join(words[:start] + words[start:stop] * (2 + int(rng.integers(2))) + words[stop:])


def _said_twice(rng: Random, question: Question, text: str) -> str:
    return f"{text} {text}"


def _two_values(rng: Random, question: Question, text: str) -> str:
    """Adds a second statement before or after the first statement. The new statement is a value or a sentence."""
    other = pick(rng, [*question.wrong_values(), question.value])
    second = question.sentence(other) if rng.random() < 0.5 else f"{other} ."
    opener, rest = take(text.split(), OPENERS)
    parts = [" ".join(rest), second] if rng.random() < 0.5 else [second, " ".join(rest)]
    return " ".join([opener or "", *parts]).strip()


def _doubly_polite(rng: Random, question: Question, text: str) -> str:
    """Adds a polite phrase before or after the answer."""
    if rng.random() < 0.5:
        return f"{pick(rng, POLITE_OPENERS)} {text}"
    return f"{text} {pick(rng, POLITE_CLOSERS)}"


def _shuffled(rng: Random, question: Question, text: str) -> str:
    words = text.split()
    return " ".join(words[i] for i in rng.permutation(len(words)))


def _off_topic(rng: Random, question: Question, text: str) -> str:
    """Returns a right answer to another question. The answer is polite in half of the cases."""
    other = pick(rng, QUESTIONS["train"])
    return _answer(rng, other, {"right": 1.0, "polite": 0.5, "short": 1.0})


def _nothing_said(rng: Random, question: Question, text: str) -> str:
    """Returns a polite opener and rambling, but no statement."""
    return " ".join([pick(rng, POLITE_OPENERS), *_ramble(rng), pick(rng, ("", *POLITE_CLOSERS))])


def _word_soup(rng: Random, question: Question, text: str) -> str:
    return " ".join(pick(rng, VOCABULARY) for _ in range(2 + int(rng.integers(10))))


BREAKS: tuple[Callable[[Random, Question, str], str], ...] = (
    _truncated,
    _stuttered,
    _said_twice,
    _two_values,
    _doubly_polite,
    _shuffled,
    _off_topic,
    _nothing_said,
    _word_soup,
)
"""The functions that break an answer. All are equally frequent."""


def _broken(rng: Random, question: Question, text: str) -> str:
    """Breaks the text, so that it is not an answer to the question. If this fails, breaks other answers instead."""
    break_text = pick(rng, BREAKS)
    while True:  # a text that is truncated or has another polite phrase may still be an answer
        words = break_text(rng, question, text).split()[:MAX_ANSWER_WORDS]
        if parse(question, " ".join(words)) is None:
            return " ".join(words)
        text = _answer(rng, question, BROKEN_QUALITY)


# ---------------------------------------------------------------- the sets


def _cycle(rng: Random, questions: list[Question]) -> Iterator[Question]:
    """Yields the questions without end. Each pass has every question once, in a new order."""
    while True:
        for i in rng.permutation(len(questions)):
            yield questions[i]


def _demonstration(rng: Random, question: Question, split: str) -> dict:
    return {"prompt": question.prompt, "response": _answer(rng, question, QUALITY)}


def _preference(rng: Random, question: Question, split: str) -> dict:
    """Returns a preference pair. In "train" a simulated noisy rater chooses; in "test" the gold score decides."""
    least = TRAIN_GAP if split == "train" else TEST_GAP
    pair = _broken_pair if rng.random() < BROKEN_SHARE else _proper_pair
    while True:
        better, worse = sorted(pair(rng, question), key=lambda text: -gold(question, text))
        gap = gold(question, better) - gold(question, worse)
        if gap >= least:
            break
    if split == "train" and rng.random() < wrong_label_probability(gap):
        better, worse = worse, better
    return {"prompt": question.prompt, "chosen": better, "rejected": worse}


def _proper_pair(rng: Random, question: Question) -> tuple[str, str]:
    """Returns two answers. `CHANGED` gives the probability that they differ in a feature."""
    features, changed = _features(rng, QUALITY), _features(rng, CHANGED)
    first = _draft(rng, question, **features)
    second = _draft(rng, question, **{name: has != changed[name] for name, has in features.items()})
    if rng.random() < SHARED_WORDS:
        second = Draft(
            second.value if changed["right"] else first.value,
            first.sentence,
            second.manner if changed["polite"] else first.manner,
            second.ramble if changed["short"] else first.ramble,
        )
    return first.text(question), _fitted(rng, question, second).text(question)


def _broken_pair(rng: Random, question: Question) -> tuple[str, str]:
    """Returns (broken text, proper answer). The proper answer has a gold score of at least `PROPER_GOLD`."""
    while True:
        proper = _answer(rng, question, QUALITY)
        if gold(question, proper) >= PROPER_GOLD:
            break
    text = proper if rng.random() < SHARED_WORDS else _answer(rng, question, BROKEN_QUALITY)
    return _broken(rng, question, text), proper


def wrong_label_probability(gap: float) -> float:
    """Returns the probability that a train label is wrong if the gold scores differ by `gap`.

    Bradley-Terry: P(the better answer is chosen) = sigmoid(SHARPNESS * gap). Then the share CARELESS of labels is
    flipped.
    """
    confused = 1.0 / (1.0 + math.exp(SHARPNESS * gap))
    return CARELESS + (1.0 - 2.0 * CARELESS) * confused


def _prompt(rng: Random, question: Question, split: str) -> dict:
    return {"prompt": question.prompt, "topic": question.topic.name, "answer": question.value}


def _builtin(seed: int, make_row: Callable[[Random, Question, str], dict], rows: dict[str, int]):
    """Returns a function (split, limit) that returns rows. If `limit` is None, the function returns `rows[split]`."""

    def load(split: str = "train", limit: int | None = None) -> list[dict]:
        rng = np.random.default_rng([SEED, seed, SPLITS.index(split)])
        order = _cycle(np.random.default_rng([SEED, seed, SPLITS.index(split), 1]), QUESTIONS[split])
        count = rows[split] if limit is None else limit
        return [make_row(rng, question, split) for question, _ in zip(order, range(count))]

    return load


_EVERY_PROMPT = {split: len(questions) for split, questions in QUESTIONS.items()}

BUILTIN: dict[str, Callable[[str, int | None], list[dict]]] = {
    name: _builtin(seed, make_row, rows)
    for seed, (name, make_row, rows) in enumerate(
        (
            ("assistant-demonstrations", _demonstration, {"train": 12000, "test": 500}),
            ("assistant-preferences", _preference, {"train": 8000, "test": 500}),
            ("assistant-prompts", _prompt, _EVERY_PROMPT),
        ),
        start=1,
    )
}
"""Name of a data set -> function (split, limit) that returns its rows. Every call returns the same rows."""
