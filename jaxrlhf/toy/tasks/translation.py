"""Translation from simple English into an invented language. The best chrF and BLEU are 1.

In this language the adjective follows the noun, and the verb comes last. Articles, nouns and adjectives agree in gender
and number; the verb agrees with its subject in number. The responses are those of learners: 40% keep the English order
of words, and 40% leave out all agreement.
"""

from jaxrlhf.toy.tasks.task import Random, Row, Task, pick, words_of

# English singular and plural, stem
MASCULINE = (("dog", "dogs", "kan"), ("man", "men", "vir"), ("king", "kings", "rek"), ("horse", "horses", "eku"))
FEMININE = (("cat", "cats", "gat"), ("woman", "women", "dam"), ("queen", "queens", "reg"), ("bird", "birds", "avi"))
ADJECTIVES = {"big": "gran", "small": "pet", "old": "vek", "young": "nov", "happy": "fel", "tired": "laz"}
VERBS = {"see": "vid", "follow": "sek", "love": "am", "help": "jut", "hear": "aud", "find": "trov"}
ENDINGS = ("o", "a", "os", "as")
KEEPS_ORDER, FORGETS_AGREEMENT = 0.4, 0.4


def _noun_phrase(rng: Random, agrees: bool, keeps_order: bool) -> tuple[str, str, str, bool]:
    """Returns (English, right translation, translation of a learner, whether it is plural)."""
    gender, plural = int(rng.integers(2)), bool(rng.random() < 0.5)
    *forms, stem = pick(rng, (MASCULINE, FEMININE)[gender])
    adjective = pick(rng, tuple(ADJECTIVES))

    def translation(ending: str, keeps_order: bool) -> str:
        noun, described = stem + ending, ADJECTIVES[adjective] + ending
        return " ".join(["l" + ending, *((described, noun) if keeps_order else (noun, described))])

    ending = ENDINGS[2 * plural + gender]
    learner = translation(ending if agrees else "o", keeps_order)
    return f"the {adjective} {forms[plural]}", translation(ending, False), learner, plural


def draw(rng: Random) -> Row:
    agrees, keeps_order = rng.random() >= FORGETS_AGREEMENT, rng.random() < KEEPS_ORDER
    subject, right_subject, learner_subject, plural = _noun_phrase(rng, agrees, keeps_order)
    thing, right_thing, learner_thing, _ = _noun_phrase(rng, agrees, keeps_order)
    verb = pick(rng, tuple(VERBS))
    form, learner_form = (VERBS[verb] + ("en" if plural and inflected else "e") for inflected in (True, agrees))
    learner = (learner_subject, learner_form, learner_thing)
    return {
        "prompt": f"{subject} {verb if plural else verb + 's'} {thing} =>",
        "response": " ".join(learner if keeps_order else (learner[0], learner[2], learner[1])),
        "reference": f"{right_subject} {right_thing} {form}",
    }


TASK = Task(
    draw,
    words_of(
        "the =>", *ADJECTIVES, *VERBS, *(verb + "s" for verb in VERBS),
        *(form for noun in MASCULINE + FEMININE for form in noun[:2]),
        *(stem + ending for stem in ("l", *ADJECTIVES.values()) for ending in ENDINGS),
        *(noun[2] + ending for noun in MASCULINE + FEMININE for ending in ENDINGS),
        *(stem + ending for stem in VERBS.values() for ending in ("e", "en")),
    ),
)  # fmt: skip
