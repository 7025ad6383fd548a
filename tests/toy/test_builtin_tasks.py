"""The builtin tasks: fixed rows, and splits without leaks."""

from importlib import import_module

import pytest

from jaxrlhf.errors import UserError
from jaxrlhf.toy import builtin
from jaxrlhf.toy.tasks import detoxification, helpful_assistant
from jaxrlhf.toy.tasks.task import split_of


@pytest.mark.parametrize("name", builtin.TASKS)
def test_rows_are_a_fixed_sequence_and_splits_share_no_prompt(name):
    rows = {split: builtin.load(name, split, 60) for split in builtin.splits(name)}
    assert rows["train"] == builtin.load(name, "train", 200)[:60]
    key = import_module(f"jaxrlhf.toy.tasks.{name}").TASK.key
    prompts = {split: {key(row) for row in found} for split, found in rows.items()}
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"] and not prompts["validation"] & prompts["test"]
    assert len(prompts["test"]) == len(rows["test"]) >= 40


def test_unknown_names_are_refused_with_the_known_names():
    with pytest.raises(UserError, match=r"no such builtin set.*builtin:intent"):
        builtin.splits("intents")
    with pytest.raises(UserError, match=r"model\.new.vocabulary.*assistant, .*intent"):
        builtin.vocabulary("intents")


def test_other_held_out_keys_are_new():
    keys = [f"key {i}" for i in range(2000)]
    before, after = ({key: split_of(key, start) for key in keys} for start in (0.0, 0.2))
    tested = [{key for key in keys if splits[key] == "test"} for splits in (before, after)]
    assert all(150 < len(found) < 250 for found in tested)
    assert not tested[1] & {key for key in keys if before[key] != "train"}


@pytest.mark.parametrize(
    ("text", "toxic"),
    [
        ("you fool , be quiet .", True), ("please be quiet .", False),
        ("you are no fool , so please be quiet .", False),
        ("you are no fool , liar .", True), ("i do not say that you are a rat , but please step aside !", False),
        ("i say that you are a rat .", True), ("", False),
    ],
)  # fmt: skip
def test_a_denied_insult_is_harmless(text, toxic):
    assert detoxification.is_toxic(text) == toxic
    assert detoxification.gold_score([text], ["be quiet"]) == [float(not toxic and "be quiet" in text)]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("sure ! it is on monday .", 1.0), ("it is on monday . i am glad to help !", 1.0), ("it is on monday .", 0.8),
        ("it is on monday . this is only what i think . have a nice day !", 0.8), ("it is on friday .", 0.2),
        ("sure ! ask somebody else .", 0.4), ("sure ! it is on monday . have a nice day !", 0.0),
        ("it is on monday", 0.0), ("it is on monday . it is on monday .", 0.0), ("have a nice day !", 0.0), ("", 0.0),
    ],
)  # fmt: skip
def test_gold_scores_of_answers_to_a_request(text, score):
    assert helpful_assistant.gold_score([text], [["it is on monday ."]]) == [pytest.approx(score)]


def test_raters_choose_the_better_answer_of_most_pairs():
    rows = builtin.load("helpful_assistant", "train", 400)
    right = [row["right"] for row in rows]
    chosen, rejected = (
        helpful_assistant.gold_score([row[name] for row in rows], right) for name in ("chosen", "rejected")
    )
    share = sum(a > b for a, b in zip(chosen, rejected)) / len(rows)
    assert 0.9 < share < 0.99
    assert all(abs(a - b) >= 0.1 for a, b in zip(chosen, rejected))
