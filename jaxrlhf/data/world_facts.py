"""The facts of the assistant world: topics, their questions and their one right answers. Words only.

Everything is lower case and split by single spaces, punctuation too, so that a word-level tokenizer reads it.
A subject keeps its article ("the sky"), a value is always one word, and within a topic each subject has one
right value. Subjects return in several topics (a frog is green, says croak, was a tadpole): knowing the subject
does not give the answer away, the question has to be read.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """A family of facts that are asked and stated alike."""

    name: str
    questions: tuple[str, ...]  # phrasings, each with {subject}
    statement: str  # the full sentence, with {subject} and {value}
    facts: dict[str, str]  # subject -> its right value

    @property
    def values(self) -> tuple[str, ...]:
        """All values of the topic: what an answer may state, rightly or wrongly."""
        return tuple(sorted(set(self.facts.values())))


def _table(text: str) -> dict[str, str]:
    """Facts written as `subject: value` and split by semicolons."""
    return dict(entry.strip().split(": ") for entry in text.split(";"))


_PAIRS = """hot cold; big small; fast slow; up down; day night; open closed; wet dry; hard soft; old new;
rich poor; happy sad; full empty"""
_OPPOSITES = [pair.split() for pair in _PAIRS.split(";")]
_NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
_DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
_MONTHS = ["january", "february", "march", "april", "may", "june"]
_MONTHS += ["july", "august", "september", "october", "november", "december"]


def _neighbours(cycle: list[str], step: int) -> dict[str, str]:
    return {word: cycle[(i + step) % len(cycle)] for i, word in enumerate(cycle)}


def _calendar(kind: str, side: str, cycle: list[str]) -> Topic:
    return Topic(
        f"{kind} {side}",
        (
            f"what {kind} comes {side} {{subject}} ?",
            f"tell me the {kind} {side} {{subject}} .",
            f"which {kind} is right {side} {{subject}} ?",
            f"do you know the {kind} {side} {{subject}} ?",
        ),
        f"{{value}} comes {side} {{subject}} .",
        _neighbours(cycle, 1 if side == "after" else -1),
    )


TOPICS: tuple[Topic, ...] = (
    Topic(
        "colour",
        (
            "what colour is {subject} ?",
            "tell me the colour of {subject} .",
            "which colour does {subject} have ?",
            "do you know the colour of {subject} ?",
        ),
        "{subject} is {value} .",
        _table(
            """the sky: blue; the sea: blue; grass: green; a frog: green; snow: white; a swan: white; coal: black;
            a crow: black; blood: red; a tomato: red; a banana: yellow; a lemon: yellow; a carrot: orange;
            chocolate: brown; an elephant: grey; a pig: pink; a flamingo: pink; a plum: purple"""
        ),
    ),
    Topic(
        "sound",
        (
            "what sound does {subject} make ?",
            "what does {subject} say ?",
            "tell me the sound of {subject} .",
            "do you know the sound of {subject} ?",
        ),
        "{subject} says {value} .",
        _table(
            """a dog: woof; a cat: meow; a cow: moo; a sheep: baa; a duck: quack; a bee: buzz; a snake: hiss;
            a pig: oink; a horse: neigh; a lion: roar; a frog: croak; an owl: hoot; a crow: caw; a wolf: howl"""
        ),
    ),
    Topic(
        "home",
        (
            "where does {subject} live ?",
            "what is the home of {subject} ?",
            "tell me where {subject} lives .",
            "do you know where {subject} lives ?",
        ),
        "{subject} lives in the {value} .",
        _table(
            """a dog: kennel; a bee: hive; a bird: nest; a pig: sty; a horse: stable; a hen: coop; a spider: web;
            a lion: den; a rabbit: burrow; a cow: barn; a camel: desert; a whale: sea; a frog: pond; a king: castle"""
        ),
    ),
    Topic(
        "young",
        (
            "what is a young {subject} called ?",
            "what do you call a young {subject} ?",
            "tell me the name of a young {subject} .",
            "do you know the name of a young {subject} ?",
        ),
        "a young {subject} is called {value} .",
        _table(
            """dog: puppy; cat: kitten; cow: calf; sheep: lamb; horse: foal; pig: piglet; hen: chick; duck: duckling;
            frog: tadpole; lion: cub; swan: cygnet; deer: fawn"""
        ),
    ),
    Topic(
        "opposite",
        (
            "what is the opposite of {subject} ?",
            "tell me the opposite of {subject} .",
            "which word means the opposite of {subject} ?",
            "do you know the opposite of {subject} ?",
        ),
        "the opposite of {subject} is {value} .",
        {a: b for pair in _OPPOSITES for a, b in (pair, pair[::-1])},
    ),
    Topic(
        "capital",
        (
            "what is the capital of {subject} ?",
            "tell me the capital of {subject} .",
            "which city is the capital of {subject} ?",
            "do you know the capital of {subject} ?",
        ),
        "the capital of {subject} is {value} .",
        _table(
            """france: paris; germany: berlin; italy: rome; spain: madrid; japan: tokyo; china: beijing;
            russia: moscow; egypt: cairo; greece: athens; austria: vienna; poland: warsaw; portugal: lisbon;
            norway: oslo; cuba: havana; peru: lima; england: london"""
        ),
    ),
    Topic(
        "sum",
        (
            "what is {subject} ?",
            "tell me what {subject} makes .",
            "how much is {subject} ?",
            "do you know what {subject} makes ?",
        ),
        "{subject} is {value} .",
        {f"{_NUMBERS[a]} plus {_NUMBERS[b]}": _NUMBERS[a + b + 1] for a in range(4) for b in range(4)},
    ),
    _calendar("day", "after", _DAYS),
    _calendar("day", "before", _DAYS),
    _calendar("month", "after", _MONTHS),
)

# What stands around a statement. An answer has one manner at most: an opener before it or a closer after it.
POLITE_OPENERS = ("sure ,", "of course ,", "happy to help ,", "with pleasure ,")
POLITE_CLOSERS = ("you are welcome .", "i hope this helps .", "have a nice day .")
RUDE_OPENERS = ("obviously ,", "what a silly question ,", "are you serious ,")
RUDE_CLOSERS = ("stop asking me .", "leave me alone .", "look it up yourself .")
NEUTRAL_OPENERS = ("here it is ,", "as for that ,")
NEUTRAL_CLOSERS = ("that is all .", "end of answer .")
# Rambling: at most one lead before the statement and two different sentences after it.
LEADS = ("well ,", "i think", "let me see ,", "as everyone knows ,")
TAILS = (
    "many people ask this .",
    "my friend told me so .",
    "it is good to know .",
    "i read that once .",
)
