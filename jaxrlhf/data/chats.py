"""Chats, and how a tokenizer's chat template writes them as text.

A chat is the input of transformers' `apply_chat_template`: messages, tools and further arguments of the template.
`apply_chat_template` returns the text. Templates accept different forms of messages, so messages are converted:

- If the template reads only text, content in parts (`[{"type": "text", "text": ...}]`) becomes one text.
- If the template reads only parts, text becomes one part.
- Arguments of tool calls become objects. If the template fails with objects, the arguments become JSON text.
- Null content of a message with tool calls is left out, because transformers does so too. If the template then fails,
  the content is null or an empty text.

`ChatTemplate.time` fixes the date that a template writes, so that a run has the same prompts on every day.
"""

import datetime
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxrlhf.data.preludes import CLOCK, NULL_CONTENT, directives
from jaxrlhf.data.sources import Message
from jaxrlhf.data.time_limit import within
from jaxrlhf.errors import SharedFault, UserError, one_line


@dataclass(frozen=True)
class Chat:
    """Messages, tools and further arguments of the chat template."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)  # variables of the template, such as enable_thinking
    continued: bool = False  # the response continues the last message, which is the start of the assistant's turn

    def followed_by(self, response: "Response") -> "Chat":
        """Returns the chat with the response at its end.

        If the prompt began an assistant's turn, the response continues this turn.
        """
        messages = as_messages(response, "assistant")
        if not self.continued or not messages:
            return replace(self, messages=[*self.messages, *messages], continued=False)
        last, first = self.messages[-1], messages[0]
        joined = {**last, **first, "content": content_text(last) + content_text(first)}
        return replace(self, messages=[*self.messages[:-1], joined, *messages[1:]], continued=False)


@dataclass(frozen=True)
class Rendered:
    """Text that a chat template wrote. The text includes special tokens."""

    text: str
    last_turn: int = 0  # for a response: the character at which its last turn begins; -1 if unknown


Prompt = str | list[Message] | Chat | Rendered
Response = str | Message | list[Message] | Rendered

_BESIDE_CONTENT = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # keys of a turn without content
_NOT_ASSISTANT = ("system", "developer", "user", "tool", "function")
MARK = "jaxrlhf-mark"  # the text of a probe response, which is then searched in the output of the template
TIME_LIMIT = 10.0  # seconds for one chat; templates take milliseconds
_ABSENT, _NULL, _EMPTY = "absent", "null", "empty"  # forms of null content


class ChatTemplate:
    """The chat template of a transformers tokenizer.

    `name` is the tokenizer's folder or hub id; error messages contain it. `time` is the date that the template writes.
    If `time` is None, the template writes the current date. Methods that render a chat take its `place`, such as
    "file.jsonl:3: ". If the template cannot write the chat, they raise `UserError` with this place.
    """

    def __init__(self, tokenizer: Any, name: str):
        self._tokenizer = tokenizer
        self.name = name
        self.time: datetime.datetime | None = None
        self.unread: set[str] = set()  # tools and arguments of rendered chats that the template does not use
        self._read: tuple[bool, bool] | None = None
        self._powers_checked = False
        self._too_slow: SharedFault | None = None

    @property
    def exists(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @property
    def uses_time(self) -> bool:
        """Whether the template writes today's date."""
        return "strftime_now" in str(self._tokenizer.chat_template or "")

    def now(self) -> datetime.datetime:
        """Returns the current time, to the second, as the template reads it from the clock."""
        template = "{{ strftime_now('%Y-%m-%dT%H:%M:%S') }}"
        try:
            chat = [{"role": "user", "content": ""}]
            text = self._tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
        except ImportError:  # without jinja2 no template can run
            return datetime.datetime.now()
        return datetime.datetime.fromisoformat(text)

    def prompt_text(self, prompt: Prompt, place: str) -> str:
        """Returns the prompt as text. The template renders a chat prompt up to the start of the response."""
        if isinstance(prompt, str):
            return prompt
        return prompt.text if isinstance(prompt, Rendered) else self._render(as_chat(prompt), place)

    def whole_text(self, chat: list[Message] | Chat, place: str) -> str:
        """Returns a finished chat as text, including the text that the template writes after the last message."""
        return self._render(as_chat(chat), place, whole=True)

    def pair_texts(self, prompt: Prompt, response: Response, place: str) -> tuple[str, str]:
        """Returns the prompt as text, and the response as the text that follows the prompt."""
        if isinstance(prompt, Rendered) and isinstance(response, Rendered):
            return prompt.text, response.text
        if isinstance(prompt, str) and isinstance(response, str):
            return prompt, response
        chat, turns = as_chat(prompt), as_messages(response, "assistant")
        if turns and turns[0]["role"] in _NOT_ASSISTANT:
            role = turns[0]["role"]
            raise UserError(f"{place}the response begins with a turn of {role}; its first turn must be the assistant's")
        before = self._render(chat, place)
        whole = self._render(chat.followed_by(turns), place, whole=True)
        if whole.startswith(before):
            return before, whole[len(before) :]
        # Some templates begin the assistant's turn with a tag, such as <think>, that they leave out of finished turns.
        if len(turns) != 1 or turns[0].get("tool_calls"):
            raise UserError(
                f"{place}the chat template of {self.name} writes the prompt differently if the response has several "
                "turns, so prompt and response cannot be separated; give a response of one text turn"
            )
        return before, self._after_opening(chat, before, content_text(turns[0]))

    def _after_opening(self, chat: Chat, before: str, text: str) -> str:
        """Returns the response text without the tag, such as <think>, that the template writes before a response.

        The tag is removed if `text` begins with it, because the prompt `before` already ends with the tag.
        """
        if chat.continued:
            return text
        header = self._render(chat.followed_by(MARK), "", whole=True).partition(MARK)[0]
        tag = before[len(header) :].strip() if before.startswith(header) else ""
        is_tag = tag and not tag[-1].isalnum()
        return text[len(tag) :].lstrip("\n") if is_tag and text.startswith(tag) else text

    def rendered_prompt(self, prompt: Prompt, place: str) -> Prompt:
        """Returns the prompt as text. If the prompt is a chat, the template renders it."""
        return prompt if isinstance(prompt, str) else Rendered(self.prompt_text(prompt, place))

    def rendered_pair(self, prompt: Prompt, response: Response, place: str) -> tuple[Prompt, Response]:
        """Returns prompt and response as texts. If one of them is a chat, the template renders both."""
        if isinstance(prompt, str) and isinstance(response, str):
            return prompt, response
        before, after = self.pair_texts(prompt, response, place)
        return Rendered(before), Rendered(after, last_turn(response, after))

    def _render(self, chat: Chat, place: str, whole: bool = False) -> str:
        if not self.exists:
            raise UserError(
                f"{place}chat messages need a chat template, but the tokenizer {self.name} has no chat template; "
                "give prompt and response as text, or use a tokenizer with a chat template"
            )
        if not chat.messages:
            raise UserError(f"{place}the chat has no message before the response; it must have at least one")
        continued = chat.continued and not whole
        last = chat.messages[-1]
        if continued and (last.get("content") is None or (last.get("tool_calls") and not content_text(last).strip())):
            raise UserError(
                f"{place}the prompt ends with a tool call of the assistant; a message of the tool must follow this call"
            )
        end = {"continue_final_message": continued, "add_generation_prompt": not whole and not continued}
        try:
            self._check_powers()
            return self._in_a_form_that_fits(chat, end)
        except SharedFault:
            raise
        except ImportError as error:
            raise SharedFault(f"{self.name}: the chat template needs jinja2; run pip install jinja2") from error
        except Exception as error:  # a template is a program and may raise anything
            self._check_syntax(error)
            raise UserError(f"{place}the chat template of {self.name} refuses this chat: {one_line(error)}") from error

    def _check_powers(self) -> None:
        """Raises SharedFault if the template uses the operator **.

        The computation of one huge power blocks the whole process, and no time limit can stop this.
        """
        if self._powers_checked:
            return
        from jinja2 import Environment

        templates = self._tokenizer.chat_template
        for template in templates.values() if isinstance(templates, dict) else (templates,):
            before = ""
            for _, kind, token in Environment().lex(str(template)):
                if token == "**" and kind == "operator" and before not in ("(", ","):  # f(**arguments) is allowed
                    raise SharedFault(f"{self.name}: the chat template uses the operator **; use * instead")
                before = token if kind != "whitespace" else before
        self._powers_checked = True

    def _check_syntax(self, error: Exception) -> None:
        """Raises SharedFault if the error means that the template does not compile."""
        from jinja2 import TemplateSyntaxError

        if isinstance(error, TemplateSyntaxError):
            line = error.lineno - (error.source or "").startswith(CLOCK.rstrip())
            raise SharedFault(
                f"{self.name}: line {line} of the chat template does not compile: {one_line(error.message)}; "
                "correct the template, or give prompt and response as text"
            ) from error

    def _in_a_form_that_fits(self, chat: Chat, end: dict[str, bool]) -> str:
        """Renders the chat with the usual form of messages. If the template fails, other forms are tried.

        Another form is accepted only if the output contains the names of all tool calls, because a template may drop
        values of a form that it does not expect.
        """
        calls = [call for message in chat.messages for call in message.get("tool_calls") or ()]
        nulls = any(message.get("content") is None for message in chat.messages)
        failure: Exception | None = None
        argument_forms = (False, True) if calls else (False,)
        null_forms = (_ABSENT, _NULL, _EMPTY) if nulls else (_ABSENT,)
        for as_text, null in itertools.product(argument_forms, null_forms):
            messages = [self._message(message, as_text, null) for message in chat.messages]
            try:
                text = self._apply(messages, chat, end, null == _NULL)
            except SharedFault:
                raise
            except Exception as error:
                failure = failure or error
                continue
            if failure is None or all(_name(call) in text for call in calls):
                return text
        raise failure or ValueError("no form of the messages works")

    def _apply(self, messages: list[Message], chat: Chat, end: dict[str, bool], with_null: bool) -> str:
        arguments = {**chat.arguments, **end}
        template = original = self._tokenizer.get_chat_template(None, chat.tools)
        names = [*chat.arguments, *(["tools"] if chat.tools else [])]
        self.unread.update(name for name in names if name not in original)
        if with_null:
            template = NULL_CONTENT + template
        if self.time is not None and "strftime_now" in original:
            template, arguments["jaxrlhf_time"] = CLOCK + template, directives(self.time)
        if template is not original:
            arguments["chat_template"] = template
        return self._written(messages, tools=chat.tools, **arguments)

    def _written(self, messages: list[Message], **arguments: Any) -> str:
        """Returns the text that the template writes. Raises `SharedFault` if this takes longer than `TIME_LIMIT`."""
        if self._too_slow is not None:  # no second wait for the same template
            raise self._too_slow
        try:
            render = self._tokenizer.apply_chat_template
            return within(TIME_LIMIT, lambda: render(messages, tokenize=False, **arguments))
        except TimeoutError:
            self._too_slow = SharedFault(
                f"{self.name}: the chat template took more than {TIME_LIMIT:g} seconds for one chat; correct its "
                "loops, or give prompt and response as text"
            )
            raise self._too_slow from None

    def _message(self, message: Message, arguments_as_text: bool, null: str) -> Message:
        """Converts a message to the form that the template reads."""
        message, content = dict(message), message.get("content")
        reads_parts, reads_text = self._reads
        if content is None:
            message.pop("content", None)
            if null == _EMPTY:
                message["content"] = ""
        elif isinstance(content, list) and reads_text and not reads_parts:
            message["content"] = content_text(message)
        elif isinstance(content, str) and not reads_text:
            message["content"] = [{"type": "text", "text": content}]
        if isinstance(message.get("tool_calls"), list):
            message["tool_calls"] = [_with_arguments(call, arguments_as_text) for call in message["tool_calls"]]
        return message

    @property
    def _reads(self) -> tuple[bool, bool]:
        """Whether the template reads content in parts, and whether it reads content as text. The answers are cached."""
        if self._read is None:
            parts = self._writes(lambda words: [{"type": "text", "text": word} for word in words])
            self._read = parts, not parts or self._writes(" ".join)
        return self._read

    def _writes(self, content: Callable[[list[str]], Any]) -> bool:
        """Whether the template writes every word of test messages. `content` makes the content of a message from words.

        The result is False if the template writes a list of parts as Python or JSON text.
        """
        words = [f"probe{i}" for i in range(6)]
        turns = [
            {"role": role, "content": content(words[2 * i : 2 * i + 2])}
            for i, role in enumerate(("user", "assistant", "system"))
        ]
        for chat in ([turns[2], *turns[:2]], turns[:2]):  # some templates refuse a system message
            try:
                text = self._written(chat)
            except SharedFault:
                raise
            except Exception:
                continue
            has_words = all(word in text for word in words[: 2 * len(chat)])
            return has_words and "'text'" not in text and '"text"' not in text
        return False


