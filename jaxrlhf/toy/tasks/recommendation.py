"""Recommendation from clicks: which of four titles somebody clicks, after three titles that they read. Best score: 1.

Two of the three titles are about one topic, the third about another. Of the four candidates, one is about the first
topic, which is the one that is clicked, one about the other, and two about further topics. The responses are the
choices of a recommender that does not know the user: 40% are the clicked candidate. Readers (histories) of the test
split are in no other split.
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
LETTERS = "ABCD"
CLICKED = 0.4  # share of the responses that are the clicked candidate


def draw(rng: Random) -> Row:
    favourite, other, *further = sample(rng, tuple(TOPICS), 4)
    history = [*sample(rng, TOPICS[favourite], 3), pick(rng, TOPICS[other])]
    clicked = history.pop(0)  # not read yet
    history = sample(rng, history, 3)
    rest = [pick(rng, [title for title in TOPICS[topic] if title not in history]) for topic in (other, *further)]
    candidates = sample(rng, [clicked, *rest], len(LETTERS))
    answer = candidates.index(clicked)
    shown = answer if rng.random() < CLICKED else pick(rng, [i for i in range(len(LETTERS)) if i != answer])
    return {
        "history": history,
        "candidates": candidates,
        "response": LETTERS[shown],
        "answer": LETTERS[answer],
    }


TASK = Task(
    draw,
    words_of(*(title for titles in TOPICS.values() for title in titles), *LETTERS, "read: | shown: choice:"),
    rows={"train": 4000, "validation": 200, "test": 250},
    key=lambda row: " | ".join(sorted(row["history"])),
)
