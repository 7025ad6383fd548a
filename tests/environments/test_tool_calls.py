"""Parsers of tool calls on forms that the model families write, and on broken ones."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.environments.tool_calls import PARSERS, Call

NAMES = ("get_weather", "add", "calculator")
WEATHER = Call("get_weather", {"city": "Rome"})
ADD = Call("add", {"a": 1, "b": 2})

CASES = [
    # Qwen 2.5 and 3, and Hermes 2 Pro
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>', [WEATHER]),
    ("qwen", '<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>', [ADD]),
    ("hermes", 'Both:\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
     '<tool_call>\n{"arguments": {"a": 1, "b": 2}, "name": "add"}\n</tool_call>', [WEATHER, ADD]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}</tool_call>', [ADD]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}', [ADD]),  # cut before the end mark
    # `<tool_call>` is a special token of some models, which decoding leaves out.
    ("hermes", '\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n', [ADD]),
    ("hermes", '{"name": "add", "arguments": {"a": 1, "b": 2}}\n\n'
     '{"name": "get_weather", "arguments": {"city": "Rome"}}', [ADD, WEATHER]),
    ("hermes", '{"name": "Ann", "arguments": {"a": 1}}', []),
    ("hermes", '{"name": "add", "arguments": {"a": 1}} is the call', []),
    ("hermes", '[{"name": "add"}]', []),
    ("hermes", "The answer is 3.", []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1</tool_call>',
     [Call("", error="the call is not valid JSON")]),
    ("hermes", "<tool_call>[1]</tool_call>", [Call("", error="a call must be an object with a name")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
     [Call("add", error="the arguments must be a JSON object")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "x"}</tool_call>',
     [Call("add", error="the arguments are not valid JSON")]),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', [Call("add")]),
    # Llama 3.1 to 3.3
    ("llama3", '{"name": "get_weather", "parameters": {"city": "Rome"}}', [WEATHER]),
    ("llama3", '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}', [ADD]),
    ("llama3", '{"name": "add", "parameters": {"a": 1, "b": 2}}; '
     '{"name": "get_weather", "parameters": {"city": "Rome"}}', [ADD, WEATHER]),
    ("llama3", '\n\n{"type": "function", "name": "add", "parameters": {"a": 1, "b": 2}}<|eom_id|>', [ADD]),
    ("llama3", '{"name": "add", "parameters": {"a": 1, "b": 2}}\n'
     '{"name": "get_weather", "parameters": {"city": "Rome"}} {"name": "add"}', [ADD, WEATHER, Call("add")]),
    ("llama3", '{"name": "add", "parameters": {"a": 1, "b": 2}} is the call', [ADD]),
    ("llama3", "The sum is {3}.", []),
    ("llama3", '{"answer": 3}', []),
    ("llama3", '{"answer": ', []),
    ("llama3", '{"name": "add", "parameters": {"a": ', [Call("", error="the call is not valid JSON")]),
    ("llama3", "<|python_tag|>import os", [Call("", error="the call is not a JSON object")]),
    # Mistral, v3 tokenizer and v11
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Rome"}}]', [WEATHER]),
    ("mistral", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Rome"}, "id": "VvvODy9mT"}, '
     '{"name": "add", "arguments": {"a": 1, "b": 2}, "id": "aaaaaaaaa"}]</s>', [WEATHER, ADD]),
    ("mistral", '[{"name": "add", "arguments": {"a": 1, "b": 2}}]', [ADD]),
    ("mistral", 'Let me see.[TOOL_CALLS]add{"a": 1, "b": 2}[TOOL_CALLS]get_weather{"city": "Rome"}', [ADD, WEATHER]),
    ("mistral", '[TOOL_CALLS]add[CALL_ID]aaaaaaaaa[ARGS]{"a": 1, "b": 2}', [ADD]),
    ("mistral", 'add{"a": 1, "b": 2}', [ADD]),
    ("mistral", 'add{"a": 1, "b": 2}get_weather{"city": "Rome"}', [ADD, WEATHER]),
    ("mistral", 'add[ARGS]{"a": 1, "b": 2} get_weather{"city": ',
     [ADD, Call("get_weather", error="the arguments are not valid JSON")]),
    ("mistral", 'set{"a": 1}', []),
    ("mistral", "[1, 2, 3]", []),
    ("mistral", "[TOOL_CALLS] []", [Call("", error="the list of calls is empty")]),
    ("mistral", '[TOOL_CALLS] [{"name"', [Call("", error="the calls are not a valid JSON list")]),
    ("mistral", "[TOOL_CALLS] hello", [Call("", error="the call has no name and JSON object")]),
    ("mistral", '[TOOL_CALLS]add{"a": ', [Call("add", error="the arguments are not valid JSON")]),
    # Word-level tokenizers
    ("plain", " calculator : 3 4 * 5 7", [Call("calculator", text="3 4 * 5 7")]),
    ("plain", "calculator:1+1", [Call("calculator", text="1+1")]),
    ("plain", "calculator :", [Call("calculator", text="")]),
    ("plain", "answer : 5", []),
    ("plain", "the calculator : 5", []),
]  # fmt: skip


@pytest.mark.parametrize(("parser", "text", "calls"), CASES)
def test_recorded_forms(parser, text, calls):
    assert PARSERS[parser](text, NAMES) == calls


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=3)
WRITTEN = {
    "hermes": lambda calls: "\n".join(f"<tool_call>\n{json.dumps(c)}\n</tool_call>" for c in calls),
    "llama3": lambda calls: "; ".join(json.dumps({"name": c["name"], "parameters": c["arguments"]}) for c in calls),
    "mistral": lambda calls: f"[TOOL_CALLS] {json.dumps(calls)}",
}


@pytest.mark.parametrize("parser", WRITTEN)
@given(given_calls=st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None, database=None)
def test_what_is_written_is_read(parser, given_calls):
    text = WRITTEN[parser]([{"name": name, "arguments": arguments} for name, arguments in given_calls])
    if "</tool_call>" in json.dumps(given_calls):
        return  # the end mark inside an argument cannot be told from the end
    assert PARSERS[parser](text, NAMES) == [Call(name, arguments) for name, arguments in given_calls]


PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", '{"name": "add"', ":", "{",
     "}", "[", "]", '"arguments"', '"parameters"', "add", "calculator : ", ";", "[" * 3000, '{"a":' * 3000, "\\u0000"]
)  # fmt: skip


@given(text=st.lists(PIECES | st.text(max_size=6), max_size=8).map("".join))
@settings(max_examples=300, deadline=None, database=None)
def test_no_text_raises(text):
    for parse in PARSERS.values():
        calls = parse(text, NAMES)
        assert isinstance(calls, list)
        assert all(isinstance(call, Call) and isinstance(call.name, str) for call in calls)
        assert all(call.error or isinstance(call.arguments, dict) for call in calls)
