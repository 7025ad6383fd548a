"""Translation in two turns: the first translation is answered with the words that are right. The best success is 1.

A sentence and its translation come from a row, such as those of `builtin:translation`; without a row they are drawn
from the seed. The demonstrations translate like learners, often with a wrong word, and rarely use the feedback.
"""

from typing import Any

from jaxrlhf.errors import UserError
from jaxrlhf.toy.games.game import Game, demonstrations
from jaxrlhf.toy.tasks import translation
from jaxrlhf.toy.tasks.task import Random, pick

MISSING = "?"
SAID = ("translate right wrong", "words")
COUNTS = tuple(str(n) for n in range(21))
BLUNDERS, REPAIRS = 0.8, 0.1  # of a demonstration: chance of a wrong word; of a right second translation


class TranslationFeedback(Game):
    """An environment: translate a sentence in `turns` turns. The reward is that of the last turn.

    After a wrong translation the observation has the number of words that a right one has, and the translation with `?`
    in place of each word that is not right at its place. The reward is the share of places with the right word. Success
    is a translation without a mistake, which ends the episode.
    `options` of reset is a row with `prompt` and `reference`, as texts. A row without one of them raises UserError. The
    case of the translation's letters does not matter.
    """

    def __init__(self, turns: int = 2) -> None:
        if turns < 1:
            raise ValueError(f"turns must be at least 1, not {turns}")
        self.turns = turns

    def start(self, options: dict[str, Any]) -> str:
        if missing := [name for name in ("prompt", "reference") if options and not isinstance(options.get(name), str)]:
            columns = ", ".join(map(str, options))
            raise UserError(f"a row of the translation game needs the text {missing[0]}; its columns are: {columns}")
        row = options or translation.draw(self.random)
        self.row, self.left, self.kept = row, self.turns, []
        self.reference = row["reference"].lower().split()
        return f"translate {row['prompt'].removesuffix('=>').strip()}"

    def play(self, action: str) -> tuple[str, tuple[float, bool] | None]:
        self.left -= 1
        words = action.split()
        self.kept = [word if word == right else MISSING for word, right in zip(words, self.reference)]
        right = sum(word != MISSING for word in self.kept)
        if words == self.reference:
            return "right", (1.0, True)
        share = right / max(len(words), len(self.reference))
        count = COUNTS[min(len(self.reference), len(COUNTS) - 1)]
        return f"wrong {count} words {' '.join(self.kept)}".strip(), None if self.left else (share, False)


def demonstrator(env: TranslationFeedback, rng: Random) -> str:
    """Returns the translation of a learner, or in a later turn the right one."""
    if env.left < env.turns and rng.random() < REPAIRS:
        return " ".join(env.reference)
    words = str(env.row["response"]).split()
    if rng.random() < BLUNDERS:
        words[int(rng.integers(len(words)))] = pick(rng, words)
    return " ".join(words)


TASK = demonstrations(
    TranslationFeedback,
    {demonstrator: 1.0},
    (*SAID, MISSING, *COUNTS, *(word for word in translation.TASK.words if word != "=>")),
    {"train": 3000, "validation": 200, "test": 500},
)
