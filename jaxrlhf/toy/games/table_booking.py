"""Table booking: a dialogue with a scripted customer who has a goal of four slots. The best success is 1.

The agent asks for the slots that it does not know, listens to corrections, and books. The demonstrations book too
early, with values that nobody said, and miss corrections.
"""

from typing import Any

from jaxrlhf.toy.games.game import Game, demonstrations
from jaxrlhf.toy.tasks.task import Random, pick, sample

SLOTS = {
    "food": ("italian", "indian", "chinese", "greek", "thai", "french"),
    "area": ("north", "south", "east", "west", "center"),
    "day": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
    "people": ("2", "3", "4", "5", "6"),
}
QUESTIONS = {"food": "which food ?", "area": "which area ?", "day": "which day ?", "people": "how many people ?"}
OPENING, ANSWER = "hello i need a table", "{} please"
CHANGE = "sorry , not {} but {}"
REPEATED, CONFUSED = "i said that", "i do not understand"
GONE, WRONG, DONE = "i go elsewhere", "that is wrong", "thank you"
EARLY, MISSES = 0.35, 0.5  # of a demonstration: chance per turn to book what is not known; to miss a correction


class TableBooking(Game):
    """An environment: a customer wants a table. The reward of the right booking is 1; a wrong booking ends the episode.

    Actions are the questions of `QUESTIONS` and `book FOOD AREA DAY PEOPLE`. The customer opens with up to two of the
    slots, and changes one of the slots at an answer with probability `changes`. At more than `patience` actions that
    are not understood or ask for what the customer has said, the customer leaves.
    """

    def __init__(self, changes: float = 0.3, patience: int = 1) -> None:
        if not 0 <= changes <= 1 or patience < 0:
            raise ValueError(f"changes must be 0 to 1 and patience at least 0, not {changes} and {patience}")
        self.changes, self.patience = changes, patience

    def start(self, options: dict[str, Any]) -> str:
        self.goal = {slot: pick(self.random, values) for slot, values in SLOTS.items()}
        opened = sample(self.random, tuple(SLOTS), int(self.random.integers(3)))
        self.said = {slot: self.goal[slot] for slot in SLOTS if slot in opened}
        self.heard = dict(self.said)  # what a player who misses corrections knows
        self.changed, self.needless = False, 0
        return " ".join([OPENING, *self.said.values()])

    def play(self, action: str) -> tuple[str, tuple[float, bool] | None]:
        asked = next((slot for slot, question in QUESTIONS.items() if _bare(action) == _bare(question)), None)
        if action.startswith("book "):
            right = action == "book " + " ".join(self.goal.values())
            return (DONE if right else WRONG), (float(right), right)
        if asked is None or asked in self.said:
            self.needless += 1
            if self.needless > self.patience:
                return GONE, (0.0, False)
            return (CONFUSED if asked is None else REPEATED), None
        text = ANSWER.format(self.goal[asked])
        if self.said and not self.changed and self.random.random() < self.changes:
            slot = pick(self.random, tuple(self.said))
            new = pick(self.random, [value for value in SLOTS[slot] if value != self.goal[slot]])
            text += f" {CHANGE.format(self.goal[slot], new)}"
            self.goal[slot] = self.said[slot] = new
            self.changed = True
        self.said[asked] = self.heard[asked] = self.goal[asked]
        return text, None


def _bare(text: str) -> str:
    return text.removesuffix("?").strip()


def best_action(env: TableBooking) -> str:
    """Returns the question for the next unknown slot, or the booking."""
    unknown = [slot for slot in SLOTS if slot not in env.said]
    return QUESTIONS[unknown[0]] if unknown else "book " + " ".join(env.said[slot] for slot in SLOTS)


def demonstrator(env: TableBooking, rng: Random) -> str:
    """Returns the action of an imperfect expert."""
    unknown = [slot for slot in SLOTS if slot not in env.said]
    if unknown and rng.random() >= EARLY:
        return QUESTIONS[pick(rng, unknown)]
    known = env.heard if rng.random() < MISSES else env.said
    return "book " + " ".join(known.get(slot) or pick(rng, SLOTS[slot]) for slot in SLOTS)


TASK = demonstrations(
    TableBooking,
    {demonstrator: 1.0},
    (OPENING, ANSWER.format(""), CHANGE.format("", ""), REPEATED, CONFUSED, GONE, WRONG, DONE, "book",
     *QUESTIONS.values(), *(value for values in SLOTS.values() for value in values)),
    {"train": 3000, "validation": 200, "test": 500},
)  # fmt: skip
