"""Demonstrations: every form of row gives the same tokens, and every response token is learnt exactly once."""

import json

import numpy as np
import pytest

from jaxrlhf.config import DemonstrationsConfig
from jaxrlhf.data.sft import Example, SFTData, fill, load_demonstrations, pack
from jaxrlhf.data.tokenizers import build_word_tokenizer, load_tokenizer
from jaxrlhf.errors import UserError


def load(path, tokenizer, max_length=32, overflow="stop", **settings):
    return load_demonstrations(DemonstrationsConfig(path=path, **settings), tokenizer, max_length, overflow)


def whole(example):
    return example.prompt_ids.tolist(), example.response_ids.tolist()


# ---------------------------------------------------------------- forms


def test_prompt_and_response(jsonl, words):
    examples, report = load(jsonl([{"prompt": "a b", "response": "c d"}, {"prompt": "", "response": "c"}]), words)
    assert whole(examples[0]) == words.encode_pair("a b", "c d")
    assert whole(examples[1]) == ([1], words.encode_pair("", "c")[1])
    assert examples[1].where.endswith("rows.jsonl:2")
    assert (report.rows, report.cut, report.dropped) == (2, 0, {})


def test_fields_by_other_names(jsonl, words):
    path = jsonl([{"question": "a b", "answer": "c d"}])
    examples, _ = load(path, words, prompt_field="question", response_field="answer")
    assert whole(examples[0]) == words.encode_pair("a b", "c d")
    with pytest.raises(UserError, match=r"the row must have the fields 'prompt' and 'response'.*: question, answer"):
        load(path, words)
    with pytest.raises(UserError, match=r"rows.jsonl:1: the row has no field 'response'"):
        load(path, words, prompt_field="question")


def test_chat_learns_the_last_assistant_turn(jsonl, chat):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    examples, _ = load(jsonl([{"messages": turns}, {"messages": turns[:4]}]), chat)
    assert whole(examples[0]) == whole(examples[1]) == chat.encode_pair(turns[:3], turns[3])
    for wrong in (turns[:1], turns[1:2]):
        with pytest.raises(UserError, match=r"rows.jsonl:1: .*must have an assistant turn after the first message"):
            load(jsonl([{"messages": wrong}]), chat)


def test_prompt_and_response_as_chats(jsonl, chat):
    prompt, response = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    rows = [
        {"prompt": prompt, "response": "b"},
        {"prompt": prompt, "response": response},
        {"prompt": "a", "response": response[0]},
    ]
    examples, _ = load(jsonl(rows), chat)
    assert [whole(example) for example in examples] == [chat.encode_pair(prompt, "b")] * 3


def test_plain_text_is_all_learnt(jsonl, words):
    examples, _ = load(jsonl([{"text": "a b c"}]), words)
    assert whole(examples[0]) == ([1], [*words.encode_prompt("a b c")[1:], 2])


def test_form_is_the_first_rows_and_the_settings_choose(jsonl, words):
    row = {"prompt": "a", "response": "b", "text": "c"}
    assert whole(load(jsonl([row]), words)[0][0]) == words.encode_pair("a", "b")
    assert whole(load(jsonl([row]), words, text_field="text")[0][0]) == words.encode_pair("", "c")
    with pytest.raises(UserError, match=r"rows.jsonl:2: the row has no field 'prompt'; the row's fields are: text"):
        load(jsonl([row, {"text": "c"}]), words)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 3, "response": "b"}, "field 'prompt' must be text or a list of chat messages, not the number 3"),
        ({"prompt": "a", "response": " "}, "field 'response' is empty"),
        ({"prompt": "a", "respnse": "b"}, "'response'; the row's fields are: prompt, respnse; did you mean 'respnse'"),
        ({"text": 1}, "no field 'prompt'; the row's fields are: text"),
        ({"prompt": [{"role": "user", "content": "a"}], "response": "b"}, "no chat template"),
    ],
)
def test_rows_that_cannot_be_used(jsonl, words, row, message):
    with pytest.raises(UserError) as caught:
        load(jsonl([{"prompt": "a", "response": "b"}, row]), words)
    assert "rows.jsonl:2: " in str(caught.value) and message in str(caught.value)


def test_the_response_by_the_name_that_trl_gives_it(jsonl, words, chat):
    text = {"prompt": "a b", "completion": "c d"}
    assert whole(load(jsonl([text]), words)[0][0]) == words.encode_pair("a b", "c d")
    roles = {"prompt": "user", "completion": "assistant"}
    turns = {name: [{"role": role, "content": name[0]}] for name, role in roles.items()}
    assert whole(load(jsonl([turns]), chat)[0][0]) == chat.encode_pair(turns["prompt"], "c")
    both = text | {"response": "e"}
    assert whole(load(jsonl([both]), words)[0][0]) == words.encode_pair("a b", "e")
    with pytest.raises(UserError, match=r"rows.jsonl:1: the row has no field 'response'"):
        load(jsonl([text]), words, response_field="response")  # what is named is meant


