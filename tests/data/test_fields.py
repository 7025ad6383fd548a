"""Fields of a row: read as they are, or refused in one line with the row's place."""

import pytest

from jaxrlhf.data.fields import messages_field, number_field, text_field, text_or_messages_field
from jaxrlhf.data.sources import Row
from jaxrlhf.errors import UserError

ROW = Row(
    {
        "prompt": "hello", "blank": " \n", "none": None, "number": 3, "nan": float("nan"), "flag": True,
        "half": "a\ud83d", "list": [], "chat": [{"role": "user", "content": "hi", "name": None}],
        "turn": {"role": "user", "content": ""},
    },
    "pairs.jsonl:12",
)  # fmt: skip


def test_fields_as_they_are():
    assert text_field(ROW, "prompt") == "hello"
    assert text_field(ROW, "blank", empty=True) == " \n"
    assert messages_field(ROW, "chat") == [{"role": "user", "content": "hi"}]
    assert text_or_messages_field(ROW, "chat") == messages_field(ROW, "chat")
    assert text_or_messages_field(ROW, "prompt") == "hello"
    assert text_or_messages_field(ROW, "turn") == [{"role": "user", "content": ""}]
    assert number_field(ROW, "number", 0.0) == 3.0
    assert number_field(ROW, "none", 0.5) == number_field(ROW, "absent", 0.5) == 0.5


@pytest.mark.parametrize(
    ("reader", "name", "parts"),
    [
        (text_field, "promt", ("no field 'promt'", "the row's fields are: prompt, blank", "did you mean 'prompt'?")),
        (text_field, "none", ("field 'none' is null",)),
        (text_field, "number", ("'number' must be text, not the number 3",)),
        (text_field, "flag", ("truth value true",)),
        (text_field, "blank", ("'blank' is empty",)),
        (text_field, "half", ("half a surrogate pair at character 1",)),
        (text_field, "chat", ("must be text, not a list of 1",)),
        (messages_field, "prompt", ("must be a list of chat messages, not the text 'hello'",)),
        (messages_field, "list", ("an empty list",)),
        (text_or_messages_field, "number", ("must be text or a list of chat messages, not the number 3",)),
        (lambda row, name: number_field(row, name, 0.0), "prompt", ("number, not the text 'hello'",)),
        (lambda row, name: number_field(row, name, 0.0), "nan", ("must be a finite float32 number",)),
        (lambda row, name: number_field(row, name, 0.0), "flag", ("must be a finite float32 number",)),
    ],
)
def test_fields_that_cannot_be_used(reader, name, parts):
    with pytest.raises(UserError) as caught:
        reader(ROW, name)
    message = str(caught.value)
    assert message.startswith("pairs.jsonl:12: ") and "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ("hi", "message 2 must be an object with role and content, not the text 'hi'"),
        ({"role": "user"}, "no content; a message needs role and content; the keys of this message are: role"),
        ({"from": "human", "value": "hi"}, "has no role and no content"),
        ({"role": 1, "content": "hi"}, "message 2, key 'role' must be text, not the number 1"),
        ({"role": "user", "content": [{"type": "text"}]}, "content', part 1, key 'text' must be text, not null"),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "part 1 must be an object of type 'text', "),
        ({"role": "user", "content": ["hi"]}, "part 1 must be an object of type 'text', not the text 'hi'"),
        ({"role": "user", "content": 3}, "message 2, key 'content' must be text, not the number 3"),
        ({"role": "assistant", "content": None, "tool_calls": None}, "message 2 has no content"),
        ({"content": None, "tool_calls": [{}]}, "message 2 has no role;"),
    ],
)
def test_messages_that_cannot_be_used(message, part):
    row = Row({"messages": [{"role": "user", "content": "a"}, message]}, "x.jsonl:1")
    with pytest.raises(UserError, match=r"x\.jsonl:1: ") as caught:
        messages_field(row, "messages")
    assert part in str(caught.value)
