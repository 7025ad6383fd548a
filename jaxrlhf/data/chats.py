"""Chats, and how they become text: through the chat template that a tokenizer carries.

A chat is what transformers' `apply_chat_template` takes: messages, tools, and further arguments of the template.
The text is what that function gives. Templates differ in the forms of messages that they read, so these may change:

- content in parts (`[{"type": "text", "text": ...}]`) becomes one text where the template knows only text, and text
  becomes a part where it knows only parts;
- arguments of tool calls are objects, also where they are spelled as JSON text, as vLLM gives them; and JSON text where
  the template fails with objects;
- content that is null beside tool calls is left out, as transformers does; null or empty where the template fails.

The clock stands still where `ChatTemplate.time` is set: a run has the same prompts on every day.
"""

import datetime
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxrlhf.data.sources import Message, one_line
from jaxrlhf.errors import SharedFault, UserError


@dataclass(frozen=True)
class Chat:
    """Messages, and what else the chat template is given with them."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)  # variables of the template, such as enable_thinking
    begun: bool = False  # the last message is the beginning of the assistant's turn, and the answer goes on from there

    def followed_by(self, answer: "Response") -> "Chat":
        """The whole chat: an answer to a turn that is begun stands in that turn."""
        messages = as_messages(answer, "assistant")
        if not self.begun or not messages:
            return replace(self, messages=[*self.messages, *messages], begun=False)
        last, first = self.messages[-1], messages[0]
        joined = {**last, **first, "content": content_text(last) + content_text(first)}
        return replace(self, messages=[*self.messages[:-1], joined, *messages[1:]], begun=False)


@dataclass(frozen=True)
class Rendered:
    """Text that a chat template has written: its special tokens are in it."""

    text: str
    last_turn: int = 0  # of an answer: where the text of its last turn begins; -1: not known


Prompt = str | list[Message] | Chat | Rendered
Response = str | Message | list[Message] | Rendered

_BESIDE_CONTENT = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # where a turn may say something too
_NOT_ANSWERS = ("system", "developer", "user", "tool", "function")
_MARK = "jaxrlhf-mark"  # text to be found again in what a template writes
_ABSENT, _NULL, _EMPTY = "absent", "null", "empty"  # what becomes of content that is null


class ChatTemplate:
    """The chat template of a transformers tokenizer; `name` is where that came from, for messages.

    `time` is what templates take for now; None: the clock. Everything that writes raises `UserError`, with the place
    that it is given, for a chat that cannot be written.
    """

    def __init__(self, tokenizer: Any, name: str):
        self._tokenizer = tokenizer
        self.name = name
        self.time: datetime.datetime | None = None
        self.unread: set[str] = set()  # what chats gave the template that it does not name; for who clears it to say
        self._read: tuple[bool, bool] | None = None

    @property
    def exists(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @property
    def uses_time(self) -> bool:
        """Whether the template writes today's date."""
        return "strftime_now" in str(self._tokenizer.chat_template or "")

    def now(self) -> datetime.datetime:
        """The time that a template would write now, to the second."""
        template = "{{ strftime_now('%Y-%m-%dT%H:%M:%S') }}"
        try:
            chat = [{"role": "user", "content": ""}]
            text = self._tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
        except ImportError:  # without jinja2 no template writes a time
            return datetime.datetime.now()
        return datetime.datetime.fromisoformat(text)

    def prompt_text(self, prompt: Prompt, place: str) -> str:
        """A text as it is; a chat as the template writes it, ending where the assistant begins to speak or goes on."""
        if isinstance(prompt, str):
            return prompt
        return prompt.text if isinstance(prompt, Rendered) else self._render(as_chat(prompt), place)

    def whole_text(self, chat: list[Message] | Chat, place: str) -> str:
        """A whole chat as the template writes and ends it."""
        return self._render(as_chat(chat), place, whole=True)

    def pair_texts(self, prompt: Prompt, response: Response, place: str) -> tuple[str, str]:
        """The prompt as text, and the text that follows it."""
        if isinstance(prompt, Rendered) and isinstance(response, Rendered):
            return prompt.text, response.text
        if isinstance(prompt, str) and isinstance(response, str):
            return prompt, response
        opening, answer = as_chat(prompt), as_messages(response, "assistant")
        if answer and answer[0]["role"] in _NOT_ANSWERS:
            raise UserError(f"{place}the answer begins with a turn of {answer[0]['role']}; want the assistant's first")
        before = self._render(opening, place)
        whole = self._render(opening.followed_by(answer), place, whole=True)
        if whole.startswith(before):
            return before, whole[len(before) :]
        # Some templates open the assistant's turn with more than they write into a finished one.
        if len(answer) != 1 or answer[0].get("tool_calls"):
            raise UserError(
                f"{place}the chat template of {self.name} writes a chat of several turns otherwise than it opens the "
                "first one, so prompt and answer cannot be told apart; want an answer of one turn of text"
            )
        return before, self._after_opening(opening, before, content_text(answer[0]))

    def _after_opening(self, opening: Chat, before: str, text: str) -> str:
        """An answer behind a prompt that opens it with more than a finished turn has, such as <think>: without that,
        where the answer begins with it too."""
        if opening.begun:
            return text
        header = self._render(opening.followed_by(_MARK), "", whole=True).partition(_MARK)[0]
        more = before[len(header) :].strip() if before.startswith(header) else ""
        is_tag = more and not more[-1].isalnum()
        return text[len(more) :].lstrip("\n") if is_tag and text.startswith(more) else text

    def rendered_prompt(self, prompt: Prompt, place: str) -> Prompt:
        """The prompt, a chat as the text that it becomes."""
        return prompt if isinstance(prompt, str) else Rendered(self.prompt_text(prompt, place))

    def rendered_pair(self, prompt: Prompt, response: Response, place: str) -> tuple[Prompt, Response]:
        """Prompt and response, a chat as the texts that it becomes."""
        if isinstance(prompt, str) and isinstance(response, str):
            return prompt, response
        before, after = self.pair_texts(prompt, response, place)
        return Rendered(before), Rendered(after, last_turn(response, after))

    def _render(self, chat: Chat, place: str, whole: bool = False) -> str:
        if not self.exists:
            raise UserError(
                f"{place}chat messages, but the tokenizer {self.name} has no chat template; "
                "give prompt and answer as text, or a tokenizer with one"
            )
        if not chat.messages:
            raise UserError(f"{place}a chat without a message before the answer; want at least one")
        begun = chat.begun and not whole
        last = chat.messages[-1]
        if begun and (last.get("content") is None or (last.get("tool_calls") and not content_text(last).strip())):
            raise UserError(f"{place}the prompt ends with a tool call of the assistant; want a tool's message after it")
        end = {"continue_final_message": begun, "add_generation_prompt": not whole and not begun}
        try:
            return self._in_a_form_that_fits(chat, end)
        except ImportError as error:
            raise SharedFault(f"{self.name}: chat templates need jinja2: pip install jinja2") from error
        except Exception as error:  # a template is a program, and raises what it likes
            self._check_syntax(error)
            raise UserError(f"{place}the chat template of {self.name} refuses this chat: {one_line(error)}") from error

    def _check_syntax(self, error: Exception) -> None:
        """SharedFault where the error says that the template does not compile."""
        from jinja2 import TemplateSyntaxError

        if isinstance(error, TemplateSyntaxError):
            line = error.lineno - (error.source or "").startswith(_CLOCK.rstrip())
            raise SharedFault(
                f"{self.name}: its chat template does not compile, line {line}: {one_line(error.message)}; "
                "mend it, or give prompt and answer as text"
            ) from error

    def _in_a_form_that_fits(self, chat: Chat, end: dict[str, bool]) -> str:
        """What transformers makes of the chat: in the usual form, or where the template fails, in the first other one.

        Another form must show the names of all calls: a template may drop what it does not expect.
        """
        calls = [call for message in chat.messages for call in message.get("tool_calls") or ()]
        nulls = any(message.get("content") is None for message in chat.messages)
        failure: Exception | None = None
        spellings = (False, True) if calls else (False,)
        contents = (_ABSENT, _NULL, _EMPTY) if nulls else (_ABSENT,)
        for as_text, null in itertools.product(spellings, contents):
            messages = [self._message(message, as_text, null) for message in chat.messages]
            try:
                text = self._apply(messages, chat, end, null == _NULL)
            except Exception as error:
                failure = failure or error
                continue
            if failure is None or all(_name(call) in text for call in calls):
                return text
        raise failure or ValueError("no form of it fits")

    def _apply(self, messages: list[Message], chat: Chat, end: dict[str, bool], with_null: bool) -> str:
        given = {**chat.arguments, **end}
        template = found = self._tokenizer.get_chat_template(None, chat.tools)
        names = [*chat.arguments, *(["tools"] if chat.tools else [])]
        self.unread.update(name for name in names if name not in found)
        if with_null:
            template = _NULL_CONTENT + template
        if self.time is not None and "strftime_now" in found:
            template, given["jaxrlhf_time"] = _CLOCK + template, _directives(self.time)
        if template is not found:
            given["chat_template"] = template
        return self._tokenizer.apply_chat_template(messages, tools=chat.tools, tokenize=False, **given)

    def _message(self, message: Message, arguments_as_text: bool, null: str) -> Message:
        """The message in the form that the template reads."""
        message, content = dict(message), message.get("content")
        parts, text = self._reads
        if content is None:
            message.pop("content", None)
            if null == _EMPTY:
                message["content"] = ""
        elif isinstance(content, list) and text and not parts:
            message["content"] = content_text(message)
        elif isinstance(content, str) and not text:
            message["content"] = [{"type": "text", "text": content}]
        if isinstance(message.get("tool_calls"), list):
            message["tool_calls"] = [_with_arguments(call, arguments_as_text) for call in message["tool_calls"]]
        return message

    @property
    def _reads(self) -> tuple[bool, bool]:
        """Whether the template writes content in parts, and content that is text; tried once."""
        if self._read is None:
            parts = self._writes(lambda words: [{"type": "text", "text": word} for word in words])
            self._read = parts, not parts or self._writes(" ".join)
        return self._read

    def _writes(self, content: Callable[[list[str]], Any]) -> bool:
        """Whether the template writes all words of such contents, and nothing of how lists are spelled."""
        words = [f"probe{i}" for i in range(6)]
        turns = [
            {"role": role, "content": content(words[2 * i : 2 * i + 2])}
            for i, role in enumerate(("user", "assistant", "system"))
        ]
        for chat in ([turns[2], *turns[:2]], turns[:2]):  # some templates refuse a system message
            try:
                text = self._tokenizer.apply_chat_template(chat, tokenize=False)
            except Exception:
                continue
            wanted = words[: 2 * len(chat)]
            return all(word in text for word in wanted) and "'text'" not in text and '"text"' not in text
        return False


