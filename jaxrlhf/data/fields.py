"""Reads and checks the fields of a row. No other module looks at the types of a row's values.

A bad field raises `UserError` with the row's place. Null means that a field is absent, because a table stores null for
each missing column and each missing key. So keys with the value null are removed from messages, tools and template
arguments. Null items of a list are kept, because they may be values of an enum.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Any

from jaxrlhf.config import ChatSourceConfig
from jaxrlhf.config.data import check_template_arguments
from jaxrlhf.data.chats import Chat, Prompt, content_text, without_empty_turn
from jaxrlhf.data.sources import Message, Row, describe
from jaxrlhf.errors import UserError, one_line

_FLOAT32_MAX = 3.4028235e38


def has_field(row: Row, name: str) -> bool:
    """Whether the row has the field with a value other than null."""
    return row.values.get(name) is not None


def text_field(row: Row, name: str, empty: bool = False) -> str:
    """Returns the field's text. Raises UserError if the field is absent or not text.

    A text of blanks also raises UserError, unless `empty` is set.
    """
    return _text(_present(row, name), row.where, f"field {name!r}", empty)


def messages_field(row: Row, name: str) -> list[Message]:
    """Returns the field's chat messages in order. There is at least one."""
    return _messages(_present(row, name), row.where, f"field {name!r}")


def text_or_messages_field(row: Row, name: str, empty: bool = False) -> str | list[Message]:
    """Returns the field's text or list of chat messages. A single message becomes a list of one message."""
    value = _present(row, name)
    what = f"field {name!r}"
    if isinstance(value, str):
        return _text(value, row.where, what, empty)
    if isinstance(value, list | dict):
        return _messages([value] if isinstance(value, dict) else value, row.where, what)
    raise UserError(f"{row.where}: {what} must be text or a list of chat messages, not {describe(value)}")


def answer_field(row: Row, name: str) -> str | list[Message]:
    """Returns the response that the field holds, as text or as chat messages.

    Raises UserError if the last message is empty.
    """
    value = text_or_messages_field(row, name)
    if not isinstance(value, str):
        check_answer(row, name, value[-1])
    return value


def check_answer(row: Row, name: str, message: Message) -> None:
    """Raises UserError if a response message has neither text nor tool calls."""
    if not content_text(message).strip() and not message.get("tool_calls"):
        raise UserError(f"{row.where}: field {name!r} has an empty response; the response must have text")


