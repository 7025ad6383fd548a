"""Arithmetic with a calculator as a tool: the answer of a sum or product of two-digit numbers. The best score is 1.

All numbers are digits that are separated by blanks, so each digit is a word. A call is written in the plain form of
`jaxrlhf.environments.tool_calls`: `calculator : 3 4 * 5 7`. 60% of the demonstrations call the calculator and repeat
its result, but only 40% of these read the question right; the others call it with a wrong digit. The answers without a
call have the right number of digits, of which all but the first are guessed. A row has the demonstration as `messages`,
the question alone as `prompt`, and `answer`.
"""

from jaxrlhf.toy.tasks.task import Random, Row, Task, pick, words_of

QUESTIONS = ("what is {} ?", "tell me {}", "{} =")
SIGNS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
CALLS, READS = 0.6, 0.4  # share of the demonstrations that call the tool; share of these that read the question right
# A turn of the assistant ends with <eos>, and no turn depends on later ones.
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %} {{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %} <eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} assistant: {% endif %}"
)


def spell(value: object) -> str:
    """Returns the characters of a value with a blank between them: `-12` becomes `- 1 2`."""
    return " ".join(str(value).replace(" ", ""))


def _misread(rng: Random, number: int) -> int:
    """Returns a number of two digits whose last digit is another one."""
    return number // 10 * 10 + (number + int(rng.integers(1, 10))) % 10


def _guess(rng: Random, result: int) -> int:
    """Returns a number with the sign, the number of digits and the first digit of the result."""
    rest = 10 ** max(len(str(abs(result))) - 1, 1)
    guess = abs(result) // rest * rest + int(rng.integers(rest))
    return -guess if result < 0 else guess


def draw(rng: Random) -> Row:
    first, second = (int(n) for n in rng.integers(10, 100, 2))
    sign = pick(rng, tuple(SIGNS))
    expression = f"{spell(first)} {sign} {spell(second)}"
    question, result = pick(rng, QUESTIONS).format(expression), SIGNS[sign](first, second)
    turns = [("user", question)]
    if rng.random() < CALLS:
        read = first if rng.random() < READS else _misread(rng, first)
        answer = SIGNS[sign](read, second)
        turns += [("assistant", f"calculator : {spell(read)} {sign} {spell(second)}"), ("tool", spell(answer))]
    else:
        answer = _guess(rng, result)
    turns.append(("assistant", spell(answer)))
    messages = [{"role": role, "content": text} for role, text in turns]
    return {"messages": messages, "prompt": question, "answer": spell(result)}


TASK = Task(
    draw,
    words_of(
        "user: assistant: tool: system: calculator : ( ) . / error", *SIGNS, *map(str, range(10)),
        *(question.format("") for question in QUESTIONS),
    ),
    {"train": 4000, "validation": 200, "test": 500},
    chat_template=CHAT_TEMPLATE,
)  # fmt: skip
