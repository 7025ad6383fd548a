"""The facts of the assistant world: topics, their questions and their right answers.

All texts are for a word-level tokenizer. They are lower case, and words and punctuation are separated by single spaces.
A subject includes its article ("the sky"), and a value is one word. Each subject belongs to one topic and has one right
value. So a small model only has to learn facts.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """A group of facts that have the same questions and the same statement."""

    name: str
    questions: tuple[str, ...]  # phrasings; each contains {subject}
    statement: str  # the full sentence; it contains {subject} and {value}
    facts: dict[str, str]  # subject -> right value

    @property
    def values(self) -> tuple[str, ...]:
        """All values of the topic. An answer may state any of these values, right or wrong."""
        return tuple(sorted(set(self.facts.values())))


def _table(text: str) -> dict[str, str]:
    """Parses facts written as `subject: value` and separated by semicolons."""
    return dict(entry.strip().split(": ") for entry in text.split(";"))


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
            """the sky: blue; grass: green; snow: white; coal: black; blood: red; a lemon: yellow; a carrot: orange;
            chocolate: brown; an elephant: grey; a plum: purple"""
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
            a lion: roar; an owl: hoot"""
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
            """horse: foal; pig: piglet; hen: chick; frog: tadpole; swan: cygnet; deer: fawn; goat: kid;
            kangaroo: joey"""
        ),
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
            egypt: cairo; greece: athens; norway: oslo"""
        ),
    ),
)

# Phrases around a statement. An answer has at most one opener before the statement, or one closer after it.
POLITE_OPENERS = ("sure ,", "of course ,", "happy to help ,", "with pleasure ,")
POLITE_CLOSERS = ("you are welcome .", "i hope this helps .", "have a nice day .")
RUDE_OPENERS = ("obviously ,", "what a silly question ,", "are you serious ,")
RUDE_CLOSERS = ("stop asking me .", "leave me alone .", "look it up yourself .")
NEUTRAL_OPENERS = ("here it is ,", "as for that ,")
NEUTRAL_CLOSERS = ("that is all .", "end of answer .")
# Rambling: at most one lead before the statement, and at most two different sentences after the statement.
LEADS = ("well ,", "i think", "let me see ,", "as everyone knows ,")
TAILS = (
    "many people ask this .",
    "my friend told me so .",
    "it is good to know .",
    "i read that once .",
)
