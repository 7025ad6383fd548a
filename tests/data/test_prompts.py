"""Prompts: at the right edge, with their columns, in a stream that is a function of the step."""


import numpy as np
import pytest

from jaxrlhf.config import PromptsConfig
from jaxrlhf.data.chats import Chat
from jaxrlhf.data.prompts import left_pad, load_prompts
from jaxrlhf.data.tokenizers import build_word_tokenizer, load_tokenizer
from jaxrlhf.errors import UserError


def load(path, tokenizer, max_prompt_tokens=16, overflow="stop", **settings):
    return load_prompts(PromptsConfig(path=path, **settings), tokenizer, max_prompt_tokens, overflow)


def test_left_pad_by_hand():
    prompts = left_pad([[5], [6, 7, 8]], 4, 9)
    np.testing.assert_array_equal(prompts.tokens, [[9, 9, 9, 5], [9, 6, 7, 8]])
    np.testing.assert_array_equal(prompts.mask.astype(int), [[0, 0, 0, 1], [0, 1, 1, 1]])
    assert prompts.tokens.dtype == np.int32 and prompts.mask.dtype == bool
    assert left_pad([[5], [6, 7, 8]]).tokens.tolist() == [[0, 0, 5], [6, 7, 8]]
    for wrong in ([1, 2, 3], []):
        with pytest.raises(ValueError, match=r"prompt 0 must have 1 to 2 tokens, not"):
            left_pad([wrong], 2)


def test_text_prompts_and_their_columns(jsonl, words):
    rows = [{"prompt": "a b", "answer": 3, "note": None}, {"prompt": "", "answer": 4, "note": [1]}]
    prompts = load(jsonl(rows), words)
    assert [ids.tolist() for ids in prompts.ids] == [words.encode_prompt("a b"), [1]]
    assert prompts.texts == ["a b", ""]
    assert prompts.columns == [{"answer": 3, "note": None}, {"answer": 4, "note": [1]}]
    padded = prompts.padded([1, 0])
    assert padded.tokens.shape == (2, 16) and padded.mask.sum(1).tolist() == [1, 3]
    assert padded.tokens[1][padded.mask[1]].tolist() == words.encode_prompt("a b")
    assert prompts.chats == [None, None]


def test_chats_leave_out_the_last_answer(jsonl, chat):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    want = chat.encode_prompt(turns[:1])
    for rows in ([{"messages": turns}], [{"messages": turns[:1]}], [{"prompt": turns[:1]}]):
        prompts = load(jsonl(rows), chat)
        assert prompts.ids[0].tolist() == want
        assert prompts.texts == [chat.decode(want)]
        assert prompts.columns == rows  # a reward function sees the chat as it is
        assert prompts.chats == [Chat(turns[:1])]
    cut = load(jsonl([{"prompt": [{"role": "user", "content": "a " * 30}]}]), chat, overflow="cut")
    assert cut.chats[0].messages[0]["content"] == "a " * 30 and len(cut.ids[0]) == 16
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*no message before"):
        load(jsonl([{"messages": turns[1:]}]), chat)


def test_plain_text_gives_its_beginning(jsonl, words):
    prompts = load(jsonl([{"text": "a b c d"}, {"text": "a"}]), words, text_tokens=3)
    assert [ids.tolist() for ids in prompts.ids] == [words.encode_prompt("a b c"), words.encode_prompt("a")]
    assert prompts.texts == ["a b c", "a"]
    assert len(load(jsonl([{"text": "a " * 100}]), words, max_prompt_tokens=9).ids[0]) == 9  # BOS and 8


def test_form_is_the_first_rows_and_the_settings_choose(jsonl, words):
    row = {"prompt": "a", "text": "b c"}
    assert load(jsonl([row]), words).texts == ["a"]
    assert load(jsonl([row]), words, text_field="text").texts == ["b c"]
    assert load(jsonl([{"question": "a"}]), words, prompt_field="question").texts == ["a"]
    with pytest.raises(UserError, match=r":1: the row must have the field 'prompt', 'messages' or 'text'; .* question"):
        load(jsonl([{"question": "a"}]), words)
    with pytest.raises(UserError, match=r"rows.jsonl:2: the row has no field 'prompt'; the row's fields are: text"):
        load(jsonl([row, {"text": "c"}]), words)
    with pytest.raises(UserError, match=r"rows.jsonl:2: field 'prompt' must be text or .*, not the number 1"):
        load(jsonl([row, {"prompt": 1}]), words)


