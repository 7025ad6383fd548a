"""Arithmetic: word problems of two steps, whose answer is a whole number after `####`. The best accuracy is 1.

Somebody has some things, and gets or loses some of them twice. No number is less than 0 or more than `LARGEST`. No
problem of the test split is in another split; another problem may have the same numbers. Of the responses, 45% show
both steps and are right, 45% guess a number without a step, and 10% have a wrong result in the second step.
"""

from jaxrlhf.toy.tasks.task import Random, Row, Task, pick, words_of

NAMES = ("anna", "ben", "clara", "david", "emma", "felix", "greta", "hugo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "nuts", "pens", "shells")
STARTS = ("{name} has {number} {things} .", "there are {number} {things} in the bag of {name} .")
GAINS = ("then {name} buys {number} more .", "{number} are a gift from a friend .", "{name} finds {number} more .")
LOSSES = ("then {name} loses {number} .", "{name} gives away {number} .", "{number} break .")
QUESTIONS = ("how many are left ?", "how many has {name} now ?", "what is the number now ?")
LARGEST, LARGEST_CHANGE = 10, 5
RIGHT, GUESS = 0.45, 0.45  # shares of the responses; the others have a wrong step


def _change(rng: Random, number: int) -> int:
    """Returns a change, not 0, after which the number is still between 0 and `LARGEST`."""
    return pick(rng, [c for c in range(-LARGEST_CHANGE, LARGEST_CHANGE + 1) if c and 0 <= number + c <= LARGEST])


def _other(rng: Random, number: int) -> int:
    return pick(rng, [other for other in range(LARGEST + 1) if other != number])


def _solution(numbers: list[int], changes: list[int]) -> str:
    """Returns the steps from each of the numbers to the next one, and the last number."""
    steps = zip(numbers, changes, numbers[1:])
    texts = [f"{number} {'+' if change > 0 else '-'} {abs(change)} = {result}" for number, change, result in steps]
    return f"{' , '.join(texts)} #### {numbers[-1]}"


def draw(rng: Random) -> Row:
    name, things, start = pick(rng, NAMES), pick(rng, THINGS), int(rng.integers(1, LARGEST + 1))
    changes, numbers = [], [start]
    for _ in range(2):
        changes.append(_change(rng, numbers[-1]))
        numbers.append(numbers[-1] + changes[-1])
    texts = [pick(rng, STARTS).format(name=name, things=things, number=start)]
    texts += [pick(rng, GAINS if c > 0 else LOSSES).format(name=name, number=abs(c)) for c in changes]
    texts.append(pick(rng, QUESTIONS).format(name=name))
    chance = rng.random()
    if chance < GUESS:
        response = f"#### {int(rng.integers(LARGEST + 1))}"
    else:
        end = numbers[-1] if chance < GUESS + RIGHT else _other(rng, numbers[-1])
        response = _solution([*numbers[:-1], end], changes)
    return {
        "prompt": " ".join(texts) + " answer:",
        "response": response,
        "solution": _solution(numbers, changes),
        "answer": str(numbers[-1]),
    }


TASK = Task(
    draw,
    words_of(
        *NAMES, *THINGS, "+ - = , #### answer:", *map(str, range(LARGEST + 1)),
        *(text.format(name="", things="", number="") for text in (*STARTS, *GAINS, *LOSSES, *QUESTIONS)),
    ),
    rows={"train": 6000, "validation": 200, "test": 500},
)  # fmt: skip