def test_a_chat_whose_answer_is_empty(jsonl, chat):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]
    for row in ({"messages": turns}, {"prompt": "a", "response": turns[1:]}):
        with pytest.raises(UserError, match=r"rows.jsonl:1: field '\w+' has an empty response"):
            load(jsonl([row]), chat)


# ---------------------------------------------------------------- rows that cannot be used


GOOD = {"prompt": "a", "response": "b"}
UNUSABLE = [GOOD | {"response": ""}, GOOD, GOOD | {"response": None}, GOOD | {"response": " "}, {"prompt": "a"}, GOOD]


def test_unusable_rows_stop_or_are_dropped_and_counted(jsonl, words):
    path = jsonl(UNUSABLE)
    for settings in ({"unusable": "drop"}, {"overflow": "drop"}, {"overflow": "cut", "unusable": "drop"}):
        examples, report = load(path, words, **settings)
        assert [e.where.rpartition(":")[2] for e in examples] == ["2", "6"] and (report.rows, report.kept) == (6, 2)
        assert list(report.dropped.values()) == [2, 1, 1]
        assert "2 dropped (field 'response' is empty; first " in str(report) and ":1), 1 dropped (" in str(report)
    for settings in ({}, {"overflow": "cut"}, {"overflow": "drop", "unusable": "stop"}):
        with pytest.raises(UserError, match=r"rows.jsonl:1: field 'response' is empty"):
            load(path, words, **settings)


def test_nothing_left_says_why(jsonl, words):
    with pytest.raises(UserError, match=r"none of the 2 rows .*: 2 field 'response' is empty; first .*rows.jsonl:1$"):
        load(jsonl([GOOD | {"response": ""}] * 2), words, unusable="drop")
    chat = {"prompt": [{"role": "user", "content": "a"}], "response": "b"}
    with pytest.raises(UserError, match=r"none of the 1 rows .*: 1 chat messages need .*, but .* has no chat template"):
        load(jsonl([chat]), words, unusable="drop")


def test_with_drop_most_rows_decide_the_form(jsonl, words):
    rows = [{"prompt": None, "response": None, "text": "c"}, GOOD | {"text": None}, GOOD | {"text": "x"}]
    examples, report = load(jsonl(rows), words, unusable="drop")
    assert [whole(e) for e in examples] == [words.encode_pair("a", "b")] * 2 and report.kept == 2
    with pytest.raises(UserError, match=r"rows.jsonl:2: field 'text' is null"):
        load(jsonl(rows), words)


def test_what_a_template_refuses_is_dropped(jsonl):
    pytest.importorskip("jinja2")
    strict = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system; sorry') }}{% endif %}"
        "{{ m.content + ' ' }}{% endfor %}"
    )
    tokenizer = build_word_tokenizer(["a", "b"], chat_template=strict)
    roles = {"system": "a", "user": "a", "assistant": "b"}
    turns = [{"role": role, "content": content} for role, content in roles.items()]
    examples, report = load(jsonl([{"messages": turns}, {"messages": turns[1:]}]), tokenizer, unusable="drop")
    assert len(examples) == 1
    assert list(report.dropped) == ["the chat template of word tokenizer refuses this chat: no system"]
    assert next(iter(report.first.values())).endswith("rows.jsonl:1")


# ---------------------------------------------------------------- overflow


@pytest.fixture
def long(jsonl):
    return jsonl(
        [
            {"prompt": "a b", "response": "c d e f"},  # 3 + 5
            {"prompt": "a b c d e", "response": "f"},  # 6 + 2
            {"prompt": "a", "response": "b"},  # 2 + 2
        ]
    )


def test_overflow_cut(long, words):
    examples, report = load(long, words, max_length=6, overflow="cut")
    prompt, response = words.encode_pair("a b", "c d e f")
    assert [whole(e) for e in examples] == [(prompt, response[:3]), words.encode_pair("a", "b")]
    assert report.cut == 1 and sum(report.dropped.values()) == 1
    assert "no room for a response" in str(report)


def test_overflow_drop(long, words):
    examples, report = load(long, words, max_length=6, overflow="drop")
    assert [whole(e) for e in examples] == [words.encode_pair("a", "b")]
    assert report.cut == 0 and sum(report.dropped.values()) == 2
    with pytest.raises(UserError, match="none of the 3 rows can be used: 3 longer than 3 tokens"):
        load(long, words, max_length=3, overflow="drop")


def test_overflow_stop(long, words):
    assert len(load(long, words, max_length=8, overflow="stop")[0]) == 3
    with pytest.raises(UserError, match=r":1: the row has 8 tokens \(prompt 3, response 5\), but max_length is 7"):
        load(long, words, max_length=7, overflow="stop")


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("seed", range(5))
def test_packing_holds_everything_tightly(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 101, size=rng.integers(1, 300)).tolist()
    bins = pack(lengths, 100)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 100 for b in bins)
    # What opened a bin fitted none of those before it.
    fill_levels = [sum(lengths[i] for i in b) for b in bins]
    for place in range(1, len(bins)):
        assert min(fill_levels[:place]) + lengths[bins[place][0]] > 100
    assert bins == pack(lengths, 100)


