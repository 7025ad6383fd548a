"""Where rows come from, and the names of their fields."""

from typing import Literal

from pydantic import Field

from jaxrlhf.config.base import PositiveInt, Settings


class SourceConfig(Settings):
    """Where rows come from."""

    path: str = Field(description="file, folder, hub id, or builtin:assistant-demonstrations, -preferences, -prompts")
    format: Literal["auto", "json", "jsonl", "parquet", "datasets", "builtin"] = Field(
        "auto", description="auto: by the path's ending; datasets: a folder or hub id for the datasets library"
    )
    split: str = Field("train", description="split of a datasets folder or hub id; of a builtin set: train or test")
    subset: str | None = Field(None, description="configuration name of a hub id")
    limit: PositiveInt | None = Field(None, description="use the first rows only; of a builtin set: how many to make")


class DemonstrationsConfig(SourceConfig):
    """Rows to imitate: prompt and response, chat messages, or plain text."""

    prompt_field: str = Field("prompt", description="text or chat messages of the prompt")
    response_field: str = Field("response", description="text or chat message of the response")
    messages_field: str = Field("messages", description="a whole chat; the last assistant turn is the response")
    text_field: str = Field("text", description="plain text, all of it learnt")


class PreferencesConfig(SourceConfig):
    """Pairs: prompt, chosen, rejected; or two whole dialogues as in hh-rlhf; or two chats."""

    prompt_field: str = Field("prompt", description="text or chat messages of the prompt; absent: whole dialogues")
    chosen_field: str = Field("chosen", description="the better answer or dialogue")
    rejected_field: str = Field("rejected", description="the worse answer or dialogue")
    margin_field: str = Field("margin", description="optional number: by how much the better one is better")


class PromptsConfig(SourceConfig):
    """Prompts to answer; a row's other columns go to the reward function."""

    prompt_field: str = Field("prompt", description="text or chat messages of the prompt")
    messages_field: str = Field("messages", description="a chat; a last assistant turn is left out")
    text_field: str = Field("text", description="plain text whose beginning is the prompt")
    text_tokens: PositiveInt = Field(8, description="how many tokens of a plain text are the prompt")
