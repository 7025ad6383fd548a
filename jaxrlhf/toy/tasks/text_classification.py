"""Sentiment of a review: positive, negative or mixed. The best accuracy is 1.

A review has one to three statements, each good or bad. "not" reverses a statement. A review with good and bad
statements is mixed. So a model must read every statement with its negation. Labels have different frequencies.
"""

from jaxrlhf.toy.tasks.task import Random, Row, Task, pick, words_of

GOOD = ("great", "lovely", "good", "excellent", "friendly", "quick")
BAD = ("bad", "awful", "poor", "terrible", "rude", "slow")
THINGS = ("the food", "the service", "the room", "the staff", "our table", "the dinner", "the bar", "the view")
VERBS = ("was", "is", "seemed")
DEGREES = ("", "", "very", "really")
LABELS = ("positive", "negative", "mixed")


def _statement(rng: Random, thing: str, good: bool) -> str:
    negated = rng.random() < 0.25
    adjective = pick(rng, GOOD if good != negated else BAD)
    return " ".join(f"{thing} {pick(rng, VERBS)} {'not' if negated else ''} {pick(rng, DEGREES)} {adjective}".split())


def draw(rng: Random) -> Row:
    label = LABELS[int(rng.choice(3, p=(0.45, 0.3, 0.25)))]
    count = int(rng.integers(2, 4)) if label == "mixed" else int(rng.integers(1, 4))
    goods = [label == "positive"] * count
    if label == "mixed":
        good = int(rng.integers(1, count))
        goods = rng.permutation([True] * good + [False] * (count - good))
    things = rng.permutation(THINGS)[:count]
    text = " , ".join(_statement(rng, str(thing), good) for thing, good in zip(things, goods))
    return {"prompt": f"review : {text} . sentiment :", "response": label, "label": label}


TASK = Task(draw, words_of("review : , . sentiment not", *GOOD, *BAD, *THINGS, *VERBS, *DEGREES, *LABELS))
