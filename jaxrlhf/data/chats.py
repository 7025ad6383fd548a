"""Chats, and how they become text: through the chat template that a tokenizer carries.

A chat is what transformers' `apply_chat_template` takes: messages, tools, and further arguments of the template.
The text is what that function gives, with four differences that are forms of data, not of templates:

- content in parts (`[{"type": "text", "text": ...}]`) is joined where the template knows only text, as vLLM does;
- content null beside tool calls is left out, and empty where the template cannot do without;
- arguments of tool calls that are spelled as JSON text are given as the object that they spell, as vLLM does;
- the clock stands still where `ChatTemplate.time` is set: a run has the same prompts on every day.
"""

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxrlhf.data.sources import Message, one_line
from jaxrlhf.errors import UserError


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

_NOT_ANSWERS = ("system", "developer", "user", "tool", "function")
_PROBE = "jaxrlhf probe"


class ChatTemplate:
    """The chat template of a transformers tokenizer; `name` is where that came from, for messages.

    `time` is what templates take for now; None: the clock. Everything that writes raises `UserError`, with the place
    that it is given, for a chat that cannot be written.
    """

    def __init__(self, tokenizer: Any, name: str):
        self._tokenizer = tokenizer
        self.name = name
        self.time: datetime.datetime | None = None
        self._parts: bool | None = None

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
        return before, content_text(answer[0])

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
        if begun and chat.messages[-1].get("content") is None:
            raise UserError(f"{place}the prompt ends with a tool call of the assistant; want a tool's message after it")
        end = {"continue_final_message": begun, "add_generation_prompt": not whole and not begun}
        try:
            try:
                return self._apply(chat, False, **end)
            except Exception:
                if all(message.get("content") is not None for message in chat.messages):
                    raise
                return self._apply(chat, True, **end)
        except ImportError as error:
            raise UserError(f"{self.name}: chat templates need jinja2: pip install jinja2") from error
        except Exception as error:  # a template is a program, and raises what it likes
            raise UserError(f"{place}the chat template of {self.name} refuses this chat: {one_line(error)}") from error

    def _apply(self, chat: Chat, null_is_empty: bool, **end: bool) -> str:
        """What transformers makes of the chat; content that is null is empty, or is left out."""
        messages = [_plain(message, self._takes_parts(message), null_is_empty) for message in chat.messages]
        given = {**chat.arguments, **end}
        template = self._tokenizer.get_chat_template(None, chat.tools)
        if self.time is not None and "strftime_now" in template:
            given |= {"chat_template": _CLOCK + template, "jaxrlhf_time": _directives(self.time)}
        return self._tokenizer.apply_chat_template(messages, tools=chat.tools, tokenize=False, **given)

    def _takes_parts(self, message: Message) -> bool:
        """Whether the template writes the text of content that is in parts; tried once, when there is some."""
        if self._parts is None and isinstance(message.get("content"), list):
            probe = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
            try:
                text = self._tokenizer.apply_chat_template(probe, tokenize=False)
            except Exception:
                text = ""
            # A template that knows only text writes the list as Python or JSON spells it, or fails.
            self._parts = _PROBE in text and "'text'" not in text and '"text"' not in text
        return bool(self._parts)


def as_messages(value: str | Message | list[Message], role: str) -> list[Message]:
    """Chat messages as they are; text as one turn of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else list(value)


def as_chat(prompt: str | Message | list[Message] | Chat) -> Chat:
    """A prompt as a chat: text is a turn of the user; messages that end with the assistant's are to be gone on with."""
    if isinstance(prompt, Chat):
        return prompt
    messages = as_messages(prompt, "user")
    return Chat(messages, begun=bool(messages) and messages[-1]["role"] == "assistant")


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


def _plain(message: Message, takes_parts: bool, null_is_empty: bool) -> Message:
    """The message in the form that the template reads."""
    message = dict(message)
    if message.get("content") is None:
        message.pop("content", None)
        if null_is_empty:
            message["content"] = ""
    elif not takes_parts:
        message["content"] = content_text(message)
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_with_parsed_arguments(call) for call in message["tool_calls"]]
    return message


def _with_parsed_arguments(call: Any) -> Any:
    """A tool call with its arguments as an object, where it has them as JSON text: templates write them as JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


# Shadows transformers' function of this name, which asks the clock. Functions cannot be given to a template (since
# transformers 5 they arrive as text), so the directives come as texts. The newline is taken off by `trim_blocks`.
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
