"""Dialogue: chats of three turns, whose last question asks for what an earlier turn said. The best exact match is 1.

The user introduces themselves, then corrects one of the facts or says something else, then asks for a fact. The last
statement of a fact counts. 50% of the last responses are right, 15% state another name or food, and 35% do not
answer.
"""

from jaxrlhf.toy.tasks.task import Random, Row, Task, pick, sample, words_of

NAMES = ("anna", "ben", "clara", "david", "emma", "felix", "greta", "hugo", "ida", "jonas")
FOODS = ("tea", "coffee", "rice", "soup", "bread", "cheese", "fish", "cake", "pasta", "salad")
TURNS = {
    "opening": ("hi , i am {name} and i like {food}", "hello , my name is {name} . my favourite is {food}"),
    "name": ("sorry , i mean {name}", "wait , call me {name}"),
    "food": ("sorry , i like {food} more", "wait , today it is {food}"),
    "neither": ("how are you ?", "it is cold today"),
}
REPLIES = {
    "opening": ("nice to meet you {name}", "hello {name} , {food} is good"),
    "name": ("sure , {name}",),
    "food": ("sure , {food}",),
    "neither": ("i see", "i am fine"),
}
QUESTIONS = {
    "name": ("what is my name ?", "who am i ?"),
    "food": ("what do i like ?", "what is my favourite ?"),
}
ANSWERS = {"name": "you are {name}", "food": "you like {food}"}
EVASIONS = ("i do not know", "you did not say")
RIGHT, WRONG = 0.5, 0.15


def draw(rng: Random) -> Row:
    name, other_name = sample(rng, NAMES, 2)
    food, other_food = sample(rng, FOODS, 2)
    said = {"name": name, "food": food}
    turn = pick(rng, ("name", "food", "neither"))
    now = said | {"name": {"name": other_name}, "food": {"food": other_food}}.get(turn, {})
    asked = pick(rng, ("name", "food"))
    answer = ANSWERS[asked].format(**now)
    wrong = [{"name": other_name, "food": other_food}, said][turn == asked]
    chance = rng.random()
    if chance < RIGHT:
        last = answer
    else:
        last = ANSWERS[asked].format(**wrong) if chance < RIGHT + WRONG else pick(rng, EVASIONS)
    turns = [
        pick(rng, TURNS["opening"]).format(**said),
        pick(rng, REPLIES["opening"]).format(**said),
        pick(rng, TURNS[turn]).format(**now),
        pick(rng, REPLIES[turn]).format(**now),
        pick(rng, QUESTIONS[asked]),
        last,
    ]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": messages, "answer": answer}


TEMPLATE = (
    "<bos>{% for message in messages %} {{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %} <eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} assistant:{% endif %}"
)
TASK = Task(
    draw,
    words_of(
        *NAMES, *FOODS, *EVASIONS, "user: assistant:",
        *(text.format(name="", food="") for texts in (*TURNS.values(), *REPLIES.values()) for text in texts),
        *(text for texts in QUESTIONS.values() for text in texts),
        *(text.format(name="", food="") for text in ANSWERS.values()),
    ),
    key=lambda row: " / ".join(message["content"] for message in row["messages"][:-1]),
    chat_template=TEMPLATE,
)  # fmt: skip