def number_field(row: Row, name: str, default: float | None = None) -> float:
    """Returns the field's number, which must be finite in float32.

    If the field is absent, returns `default`. If `default` is None, an absent field raises UserError.
    """
    if default is not None and not has_field(row, name):
        return default
    value = _present(row, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _FLOAT32_MAX:
        raise UserError(f"{row.where}: field {name!r} must be a finite float32 number, not {describe(value)}")
    return float(value)


def chat_of(row: Row, config: ChatSourceConfig, prompt: str | list[Message], continued: bool | None = None) -> Prompt:
    """Returns the prompt as a `Chat` with the tools and template arguments of row and config.

    A text prompt is returned unchanged. `continued` says whether the response continues the last message. If
    `continued` is None, the message decides: the response continues a non-empty assistant turn.
    """
    if isinstance(prompt, str):
        return prompt
    if continued is None:
        prompt = without_empty_turn(prompt)
        continued = bool(prompt) and prompt[-1]["role"] == "assistant"
    return Chat(prompt, _tools(row, config), _template_arguments(row, config), continued)


def columns_beside_text(row: Row, config: ChatSourceConfig, prompt: Prompt) -> set[str]:
    """Returns the row's columns of tools and template arguments that are unused because the prompt is text."""
    if not isinstance(prompt, str):
        return set()
    names = {config.tools_field, config.chat_template_kwargs_field}
    return {name for name in names if not _is_empty(row.values.get(name))}


def _is_empty(value: Any) -> bool:
    """Whether the value of a column of tools or template arguments is empty.

    A JSON text is empty if the value that it describes is empty.
    """
    return value in (None, [], {}) or (isinstance(value, str) and value.strip() in ("", "null", "[]", "{}"))


def _tools(row: Row, config: ChatSourceConfig) -> list[dict[str, Any]] | None:
    """Returns the row's tools, or the config's tools if the row's field is absent. None means no tools."""
    name = config.tools_field
    tools = _parsed(row, name)
    if tools is None:
        return config.tools
    if isinstance(tools, dict):
        tools = [tools]
    parsed = [_tool(tool) for tool in tools] if isinstance(tools, list) else None
    if parsed is None or not all(isinstance(tool, dict) for tool in parsed):
        raise UserError(
            f"{row.where}: field {name!r} must be a list of tool objects (or this list as JSON text), not "
            f"{describe(tools)}; correct the field, or set tools_field to another column, or to '' for no column"
        )
    return _without_nulls(parsed) or None


def _tool(value: Any) -> Any:
    """Returns one tool of a list. If the tool is JSON text, it is parsed."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _template_arguments(row: Row, config: ChatSourceConfig) -> dict[str, Any]:
    """Returns the template arguments. An argument of the row replaces the config's argument with the same name."""
    name = config.chat_template_kwargs_field
    arguments = _parsed(row, name)
    if arguments is None:
        return config.chat_template_kwargs
    if not isinstance(arguments, dict):
        raise UserError(
            f"{row.where}: field {name!r} must be an object of template arguments such as "
            f'{{"enable_thinking": false}}, not {describe(arguments)}; correct the field, or set '
            "chat_template_kwargs_field to another column, or to '' for no column"
        )
    try:
        check_template_arguments(arguments)
    except ValueError as error:
        raise UserError(f"{row.where}: field {name!r}: {error}") from None
    return config.chat_template_kwargs | _without_nulls(arguments)


def _parsed(row: Row, name: str) -> Any:
    """Returns the field's value, or None if the field is empty.

    JSON text is parsed, because some tables cannot hold objects.
    """
    value = row.values.get(name)
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{row.where}: the text of field {name!r} is not JSON: {one_line(error)}") from None


def _without_nulls(value: Any) -> Any:
    """Returns a copy of the value without keys that have the value null, at any depth."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _present(row: Row, name: str) -> Any:
    if not has_field(row, name):
        problem = f"field {name!r} is null" if name in row.values else f"the row has no field {name!r}"
        near = difflib.get_close_matches(name, [n for n in row.values if n != name], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        has = ", ".join(row.values) or "none"
        raise UserError(
            f"{row.where}: {problem}; the row's fields are: {has}{hint} (the data section of the config says which "
            "fields are read)"
        )
    return row.values[name]


def _text(value: Any, where: str, what: str, empty: bool) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {what} must be text, not {describe(value)}")
    if not empty and not value.strip():
        raise UserError(f"{where}: {what} is empty; it must have text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can contain half a character: "\ud83d"
        raise UserError(
            f"{where}: {what} contains half a surrogate pair at character {error.start}; remove this character"
        ) from error
    return value


def _messages(value: Any, where: str, what: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {what} must be a list of chat messages, not {describe(value)}")
    messages = []
    for number, message in enumerate(value, 1):
        turn = f"{what}, message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{where}: {turn} must be an object with role and content, not {describe(message)}")
        # In OpenAI's format a tool call has no content.
        required = ("role",) if message.get("tool_calls") else ("role", "content")
        missing = [key for key in required if message.get(key) is None]
        if missing:
            raise UserError(
                f"{where}: {turn} has no {' and no '.join(missing)}; "
                f"a message needs role and content; the keys of this message are: {', '.join(message) or 'none'}"
            )
        _text(message["role"], where, f"{turn}, key 'role'", empty=False)
        if isinstance(message.get("content"), list):
            _check_parts(message["content"], where, f"{turn}, key 'content'")
        elif message.get("content") is not None:
            _text(message["content"], where, f"{turn}, key 'content'", empty=True)
        messages.append(_without_nulls(message))
    return messages


def _check_parts(parts: list[Any], where: str, what: str) -> None:
    """Raises UserError unless all parts of the content are text: `{"type": "text", "text": ...}`."""
    for number, part in enumerate(parts, 1):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind != "text":
            actual = f"of type {kind!r}" if kind else describe(part)
            raise UserError(f"{where}: {what}, part {number} must be an object of type 'text', not {actual}")
        _text(part.get("text"), where, f"{what}, part {number}, key 'text'", empty=True)
