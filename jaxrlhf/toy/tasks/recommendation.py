"""Recommendation from clicks: the next film for a user with a hidden taste. The best share of accepted films is 1.

A history has the films that a user watched: most are of the user's taste, one may be of another taste. A film is
accepted if the user clicked on it: `clicks` are the films of the taste that the history has not. The tastes and their
films are nowhere in the text; a model learns them from clicks.
"""

import numpy as np

from jaxrlhf.toy.tasks.task import Random, Row, Task, pick, words_of

FIRST = ("red", "silent", "last", "golden", "broken", "hidden", "lost", "wild")
SECOND = ("river", "city", "moon", "garden", "road", "winter")
FILMS = tuple(f"{first}-{second}" for first in FIRST for second in SECOND)
TASTES = np.random.default_rng(7).permutation(FILMS).reshape(6, 8).tolist()  # a taste is a random set of films


def draw(rng: Random) -> Row:
    taste = int(rng.integers(len(TASTES)))
    films = [str(film) for film in rng.permutation(TASTES[taste])]
    count = int(rng.integers(2, 5))
    history = films[:count]
    if count > 2 and rng.random() < 0.5:
        history[int(rng.integers(count))] = pick(rng, TASTES[(taste + int(rng.integers(1, len(TASTES)))) % len(TASTES)])
    clicks = [film for film in films if film not in history]
    return {"prompt": f"watched {' '.join(history)} next :", "response": pick(rng, clicks), "clicks": clicks}


TASK = Task(draw, words_of("watched next :", *FILMS), rows={"train": 4000, "validation": 200, "test": 500})
