"""The assistant world: sets of questions and answers from no file and no network, with a true score.

It gives the builtin sets `assistant-demonstrations`, `assistant-preferences` and `assistant-prompts`, and
`gold_score`, the true score that no model is trained on: what a reward model only estimates.

Demonstrations imitate people of mixed quality (right in 62%, polite in 35%, short in 45%, independently), so a
perfect imitation scores about 0.55 and preferences hold what is left to learn. The right value is still by far
the most frequent single one for each question, and each fact occurs in the preferences.

Every set is a fixed sequence per split: a limit cuts it or makes it longer, and seeds are constants.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from jaxrlhf.errors import UserError
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
QUALITY = {"right": 0.62, "polite": 0.35, "short": 0.45}  # share of demonstrations that have each

CHANGED = {"right": 0.6, "polite": 0.45, "short": 0.45}  # how often a pair's two answers differ in each
SHARED_WORDS = 0.75  # pairs that are alike to the word in what they do not differ in; the others are two drafts
BROKEN_SHARE = 0.2  # pairs that set broken text against a proper answer
# Text is broken from its opponent or from an answer better than most: where a policy will look for loopholes.
BROKEN_QUALITY = {"right": 0.75, "polite": 0.75, "short": 0.75}
PROPER_GOLD = 0.2  # the proper answer's least score in such a pair
TRAIN_GAP, TEST_GAP = 0.05, 0.15  # least gold difference within a pair
SHARPNESS = 15.0  # train labels: Bradley-Terry on SHARPNESS x the gold difference ...
CARELESS = 0.04  # ... and then this share is flipped; about 6% of the labels are wrong in all


# ---------------------------------------------------------------- answers, proper and broken


def _features(rng: Random, odds: dict[str, float]) -> dict[str, bool]:
    return {name: bool(rng.random() < share) for name, share in odds.items()}


@dataclass(frozen=True)
class Draft:
    """The parts of a proper answer; those of a feature stand together, so that it can change alone."""

    value: str  # right or wrong
    sentence: bool  # stated in a sentence, or bare
    manner: tuple[str, str]  # polite or not: opener and closer, one of them empty or both
    ramble: tuple[str, ...]  # empty where short; else lead or "", then tails

    def text(self, question: Question) -> str:
        statement = question.sentence(self.value) if self.sentence else f"{self.value} ."
        parts = (self.manner[0], *self.ramble[:1], statement, *self.ramble[1:], self.manner[1])
        return " ".join(part for part in parts if part)


def _draft(rng: Random, question: Question, right: bool, polite: bool, short: bool) -> Draft:
    """A proper answer with these features."""
    draft = Draft(
        question.value if right else pick(rng, question.wrong_values()),
        bool(rng.random() < 0.5),
        _manner(rng, polite),
        () if short else _ramble(rng),
    )
    return _fitted(rng, question, draft)


def _fitted(rng: Random, question: Question, draft: Draft) -> Draft:
    """The draft with another rambling where it is too long; a lead alone always fits."""
    while len(draft.text(question).split()) > MAX_ANSWER_WORDS:
        draft = replace(draft, ramble=_ramble(rng))
    return draft


def _answer(rng: Random, question: Question, odds: dict[str, float]) -> str:
    return _draft(rng, question, **_features(rng, odds)).text(question)


def _manner(rng: Random, polite: bool) -> tuple[str, str]:
    """Opener and closer, one of them empty or both."""
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
    """A lead, a tail, a lead and a tail, or two tails; the lead or "" comes first."""
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
    """A second statement after the first, in either form."""
    other = pick(rng, [*question.wrong_values(), question.value])
    second = question.sentence(other) if rng.random() < 0.5 else f"{other} ."
    opener, rest = take(text.split(), OPENERS)
    parts = [" ".join(rest), second] if rng.random() < 0.5 else [second, " ".join(rest)]
    return " ".join([opener or "", *parts]).strip()


def _doubly_polite(rng: Random, question: Question, text: str) -> str:
    """One polite phrase more than the answer has, before or after it."""
    if rng.random() < 0.5:
        return f"{pick(rng, POLITE_OPENERS)} {text}"
    return f"{text} {pick(rng, POLITE_CLOSERS)}"


def _shuffled(rng: Random, question: Question, text: str) -> str:
    words = text.split()
    return " ".join(words[i] for i in rng.permutation(len(words)))


def _off_topic(rng: Random, question: Question, text: str) -> str:
    """A right, perhaps polite answer to another question."""
    other = pick(rng, QUESTIONS["train"])
    return _answer(rng, other, {"right": 1.0, "polite": 0.5, "short": 1.0})


def _nothing_said(rng: Random, question: Question, text: str) -> str:
    """Manners and rambling without a statement."""
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
"""The ways to break an answer, equally frequent."""


def _broken(rng: Random, question: Question, text: str) -> str:
    """The text broken so that it is no answer to the question; where that fails, another text."""
    break_text = pick(rng, BREAKS)
    while True:  # a cut or one more polite phrase sometimes leaves a proper answer
        words = break_text(rng, question, text).split()[:MAX_ANSWER_WORDS]
        if parse(question, " ".join(words)) is None:
            return " ".join(words)
        text = _answer(rng, question, BROKEN_QUALITY)


# ---------------------------------------------------------------- the sets


def _cycle(rng: Random, questions: list[Question]) -> Iterator[Question]:
    """Endless; each pass visits every question once, in a new order."""
    while True:
        for i in rng.permutation(len(questions)):
            yield questions[i]


def _demonstration(rng: Random, question: Question, split: str) -> dict:
    return {"prompt": question.prompt, "response": _answer(rng, question, QUALITY)}


def _preference(rng: Random, question: Question, split: str) -> dict:
    """A pair and its label: in train as a noisy rater gives it, in test the truth."""
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
    """Two answers that differ in one, two or three features."""
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
    """Broken text, its opponent itself or another answer broken, and a proper answer that is worth something."""
    while True:
        proper = _answer(rng, question, QUALITY)
        if gold(question, proper) >= PROPER_GOLD:
            break
    text = proper if rng.random() < SHARED_WORDS else _answer(rng, question, BROKEN_QUALITY)
    return _broken(rng, question, text), proper


def wrong_label_probability(gap: float) -> float:
    """How likely a train label is wrong where the two gold scores differ by `gap`.

    Bradley-Terry: P(the better one is chosen) = sigmoid(SHARPNESS gap); then a share CARELESS is flipped.
    """
    confused = 1.0 / (1.0 + math.exp(SHARPNESS * gap))
    return CARELESS + (1.0 - 2.0 * CARELESS) * confused


def _prompt(rng: Random, question: Question, split: str) -> dict:
    return {"prompt": question.prompt, "topic": question.topic.name, "answer": question.value}


def _builtin(name: str, seed: int, make_row: Callable[[Random, Question, str], dict], rows: dict[str, int]):
    def load(split: str = "train", limit: int | None = None) -> list[dict]:
        if split not in SPLITS:
            raise UserError(f"builtin:{name}: no split {split!r}; there are {' and '.join(SPLITS)}")
        if limit is not None and limit < 1:
            raise UserError(f"builtin:{name}: limit is {limit}; give at least 1, or null for {rows[split]} rows")
        rng = np.random.default_rng([SEED, seed, SPLITS.index(split)])
        order = _cycle(np.random.default_rng([SEED, seed, SPLITS.index(split), 1]), QUESTIONS[split])
        count = rows[split] if limit is None else limit
        return [make_row(rng, question, split) for question, _ in zip(order, range(count))]

    load.__doc__ = f"Rows of builtin:{name}; without a limit {rows['train']} for train, {rows['test']} for test."
    return load


_EVERY_PROMPT = {split: len(questions) for split, questions in QUESTIONS.items()}

BUILTIN: dict[str, Callable[[str, int | None], list[dict]]] = {
    name: _builtin(name, seed, make_row, rows)
    for seed, (name, make_row, rows) in enumerate(
        (
            ("assistant-demonstrations", _demonstration, {"train": 12000, "test": 500}),
            ("assistant-preferences", _preference, {"train": 8000, "test": 500}),
            ("assistant-prompts", _prompt, _EVERY_PROMPT),
        ),
        start=1,
    )
}
"""Name -> loader of (split, limit): the rows of a set, the same ones at every call."""
