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
        (text_field, "promt", ("no field 'promt'", "the row has prompt, blank", "did you mean 'prompt'?")),
        (text_field, "none", ("field 'none' is null",)),
        (text_field, "number", ("'number' is the number 3; want text",)),
        (text_field, "flag", ("truth value true",)),
        (text_field, "blank", ("'blank' is empty",)),
        (text_field, "half", ("half a surrogate pair at character 1",)),
        (text_field, "chat", ("a list of 1; want text",)),
        (messages_field, "prompt", ("the text 'hello'; want a list of chat messages",)),
        (messages_field, "list", ("an empty list",)),
        (text_or_messages_field, "number", ("the number 3; want text or a list",)),
        (lambda row, name: number_field(row, name, 0.0), "prompt", ("the text 'hello'; want a finite number",)),
        (lambda row, name: number_field(row, name, 0.0), "nan", ("want a finite number",)),
        (lambda row, name: number_field(row, name, 0.0), "flag", ("want a finite number",)),
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
        ("hi", "message 2 is the text 'hi'"),
        ({"role": "user"}, "message 2 has no content; want role and content, it has role"),
        ({"from": "human", "value": "hi"}, "has no role and no content"),
        ({"role": 1, "content": "hi"}, "message 2, role is the number 1"),
        ({"role": "user", "content": [{"type": "text"}]}, "message 2, content, part 1, text is null; want text"),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "part 1 is of type 'image'; want text or parts"),
        ({"role": "user", "content": ["hi"]}, "message 2, content, part 1 is the text 'hi'"),
        ({"role": "user", "content": 3}, "message 2, content is the number 3; want text"),
        ({"role": "assistant", "content": None, "tool_calls": None}, "message 2 has no content"),
        ({"content": None, "tool_calls": [{}]}, "message 2 has no role;"),
    ],
)
def test_messages_that_cannot_be_used(message, part):
    row = Row({"messages": [{"role": "user", "content": "a"}, message]}, "x.jsonl:1")
    with pytest.raises(UserError, match=r"x\.jsonl:1: ") as caught:
        messages_field(row, "messages")
    assert part in str(caught.value)
