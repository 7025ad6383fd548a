"""entity_f1 and relation_f1: equal to seqeval's strict F1, and what each form of an answer is worth."""

import json

import numpy as np
import pytest

from jaxrlhf.rewards.functions import FunctionReward
from jaxrlhf.rewards.library import entity_f1, relation_f1

TOKENS = ["EU", "rejects", "German", "call", "to", "boycott", "British", "lamb", "in", "New", "York"]
GOLD = ["B-ORG", "O", "B-MISC", "O", "O", "O", "B-MISC", "O", "O", "B-LOC", "I-LOC"]
RECORDED = [  # tags of an answer, for GOLD
    GOLD,
    ["O"] * 11,
    ["B-ORG", "O", "B-MISC", "O", "O", "O", "B-MISC", "O", "O", "B-LOC", "O"],  # too short
    ["B-ORG", "O", "B-MISC", "O", "O", "O", "B-MISC", "I-MISC", "O", "B-LOC", "I-LOC"],  # too long
    ["B-PER", "O", "B-MISC", "O", "O", "O", "B-LOC", "O", "O", "B-LOC", "I-LOC"],  # other labels
    ["B-ORG", "I-MISC", "O", "I-PER", "O", "O", "B-MISC", "O", "O", "I-LOC", "I-LOC"],  # I- that continues nothing
    ["B-ORG", "B-ORG", "B-MISC", "B-MISC", "O", "O", "B-MISC", "O", "O", "B-LOC", "B-LOC"],
    ["B-ORG", "O", "B-MISC", "I-ORG", "I-ORG", "O", "O", "O", "O", "B-LOC", "I-PER"],
]


def as_bio(tags):
    return " ".join(tags)


def as_conll(tags):
    return "\n".join(f"{token} {tag}" for token, tag in zip(TOKENS, tags))


def as_slashes(tags):
    return " ".join(f"{token}/{tag}" for token, tag in zip(TOKENS, tags))


@pytest.mark.parametrize("write", [as_bio, as_conll, as_slashes])
@pytest.mark.parametrize("tags", RECORDED, ids=range(len(RECORDED)))
def test_tags_score_as_in_seqeval(tags, write):
    f1_score = pytest.importorskip("seqeval.metrics").f1_score
    from seqeval.scheme import IOB2

    expected = f1_score([GOLD], [tags], mode="strict", scheme=IOB2, zero_division=0)
    assert entity_f1([write(tags)], [GOLD], [TOKENS]) == [pytest.approx(expected)]


def test_random_tags_score_as_in_seqeval():
    f1_score = pytest.importorskip("seqeval.metrics").f1_score
    from seqeval.scheme import IOB2

    names = ["O", "B-A", "I-A", "B-B", "I-B"]
    random = np.random.default_rng(0)
    tokens = [f"t{i}" for i in range(9)]
    for _ in range(200):
        gold = [names[i] for i in random.integers(0, 5, 9)]
        for i, tag in enumerate(gold):  # gold is IOB2
            if tag[0] == "I" and (i == 0 or gold[i - 1][2:] != tag[2:]):
                gold[i] = "B" + tag[1:]
        answer = [names[i] for i in random.integers(0, 5, 9)]
        expected = f1_score([gold], [answer], mode="strict", scheme=IOB2, zero_division=0)
        if any(tag != "O" for tag in gold):
            assert entity_f1([" ".join(answer)], [gold], [tokens]) == [pytest.approx(expected)]


OBJECTS = [{"text": "EU", "label": "ORG"}, {"text": "New  York", "label": "loc"}]
PLACES = [{"start": 0, "end": 2, "label": "ORG"}, {"start": 50, "end": 58, "label": "LOC"}]
ANSWERS = [
    json.dumps(OBJECTS),
    json.dumps(PLACES),
    "```json\n" + json.dumps({"ORG": ["EU"], "LOC": ["New York"]}) + "\n```",
    "- ORG: EU\n- LOC: New York",
    "[EU](ORG) rejects German call to boycott British lamb in [New York](LOC)",
    "[EU](ORG)\nrejects German call to boycott British lamb in [New\nYork](LOC) ",
    "B-ORG O O O O O O O O B-LOC I-LOC",
]
FORMS = ["json", "json", "json", "lines", "inline", "inline", "bio"]


