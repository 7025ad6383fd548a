"""Pairs: the prompt is the same on both sides whatever the form, and every pair counts once."""


import numpy as np
import pytest

from jaxrlhf.config import PreferencesConfig
from jaxrlhf.data.preferences import Pair, PreferenceData, load_preferences
from jaxrlhf.data.tokenizers import load_tokenizer
from jaxrlhf.errors import UserError


def load(path, tokenizer, max_length=64, overflow="stop", **settings):
    return load_preferences(PreferencesConfig(path=path, **settings), tokenizer, max_length, overflow)


def joint(tokenizer, prompt, answer):
    prompt_ids, answer_ids = tokenizer.encode_pair(prompt, answer)
    return prompt_ids + answer_ids


def sides(pair):
    return pair.chosen_ids.tolist(), pair.rejected_ids.tolist()


# ---------------------------------------------------------------- forms


def test_prompt_chosen_rejected(jsonl, words):
    rows = [
        {"prompt": "a b", "chosen": "c", "rejected": "d e", "margin": 2},
        {"prompt": "", "chosen": "a", "rejected": "b"},
    ]
    pairs, report = load(jsonl(rows), words)
    assert sides(pairs[0]) == (joint(words, "a b", "c"), joint(words, "a b", "d e"))
    assert [p.margin for p in pairs] == [2.0, 0.0] and len(pairs[0]) == 6
    assert pairs[1].where.endswith("rows.jsonl:2") and report.kept == 2


def test_dialogues_in_one_text(jsonl, words):
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    rows = [
        {"chosen": start + " hello there d", "rejected": start + " hello my"},
        {"chosen": start + " d", "rejected": start + " d\n\nHuman: e\n\nAssistant: f"},
        {"chosen": start + " d\n\nHuman: e\n\nAssistant: f", "rejected": start + " e\n\nHuman: e\n\nAssistant: g"},
    ]
    pairs, _ = load(jsonl(rows), words)
    for pair, row in zip(pairs, rows):
        assert sides(pair) == tuple(joint(words, start, row[s][len(start) :]) for s in ("chosen", "rejected"))


def test_texts_that_are_no_dialogues(jsonl, words):
    with pytest.raises(UserError, match=r"rows.jsonl:1: the row has no field 'prompt', .* are: chosen, rejected"):
        load(jsonl([{"chosen": "a b", "rejected": "a c"}]), words)


def turn(role, content):
    return {"role": role, "content": content}


def test_chat_forms_agree(jsonl, chat):
    prompt, good, bad = [turn("user", "hello")], turn("assistant", "b"), turn("assistant", "c")
    rows = [
        {"prompt": prompt, "chosen": [good], "rejected": [bad]},
        {"prompt": prompt, "chosen": "b", "rejected": "c"},
        {"prompt": prompt, "chosen": [*prompt, good], "rejected": [*prompt, bad]},
        {"prompt": "hello", "chosen": [*prompt, good], "rejected": [*prompt, bad]},
        {"chosen": [*prompt, good], "rejected": [*prompt, bad]},
    ]
    pairs, _ = load(jsonl(rows), chat)
    for pair in pairs:
        assert sides(pair) == (joint(chat, prompt, "b"), joint(chat, prompt, "c"))


def test_whole_chats_split_at_the_last_common_question(jsonl, chat):
    common = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    rows = [
        {"chosen": [*common, turn("assistant", "d")], "rejected": [*common, turn("assistant", "e")]},
        # They part at a question: the answer before it is part of what is compared.
        {"chosen": [*common, turn("assistant", "d")], "rejected": [*common[:2], turn("user", "f")]},
        {"chosen": common[:2], "rejected": [*common, turn("assistant", "d")]},
    ]
    pairs, _ = load(jsonl(rows), chat)
    assert sides(pairs[0]) == (joint(chat, common, "d"), joint(chat, common, "e"))
    assert sides(pairs[1])[0] == joint(chat, common[:1], [*common[1:], turn("assistant", "d")])
    assert sides(pairs[2])[0] == joint(chat, common[:1], "b")
    for wrong in ([turn("user", "x")], [turn("assistant", "b")]):
        with pytest.raises(UserError, match=r"rows.jsonl:1: .*have no common turn"):
            load(jsonl([{"chosen": common, "rejected": wrong}]), chat)


