"""The builtin tasks: fixed rows, and splits without leaks."""

from importlib import import_module

import pytest

from jaxrlhf.errors import UserError
from jaxrlhf.toy import builtin


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
