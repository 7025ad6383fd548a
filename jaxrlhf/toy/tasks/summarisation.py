"""Summarisation: a report of four sentences, whose summary is a headline about its news. The best ROUGE is 1.

One sentence is the news, one tells an older event, two are background; their order is random. Of the responses, 45% are
the headline, 25% copy the sentence with the news, 5% are about the older event, and 25% add background.
"""

from jaxrlhf.toy.tasks.task import Random, Row, Task, pick, sample, words_of

EVENTS = (  # cause, past, present
    ("fire", "destroyed", "destroys"), ("storm", "damaged", "damages"), ("flood", "closed", "closes"),
    ("thief", "robbed", "robs"), ("truck", "hit", "hits"), ("tree", "blocked", "blocks"),
)  # fmt: skip
PLACES = ("bakery", "school", "museum", "station", "library", "hotel", "market", "bank")
TOWNS = ("lund", "bergen", "odense", "turku", "malmo", "aarhus", "oulu", "tromso")
NEWS_TIMES = ("last night", "this morning", "today")
OLD_TIMES = ("last year", "long ago", "in spring")
SENTENCE = "{time} a {cause} {past} the {place} in {town} ."
HEADLINE = "{cause} {present} {place} in {town}"
BACKGROUND = (
    "nobody was hurt .", "the weather was bad .", "many people came to look .", "the police have no comment .",
    "the mayor was not there .", "the damage is not known yet .", "work goes on this week .", "the owner was at home .",
)  # fmt: skip
RIGHT, COPY, OLD = 0.45, 0.25, 0.05


def draw(rng: Random) -> Row:
    events = sample(rng, EVENTS, 2)
    places, towns = sample(rng, PLACES, 2), sample(rng, TOWNS, 2)
    news, old = (
        {"time": pick(rng, times), "cause": cause, "past": past, "present": present, "place": place, "town": town}
        for times, (cause, past, present), place, town in zip((NEWS_TIMES, OLD_TIMES), events, places, towns)
    )
    background = sample(rng, BACKGROUND, 2)
    sentences = sample(rng, [SENTENCE.format(**news), SENTENCE.format(**old), *background], 4)
    headline = HEADLINE.format(**news)
    forms = (headline, SENTENCE.format(**news), HEADLINE.format(**old), f"{headline} , {background[0]}")
    response = forms[int(rng.choice(4, p=(RIGHT, COPY, OLD, 1 - RIGHT - COPY - OLD)))]
    return {"prompt": f"{' '.join(sentences)} headline:", "response": response, "reference": headline}


TASK = Task(
    draw,
    words_of(
        *(word for event in EVENTS for word in event), *PLACES, *TOWNS, *NEWS_TIMES, *OLD_TIMES, *BACKGROUND,
        "a the in . , headline:",
    ),
)  # fmt: skip
