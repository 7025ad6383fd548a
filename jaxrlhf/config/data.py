"""Data sources, and the names of their fields."""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, field_validator

from jaxrlhf.config.base import PositiveInt, Settings
from jaxrlhf.config.paths import SourcePath

# Arguments of `apply_chat_template` that the stages set. Rows and settings may not set these arguments.
RESERVED = (
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip


def check_template_arguments(names: Iterable[str]) -> None:
    """Raises ValueError if a name is in `RESERVED`: an argument that the stages set, not a variable of the template."""
    for name in names:
        if name in RESERVED:
            raise ValueError(f"{name} is set by the stage that renders the chat; give variables of the template only")


class SourceConfig(Settings):
    """A data source."""

    path: SourcePath = Field(description="file, folder, hub id, or builtin:assistant-demonstrations, -preferences, -prompts")
    format: Literal["auto", "json", "jsonl", "parquet", "datasets", "builtin"] = Field("auto", description="file format; auto takes it from the path's ending; datasets is for a folder or hub id that the datasets library loads")
    split: str = Field("train", description="split of a datasets folder or hub id; builtin data sets have the splits train and test")
    subset: str | None = Field(None, description="configuration name of a hub id")
    limit: PositiveInt | None = Field(None, description="number of first rows to use, or of rows to generate for a builtin data set; null uses all rows")
    unusable: Literal["stop", "drop"] | None = Field(None, description="what happens with a row that cannot be used (an empty completion, a wrong type, a chat that the template rejects): it stops the run (stop), or it is dropped and counted (drop); null is drop if overflow is drop, else stop, because an error in every row should not look like a small data set")


class ChatSourceConfig(SourceConfig):
    """A data source whose rows may hold chats, and the chat template's inputs."""

    tools: list[dict[str, Any]] | None = Field(None, description="JSON schemas of the tools of every chat, for the chat template; a row's own tools replace them")
    tools_field: str = Field("tools", description="column with a chat's tools, as a list of JSON schemas or as JSON text; '' reads none")
    chat_template_kwargs: dict[str, Any] = Field({}, description="variables of the chat template, such as {enable_thinking: false}; a row's own variables override them")
    chat_template_kwargs_field: str = Field("chat_template_kwargs", description="column with a chat's own template variables, as an object or as JSON text; '' reads none")

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_arguments(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        check_template_arguments(kwargs)
        return kwargs


class DemonstrationsConfig(ChatSourceConfig):
    """Demonstrations: prompt and response, chat messages, or plain text."""

    prompt_field: str = Field("prompt", description="column with the prompt, as text or chat messages")
    response_field: str = Field("response", description="column with the response, as text or chat messages; if this setting is not given, a row without the column response is read from its column completion")
    messages_field: str = Field("messages", description="column with a complete chat, whose last assistant turn is the response")
    text_field: str = Field("text", description="column with plain text; every token of the text is learned")


class PreferencesConfig(ChatSourceConfig):
    """Preference pairs, in one of three forms: one prompt and two completions; two full dialogues, as in hh-rlhf; two chats."""

    prompt_field: str = Field("prompt", description="column with the prompt, as text or chat messages; without this column, chosen and rejected are full dialogues")
    chosen_field: str = Field("chosen", description="column with the better completion or dialogue")
    rejected_field: str = Field("rejected", description="column with the worse completion or dialogue")
    margin_field: str = Field("margin", description="optional column with the margin: a number that says by how much the chosen completion is better")


class PromptsConfig(ChatSourceConfig):
    """Prompts; the reward function receives a row's other columns."""

    prompt_field: str = Field("prompt", description="column with the prompt, as text or chat messages; a final assistant turn is continued")
    messages_field: str = Field("messages", description="column with a chat; a final assistant turn is removed")
    text_field: str = Field("text", description="column with plain text; the first text_tokens tokens are the prompt")
    text_tokens: PositiveInt = Field(8, description="number of first tokens of a plain text that form the prompt")
