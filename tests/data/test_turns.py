"""Training on every assistant turn of a chat: which tokens are learned, and which templates and chats are refused."""

import numpy as np
import pytest

from jaxrlhf.config import DemonstrationsConfig
from jaxrlhf.data.sft import SFTData, fill, load_demonstrations
from jaxrlhf.data.tokenizers import build_word_tokenizer
from jaxrlhf.errors import UserError

WORDS = ["<user>", "<assistant>", "<tool>", "<think>", *"abcdefghijk"]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' <eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
TURNS = [("user", "a b"), ("assistant", "c"), ("tool", "d"), ("assistant", "e f"), ("user", "g"), ("assistant", "h")]


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def load(path, template=TEMPLATE, max_length=64, overflow="stop", **settings):
    tokenizer = build_word_tokenizer(WORDS, chat_template=template)
    config = DemonstrationsConfig(path=path, **({"learn": "all"} | settings))
    return tokenizer, *load_demonstrations(config, tokenizer, max_length, overflow)


def learned(tokenizer, example, length=64):
    """The words that training learns, in order."""
    batch = fill([example], [[0]], 1, length, 0)
    return tokenizer.fast.convert_ids_to_tokens(batch.tokens[0][batch.loss_mask[0]].tolist())


def test_every_assistant_turn_is_learned_up_to_its_end(jsonl):
    path = jsonl([{"messages": chat(*TURNS)}])
    tokenizer, (example,), _ = load(path)
    assert learned(tokenizer, example) == ["c", "<eos>", "e", "f", "<eos>", "h", "<eos>"]
    _, (last,), _ = load(path, learn="last")
    assert learned(tokenizer, last) == ["h", "<eos>"]
    np.testing.assert_array_equal(example.prompt_ids, last.prompt_ids)
    np.testing.assert_array_equal(example.response_ids, last.response_ids)
    by_field = [{"prompt": chat(*TURNS[:5]), "response": "h"}]
    assert learned(tokenizer, load(jsonl(by_field))[1][0]) == learned(tokenizer, example)


def test_turns_of_packed_rows_keep_their_places(jsonl):
    rows = [{"messages": chat(*TURNS)}, {"messages": chat(*TURNS[:2])}]
    tokenizer, examples, _ = load(jsonl(rows))
    batch = fill(examples, [[1, 0]], 1, 64, 0)
    words = tokenizer.fast.convert_ids_to_tokens(batch.tokens[0][batch.loss_mask[0]].tolist())
    assert words == ["c", "<eos>", "c", "<eos>", "e", "f", "<eos>", "h", "<eos>"]
    learn_last = load(jsonl(rows), learn="last")[1]
    assert SFTData(examples, 1, 64, 0).checksum() != SFTData(learn_last, 1, 64, 0).checksum()


def test_a_template_without_end_tokens(jsonl):
    template = TEMPLATE.replace(" <eos>\n", "\n")
    tokenizer, (example,), _ = load(jsonl([{"messages": chat(*TURNS)}]), template)
    assert learned(tokenizer, example) == ["c", "e", "f", "h", "<eos>"]


def test_a_turn_that_the_response_continues_is_no_earlier_turn(jsonl):
    rows = [{"prompt": chat(*TURNS[:3], ("assistant", "e")), "response": " f"}]
    tokenizer, (example,), _ = load(jsonl(rows))
    assert learned(tokenizer, example) == ["c", "<eos>", "f", "<eos>"]


def test_templates_that_rewrite_earlier_turns_are_refused(jsonl):
    forgets = TEMPLATE.replace("m.content", "(m.content if loop.last else m.content.replace('<think> ', ''))")
    path = jsonl([{"messages": chat(("user", "a"), ("assistant", "<think> b"), *TURNS[4:])}])
    message = (
        r"rows.jsonl:1: the chat template of word tokenizer writes message 2 differently when later messages follow: "
        r"after '<user> a <eos>\\n<assistant> ' comes 'b <eos>.*' instead of '<think> b.*'; .* set learn: last"
    )
    with pytest.raises(UserError, match=message):
        load(path, forgets)
    kept = {"messages": chat(*TURNS[:2])}
    path = jsonl([{"messages": chat(("user", "a"), ("assistant", "<think> b"), *TURNS[4:])}, kept])
    _, examples, report = load(path, forgets, unusable="drop")
    assert len(examples) == 1 and "writes message 2 differently" in str(report)


def test_long_chats_lose_their_last_turns(jsonl):
    path = jsonl([{"messages": chat(*TURNS)}])
    tokenizer, (whole,), _ = load(path)
    second = whole.earlier[1]
    for length, words in ((second[1] + 1, ["c", "<eos>", "e", "f", "<eos>"]), (second[0] + 1, ["c", "<eos>", "e"])):
        _, (example,), report = load(path, max_length=length, overflow="cut")
        assert learned(tokenizer, example) == words and report.cut == 1
        assert len(example) <= length
    with pytest.raises(UserError, match="the prompt leaves no room for a response in 3 tokens"):
        load(path, max_length=3, overflow="cut")
