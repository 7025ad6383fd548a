"""Customer service: a question and three retrieved policies, one of which answers it. The best score is 1.

A row has the columns `question` and `snippets`; a template writes the prompt. The details of the policies differ from
row to row, so a model must read them. 50% of the responses state the right policy, 5% another policy, and 45% none; 40%
end politely. The score is 0.8 for the right detail and 0.2 for politeness.
"""

from jaxrlhf.toy.tasks.task import Random, Row, Task, pick, sample, words_of

# (policy, its details, questions)
POLICIES = (
    ("you can return goods within {} days .", ("3", "5", "7", "10", "14", "20", "30", "60"),
     ("can i return my lamp ?", "how long can i send things back ?")),
    ("we deliver by {} .", ("van", "train", "ship", "bike", "truck", "plane", "post", "drone"),
     ("how will my parcel arrive ?", "how do you deliver ?")),
    ("you can pay by {} .", ("card", "cash", "cheque", "transfer", "voucher", "invoice", "coin", "app"),
     ("how can i pay ?", "i want to pay for my lamp . how do i do it ?")),
    ("all lamps come in {} .", ("red", "blue", "green", "white", "black", "brown", "grey", "pink"),
     ("in which colour do you sell lamps ?", "which colour will my lamp have ?")),
    ("our office is in {} .", ("paris", "rome", "oslo", "madrid", "tokyo", "cairo", "lima", "delhi"),
     ("where is your office ?", "where can i visit you ?")),
)  # fmt: skip
DETAILS = tuple(detail for _, details, _ in POLICIES for detail in details)
SNIPPETS = 3
POLITE = ("happy to help !", "thank you for asking !")
EVASIONS = ("please call us .", "we do not know .")
RIGHT, OTHER, POLITE_SHARE = 0.5, 0.05, 0.4


def draw(rng: Random) -> Row:
    policies = [(text, pick(rng, details), questions) for text, details, questions in sample(rng, POLICIES, SNIPPETS)]
    asked = int(rng.integers(SNIPPETS))
    _, answer, questions = policies[asked]
    snippets = [text.format(detail) for text, detail, _ in policies]
    chance = rng.random()
    stated = snippets[asked] if chance < RIGHT else pick(rng, snippets[:asked] + snippets[asked + 1 :])
    response = stated if chance < RIGHT + OTHER else pick(rng, EVASIONS)
    if rng.random() < POLITE_SHARE:
        response += " " + pick(rng, POLITE)
    return {"question": pick(rng, questions), "snippets": snippets, "response": response, "label": answer}


TASK = Task(
    draw,
    words_of(
        *DETAILS, *POLITE, *EVASIONS, "policy: customer: agent:",
        *(text.format("") for policy, _, questions in POLICIES for text in (policy, *questions)),
    ),
    key=lambda row: " ".join([*row["snippets"], row["question"]]),
)  # fmt: skip
