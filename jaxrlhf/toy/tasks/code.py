"""Code with unit tests: a sentence about a function of a number becomes a function of Python. The best score is 1.

A sentence asks for two steps, such as "add 3 , then square it". Each row has four asserts that call `f`. The functions
of the test split are in no other split. Of the responses, 45% are right, 35% forget to return the result, 10% give the
function another name, and 10% have the steps in the wrong order, which is also right for some pairs of steps.
"""

import operator

from jaxrlhf.toy.tasks.task import Random, Row, Task, pick, sample, words_of

CONSTANTS = tuple(range(2, 14))
# Ways to ask for a step, its expression, its function of x and n
STEPS = (
    (("add {n}", "increase it by {n}"), "( {x} + {n} )", operator.add),
    (("subtract {n}", "decrease it by {n}"), "( {x} - {n} )", operator.sub),
    (("multiply it by {n}", "take it {n} times"), "( {x} * {n} )", operator.mul),
    (("find the rest after division by {n}", "take it modulo {n}"), "( {x} % {n} )", operator.mod),
    (("square it", "multiply it by itself"), "( {x} ** 2 )", lambda x, n: x**2),
    (("change its sign", "negate it"), "( - {x} )", lambda x, n: -x),
    (("remove its sign", "take its absolute value"), "abs ( {x} )", lambda x, n: abs(x)),
)
HEADS = ("write f ( x ) :", "python function f of x :", "define f ( x ) :")
JOINTS = (", then", "and afterwards")
RIGHT, NO_RETURN, OTHER_NAME = 0.45, 0.35, 0.1
TESTS, ARGUMENTS = 4, range(-9, 10)


def draw(rng: Random) -> Row:
    (first, inner, apply_first), (second, outer, apply_second) = sample(rng, STEPS, 2)
    n, m = pick(rng, CONSTANTS), pick(rng, CONSTANTS)
    body = outer.format(x=inner.format(x="x", n=n), n=m)
    swapped = inner.format(x=outer.format(x="x", n=m), n=n)
    name, result, chance = "f", f"return {body}", rng.random()
    if RIGHT <= chance < RIGHT + NO_RETURN:
        result = body
    elif RIGHT + NO_RETURN <= chance < RIGHT + NO_RETURN + OTHER_NAME:
        name = "g"
    elif chance >= RIGHT + NO_RETURN + OTHER_NAME:
        result = f"return {swapped}"
    steps = f"{pick(rng, first).format(n=n)} {pick(rng, JOINTS)} {pick(rng, second).format(n=m)}"
    return {
        "prompt": f"{pick(rng, HEADS)} {steps} . code:",
        "response": f"def {name} ( x ) : {result}",
        "solution": f"def f ( x ) : return {body}",
        "tests": [f"assert f({x}) == {apply_second(apply_first(x, n), m)}" for x in sample(rng, ARGUMENTS, TESTS)],
    }


TASK = Task(
    draw,
    words_of(
        *map(str, CONSTANTS), *HEADS, *JOINTS, "def f g ( x ) : return . code:",
        *(text.format(n="", x="") for texts, code, _ in STEPS for text in (*texts, code)),
    ),
    rows={"train": 4000, "validation": 150, "test": 200},
    key=lambda row: row["solution"],
)  # fmt: skip