def test_packing_knows_perfect_fits():
    assert [sorted(b) for b in pack([5, 3, 7, 5], 10)] == [[1, 2], [0, 3]]
    assert pack([10, 10], 10) == [[0], [1]]
    with pytest.raises(ValueError, match="length 11"):
        pack([11], 10)


def examples_of(sizes):
    """Token ids that say where they come from: 1000 i + position."""
    made = []
    for i, (p, r) in enumerate(sizes):
        ids = np.arange(p + r, dtype=np.int32) + 1000 * (i + 1)
        made.append(Example(ids[:p], ids[p:], f"row {i}"))
    return made


def test_fill_by_hand():
    batch = fill(examples_of([(2, 1), (0, 2)]), [[0, 1], [1]], rows=3, length=6, pad_id=None)
    np.testing.assert_array_equal(
        batch.tokens, [[1000, 1001, 1002, 2000, 2001, 0], [2000, 2001, 0, 0, 0, 0], [0] * 6]
    )
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0], [0] * 6])
    # Token 2000 begins a segment: nothing stands before it, so nothing can learn to say it.
    np.testing.assert_array_equal(batch.loss_mask.astype(int), [[0, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6])


@pytest.mark.parametrize("packing", [True, False])
def test_each_response_token_is_learnt_once_an_epoch(packing):
    rng = np.random.default_rng(0)
    examples = examples_of(rng.integers(1, 16, size=(101, 2)))
    data = SFTData(examples, batch_size=4, max_length=30, seed=1, packing=packing, pad_id=7)
    want = sorted(int(t) for e in examples for t in e.response_ids)
    firsts = []
    for epoch in range(2):
        batches = [data.batch(step) for step in range(epoch * len(data), (epoch + 1) * len(data))]
        learnt = np.concatenate([b.tokens[b.loss_mask] for b in batches])
        assert sorted(learnt.tolist()) == want
        real = np.concatenate([b.tokens[b.segments > 0] for b in batches])
        assert len(real) == sum(map(len, examples))
        assert all((b.tokens[b.segments == 0] == 7).all() for b in batches)
        firsts.append(learnt.tolist())
        for b in batches:
            assert b.tokens.shape == b.segments.shape == b.loss_mask.shape
            assert b.tokens.shape[0] == 4 and b.tokens.dtype == b.segments.dtype == np.int32
            # A segment is one example, whole and in order.
            for row, segments in zip(b.tokens, b.segments):
                for s in range(1, segments.max() + 1):
                    ids = row[segments == s]
                    assert len(ids) == len(examples[ids[0] // 1000 - 1]) and (np.diff(ids) == 1).all()
    assert firsts[0] != firsts[1]
    shapes = {data.batch(step).tokens.shape for step in range(len(data))}
    assert shapes == {(4, 30)} if packing else 1 < len(shapes) <= 4
    evaluated = np.concatenate([b.tokens[b.loss_mask] for b in data.all_batches()])
    assert sorted(evaluated.tolist()) == want and len(data.all_batches()) == len(data)


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_depends_on_seed_and_step_alone(packing):
    examples = examples_of([(1 + i % 5, 1 + i % 7) for i in range(40)])
    one, two, other = (SFTData(examples, 4, 16, seed, packing) for seed in (3, 3, 4))
    for step in (9, 0, 23):
        for name in ("tokens", "segments", "loss_mask"):
            np.testing.assert_array_equal(getattr(one.batch(step), name), getattr(two.batch(step), name))
    assert any((one.batch(s).tokens.tolist() != other.batch(s).tokens.tolist()) for s in range(3))


def test_fewer_examples_than_a_batch():
    for packing in (True, False):
        data = SFTData(examples_of([(2, 2)]), 8, 16, 0, packing)
        assert len(data) == 1
        batch = data.batch(5)
        assert batch.tokens.shape[0] == 8 and (batch.segments > 0).sum() == 4 and batch.loss_mask.sum() == 2


def test_real_stories(texts, stories260k):
    tokenizer = load_tokenizer(str(stories260k))
    path = str(texts / "tinystories.jsonl")
    examples, report = load(path, tokenizer, max_length=512, overflow="cut", limit=300)
    assert report.kept == len(examples) == 300 and 0 < report.cut < 300
    with open(path) as file:
        first = json.loads(file.readline())["text"]
    assert examples[0].prompt_ids.tolist() == [1]
    assert tokenizer.decode(examples[0].response_ids) == first and examples[0].response_ids[-1] == 2
    data = SFTData(examples, 8, 512, 0, pad_id=tokenizer.pad_id)
    learnt = sum(int(data.batch(step).loss_mask.sum()) for step in range(len(data)))
    assert learnt == sum(len(e.response_ids) for e in examples)
