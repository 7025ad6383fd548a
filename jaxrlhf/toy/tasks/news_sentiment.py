"""News sentiment: what a headline means for one of its companies, which is marked. The best accuracy is 1.

A headline names one to four companies whose news have different sentiments, so the marked company decides the label.
"""

from jaxrlhf.toy.tasks.task import Random, Row, Task, pick, words_of

COMPANIES = ("acme", "globex", "initech", "umbrella", "hooli", "stark", "wayne", "cyberdyne")
ALONE = {
    "positive": ("wins large order", "raises outlook", "reports record profit", "shares jump", "beats forecasts"),
    "negative": ("cuts jobs", "warns on profit", "recalls product", "shares fall", "loses large order"),
    "neutral": ("holds annual meeting", "names new chairman", "moves office", "reports on monday", "keeps outlook"),
}
# News about two companies, with the labels of the first and the second.
PAIRS = (
    ("takes customers from", "positive", "negative"), ("loses customers to", "negative", "positive"),
    ("wins lawsuit against", "positive", "negative"), ("pays fine to", "negative", "positive"),
    ("meets", "neutral", "neutral"),
)  # fmt: skip
LINKS = ("while", ", and", ";", "as")


def draw(rng: Random) -> Row:
    names = [str(name) for name in rng.permutation(COMPANIES)]
    clauses, labels = [], {}
    for _ in range(int(rng.integers(1, 3))):
        if rng.random() < 0.3:
            first, second = names.pop(), names.pop()
            verb, labels[first], labels[second] = pick(rng, PAIRS)
            clauses.append(f"{first} {verb} {second}")
        else:
            name = names.pop()
            labels[name] = pick(rng, tuple(ALONE))
            clauses.append(f"{name} {pick(rng, ALONE[labels[name]])}")
    target = pick(rng, tuple(labels))
    headline = f" {pick(rng, LINKS)} ".join(clauses)
    prompt = f"{headline.replace(target, f'[ {target} ]')} . sentiment :"
    return {"prompt": prompt, "response": labels[target], "label": labels[target], "company": target}


TASK = Task(
    draw,
    words_of("[ ] . sentiment :", *COMPANIES, *LINKS, *ALONE, *(verb for verb, *_ in PAIRS),
             *(news for of_label in ALONE.values() for news in of_label)),
    rows={"train": 8000, "validation": 200, "test": 500},
)  # fmt: skip