def test_a_text_prompt_beside_whole_chats(jsonl, chat):
    """The chat's own turns are the prompt, whatever stands before the prompt field's turn and around its text."""
    short, hello = turn("system", "my"), turn("user", "hello")
    before = [turn("user", "a"), turn("assistant", "b")]
    openings = [[short, hello], [*before, hello], [hello], [short, *before, hello], [turn("user", "hello ")]]
    for opening in openings:
        sides_of = {"chosen": [*opening, turn("assistant", "c")], "rejected": [*opening, turn("assistant", "d")]}
        for prompt in ("hello", " hello\n", [hello], [turn("user", [{"type": "text", "text": "hello"}])]):
            (pair,), _ = load(jsonl([{"prompt": prompt} | sides_of]), chat)
            assert sides(pair) == (joint(chat, opening, "c"), joint(chat, opening, "d"))
            assert pair.chosen_ids.tolist() == next(chat.encode_chats([sides_of["chosen"]]))
    other = [turn("user", "hello "), turn("assistant", "d")]  # the same question but for a blank: the chosen one's
    (pair,), _ = load(jsonl([{"prompt": "hello", "chosen": [hello, turn("assistant", "c")], "rejected": other}]), chat)
    assert sides(pair) == (joint(chat, [hello], "c"), joint(chat, [hello], "d"))
    whole = [hello, turn("assistant", "c")]
    (pair,), _ = load(jsonl([{"prompt": "", "chosen": whole, "rejected": other}]), chat)
    assert sides(pair)[0] == joint(chat, [hello], "c")