def as_messages(value: str | Message | list[Message], role: str) -> list[Message]:
    """Returns the value as chat messages. Text becomes one turn of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else list(value)


def as_chat(prompt: str | Message | list[Message] | Chat) -> Chat:
    """Returns the prompt as a chat. Text becomes a user turn.

    If the last turn is the assistant's, the response continues this turn.
    """
    if isinstance(prompt, Chat):
        return prompt
    messages = without_empty_turn(as_messages(prompt, "user"))
    return Chat(messages, continued=bool(messages) and messages[-1]["role"] == "assistant")


def without_empty_turn(messages: list[Message]) -> list[Message]:
    """Returns the prompt's messages without empty assistant turns at the end.

    These turns only mark the place of the response.
    """
    last = messages[-1] if messages else {"role": ""}
    if last["role"] != "assistant" or content_text(last).strip() or any(map(last.get, _BESIDE_CONTENT)):
        return messages
    return without_empty_turn(messages[:-1])


def last_turn(response: Response, text: str) -> int:
    """Returns the index in the rendered `text` at which the content of the response's last turn begins.

    Returns -1 if this index is unknown.
    """
    if isinstance(response, Rendered):
        return response.last_turn
    if not isinstance(response, list) or len(response) < 2:
        return 0
    content = content_text(response[-1]).strip()
    return text.rfind(content) if content else -1


def content_text(message: Message) -> str:
    """Returns the content of a message as one text. Null content becomes an empty text."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def _name(call: Any) -> str:
    """Returns the function name of a tool call, or an empty text."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    return str(function.get("name", "")) if isinstance(function, dict) else ""


def _with_arguments(call: Any, as_text: bool) -> Any:
    """Returns a tool call with its arguments as JSON text if `as_text` is set, else as an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if as_text and isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        arguments = parsed if isinstance(parsed, dict) else arguments
    return {**call, "function": {**function, "arguments": arguments}} if "arguments" in function else call
