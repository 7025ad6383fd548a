"""Helpful assistant from preferences: requests that hold their own answer, and pairs of answers. Best gold score: 1.

A request asks for a dish from two foods, for the day of an event, or for the better of two things. `gold_score` gives
0.6 for the right statement, 0.2 for one polite phrase and 0.2 for an answer without chatter; a text that is not such an
answer scores 0. Of the responses for SFT, 50% are right, 40% polite and 50% free of chatter.

The better answer of a pair is the one with the higher gold score; raters err in 5% of the pairs. In
about 57%, the two answers differ in the statement alone. In about 18%, one text is not an answer: it is cut, has a
phrase twice, or is in disorder.
"""

from jaxrlhf.toy.tasks.task import Random, Row, Task, pick, sample, words_of

FOODS = ("eggs", "rice", "fish", "beans", "cheese", "bread", "pasta", "corn", "ham", "kale")
EVENTS = ("dentist", "concert", "exam", "party", "meeting", "game", "flight", "class")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
THINGS = ("lamp", "chair", "clock", "coat", "bag", "tent")
COOKING = ("i have {0} and {1} . what can i cook ?", "what can i eat ? there are {0} and {1} .")
REMINDING = ("my {event} is on {day} . when is it ?", "remind me please . on {day} i have my {event} .")
BUYING = ("i like the {0} more than the {1} . which one do i buy ?", "which one shall i buy ? the {0} beats the {1} .")
GREETINGS = ("hello !", "good morning !", "please help me .", "")
DISH, REMINDER, ADVICE = "you can cook {} with {} .", "it is on {} .", "buy the {} ."
REFUSALS = ("i can not help you .", "ask somebody else .")
STATEMENTS = frozenset(
    (
        *(DISH.format(one, two) for one in FOODS for two in FOODS),
        *(REMINDER.format(day) for day in DAYS),
        *(ADVICE.format(thing) for thing in THINGS),
        *REFUSALS,
    )
)
OPENERS = ("sure !", "good question !")
CLOSERS = ("have a nice day !", "i am glad to help !")
CHATTER = ("this is only what i think .", "many people ask me this .", "there is a lot to say about it .")
RIGHT, POLITE, BRIEF = 0.5, 0.4, 0.5  # shares of the responses
ERRING = 0.05  # share of the pairs
# Shares of pairs with a broken text, and of pairs that differ in the statement alone, before pairs with
# equal scores are drawn again.
BROKEN, SAME_WORDS = 0.2, 0.5
GAP = 0.1  # smallest difference of gold scores in a pair


def _dish(rng: Random) -> tuple[str, list[str], list[str]]:
    one, two, *others = sample(rng, FOODS, 4)
    wrong = [DISH.format(one, others[0]), DISH.format(others[0], two), DISH.format(*others)]
    wrong += [DISH.format(food, food) for food in (one, two)]
    return pick(rng, COOKING).format(one, two), [DISH.format(one, two), DISH.format(two, one)], wrong


def _reminder(rng: Random) -> tuple[str, list[str], list[str]]:
    day, *others = sample(rng, DAYS, 3)
    request = pick(rng, REMINDING).format(event=pick(rng, EVENTS), day=day)
    return request, [REMINDER.format(day)], [REMINDER.format(other) for other in others]


def _advice(rng: Random) -> tuple[str, list[str], list[str]]:
    better, *others = sample(rng, THINGS, 3)
    request = pick(rng, BUYING).format(better, *others)
    return request, [ADVICE.format(better)], [ADVICE.format(thing) for thing in others]


def draw(rng: Random) -> Row:
    request, right, wrong = pick(rng, (_dish, _reminder, _advice))(rng)
    wrong = [*wrong, pick(rng, REFUSALS)]
    chosen, rejected = _pair(rng, right, wrong)
    prompt = " ".join(f"user: {pick(rng, GREETINGS)} {request} assistant:".split())
    row = {"prompt": prompt, "response": _answer(rng, right, wrong), "right": right}
    return row | {"chosen": chosen, "rejected": rejected}


def _answer(rng: Random, right: list[str], wrong: list[str]) -> str:
    return _in_words(rng, pick(rng, right if rng.random() < RIGHT else wrong))


def _in_words(rng: Random, statement: str) -> str:
    """Returns an answer with a statement."""
    is_polite, is_brief = rng.random() < POLITE, rng.random() < BRIEF
    opener, closer = pick(rng, ((pick(rng, OPENERS), ""), ("", pick(rng, CLOSERS)))) if is_polite else ("", "")
    parts = (opener, statement, "" if is_brief else pick(rng, CHATTER), closer)
    return " ".join(part for part in parts if part)


def _broken(rng: Random, right: list[str], wrong: list[str]) -> str:
    """Returns a text that is not an answer."""
    while True:
        words = _answer(rng, right, wrong).split()
        cut = words[: int(rng.integers(1, len(words)))]
        twice = [*words, *pick(rng, OPENERS + CLOSERS + CHATTER + tuple(right)).split()]
        text = " ".join(pick(rng, (cut, twice, sample(rng, words, len(words)))))
        if gold(text, right) == 0:
            return text


def _pair(rng: Random, right: list[str], wrong: list[str]) -> tuple[str, str]:
    """Returns (chosen, rejected)."""
    while True:
        first, chance = _answer(rng, right, wrong), rng.random()
        if chance < SAME_WORDS:
            statement = pick(rng, right)
            first = _in_words(rng, statement)
            second = first.replace(statement, pick(rng, wrong))
        else:
            second = (_broken if chance < SAME_WORDS + BROKEN else _answer)(rng, right, wrong)
        difference = gold(first, right) - gold(second, right)
        if abs(difference) >= GAP:
            return (first, second) if (difference > 0) != (rng.random() < ERRING) else (second, first)


def gold(text: str, right: list[str]) -> float:
    """Returns the score of an answer in [0, 1]. An answer is [opener] statement [chatter] [closer]."""
    text = " ".join(text.split())
    polite = brief = 0
    for phrase in OPENERS:
        if text.startswith(phrase + " "):
            text, polite = text[len(phrase) + 1 :], polite + 1
            break
    for phrase in CLOSERS:
        if text.endswith(" " + phrase):
            text, polite = text[: -len(phrase) - 1], polite + 1
            break
    statement = text
    for phrase in CHATTER:
        statement = statement.removesuffix(" " + phrase)
        if statement != text:
            break
    brief = statement == text
    if statement not in STATEMENTS or polite > 1:
        return 0.0
    return 0.6 * (statement in right) + 0.2 * polite + 0.2 * brief


def gold_score(completions: list[str], right: list[list[str]], **columns: object) -> list[float]:
    """Returns the gold score of each completion; `right` is the column with the right statements of a row."""
    return [gold(text, statements) for text, statements in zip(completions, right, strict=True)]


TASK = Task(
    draw,
    words_of(
        *FOODS, *EVENTS, *DAYS, *THINGS, *GREETINGS, *REFUSALS, *OPENERS, *CLOSERS, *CHATTER,
        "user: assistant:",
        *(text.format("", "", event="", day="") for text in COOKING + REMINDING + BUYING),
        *(text.format("", "") for text in (DISH, REMINDER, ADVICE)),
    ),
    rows={"train": 10000, "validation": 200, "test": 250},
    held_out_from=0.2,
)  # fmt: skip
