"""Named entities: persons, organisations and places in a sentence, as a JSON list. The best F1 is 1.

Some names belong to two kinds (`jordan` is a person or a place), so only the sentence says which one is meant. In the
demonstrations, an entity is left out with probability `FAULT`, and has the wrong kind with probability `FAULT`.
"""

from jaxrlhf.toy.tasks.task import Random, Row, Task, pick, words_of

FIRST = ("anna", "john", "maria", "omar", "jordan", "sydney")
LAST = ("smith", "ford", "king", "morgan", "")
ORGANISATIONS = ("acme", "globex", "ford", "morgan", "acme bank", "north bank")
PLACES = ("paris", "london", "jordan", "sydney", "new york", "north bay")
KINDS = ("PER", "ORG", "LOC")
FAULT = 0.2
SENTENCES = (
    "{PER} works for {ORG}", "{PER} works for {ORG} in {LOC}", "{ORG} opened an office in {LOC}",
    "{PER} lives in {LOC}", "{PER} met {PER}", "{ORG} hired {PER}", "{ORG} bought {ORG}", "{PER} moved to {LOC}",
    "{PER} left {ORG} for {ORG}", "{PER} said that {ORG} is growing", "the mayor of {LOC} met {PER}",
    "shares of {ORG} fell", "it rained in {LOC}", "nothing happened", "the market was quiet", "{PER} is ill",
    "{ORG} moves to {LOC}", "{LOC} thanks {ORG}",
)  # fmt: skip
WHEN = ("", "", "today", "on monday", "last week", "in may")


def _name(rng: Random, kind: str) -> str:
    if kind == "PER":
        return f"{pick(rng, FIRST)} {pick(rng, LAST)}".strip()
    return pick(rng, ORGANISATIONS if kind == "ORG" else PLACES)


def draw(rng: Random) -> Row:
    tokens: list[str] = []
    tags: list[str] = []
    entities, spans = [], []
    for part in f"{pick(rng, SENTENCES)} {pick(rng, WHEN)}".split():
        kind = part.strip("{}")
        name = _name(rng, kind) if kind in KINDS else part
        words = name.split()
        tokens += words
        if kind in KINDS:
            spans.append(f"{kind}: {name}")
            tags += [f"B-{kind}", *[f"I-{kind}"] * (len(words) - 1)]
            if (chance := rng.random()) < 1 - FAULT:
                stated = kind if chance < 1 - 2 * FAULT else pick(rng, [other for other in KINDS if other != kind])
                entities.append(f'{{"label":"{stated}","text":" {name} "}}')
        else:
            tags.append("O")
    response = f"[ {' , '.join(entities)} ]" if entities else "none"
    prompt = f"{' '.join(tokens)} =>"
    return {"prompt": prompt, "response": response, "tokens": tokens, "entities": tags, "spans": spans}


STARTS = tuple(f'{{"label":"{kind}","text":"' for kind in KINDS)
TASK = Task(
    draw,
    words_of('[ , ] "} none =>', *STARTS, *FIRST, *LAST, *ORGANISATIONS, *PLACES, *WHEN,
             *(word for text in SENTENCES for word in text.split() if "{" not in word)),
    rows={"train": 4000, "validation": 200, "test": 500},
)  # fmt: skip
