"""Arithmetic: sums of four digits, written as running totals. The best accuracy is 1.

The answer to `7 + 5 + 9 + 2 =` is `12 21 23`. Numbers up to 36 are words.
"""

from jaxrlhf.toy.tasks.task import Random, Row, Task, words_of


def draw(rng: Random) -> Row:
    digits = rng.integers(1, 10, 4)
    totals = digits.cumsum()
    return {
        "prompt": f"{' + '.join(map(str, digits))} =",
        "response": " ".join(map(str, totals[1:])),
        "answer": str(totals[-1]),
    }


TASK = Task(draw, words_of("+ =", *map(str, range(1, 37))), rows={"train": 4000, "validation": 200, "test": 500})
