"""Reads and checks the fields of a row. No other module looks at the types of a row's values.

A bad field raises `UserError` with the row's place. Null counts as absent, because in a table every row has every
column and every struct has every key, at any depth. So keys whose value is null are removed from messages, tools and
template arguments. A null item of a list (an enum with null) stays.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Any

from jaxrlhf.config import ChatSourceConfig
from jaxrlhf.config.data import check_template_arguments
from jaxrlhf.data.chats import Chat, Prompt, content_text, without_empty_turn
from jaxrlhf.data.sources import Message, Row, describe, one_line
from jaxrlhf.errors import UserError

_FLOAT32_MAX = 3.4028235e38


def has_field(row: Row, name: str) -> bool:
    """Whether the row has the field and it is not null."""
    return row.values.get(name) is not None


def text_field(row: Row, name: str, empty: bool = False) -> str:
    """The field's text. UserError if it is absent, not text or, unless `empty`, blank."""
    return _text(_present(row, name), row.where, f"field {name!r}", empty)


def messages_field(row: Row, name: str) -> list[Message]:
    """The field's chat messages in order, at least one."""
    return _messages(_present(row, name), row.where, f"field {name!r}")


def text_or_messages_field(row: Row, name: str, empty: bool = False) -> str | list[Message]:
    """The field's text or list of chat messages; a single message (an object) becomes a list of one."""
    value = _present(row, name)
    what = f"field {name!r}"
    if isinstance(value, str):
        return _text(value, row.where, what, empty)
    if isinstance(value, list | dict):
        return _messages([value] if isinstance(value, dict) else value, row.where, what)
    raise UserError(f"{row.where}: {what} is {describe(value)}; want text or a list of chat messages")


def answer_field(row: Row, name: str) -> str | list[Message]:
    """The response of the field, text or chat messages; UserError if its last message is empty."""
    value = text_or_messages_field(row, name)
    if not isinstance(value, str):
        check_answer(row, name, value[-1])
    return value


def check_answer(row: Row, name: str, message: Message) -> None:
    """Raises UserError if a response message has neither text nor tool calls."""
    if not content_text(message).strip() and not message.get("tool_calls"):
        raise UserError(f"{row.where}: field {name!r} has an empty response; want text")


