"""Question answering: a paragraph about a person, and a question whose answer is a span of it. The best exact match: 1.

A paragraph has three of four facts, in sentences in random order. Test paragraphs are in no other split, so a model
must read them. Of the responses, 45% are the right span, 50% have words around it, and 5% are a span
of another sentence.
"""

from jaxrlhf.toy.tasks.task import Random, Row, Task, pick, sample, words_of

NAMES = ("anna", "ben", "clara", "david", "emma", "felix", "greta", "hugo")
CITIES = ("paris", "rome", "oslo", "madrid", "tokyo", "cairo", "lima", "delhi")
JOBS = ("teacher", "baker", "nurse", "painter", "pilot", "farmer", "lawyer", "cook")
FOODS = ("soup", "rice", "bread", "fish", "cheese", "cake", "salad", "pasta")
ANIMALS = ("cat", "dog", "horse", "bird", "snake", "rabbit", "goat", "duck")
# Sentence, its spans, questions
FACTS = (
    ("{name} lives in {span} .", CITIES, ("where does {name} live ?", "in which city is the home of {name} ?")),
    ("{name} works as a {span} .", JOBS, ("what does {name} work as ?", "what is the job of {name} ?")),
    ("{name} likes to eat {span} .", FOODS, ("what does {name} like to eat ?", "what is the favourite of {name} ?")),
    ("{name} has a {span} at home .", ANIMALS, ("which animal does {name} have ?", "what does {name} have at home ?")),
)
SPANS = ("{} .", "the {}")
WORDY = ("i think {} .", "it is {} , i believe .")
RIGHT, OTHER = 0.45, 0.05  # shares of the responses that are the span, and that are the span of another sentence


def draw(rng: Random) -> Row:
    name = pick(rng, NAMES)
    facts = [(sentence, pick(rng, spans), questions) for sentence, spans, questions in sample(rng, FACTS, 3)]
    _, span, questions = facts[0]
    chance = rng.random()
    forms = WORDY if chance >= RIGHT + OTHER else SPANS
    stated = facts[1][1] if RIGHT <= chance < RIGHT + OTHER else span
    paragraph = [sentence.format(name=name, span=value) for sentence, value, _ in sample(rng, facts, 3)]
    return {
        "prompt": f"{' '.join(paragraph)} question: {pick(rng, questions).format(name=name)}",
        "response": pick(rng, forms).format(stated),
        "answer": span,
    }


TASK = Task(
    draw,
    words_of(
        *NAMES, *CITIES, *JOBS, *FOODS, *ANIMALS, "question:", *(text.format("") for text in SPANS + WORDY),
        *(text.format(name="", span="") for sentence, _, questions in FACTS for text in (sentence, *questions)),
    ),
)  # fmt: skip
