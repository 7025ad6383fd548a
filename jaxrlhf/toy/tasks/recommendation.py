"""Recommendation from clicks: which of four titles somebody clicks, after three titles that they read. Best score: 1.

A title has its topic before it. Two of the three titles are about one topic, the third about another. Of the four
candidates, one is about the first topic and is clicked, one is about the other topic, and two are about further topics.
The responses are what a simple recommender showed first: 40% are the clicked candidate, 60% one of the others. Readers
(histories) of the test split are in no other split.
"""

from jaxrlhf.toy.tasks.task import Random, Row, Task, pick, sample, words_of

TOPICS = {
    "sport": ("cup final", "new coach", "late goal", "bike race", "swim record", "tennis star"),
    "weather": ("rain warning", "hot summer", "snow storm", "strong wind", "thick fog", "dry autumn"),
    "politics": ("close election", "tax law", "mayor resigns", "budget vote", "peace talks", "town council"),
    "food": ("bread recipe", "best soup", "cheese fair", "street kitchen", "sweet cake", "fresh fish"),
    "film": ("actor prize", "cinema opens", "long sequel", "horror hit", "director dies", "series ends"),
    "science": ("mars probe", "old fossil", "virus study", "deep ocean", "gene test", "star map"),
}
HISTORY = 3
CLICKED = 0.4  # share of the responses that are the clicked candidate


def draw(rng: Random) -> Row:
    favourite, other, *further = sample(rng, tuple(TOPICS), 4)
    *read, clicked = sample(rng, TOPICS[favourite], HISTORY)
    also_read, rejected = sample(rng, TOPICS[other], 2)
    history = [f"{favourite} {title}" for title in read] + [f"{other} {also_read}"]
    answer = f"{favourite} {clicked}"
    rest = [f"{other} {rejected}", *(f"{topic} {pick(rng, TOPICS[topic])}" for topic in further)]
    return {
        "history": sample(rng, history, HISTORY),
        "candidates": sample(rng, [answer, *rest], 1 + len(rest)),
        "response": answer if rng.random() < CLICKED else pick(rng, rest),
        "answer": answer,
    }


TASK = Task(
    draw,
    words_of(*TOPICS, *(title for titles in TOPICS.values() for title in titles), "read: | shown: next:"),
    rows={"train": 5000, "validation": 200, "test": 250},
    key=lambda row: " | ".join(sorted(row["history"])),
)
