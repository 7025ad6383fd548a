"""Where rows come from, and the names of their fields."""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, field_validator

from jaxrlhf.config.base import PositiveInt, Settings

# What `apply_chat_template` is told by the stages, and no row or setting may say otherwise.
RESERVED = (
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip


def check_template_arguments(names: Iterable[str]) -> None:
    """ValueError where one is no argument of a template, but of what writes the chat."""
    for name in names:
        if name in RESERVED:
            raise ValueError(f"{name} is set by the stage that writes the chat; want variables of the template")


class SourceConfig(Settings):
    """Where rows come from."""

    path: str = Field(description="file, folder, hub id, or builtin:assistant-demonstrations, -preferences, -prompts")
    format: Literal["auto", "json", "jsonl", "parquet", "datasets", "builtin"] = Field(
        "auto", description="auto: by the path's ending; datasets: a folder or hub id for the datasets library"
    )
    split: str = Field("train", description="split of a datasets folder or hub id; of a builtin set: train or test")
    subset: str | None = Field(None, description="configuration name of a hub id")
    limit: PositiveInt | None = Field(None, description="use the first rows only; of a builtin set: how many to make")
    unusable: Literal["stop", "drop"] | None = Field(None, description="rows that cannot be used (an answer that is empty or null, a wrong type, a chat that the template refuses): stop at the first, or drop and count them; null: drop where overflow is drop, else stop, because a fault in every row should not pass for a small set")


class ChatSourceConfig(SourceConfig):
    """Rows that may hold chats; what the tokenizer's chat template is given with their messages."""

    tools: list[dict[str, Any]] | None = Field(None, description="tools of every chat as JSON schemas, for the chat template; a row's own replace them")
    tools_field: str = Field("tools", description="column with a chat's tools: a list of JSON schemas, or that as JSON text; '': none")
    chat_template_kwargs: dict[str, Any] = Field({}, description="variables of the chat template, such as {enable_thinking: false}; a row's own win")
    chat_template_kwargs_field: str = Field("chat_template_kwargs", description="column with such variables of a chat, as an object or JSON text; '': none")

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_arguments(cls, given: dict[str, Any]) -> dict[str, Any]:
        check_template_arguments(given)
        return given


class DemonstrationsConfig(ChatSourceConfig):
    """Rows to imitate: prompt and response, chat messages, or plain text."""

    prompt_field: str = Field("prompt", description="text or chat messages of the prompt")
    response_field: str = Field("response", description="text or chat messages of the response; unless it is set, completion is read where a row has no response")
    messages_field: str = Field("messages", description="a whole chat; the last assistant turn is the response")
    text_field: str = Field("text", description="plain text, all of it learnt")


class PreferencesConfig(ChatSourceConfig):
    """Pairs: prompt, chosen, rejected; or two whole dialogues as in hh-rlhf; or two chats."""

    prompt_field: str = Field("prompt", description="text or chat messages of the prompt; absent: whole dialogues")
    chosen_field: str = Field("chosen", description="the better answer or dialogue")
    rejected_field: str = Field("rejected", description="the worse answer or dialogue")
    margin_field: str = Field("margin", description="optional number: by how much the better one is better")


class PromptsConfig(ChatSourceConfig):
    """Prompts to answer; a row's other columns go to the reward function."""

    prompt_field: str = Field("prompt", description="text or chat messages of the prompt; a last assistant turn is continued")
    messages_field: str = Field("messages", description="a chat; a last assistant turn is left out")
    text_field: str = Field("text", description="plain text whose beginning is the prompt")
    text_tokens: PositiveInt = Field(8, description="how many tokens of a plain text are the prompt")
