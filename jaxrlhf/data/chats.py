"""Chats to text, through the chat template that a tokenizer carries."""

from typing import Any

from jaxrlhf.data.sources import Message, one_line
from jaxrlhf.errors import UserError

Prompt = str | list[Message]
Response = str | Message | list[Message]


class ChatTemplate:
    """The chat template of a transformers tokenizer; `name` is where that came from, for messages."""

    def __init__(self, tokenizer: Any, name: str):
        self._tokenizer = tokenizer
        self.name = name

    @property
    def exists(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def prompt_text(self, prompt: Prompt, place: str) -> str:
        """A text as it is; a chat as the template writes it, ending where the assistant begins to speak."""
        return prompt if isinstance(prompt, str) else self._render(prompt, True, place)

    def whole_text(self, chat: list[Message], place: str) -> str:
        """A whole chat as the template writes and ends it."""
        return self._render(chat, False, place)

    def pair_texts(self, prompt: Prompt, response: Response, place: str) -> tuple[str, str]:
        """The prompt as text, and the text that follows it."""
        if isinstance(prompt, str) and isinstance(response, str):
            return prompt, response
        opening, answer = as_messages(prompt, "user"), as_messages(response, "assistant")
        before = self._render(opening, True, place)
        whole = self._render(opening + answer, False, place)
        if whole.startswith(before):
            return before, whole[len(before) :]
        # Some templates open the assistant's turn with more than they write into a finished one.
        return before, "".join(message["content"] for message in answer)

    def _render(self, messages: list[Message], open_turn: bool, place: str) -> str:
        if not self.exists:
            raise UserError(
                f"{place}chat messages, but the tokenizer {self.name} has no chat template; "
                "give prompt and answer as text, or a tokenizer with one"
            )
        if not messages:
            raise UserError(f"{place}a chat without a message before the answer; want at least one")
        try:
            return self._tokenizer.apply_chat_template(messages, add_generation_prompt=open_turn, tokenize=False)
        except ImportError as error:
            raise UserError(f"{self.name}: chat templates need jinja2: pip install jinja2") from error
        except Exception as error:  # a template is a program, and raises what it likes
            raise UserError(f"{place}the chat template of {self.name} refuses this chat: {one_line(error)}") from error


def as_messages(value: str | Message | list[Message], role: str) -> list[Message]:
    """Chat messages as they are; text as one turn of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else list(value)
