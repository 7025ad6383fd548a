"""Chats, and how a tokenizer's chat template writes them as text.

A chat is the input of transformers' `apply_chat_template`: messages, tools, and further arguments of the template. The
text is that function's output. Templates accept different forms of messages, so messages are converted:

- content in parts (`[{"type": "text", "text": ...}]`) becomes one text for a template that reads only text, and text
  becomes a part for a template that reads only parts;
- arguments of tool calls become objects, and JSON text if the template fails with objects;
- null content beside tool calls is left out, as in transformers; it becomes null or empty if the template fails.

`ChatTemplate.time` fixes the date that a template writes, so that a run has the same prompts on every day.
"""

import datetime
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxrlhf.data.sources import Message, one_line
from jaxrlhf.data.time_limit import within
from jaxrlhf.errors import SharedFault, UserError


@dataclass(frozen=True)
class Chat:
    """Messages, with tools and further arguments of the chat template."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)  # variables of the template, such as enable_thinking
    continued: bool = False  # the last message is the start of the assistant's turn, which the response continues

    def followed_by(self, response: "Response") -> "Chat":
        """The chat with a response appended, or joined to the assistant's turn that the prompt began."""
        messages = as_messages(response, "assistant")
        if not self.continued or not messages:
            return replace(self, messages=[*self.messages, *messages], continued=False)
        last, first = self.messages[-1], messages[0]
        joined = {**last, **first, "content": content_text(last) + content_text(first)}
        return replace(self, messages=[*self.messages[:-1], joined, *messages[1:]], continued=False)


@dataclass(frozen=True)
class Rendered:
    """Text that a chat template wrote, special tokens included."""

    text: str
    last_turn: int = 0  # of a response: where the text of its last turn begins; -1: not known


Prompt = str | list[Message] | Chat | Rendered
Response = str | Message | list[Message] | Rendered

_BESIDE_CONTENT = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # a turn without content may have these
_NOT_ASSISTANT = ("system", "developer", "user", "tool", "function")
_MARK = "jaxrlhf-mark"  # a text to find in the output of a template
TIME_LIMIT = 10.0  # seconds for one chat; templates take milliseconds
_ABSENT, _NULL, _EMPTY = "absent", "null", "empty"  # forms of null content


