"""The language of the assistant world: the questions, the grammar of answers, and the gold score of answers.

A question asks for one fact in one phrasing. An answer states a value, alone or in a sentence. An answer may be polite
or rude, and may ramble. About 15% of all (fact, phrasing) combinations are the test split. The training split has every
fact of the test split in other phrasings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

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
    TOPICS,
    Topic,
)

RIGHT, POLITE, SHORT = 0.6, 0.2, 0.2  # the parts of the gold score; they sum to 1
RAMBLE_WORDS = 5  # an answer with this many rambling words gets no points for SHORT
HELD_OUT_FACTS = 0.6  # share of facts with one of their four phrasings in the test split, so 15% of combinations
SPLITS = ("train", "test")
SEED = 20_240_317

OPENERS = POLITE_OPENERS + RUDE_OPENERS + NEUTRAL_OPENERS
CLOSERS = POLITE_CLOSERS + RUDE_CLOSERS + NEUTRAL_CLOSERS

Random = np.random.Generator
Item = TypeVar("Item")


# ---------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """A question for a fact, in one of the phrasings of its topic."""

    topic: Topic
    subject: str
    phrasing: int

    @property
    def prompt(self) -> str:
        return self.topic.questions[self.phrasing].format(subject=self.subject)

    @property
    def value(self) -> str:
        """The right value of the subject."""
        return self.topic.facts[self.subject]

    def sentence(self, value: str) -> str:
        """Returns the full sentence that states a value. The value may be right or wrong."""
        return self.topic.statement.format(subject=self.subject, value=value)

    def wrong_values(self) -> list[str]:
        """Returns plausible wrong values: the other values of the topic, except words of the subject."""
        return [v for v in self.topic.values if v != self.value and v not in self.subject.split()]


def pick(rng: Random, items: Sequence[Item]) -> Item:
    """Returns a uniformly random item."""
    return items[int(rng.integers(len(items)))]


def _split_questions() -> dict[str, list[Question]]:
    """Returns the questions of each split, by the name of the split."""
    rng = np.random.default_rng([SEED, 0])
    split: dict[str, list[Question]] = {name: [] for name in SPLITS}
    for topic in TOPICS:
        for subject in topic.facts:
            held_out = pick(rng, range(len(topic.questions))) if rng.random() < HELD_OUT_FACTS else None
            for phrasing in range(len(topic.questions)):
                split["test" if phrasing == held_out else "train"].append(Question(topic, subject, phrasing))
    return split


QUESTIONS = _split_questions()
_BY_PROMPT = {question.prompt: question for questions in QUESTIONS.values() for question in questions}

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {
            word
            for question in _BY_PROMPT.values()
            for text in (question.prompt, question.sentence(question.value), *OPENERS, *CLOSERS, *LEADS, *TAILS)
            for word in text.split()
        }
    )
)
"""All words and punctuation marks of prompts and answers."""


# ---------------------------------------------------------------- the gold score


@dataclass(frozen=True)
class Answer:
    """The parts of a well-formed answer."""

    value: str
    manner: str | None  # the opener or closer, or None
    ramble_words: int  # number of words in leads and tails


def parse(question: Question, text: str) -> Answer | None:
    """Parses an answer to a question. Returns None if the text is not an answer.

    The grammar is: [opener] [lead] statement [tail [another tail]] [closer]. An answer may have an opener or a closer,
    but not both. The statement holds a value of the question's topic, alone ("blue .") or in the sentence about the
    question's subject ("the sky is blue ."). Any other text is not an answer. Examples are texts with an unknown word,
    with a second value, with a repeated tail, or about another subject, and truncated texts.
    """
    words = text.split()
    opener, words = take(words, OPENERS)
    lead, words = take(words, LEADS)
    value, words = _take_statement(question, words)
    if value is None:
        return None
    tails = []
    for _ in range(2):
        tail, words = take(words, tuple(t for t in TAILS if t not in tails))
        tails += [tail] if tail else []
    closer, words = take(words, CLOSERS)
    if words or (opener and closer):
        return None
    return Answer(value, opener or closer, sum(len(part.split()) for part in (lead or "", *tails)))


def take(words: list[str], phrases: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """Returns (phrase, remaining words). `phrase` is the phrase at the start of the words, or None.

    No phrase in `phrases` may be the beginning of another phrase.
    """
    for phrase in phrases:
        n = len(phrase.split())
        if words[:n] == phrase.split():
            return phrase, words[n:]
    return None, words


def _take_statement(question: Question, words: list[str]) -> tuple[str | None, list[str]]:
    """Returns (value, remaining words). `value` is None if the words do not start with a statement."""
    for value in question.topic.values:
        for statement in (question.sentence(value), f"{value} ."):
            n = len(statement.split())
            if words[:n] == statement.split():
                return value, words[n:]
    return None, words


def score_answer(question: Question, answer: Answer | None) -> float:
    """Returns the gold score in [0, 1]: points for a right value, politeness and brevity. No answer (None) scores 0."""
    if answer is None:
        return 0.0
    right = answer.value == question.value
    polite = answer.manner in POLITE_OPENERS + POLITE_CLOSERS
    short = max(0.0, 1.0 - answer.ramble_words / RAMBLE_WORDS)
    return RIGHT * right + POLITE * polite + SHORT * short


def gold(question: Question, text: str) -> float:
    """Returns the gold score of a text as an answer to a question."""
    return score_answer(question, parse(question, text))


def gold_score(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Returns the gold score of each completion, in [0, 1]. For every prompt, some completions score 1.

    `jaxrlhf.toy.world:gold_score` is a reward function. Raises `UserError` if a prompt is not a question of this world.
    """
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        question = _BY_PROMPT.get(" ".join(prompt.split()))
        if question is None:
            raise UserError(
                f"gold_score: the prompt {prompt!r} is not a question of the assistant world; use gold_score only with "
                "the prompts of builtin:assistant-prompts"
            )
        scores.append(gold(question, completion))
    return scores
