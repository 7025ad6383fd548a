"""Mixtures of sources: shares of a pass, one form per source, and settings that do not fit each other."""

import collections

import pytest
from pydantic import ValidationError

from jaxrlhf.config import DemonstrationsConfig, PreferencesConfig, PromptsConfig
from jaxrlhf.data.mixture import repeats
from jaxrlhf.data.preferences import load_preferences
from jaxrlhf.data.prompts import load_prompts
from jaxrlhf.data.sft import load_demonstrations
from jaxrlhf.errors import UserError


def counts(weights, epochs, sizes):
    return [collections.Counter(rows.tolist()) for rows in repeats(weights, epochs, sizes)]


def test_epochs_repeat_rows_and_take_a_part_of_them():
    whole, double, half, some = counts([None] * 4, [None, 2.0, 0.5, 1.25], [10, 3, 10, 8])
    assert whole == {i: 1 for i in range(10)} and double == {i: 2 for i in range(3)}
    assert half.total() == 5 and set(half.values()) == {1}
    assert some.total() == 10 and sorted(some.values()) == [1] * 6 + [2] * 2
    assert counts([None], [0.01], [10])[0].total() == 1


def test_weights_are_shares_and_every_row_appears():
    large, small = counts([3.0, 1.0], [None, None], [10, 100])
    assert small == {i: 1 for i in range(100)} and large == {i: 30 for i in range(10)}
    first, second = counts([1.0, 1.0], [None, None], [10, 13])
    assert first.total() == second.total() == 13 and sorted(first.values()) == [1] * 7 + [2] * 3


def test_sources_of_different_forms(jsonl, chat):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    config = DemonstrationsConfig(
        path=jsonl([{"messages": turns}], "chats.jsonl"),
        mix_with=[
            {"path": jsonl([{"question": "c", "answer": "d"}] * 2, "pairs.jsonl"), "prompt_field": "question",
             "response_field": "answer", "epochs": 2.0},
            {"path": jsonl([{"text": "e", "label": 1}], "labels.jsonl"), "template": "{{ text }} :",
             "response_template": "{{ 'ab'[label] }}"},
        ],
    )  # fmt: skip
    examples, report = load_demonstrations(config, chat, 32, "stop")
    alone = [load_demonstrations(DemonstrationsConfig(**source), chat, 32, "stop")[0] for source in (
        {"path": config.path},
        config.mix_with[0].model_dump(exclude_unset=True),
        config.mix_with[1].model_dump(exclude_unset=True),
    )]  # fmt: skip
    wanted = [alone[0][0], alone[1][0], alone[1][0], alone[1][1], alone[1][1], alone[2][0]]
    assert [e.prompt_ids.tolist() + e.response_ids.tolist() for e in examples] == [
        e.prompt_ids.tolist() + e.response_ids.tolist() for e in wanted
    ]
    assert str(report).endswith("labels.jsonl: 4 of 4 rows, a pass has 1 + 4 + 1 rows")


def test_preferences_and_prompts_are_mixed_too(jsonl, words):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    config = PreferencesConfig(path=jsonl([pair], "a.jsonl"), mix_with=[{"path": jsonl([pair] * 2, "b.jsonl")}])
    assert len(load_preferences(config, words, 16, "stop")[0]) == 3
    easy = jsonl([{"prompt": "a", "level": 3}, {"prompt": "b", "level": 1}], "easy.jsonl")
    hard = jsonl([{"prompt": "c"}], "hard.jsonl")
    config = PromptsConfig(path=easy, curriculum="level", weight=2.0, mix_with=[{"path": hard, "weight": 1.0}])
    prompts = load_prompts(config, words, 16, "stop")
    assert prompts.texts == ["a", "b", "c"] and prompts.keys.tolist() == [3, 1, 0]
    assert prompts.rows(0, 0, 3).tolist() == [2, 1, 0]
    with pytest.raises(UserError, match=r"hard.jsonl:1: the row has no field 'level'"):
        load_prompts(PromptsConfig(path=hard, curriculum="level"), words, 16, "stop")


def test_a_weight_that_would_fill_the_memory_is_refused():
    with pytest.raises(UserError, match="would have 3,000,000,001 rows, but at most 100,000,000 are allowed"):
        repeats([1.0, 3e9], [None, None], [1, 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1.0}, "weight has no effect without other sources"),
        ({"weight": 1.0, "mix_with": [{"path": "b"}]}, "source 2 of the mixture has no weight"),
        ({"weight": 1.0, "mix_with": [{"path": "b", "epochs": 2.0}]}, "a mixture has either weight or epochs"),
        ({"mix_with": [{"path": "b", "mix_with": []}]}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValidationError, match=message):
        PromptsConfig(path="a.jsonl", **settings)
