"""Finds the tool calls in an assistant's turn, in the format of each model family. `PARSERS` is the table.

A parser never raises. It returns no calls for a turn that is an answer. A call that cannot be read has an `error`,
which becomes the answer of the tool. The markers of some families are special tokens, which decoding leaves out
(`<|python_tag|>`, `[TOOL_CALLS]`, in some models `<tool_call>`), so a parser also reads calls without these markers.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

_DECODER = json.JSONDecoder()
_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_MISTRAL = "[TOOL_CALLS]"
_MISTRAL_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)")
_PYTHON_TAG = "<|python_tag|>"
_BAD_ARGUMENTS = "the arguments are not valid JSON"
_PLAIN = re.compile(r"\s*([A-Za-z_]\w*)\s*:(.*)\Z", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A call of a tool, or what is wrong with it."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    text: str | None = None  # arguments as text, in the order of the parameters (the plain form)
    error: str | None = None


Parser = Callable[[str, Collection[str]], list[Call]]
"""Takes the text of a turn and the names of the tools. Returns the calls in the turn."""


def parse_hermes(text: str, names: Collection[str] = ()) -> list[Call]:
    """Hermes 2 Pro, Hermes 3, Qwen 2.5, Qwen 3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

    Without the marks, a text that is nothing but such objects with the names of tools is read.
    Source: the chat templates of these models, and https://github.com/NousResearch/Hermes-Function-Calling.
    """
    calls = [_call_of_json(body, "arguments") for body in _HERMES.findall(text)]
    return calls or _bare_calls(text, names)


def parse_llama3(text: str, names: Collection[str] = ()) -> list[Call]:
    """Llama 3.1 to 3.3: `{"name": ..., "parameters": {...}}`, also after `<|python_tag|>`, several separated by `;`.

    Source: https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1 (JSON based tool calling).
    """
    tagged = _PYTHON_TAG in text
    rest = text.rpartition(_PYTHON_TAG)[2].strip()
    if not rest.startswith("{"):
        return [_broken("the call is not a JSON object")] if tagged else []
    calls: list[Call] = []
    while rest:
        try:
            value, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            # A JSON object that is an answer has no name.
            return [*calls, _broken("the call is not valid JSON")] if tagged or calls or '"name"' in rest else []
        if not tagged and not calls and not (isinstance(value, dict) and "name" in value):
            return []
        calls.append(_call_of_value(value, "parameters"))
        rest = rest[end:].lstrip()
        if rest and not rest.startswith((";", "{")):
            break  # text after the call
        rest = rest.lstrip("; \n\t")
    return calls


def parse_mistral(text: str, names: Collection[str] = ()) -> list[Call]:
    """Mistral: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, and the newer `[TOOL_CALLS]name[ARGS]{...}`.

    Source: https://docs.mistral.ai/cookbooks/concept-deep-dive-tokenization-tool_calling (v3 tokenizer) and
    mistral-common (v11 to v13).
    """
    _, mark, rest = text.partition(_MISTRAL)
    rest = rest.strip() if mark else text.strip()
    if rest.startswith("["):
        try:
            value, _ = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            broken = mark or '"name"' in rest
            return [_broken("the calls are not a valid JSON list")] if broken else []
        if not mark and not any(isinstance(item, dict) and "name" in item for item in value):
            return []
        return [_call_of_value(item, "arguments") for item in value] or [_broken("the list of calls is empty")]
    if not mark:
        # Without the marker, the newer form is known by a tool's name before the brace.
        calls = []
        while (named := _MISTRAL_NAMED.match(rest)) and named[1] in names:
            try:
                arguments, end = _DECODER.raw_decode(rest, named.end())
            except (ValueError, RecursionError):
                return [*calls, Call(named[1], error=_BAD_ARGUMENTS)]
            calls.append(Call(named[1], arguments))
            rest = rest[end:]
        return calls
    return _named_calls(rest.split(_MISTRAL))


def parse_plain(text: str, names: Collection[str] = ()) -> list[Call]:
    """For word-level tokenizers: `name : text`, where the name is that of a tool.

    The text is the only argument. A tool with several parameters takes them in order, separated by commas. Blanks
    around an argument are removed.
    """
    match = _PLAIN.match(text)
    if match is None or match[1] not in names:
        return []
    return [Call(match[1], text=match[2].strip())]


PARSERS: dict[str, Parser] = {
    "hermes": parse_hermes,
    "qwen": parse_hermes,
    "llama3": parse_llama3,
    "mistral": parse_mistral,
    "plain": parse_plain,
}


def _bare_calls(text: str, names: Collection[str]) -> list[Call]:
    """Returns the calls of a text that is nothing but JSON objects with the name of a tool, else none."""
    calls, rest = [], text.strip()
    while rest:
        try:
            value, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in names:
            return []
        calls.append(_call_of_value(value, "arguments"))
        rest = rest[end:].lstrip()
    return calls


def _named_calls(parts: list[str]) -> list[Call]:
    calls = []
    for part in parts:
        named = _MISTRAL_NAMED.match(part)
        if named is None:
            calls.append(_broken("the call has no name and JSON object"))
            continue
        try:
            arguments, _ = _DECODER.raw_decode(part[named.end() :])
        except (ValueError, RecursionError):
            calls.append(Call(named[1], error=_BAD_ARGUMENTS))
            continue
        calls.append(Call(named[1], arguments))
    return calls


def _call_of_json(text: str, key: str) -> Call:
    try:
        return _call_of_value(json.loads(text), key)
    except (ValueError, RecursionError):
        return _broken("the call is not valid JSON")


def _call_of_value(value: Any, key: str) -> Call:
    """Returns the call that an object describes. `key` is the family's key of the arguments; others are read too."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return _broken("a call must be an object with a name")
    name = value["name"]
    arguments = next((value[k] for k in (key, "arguments", "parameters") if k in value), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return Call(name, error=_BAD_ARGUMENTS)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return Call(name, error="the arguments must be a JSON object")
    return Call(name, arguments)


def _broken(reason: str) -> Call:
    return Call("", error=reason)
