"""The builtin tasks: fixed rows, splits without leaks, known words, and a best score that the demonstrations reach."""

import pytest

from jaxrlhf.errors import UserError
from jaxrlhf.toy import builtin


def texts(value):
    """Every text of a row's prompts, responses and messages."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return texts(value["content"]) if isinstance(value, dict) else []


@pytest.mark.parametrize("name", builtin.TASKS)
def test_rows_are_a_fixed_sequence_and_splits_share_no_prompt(name):
    rows = {split: builtin.load(name, split, 60) for split in builtin.splits(name)}
    assert rows["train"] == builtin.load(name, "train", 200)[:60]
    prompts = {split: {str(row.get("prompt", row.get("messages"))) for row in found} for split, found in rows.items()}
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"] and not prompts["validation"] & prompts["test"]
    assert len(prompts["test"]) == len(rows["test"]) >= 40


@pytest.mark.parametrize("name", builtin.TASKS)
def test_the_vocabulary_has_every_word(name):
    words, _ = builtin.vocabulary(name)
    assert len(set(words)) == len(words) <= 1000
    for row in builtin.load(name, "train", 200) + builtin.load(name, "test", 60):
        for field in ("prompt", "response", "chosen", "rejected", "messages"):
            for text in texts(row.get(field)):
                assert set(text.split()) <= set(words), text


def test_unknown_names_are_refused_with_the_known_names():
    with pytest.raises(UserError, match=r"no such builtin set.*builtin:intent"):
        builtin.splits("intents")
    with pytest.raises(UserError, match=r"model\.new.vocabulary.*assistant, .*intent"):
        builtin.vocabulary("intents")