def number_field(row: Row, name: str, default: float) -> float:
    """The field's number, which must be finite in float32, or `default` if the field is absent."""
    if not has_field(row, name):
        return default
    value = row.values[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _FLOAT32_MAX:
        raise UserError(f"{row.where}: field {name!r} is {describe(value)}; want a finite number (of float32)")
    return float(value)


def chat_of(row: Row, config: ChatSourceConfig, prompt: str | list[Message], continued: bool | None = None) -> Prompt:
    """The prompt as a `Chat` with the tools and template arguments of row and config; a text prompt is returned as is.

    `continued`: whether the response continues the last message. None means that it does if the last message is a
    non-empty assistant turn.
    """
    if isinstance(prompt, str):
        return prompt
    if continued is None:
        prompt = without_empty_turn(prompt)
        continued = bool(prompt) and prompt[-1]["role"] == "assistant"
    return Chat(prompt, _tools(row, config), _template_arguments(row, config), continued)


def columns_beside_text(row: Row, config: ChatSourceConfig, prompt: Prompt) -> set[str]:
    """The row's columns of tools and template arguments that are unused because its prompt is text."""
    if not isinstance(prompt, str):
        return set()
    names = {config.tools_field, config.chat_template_kwargs_field}
    return {name for name in names if not _is_empty(row.values.get(name))}


def _is_empty(value: Any) -> bool:
    """Whether the value of a column of tools or template arguments is empty. JSON text counts as its value."""
    return value in (None, [], {}) or (isinstance(value, str) and value.strip() in ("", "null", "[]", "{}"))


def _tools(row: Row, config: ChatSourceConfig) -> list[dict[str, Any]] | None:
    """The row's tools, or the config's if the row has no value; None if there are none."""
    name = config.tools_field
    tools = _parsed(row, name)
    if tools is None:
        return config.tools
    if isinstance(tools, dict):
        tools = [tools]
    parsed = [_tool(tool) for tool in tools] if isinstance(tools, list) else None
    if parsed is None or not all(isinstance(tool, dict) for tool in parsed):
        raise UserError(
            f"{row.where}: field {name!r} is {describe(tools)}; want a list of tools as objects, also as JSON text "
            "(tools_field names another column, or '' for none)"
        )
    return _without_nulls(parsed) or None


def _tool(value: Any) -> Any:
    """One tool of a list, parsed if it is JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _template_arguments(row: Row, config: ChatSourceConfig) -> dict[str, Any]:
    """The template arguments of the config, overridden by those of the row."""
    name = config.chat_template_kwargs_field
    arguments = _parsed(row, name)
    if arguments is None:
        return config.chat_template_kwargs
    if not isinstance(arguments, dict):
        raise UserError(
            f"{row.where}: field {name!r} is {describe(arguments)}; want an object of template arguments, such as "
            '{"enable_thinking": false} (chat_template_kwargs_field names another column, or \'\' for none)'
        )
    try:
        check_template_arguments(arguments)
    except ValueError as error:
        raise UserError(f"{row.where}: field {name!r}: {error}") from None
    return config.chat_template_kwargs | _without_nulls(arguments)


def _parsed(row: Row, name: str) -> Any:
    """The field's value; None if it is empty. JSON text is parsed, because some tables cannot hold objects."""
    value = row.values.get(name)
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{row.where}: field {name!r} is text that is not JSON ({one_line(error)})") from None


def _without_nulls(value: Any) -> Any:
    """A copy of the value without the keys, at any depth, whose value is null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _present(row: Row, name: str) -> Any:
    if not has_field(row, name):
        problem = f"field {name!r} is null" if name in row.values else f"no field {name!r}"
        near = difflib.get_close_matches(name, [n for n in row.values if n != name], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        has = ", ".join(row.values) or "no fields"
        raise UserError(f"{row.where}: {problem}; the row has {has}{hint} (set the data section's field keys)")
    return row.values[name]


def _text(value: Any, where: str, what: str, empty: bool) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {what} is {describe(value)}; want text")
    if not empty and not value.strip():
        raise UserError(f"{where}: {what} is empty; want text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can contain half a character: "\ud83d"
        raise UserError(f"{where}: {what} holds half a surrogate pair at character {error.start}") from error
    return value


def _messages(value: Any, where: str, what: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {what} is {describe(value)}; want a list of chat messages")
    messages = []
    for number, message in enumerate(value, 1):
        turn = f"{what}, message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{where}: {turn} is {describe(message)}; want an object with role and content")
        # In OpenAI's format a tool call has no content.
        required = ("role",) if message.get("tool_calls") else ("role", "content")
        missing = [key for key in required if message.get(key) is None]
        if missing:
            raise UserError(
                f"{where}: {turn} has no {' and no '.join(missing)}; "
                f"want role and content, it has {', '.join(message) or 'no fields'}"
            )
        _text(message["role"], where, f"{turn}, role", empty=False)
        if isinstance(message.get("content"), list):
            _check_parts(message["content"], where, f"{turn}, content")
        elif message.get("content") is not None:
            _text(message["content"], where, f"{turn}, content", empty=True)
        messages.append(_without_nulls(message))
    return messages


def _check_parts(parts: list[Any], where: str, what: str) -> None:
    """Raises UserError unless all parts of the content are text: `{"type": "text", "text": ...}`."""
    for number, part in enumerate(parts, 1):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind != "text":
            actual = f"of type {kind!r}" if kind else describe(part)
            raise UserError(f"{where}: {what}, part {number} is {actual}; want text or parts of type text")
        _text(part.get("text"), where, f"{what}, part {number}, text", empty=True)