GOLDS = [OBJECTS, PLACES, json.dumps(PLACES), "ORG: EU\nLOC: New York", ["ORG: EU", "LOC: New York"]]


@pytest.mark.parametrize("gold", GOLDS)
def test_each_form_of_an_answer_scores_alike(gold):
    count = len(ANSWERS)
    assert entity_f1(ANSWERS, [gold] * count, [TOKENS] * count) == [1.0] * count
    for answer, form in zip(ANSWERS, FORMS):
        assert entity_f1([answer], [gold], [TOKENS], format=form) == [1.0]
        other = "lines" if form == "json" else "json"
        assert entity_f1([answer], [gold], [TOKENS], format=other) == [0.0]
    # Two of the three entities of another gold: 2 * 2 / (2 + 4)
    assert entity_f1(ANSWERS, [GOLD] * count, [TOKENS] * count) == [pytest.approx(4 / 6)] * count


def test_places_count_and_texts_may_repeat():
    text = "Paris met Paris"
    first, second = ({"start": 0, "end": 5, "label": "PER"}, {"start": 10, "end": 15, "label": "PER"})
    answers = [json.dumps([first]), json.dumps([second]), "[Paris](PER) met Paris", "PER: Paris"]
    assert entity_f1(answers, [[first]] * 4, text=[text] * 4) == [1, 0, 1, 1]
    # Repeating a right entity lowers the score, in every form.
    repeated = [json.dumps([first, first]), "PER: Paris\nPER: Paris", "PER: Paris\n" * 9]
    assert entity_f1(repeated, [[first]] * 3, text=[text] * 3) == pytest.approx([2 / 3, 2 / 3, 2 / 10])
    assert entity_f1(repeated[1:2], [[first, second]], text=[text]) == [1.0]


@pytest.mark.parametrize(
    "answer",
    ["", " \n", "EU is an ORG", "Entities:\nORG: EU", "[EU](ORG) refuses", "O O", "[1, 2]", "3", '{"ORG": "EU"}',
     '[{"label": "ORG"}]', '[{"text": "EU"}]', '[{"start": 0, "end": 99, "label": "ORG"}]', "[" * 10_000],
)  # fmt: skip
def test_what_cannot_be_read_scores_0_even_if_there_is_nothing_to_find(answer):
    assert entity_f1([answer] * 2, [["O"] * 11, GOLD], [TOKENS] * 2) == [0.0, 0.0]


def test_no_entity():
    answers = ["none", "None.", "[]", "{}", " ".join(TOKENS), "O " * 11]
    assert entity_f1(answers, [[]] * 6, [TOKENS] * 6) == [1.0] * 6
    assert entity_f1(answers, [GOLD] * 6, [TOKENS] * 6) == [0.0] * 6
    assert entity_f1(["none", "none"], [None, []], [TOKENS] * 2) == [None, 1.0]


def test_partial_overlap_counts_characters_or_words():
    tokens = ["in", "New", "York", "City"]
    gold = [["O", "B-LOC", "I-LOC", "I-LOC"]]
    answers = {"O B-LOC I-LOC O": 8 / 13, "O O B-LOC I-LOC": 9 / 13, "O B-PER I-PER O": 0, "LOC: New York": 2 / 3}
    for answer, share in answers.items():
        assert entity_f1([answer], gold, [tokens], match="partial") == [pytest.approx(share)]
        assert entity_f1([answer], gold, [tokens]) == [0.0]
    # Two halves of one entity pay for one of them only: 2 * 8/13 / (2 + 1).
    assert entity_f1(["O B-LOC I-LOC B-LOC"], gold, [tokens], match="partial") == [pytest.approx(2 * 8 / 13 / 3)]
    assert entity_f1(["O B-LOC I-LOC I-LOC"], gold, [tokens], match="partial") == [1.0]