def test_unusable_prompts_are_dropped(jsonl, words):
    rows = [{"prompt": prompt, "n": n} for n, prompt in enumerate([3, "a", "a\ud83d", None, "b"])]
    for settings in ({"unusable": "drop"}, {"overflow": "drop"}):
        prompts = load(jsonl(rows), words, **settings)
        assert prompts.texts == ["a", "b"] and [column["n"] for column in prompts.columns] == [1, 4]
        assert prompts.report.kept == 2 and all(count == 1 for count in prompts.report.dropped.values())
    with pytest.raises(UserError, match=r"rows.jsonl:1: field 'prompt' must be text.*, not the number 3"):
        load(jsonl(rows), words, overflow="cut")


def test_an_empty_prompt_without_bos(jsonl, words):
    bare = build_word_tokenizer(["a", "b"])
    bare.prefix_ids = []
    path = jsonl([{"prompt": "a"}, {"prompt": ""}])
    with pytest.raises(UserError, match=r"rows.jsonl:2: the prompt is empty, and the tokenizer has no BOS"):
        load(path, bare)
    prompts = load(path, bare, unusable="drop")
    assert prompts.texts == ["a"] and next(iter(prompts.report.first.values())).endswith("rows.jsonl:2")


def test_overflow(jsonl, words):
    path = jsonl([{"prompt": "a b c d", "n": 0}, {"prompt": "a", "n": 1}])
    cut = load(path, words, max_prompt_tokens=3, overflow="cut")
    assert [ids.tolist() for ids in cut.ids] == [words.encode_prompt("c d"), words.encode_prompt("a")]
    assert cut.texts == ["c d", "a"] and cut.report.cut == 1 and cut.report.kept == 2
    drop = load(path, words, max_prompt_tokens=3, overflow="drop")
    assert drop.texts == ["a"] and drop.columns == [{"n": 1}] and drop.report.kept == 1
    with pytest.raises(UserError, match=r"rows.jsonl:1: the prompt has 5 tokens, but max_prompt_tokens is 3"):
        load(path, words, max_prompt_tokens=3, overflow="stop")
    for overflow in ("cut", "drop"):
        with pytest.raises(UserError, match="none of the 2 rows can be used"):
            load(path, words, max_prompt_tokens=1, overflow=overflow)


def test_the_stream_is_a_function_of_seed_and_step(jsonl, words):
    prompts = load(jsonl([{"prompt": "a " * (i % 5 + 1), "i": i} for i in range(10)]), words)

    def rows(seed, steps):
        return [[prompts.columns[row]["i"] for row in prompts.rows(seed, step, 4)] for step in steps]

    whole = rows(1, range(10))
    assert rows(1, range(6, 10)) == whole[6:]
    assert rows(2, range(10)) != whole
    flat = [i for rows in whole for i in rows]
    for epoch in range(4):
        assert sorted(flat[10 * epoch : 10 * epoch + 10]) == list(range(10))
    chosen = prompts.rows(1, 0, 4)
    padded = prompts.padded(chosen)
    for row, mask, number in zip(padded.tokens, padded.mask, chosen):
        words_of = words.encode_prompt("a " * (prompts.columns[number]["i"] % 5 + 1))
        assert row[mask].tolist() == words_of == words.encode_prompt(prompts.texts[number])


def test_real_prompts(texts, stories260k):
    tokenizer = load_tokenizer(str(stories260k))
    problems = load(str(texts / "gsm8k" / "test.jsonl"), tokenizer, 256, "cut", prompt_field="question", limit=200)
    assert len(problems) == 200 and all("####" in column["answer"] for column in problems.columns)
    stories = load(str(texts / "tinystories.jsonl"), tokenizer, limit=50)
    assert {len(ids) for ids in stories.ids} == {9} and all(ids[0] == 1 for ids in stories.ids)
    assert stories.padded([0]).tokens[0, :7].tolist() == [0] * 7