def as_messages(value: str | Message | list[Message], role: str) -> list[Message]:
    """Chat messages as they are; text as one turn of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else list(value)


def as_chat(prompt: str | Message | list[Message] | Chat) -> Chat:
    """A prompt as a chat: text is a turn of the user; messages that end with the assistant's are to be continued."""
    if isinstance(prompt, Chat):
        return prompt
    messages = without_empty_turn(as_messages(prompt, "user"))
    return Chat(messages, begun=bool(messages) and messages[-1]["role"] == "assistant")


def without_empty_turn(messages: list[Message]) -> list[Message]:
    """A prompt's messages without turns of the assistant at their end that say nothing: they only ask for an answer."""
    last = messages[-1] if messages else {"role": ""}
    if last["role"] != "assistant" or content_text(last).strip() or any(map(last.get, _BESIDE_CONTENT)):
        return messages
    return without_empty_turn(messages[:-1])


def last_turn(answer: Response, text: str) -> int:
    """Where the last turn of an answer begins to speak in the `text` that was written of it; -1: not known."""
    if isinstance(answer, Rendered):
        return answer.last_turn
    if not isinstance(answer, list) or len(answer) < 2:
        return 0
    content = content_text(answer[-1]).strip()
    return text.rfind(content) if content else -1


def content_text(message: Message) -> str:
    """What a message says, in one text; empty where its content is null."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def _name(call: Any) -> str:
    """The name of the function that a tool call calls."""
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
            spelled = json.loads(arguments)
        except ValueError:
            return call
        arguments = spelled if isinstance(spelled, dict) else arguments
    return {**call, "function": {**function, "arguments": arguments}} if "arguments" in function else call


# What is put before a template; the newline is taken off by `trim_blocks`, with which transformers reads templates.

# Gives messages without content the content null, which transformers takes out: DeepSeek's templates ask `is none`.
_NULL_CONTENT = (
    "{% set found = namespace(messages=[]) %}{% for message in messages %}"
    "{% set found.messages = found.messages + [message if 'content' in message else dict(message, content=none)] %}"
    "{% endfor %}{% set messages = found.messages %}\n"
)
# Shadows transformers' function of this name, which asks the clock. A function cannot be given to a template (since
# transformers 5 it arrives as text), so what each directive writes is given.
_CLOCK = (
    "{% macro strftime_now(format) %}{% set time = namespace(text=format) %}"
    "{% for directive, text in jaxrlhf_time.items() %}{% set time.text = time.text.replace(directive, text) %}"
    "{% endfor %}"
    "{{ time.text }}{% endmacro %}\n"
)


def _directives(time: datetime.datetime) -> dict[str, str]:
    """strftime's directives, also without leading zeros, and what each is at that time."""
    bare = {f"%-{letter}": time.strftime(f"%{letter}").lstrip("0") or "0" for letter in "dmyHIMSj"}
    letters = "aAbBcdeDfFGhHIjmMnprRStTuUVwWxXyYzZ"
    return bare | {f"%{letter}": time.strftime(f"%{letter}") for letter in letters} | {"%%": "%"}