def test_numbers_of_tags_and_case():
    names = ["O", "B-PER", "I-PER"]
    assert entity_f1(["per: ada b"], [[1, 2]], [["Ada", "B"]], tags=names, ignore_case=True) == [1.0]
    assert entity_f1(["per: ada b"], [[1, 2]], [["Ada", "B"]], tags=names) == [0.0]


@pytest.mark.parametrize(
    ("gold", "tokens", "words"),
    [
        ([1, 0], ["a", "b"], "the option tags must list the names"),
        (["B-A"], ["a", "b"], "1 tags for 2 entries of the column tokens"),
        (["O", "I-A"], ["a", "b"], "the tag I-A follows O; tags must be IOB2"),
        (["B-A", "O"], None, "2 tags for 0 entries"),
        ([{"start": 0, "end": 9, "label": "A"}], ["a"], "is not in the text of 1 characters"),
        ([{"text": "a"}], ["a"], "has no label"),
        (["a"], "a", "the column tokens must hold a list of texts"),
        (3, ["a"], "it must be a list of entities, not a int"),
        ("what", ["a"], "does not have the form LABEL: text"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(gold, tokens, words):
    with pytest.raises(ValueError) as caught:
        entity_f1(["none"] * 2, [None, gold], None if tokens is None else [None, tokens])
    message = str(caught.value)
    assert message.startswith("column entities, row 1 cannot be used: ") and words in message and "\n" not in message


RELATIONS = [{"head": "Ada", "relation": "born in", "tail": "London"}, ["Ada", "spouse", "Will King"]]


@pytest.mark.parametrize("write", [json.dumps, lambda rows: "- Ada | born in | London\n2. Ada |Spouse| Will  King"])
@pytest.mark.parametrize("gold", [RELATIONS, json.dumps(RELATIONS), "Ada | born in | London\nAda | spouse | Will King"])
def test_relations_in_each_form(write, gold):
    assert relation_f1([write(RELATIONS)], [gold]) == [1.0]
    assert relation_f1(["Ada | born in | London"], [gold]) == [pytest.approx(2 / 3)]
    assert relation_f1(["Ada | born in | London\n" * 2], [gold]) == [pytest.approx(0.5)]
    assert relation_f1(["Ada | born in | London\nSo?", "", "none"], [gold] * 3) == [0.0] * 3
    swapped = "London | born in | Ada\nWill King | spouse | Ada"
    assert relation_f1([swapped], [gold]) == [0.0]
    assert relation_f1([swapped], [gold], symmetric=["spouse"]) == [0.5]
    assert relation_f1(["Ada | spouse | King"], [gold], match="partial") == [pytest.approx(2 * 0.75 / 3)]
    assert relation_f1(["none", "none"], [[], None]) == [1.0, None]


def test_labels_of_head_and_tail_must_match_where_they_are_given():
    head, tail = {"text": "Ada", "label": "PER"}, {"text": "London", "label": "LOC"}
    gold = [[{"head": head, "relation": "born in", "tail": tail}]]
    good = json.dumps(gold[0])
    assert relation_f1([good], gold) == [1.0]
    assert relation_f1([good.replace("LOC", "ORG")], gold) == relation_f1(["Ada | born in | London"], gold) == [0.0]
    with pytest.raises(ValueError, match=r"\Acolumn relations, row 0 cannot be used: [^\n]*\Z"):
        relation_f1(["none"], [["a | b"]])


def test_options_are_checked_when_the_reward_is_built():
    for options in ({"format": "xml"}, {"match": "loose"}, {"tags": "O"}):
        with pytest.raises(Exception, match=f"ppo.reward.function: .*{next(iter(options))}"):
            FunctionReward("jaxrlhf.rewards.library:entity_f1", "ppo.reward.function", options)