def test_answers_of_several_turns(jsonl, chat):
    prompt, answer = [turn("user", "a")], [turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    worse = [turn("assistant", "e"), *answer[1:]]
    rows = [
        {"prompt": "a", "chosen": answer, "rejected": worse},
        {"prompt": prompt, "chosen": answer, "rejected": worse},
        {"prompt": prompt, "chosen": [*prompt, *answer], "rejected": [*prompt, *worse]},
    ]
    pairs, _ = load(jsonl(rows), chat)
    for pair in pairs:
        assert sides(pair) == tuple(next(chat.encode_chats([[*prompt, *side]])) for side in (answer, worse))


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "message"),
    [
        ("x", "user:a assistant:b", "user:a assistant:c", "the chat in field 'chosen' begins with a turn of user"),
        ("a", "user:a assistant:b", "user:x assistant:c", "only one of chosen and rejected contains the prompt"),
        ("a", "user:a assistant:b", "assistant:c", "one of chosen and rejected contains the prompt"),
        ("a", "assistant:b", "user:x assistant:c", "the chat in field 'rejected' begins with a turn of user"),
        ("a", "system:b user:a assistant:b", "system:c user:a assistant:c", "have no common turn"),
        ("a", "user:b assistant:b user:a assistant:b", "user:b assistant:c user:a assistant:c", "differ within"),
        ("a", "assistant:", "assistant:c", "'chosen' has an empty response"),
    ],
)
def test_mixed_rows_that_cannot_be_used(jsonl, chat, prompt, chosen, rejected, message):
    row = {"prompt": prompt} | {
        name: [turn(*part.split(":")) for part in side.split()]
        for name, side in (("chosen", chosen), ("rejected", rejected))
    }
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(UserError) as caught:
        load(jsonl([good, row]), chat)
    assert "rows.jsonl:2: " in str(caught.value) and message in str(caught.value)
    pairs, report = load(jsonl([good, row]), chat, unusable="drop")
    assert len(pairs) == 1 and list(report.first.values()) == [str(caught.value).split(": ")[0]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' must be text or a list of chat messages, not the"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "field 'chosen' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "field 'rejected' is null"),
        ({"prompt": "a", "chosen": "b", "reject": "c"}, "the row's fields are: prompt, chosen, reject; did"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, "must be a finite float32 number, not"),
        ({"chosen": "b", "rejected": [{"role": "user", "content": "a"}]}, "one of chosen and rejected is text"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(jsonl, words, row, message):
    with pytest.raises(UserError) as caught:
        load(jsonl([{"prompt": "a", "chosen": "b", "rejected": "c"}, row]), words)
    assert "rows.jsonl:2: " in str(caught.value) and message in str(caught.value)


def test_equal_answers_are_dropped_and_counted(jsonl, words):
    same = {"prompt": "a", "chosen": "b", "rejected": " b"}
    pairs, report = load(jsonl([same, {"prompt": "a", "chosen": "b", "rejected": "c"}, same]), words)
    assert len(pairs) == 1 and report.dropped == {"chosen and rejected are equal": 2}
    with pytest.raises(UserError, match="none of the 1 rows can be used: 1 chosen and rejected are equal"):
        load(jsonl([same]), words)


# ---------------------------------------------------------------- overflow


ROWS = [
    {"prompt": "a b c d", "chosen": "e", "rejected": "f g"},  # 5 + 3
    {"prompt": "a", "chosen": "b c d e f g h", "rejected": "b"},  # 2 + 8
    {"prompt": "a", "chosen": "b", "rejected": "c"},  # 2 + 2
]


def test_overflow_cut_takes_the_same_off_both_prompts(jsonl, words):
    pairs, report = load(jsonl(ROWS), words, max_length=6, overflow="cut")
    assert sides(pairs[0]) == (joint(words, "c d", "e"), joint(words, "c d", "f g"))
    assert sides(pairs[1]) == (joint(words, "a", "b"), joint(words, "a", "c"))
    assert report.cut == 1 and report.dropped == {"the response leaves no room for a prompt in 6 tokens": 1}


def test_overflow_drop_and_stop(jsonl, words):
    pairs, report = load(jsonl(ROWS), words, max_length=6, overflow="drop")
    assert len(pairs) == 1 and report.dropped == {"longer than 6 tokens": 2}
    with pytest.raises(UserError, match=r"the pair has 8 tokens \(prompt 5, longer response 3\), but max_length is 6"):
        load(jsonl(ROWS), words, max_length=6, overflow="stop")
    with pytest.raises(UserError, match="none of the 3 rows can be used"):
        load(jsonl(ROWS), words, max_length=3, overflow="drop")


# ---------------------------------------------------------------- batches


def pairs_of(count, seed=0):
    """Ids that say where they come from: 1000 i + position; rejected ones negative."""
    rng = np.random.default_rng(seed)
    made = []
    for i, (c, r) in enumerate(rng.integers(1, 61, size=(count, 2))):
        first = 1000 * (i + 1)
        made.append(Pair(first + np.arange(c, dtype=np.int32), -first - np.arange(r, dtype=np.int32), i / 10, ""))
    return made


def check(batch, pairs):
    """All rows hold whole pairs; gives the numbers of those that count."""
    numbers = batch.chosen[:, 0] // 1000 - 1
    for row, number in enumerate(numbers):
        pair = pairs[number]
        for ids, mask, want in (
            (batch.chosen, batch.chosen_mask, pair.chosen_ids),
            (batch.rejected, batch.rejected_mask, pair.rejected_ids),
        ):
            np.testing.assert_array_equal(ids[row][mask[row]], want)
            assert mask[row, : len(want)].all() and (ids[row][~mask[row]] == 9).all()
        assert batch.margin[row] == np.float32(pair.margin)
    return numbers[batch.weight == 1].tolist()


def test_each_pair_counts_once_an_epoch():
    pairs = pairs_of(107)
    data = PreferenceData(pairs, batch_size=8, max_length=60, seed=2, buckets=4, pad_id=9)
    orders = []
    for epoch in range(2):
        batches = [data.batch(step) for step in range(epoch * len(data), (epoch + 1) * len(data))]
        orders.append([number for batch in batches for number in check(batch, pairs)])
        assert sorted(orders[-1]) == list(range(107))
        assert all(batch.chosen.shape == batch.rejected.shape for batch in batches)
    assert orders[0] != orders[1]
    shapes = {data.batch(step).chosen.shape for step in range(len(data))}
    assert len(shapes) == 4 and all(b == 8 and (length % 8 == 0 or length == 60) for b, length in shapes)
    counted = [number for batch in data.all_batches() for number in check(batch, pairs)]
    assert sorted(counted) == list(range(107))
    assert all(set(np.unique(batch.weight)) <= {0.0, 1.0} for batch in data.all_batches())


def test_a_batch_depends_on_seed_and_step_alone():
    pairs = pairs_of(50)
    one, two, other = (PreferenceData(pairs, 4, 64, seed, pad_id=9) for seed in (1, 1, 2))
    for step in (30, 0, 7):
        np.testing.assert_array_equal(one.batch(step).chosen, two.batch(step).chosen)
    assert [check(one.batch(s), pairs) for s in range(5)] != [check(other.batch(s), pairs) for s in range(5)]


def test_fewer_pairs_than_a_batch_make_one_bucket():
    pairs = pairs_of(3)
    data = PreferenceData(pairs, 8, 64, 0, buckets=4, pad_id=9)
    assert len(data) == 1
    batch = data.batch(0)
    assert sorted(check(batch, pairs)) == [0, 1, 2] and batch.weight.tolist() == [1.0] * 3 + [0.0] * 5
    assert batch.chosen_mask.any(axis=1).all()  # what fills up is real too: no score is taken of nothing


def test_real_pairs(texts, stories260k):
    tokenizer = load_tokenizer(str(stories260k))
    pairs, report = load(str(texts / "preferences.jsonl"), tokenizer, 128, "cut")
    assert report.rows == 300 and report.dropped["chosen and rejected are equal"] == 2
    assert "\n" not in str(report)
    for pair in pairs:
        assert pair.chosen_ids[0] == pair.rejected_ids[0] == 1
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == 2
        assert len(pair) <= 128
