"""Twenty questions over the assistant world: find one of its 36 subjects by questions with yes or no.

A question is for a property ("is it an animal ?") or for a subject ("is it a dog ?"). The game ends with the right
subject. `fewest_questions` gives the number that always suffices: 8 (by search over all ways to play). So the best
success is 1 with 8 or more questions. A quarter of the demonstrations ask the best questions. The others ask for
properties at random and never guess.
"""

from functools import cache
from typing import Any

from jaxrlhf.toy.facts import TOPICS
from jaxrlhf.toy.games.game import Game, demonstrations
from jaxrlhf.toy.tasks.task import Random, pick

USEFUL = 0.25  # share of the demonstrations with the best questions


def _subject(topic: str, subject: str) -> str:
    return f"a {subject}" if topic == "young" else subject


SUBJECTS = tuple(_subject(topic.name, subject) for topic in TOPICS for subject in topic.facts)


def _set(text: str) -> frozenset[int]:
    return frozenset(SUBJECTS.index(subject) for subject in text.split(", "))


PROPERTIES = {
    "is it an animal ?": _set(
        "an elephant, a dog, a cat, a cow, a sheep, a duck, a bee, a snake, a lion, an owl, a horse, a pig, a hen, a "
        "frog, a swan, a deer, a goat, a kangaroo"
    ),
    "is it a country ?": _set("france, germany, italy, spain, japan, china, egypt, greece, norway"),
    "is it a bird ?": _set("a duck, an owl, a hen, a swan"),
    "is it in europe ?": _set("france, germany, italy, spain, greece, norway"),
    "is it in asia ?": _set("japan, china"),
    "is it by the mediterranean ?": _set("france, italy, spain, egypt, greece"),
    "can you eat it for dessert ?": _set("a lemon, chocolate, a plum"),
    "does it grow ?": _set("grass, a lemon, a carrot, a plum"),
    "is it cold ?": _set("snow"),
    "is it dark ?": _set("coal, chocolate, a plum, blood"),
    "does it live on a farm ?": _set("a cow, a sheep, a duck, a horse, a pig, a hen, a goat"),
    "does it live in the house ?": _set("a dog, a cat"),
    "can it fly ?": _set("a duck, a bee, an owl, a swan"),
    "does it swim ?": _set("a duck, a frog, a swan"),
    "does it have wool or horns ?": _set("a cow, a sheep, a deer, a goat"),
    "is it bigger than you ?": _set("an elephant, a cow, a lion, a horse, a deer, the sky"),
    "does it eat meat ?": _set("a dog, a cat, a snake, a lion, an owl"),
}
GUESSES = {f"is it {subject} ?": frozenset([n]) for n, subject in enumerate(SUBJECTS)}
QUESTIONS = PROPERTIES | GUESSES
ANSWERS = ("yes", "no", "yes that is it", "i do not understand")


class TwentyQuestions(Game):
    """An environment: find the subject in `questions` questions. The reward of success is 1.

    An action is one of `QUESTIONS`, with or without the question mark. Any other action is a lost question.
    """

    def __init__(self, questions: int = 20) -> None:
        if questions < 1:
            raise ValueError(f"questions must be at least 1, not {questions}")
        self.questions = questions

    def start(self, options: dict[str, Any]) -> str:
        self.secret, self.left = int(self.random.integers(len(SUBJECTS))), self.questions
        self.possible = frozenset(range(len(SUBJECTS)))  # for a player who listens
        return "i think of something . what is it ?"

    def play(self, action: str) -> tuple[str, tuple[float, bool] | None]:
        self.left -= 1
        lost = None if self.left else (0.0, False)
        question = action.removesuffix("?").strip() + " ?"
        if question not in QUESTIONS:
            return "i do not understand", lost
        yes = self.secret in QUESTIONS[question]
        if question in GUESSES and yes:
            return "yes that is it", (1.0, True)
        self.possible = self.possible & QUESTIONS[question] if yes else self.possible - QUESTIONS[question]
        return "yes" if yes else "no", lost


@cache
def best_question(possible: frozenset[int]) -> str:
    """Returns the question that halves the possible subjects best; the subject itself if two or fewer are left."""
    if len(possible) <= 2:
        return f"is it {SUBJECTS[min(possible)]} ?"
    return min(QUESTIONS, key=lambda question: abs(2 * len(possible & QUESTIONS[question]) - len(possible)))


@cache
def fewest_questions(possible: frozenset[int] = frozenset(range(len(SUBJECTS)))) -> int:
    """Returns the number of questions of the best strategy in its worst case, the right guess included."""
    return _fewest(possible, len(SUBJECTS))


@cache
def _fewest(possible: frozenset[int], limit: int) -> int:
    """As `fewest_questions`; returns `limit` if it takes at least `limit` questions."""
    size = len(possible)
    # The last question is a guess, so k questions find at most 2^k - 1 subjects.
    if size == 0 or size == 1:
        return size
    if size.bit_length() >= limit:
        return limit
    best = limit
    halves = {(possible & has, possible - has) for has in PROPERTIES.values() if 0 < len(possible & has) < size}
    guesses = {(frozenset(), possible - {subject}) for subject in possible}
    for yes, no in sorted(halves | guesses, key=lambda parts: max(map(len, parts))):
        larger, smaller = sorted((yes, no), key=len, reverse=True)
        worst = _fewest(larger, best - 1)
        if worst < best - 1:
            worst = max(worst, _fewest(smaller, best - 1))
        best = min(best, worst + 1)
        if best <= size.bit_length():
            break
    return best


def best_action(env: TwentyQuestions) -> str:
    """Returns the best question by what is known."""
    return best_question(env.possible)


def random_action(env: TwentyQuestions, rng: Random) -> str:
    """Returns a question for a property, which does not depend on the answers."""
    return pick(rng, tuple(PROPERTIES))


TASK = demonstrations(
    lambda: TwentyQuestions(10),
    {lambda env, rng: best_action(env): USEFUL, random_action: 1 - USEFUL},
    (*QUESTIONS, *ANSWERS, "i think of something . what is it ?"),
    {"train": 2000, "validation": 200, "test": 500},
)
