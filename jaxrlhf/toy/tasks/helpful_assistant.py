"""Helpful assistant from preferences: requests that hold their own answer, and pairs of answers. Best gold score: 1.

A request asks for a dish without the food that the user dislikes, for the day of an event, or for the cheaper of two
things. `gold_score` gives 0.6 for the right statement, 0.2 for one polite phrase and 0.2 for an answer without chatter;
a text that is not such an answer scores 0. Of the responses for SFT, 50% are right, 40% polite and 50% free of chatter.

The better answer of a pair is the one with the higher gold score. In the train split, raters err in 5% of the pairs. In
20% of the pairs, one text is not an answer: it is cut, has a phrase twice, or is in disorder.
"""

from jaxrlhf.toy.tasks.task import Random, Row, Task, pick, sample, words_of

FOODS = ("eggs", "rice", "fish", "beans", "cheese", "bread", "pasta", "corn", "ham", "kale")
EVENTS = ("dentist", "concert", "exam", "party", "meeting", "game")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
THINGS = ("lamp", "chair", "clock", "coat", "bag", "tent")
PRICES = tuple(str(price) for price in range(1, 13))
COOKING = (
    "i have {0} , {1} and {2} but i do not like {bad} . what can i cook ?",
    "what can i eat ? there are {0} , {1} and {2} , and i hate {bad} .",
)
REMINDING = (
    "my {0} is on {a} and my {1} is on {b} . when is my {asked} ?",
    "remind me of my {asked} please . the {0} is on {a} , the {1} on {b} .",
)
BUYING = (
    "a {0} costs {a} and a {1} costs {b} . which is cheaper ?",
    "what shall i buy ? i want to spend less . the {0} is {a} , the {1} is {b} .",
)
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
SHARES = {"right": 0.5, "polite": 0.4, "brief": 0.5}  # of the responses
ERRING, BROKEN = 0.05, 0.2  # shares of the pairs
GAP = 0.1  # smallest difference of gold scores in a pair


def _dish(rng: Random) -> tuple[str, list[str], list[str]]:
    foods = sample(rng, FOODS, 4)
    has, bad = foods[:3], foods[int(rng.integers(3))]
    one, two = (food for food in has if food != bad)
    right = [DISH.format(one, two), DISH.format(two, one)]
    wrong = [DISH.format(one, bad), DISH.format(bad, two), DISH.format(two, foods[3])]
    return pick(rng, COOKING).format(*has, bad=bad), right, wrong


def _reminder(rng: Random) -> tuple[str, list[str], list[str]]:
    events, days = sample(rng, EVENTS, 2), sample(rng, DAYS, 3)
    asked = int(rng.integers(2))
    request = pick(rng, REMINDING).format(*events, a=days[0], b=days[1], asked=events[asked])
    return request, [REMINDER.format(days[asked])], [REMINDER.format(days[i]) for i in (1 - asked, 2)]


def _advice(rng: Random) -> tuple[str, list[str], list[str]]:
    things, prices = sample(rng, THINGS, 2), sample(rng, PRICES, 2)
    cheaper = int(int(prices[1]) < int(prices[0]))
    request = pick(rng, BUYING).format(*things, a=prices[0], b=prices[1])
    return request, [ADVICE.format(things[cheaper])], [ADVICE.format(things[1 - cheaper])]


def draw(rng: Random) -> Row:
    request, right, wrong = pick(rng, (_dish, _reminder, _advice))(rng)
    wrong = [*wrong, pick(rng, REFUSALS)]
    chosen, rejected = _pair(rng, right, wrong)
    row = {"prompt": f"user: {request} assistant:", "response": _answer(rng, right, wrong), "right": right}
    return row | {"chosen": chosen, "rejected": rejected}


def _answer(rng: Random, right: list[str], wrong: list[str]) -> str:
    is_right, is_polite, is_brief = (rng.random() < share for share in SHARES.values())
    statement = pick(rng, right if is_right else wrong)
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
        first = _answer(rng, right, wrong)
        second = (_broken if rng.random() < BROKEN else _answer)(rng, right, wrong)
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
        *FOODS, *EVENTS, *DAYS, *THINGS, *PRICES, *REFUSALS, *OPENERS, *CLOSERS, *CHATTER, "user: assistant:",
        *(text.format(*[""] * 3, a="", b="", bad="", asked="") for text in COOKING + REMINDING + BUYING),
        *(text.format("", "") for text in (DISH, REMINDER, ADVICE)),
    ),
    rows={"train": 8000, "validation": 200, "test": 500},
)  # fmt: skip