class ChatTemplate:
    """The chat template of a transformers tokenizer. `name` is the tokenizer's folder or hub id, for messages.

    `time` is the date that templates write; None: the clock. Methods that render take the chat's `place`, such as
    "file.jsonl:3: ", and raise `UserError` with it for a chat that the template cannot write.
    """

    def __init__(self, tokenizer: Any, name: str):
        self._tokenizer = tokenizer
        self.name = name
        self.time: datetime.datetime | None = None
        self.unread: set[str] = set()  # tools and arguments of rendered chats that the template does not use
        self._read: tuple[bool, bool] | None = None
        self._powers_checked = False

    @property
    def exists(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @property
    def uses_time(self) -> bool:
        """Whether the template writes today's date."""
        return "strftime_now" in str(self._tokenizer.chat_template or "")

    def now(self) -> datetime.datetime:
        """The current time as a template writes it, to the second."""
        template = "{{ strftime_now('%Y-%m-%dT%H:%M:%S') }}"
        try:
            chat = [{"role": "user", "content": ""}]
            text = self._tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
        except ImportError:  # without jinja2 no template can run
            return datetime.datetime.now()
        return datetime.datetime.fromisoformat(text)

    def prompt_text(self, prompt: Prompt, place: str) -> str:
        """The prompt as text. A chat ends where the assistant's turn begins, or where the response continues it."""
        if isinstance(prompt, str):
            return prompt
        return prompt.text if isinstance(prompt, Rendered) else self._render(as_chat(prompt), place)

    def whole_text(self, chat: list[Message] | Chat, place: str) -> str:
        """A finished chat as text, with what the template writes after the last message."""
        return self._render(as_chat(chat), place, whole=True)

    def pair_texts(self, prompt: Prompt, response: Response, place: str) -> tuple[str, str]:
        """The prompt as text, and the text that follows it."""
        if isinstance(prompt, Rendered) and isinstance(response, Rendered):
            return prompt.text, response.text
        if isinstance(prompt, str) and isinstance(response, str):
            return prompt, response
        chat, turns = as_chat(prompt), as_messages(response, "assistant")
        if turns and turns[0]["role"] in _NOT_ASSISTANT:
            raise UserError(f"{place}the response begins with a turn of {turns[0]['role']}; want the assistant's first")
        before = self._render(chat, place)
        whole = self._render(chat.followed_by(turns), place, whole=True)
        if whole.startswith(before):
            return before, whole[len(before) :]
        # Some templates open the assistant's turn with text that a finished turn lacks, such as <think>.
        if len(turns) != 1 or turns[0].get("tool_calls"):
            raise UserError(
                f"{place}the chat template of {self.name} writes the prompt differently before a response of several "
                "turns, so prompt and response cannot be separated; want a response of one turn of text"
            )
        return before, self._after_opening(chat, before, content_text(turns[0]))

    def _after_opening(self, chat: Chat, before: str, text: str) -> str:
        """The response text without a tag at its start that already ends the prompt `before`, such as <think>."""
        if chat.continued:
            return text
        header = self._render(chat.followed_by(_MARK), "", whole=True).partition(_MARK)[0]
        tag = before[len(header) :].strip() if before.startswith(header) else ""
        is_tag = tag and not tag[-1].isalnum()
        return text[len(tag) :].lstrip("\n") if is_tag and text.startswith(tag) else text

    def rendered_prompt(self, prompt: Prompt, place: str) -> Prompt:
        """The prompt, with a chat rendered to text."""
        return prompt if isinstance(prompt, str) else Rendered(self.prompt_text(prompt, place))

    def rendered_pair(self, prompt: Prompt, response: Response, place: str) -> tuple[Prompt, Response]:
        """Prompt and response, with a chat rendered to text."""
        if isinstance(prompt, str) and isinstance(response, str):
            return prompt, response
        before, after = self.pair_texts(prompt, response, place)
        return Rendered(before), Rendered(after, last_turn(response, after))

    def _render(self, chat: Chat, place: str, whole: bool = False) -> str:
        if not self.exists:
            raise UserError(
                f"{place}chat messages, but the tokenizer {self.name} has no chat template; "
                "want prompt and response as text, or a tokenizer with a chat template"
            )
        if not chat.messages:
            raise UserError(f"{place}a chat without a message before the response; want at least one")
        continued = chat.continued and not whole
        last = chat.messages[-1]
        if continued and (last.get("content") is None or (last.get("tool_calls") and not content_text(last).strip())):
            raise UserError(f"{place}the prompt ends with a tool call of the assistant; want a tool's message after it")
        end = {"continue_final_message": continued, "add_generation_prompt": not whole and not continued}
        try:
            self._check_powers()
            return self._in_a_form_that_fits(chat, end)
        except SharedFault:
            raise
        except ImportError as error:
            raise SharedFault(f"{self.name}: chat templates need jinja2: pip install jinja2") from error
        except Exception as error:  # a template is a program and may raise anything
            self._check_syntax(error)
            raise UserError(f"{place}the chat template of {self.name} refuses this chat: {one_line(error)}") from error

    def _check_powers(self) -> None:
        """Raises SharedFault for the operator **: one huge power would block the process, past every time limit."""
        if self._powers_checked:
            return
        from jinja2 import Environment

        templates = self._tokenizer.chat_template
        for template in templates.values() if isinstance(templates, dict) else (templates,):
            before = ""
            for _, kind, token in Environment().lex(str(template)):
                if token == "**" and kind == "operator" and before not in ("(", ","):  # not of f(**arguments)
                    raise SharedFault(f"{self.name}: its chat template uses the operator **; write the product out")
                before = token if kind != "whitespace" else before
        self._powers_checked = True

    def _check_syntax(self, error: Exception) -> None:
        """Raises SharedFault if the error means that the template does not compile."""
        from jinja2 import TemplateSyntaxError

        if isinstance(error, TemplateSyntaxError):
            line = error.lineno - (error.source or "").startswith(_CLOCK.rstrip())
            raise SharedFault(
                f"{self.name}: its chat template does not compile, line {line}: {one_line(error.message)}; "
                "correct it, or give prompt and response as text"
            ) from error

    def _in_a_form_that_fits(self, chat: Chat, end: dict[str, bool]) -> str:
        """Renders the chat in the usual form of messages, or if the template fails, in the first form that works.

        Another form counts only if the output has the names of all tool calls: a template may drop unexpected values.
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
            template = _NULL_CONTENT + template
        if self.time is not None and "strftime_now" in original:
            template, arguments["jaxrlhf_time"] = _CLOCK + template, _directives(self.time)
        if template is not original:
            arguments["chat_template"] = template
        return self._written(messages, tools=chat.tools, **arguments)

    def _written(self, messages: list[Message], **arguments: Any) -> str:
        """The template's text; a template is a program, so its time is limited. Raises `SharedFault` beyond that."""
        try:
            render = self._tokenizer.apply_chat_template
            return within(TIME_LIMIT, lambda: render(messages, tokenize=False, **arguments))
        except TimeoutError:
            raise SharedFault(
                f"{self.name}: its chat template took more than {TIME_LIMIT:g} seconds for one chat; correct its "
                "loops, or give prompt and response as text"
            ) from None

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
        """(whether the template reads content in parts, whether it reads content as text); tested once."""
        if self._read is None:
            parts = self._writes(lambda words: [{"type": "text", "text": word} for word in words])
            self._read = parts, not parts or self._writes(" ".join)
        return self._read

    def _writes(self, content: Callable[[list[str]], Any]) -> bool:
        """Whether the template writes every word of contents made by `content`, not a list as Python or JSON text."""
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
    """The value as chat messages; text becomes one turn of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else list(value)


def as_chat(prompt: str | Message | list[Message] | Chat) -> Chat:
    """The prompt as a chat. Text becomes a user turn; a response continues a last turn of the assistant."""
    if isinstance(prompt, Chat):
        return prompt
    messages = without_empty_turn(as_messages(prompt, "user"))
    return Chat(messages, continued=bool(messages) and messages[-1]["role"] == "assistant")


def without_empty_turn(messages: list[Message]) -> list[Message]:
    """The prompt's messages without empty assistant turns at the end, which only mark the place of the response."""
    last = messages[-1] if messages else {"role": ""}
    if last["role"] != "assistant" or content_text(last).strip() or any(map(last.get, _BESIDE_CONTENT)):
        return messages
    return without_empty_turn(messages[:-1])


def last_turn(response: Response, text: str) -> int:
    """Where the content of the response's last turn begins in its rendered `text`; -1: not known."""
    if isinstance(response, Rendered):
        return response.last_turn
    if not isinstance(response, list) or len(response) < 2:
        return 0
    content = content_text(response[-1]).strip()
    return text.rfind(content) if content else -1


def content_text(message: Message) -> str:
    """The content of a message as one text; empty if it is null."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def _name(call: Any) -> str:
    """The function name of a tool call."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    return str(function.get("name", "")) if isinstance(function, dict) else ""


def _with_arguments(call: Any, as_text: bool) -> Any:
    """A tool call with its arguments as an object, or as JSON text."""
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


# Prefixes for a template. transformers compiles templates with `trim_blocks`, which removes the final newline.

# Sets missing content to null, which transformers removes but DeepSeek's templates test with `is none`.
_NULL_CONTENT = (
    "{% set filled = namespace(messages=[]) %}{% for message in messages %}"
    "{% set filled.messages = filled.messages + [message if 'content' in message else dict(message, content=none)] %}"
    "{% endfor %}{% set messages = filled.messages %}\n"
)
# Shadows transformers' function of this name, which reads the clock. A template cannot receive a function (since
# transformers 5 it arrives as text), so it receives the value of each directive.
_CLOCK = (
    "{% macro strftime_now(format) %}{% set time = namespace(text=format) %}"
    "{% for directive, text in jaxrlhf_time.items() %}{% set time.text = time.text.replace(directive, text) %}"
    "{% endfor %}"
    "{{ time.text }}{% endmacro %}\n"
)


def _directives(time: datetime.datetime) -> dict[str, str]:
    """strftime directive -> its value at this time, including directives without leading zeros, such as %-d."""
    bare = {f"%-{letter}": time.strftime(f"%{letter}").lstrip("0") or "0" for letter in "dmyHIMSj"}
    letters = "aAbBcdeDfFGhHIjmMnprRStTuUVwWxXyYzZ"
    return bare | {f"%{letter}": time.strftime(f"%{letter}") for letter in letters} | {"%%": "%"}
