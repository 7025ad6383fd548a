"""Settings that describe data sources and name the fields of their rows."""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from jaxrlhf.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Settings
from jaxrlhf.config.paths import SourcePath

# Arguments of `apply_chat_template` that the stages set. Rows and settings may not set these arguments.
RESERVED = (
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip


def check_template_arguments(names: Iterable[str]) -> None:
    """Raises ValueError if a name is in `RESERVED`, because the stages set these arguments."""
    for name in names:
        if name in RESERVED:
            raise ValueError(f"{name} is set by the stage that renders the chat; give only variables of the template")


class SourceConfig(Settings):
    """A data source."""

    path: SourcePath = Field(description="file, pattern of files such as part-*.jsonl, folder, hub id, or builtin:NAME: assistant-demonstrations, assistant-preferences, assistant-prompts, a task such as intent, or a game such as number_guessing")
    format: Literal["auto", "json", "jsonl", "csv", "parquet", "datasets", "builtin"] = Field("auto", description="file format; auto decides by the ending of the path; csv is a table with a header, whose empty cells are null; datasets is for a folder or hub id that the datasets library loads")
    split: str = Field("train", description="split of a datasets folder or hub id; builtin data sets have the splits train and test, and builtin tasks and games also validation")
    subset: str | None = Field(None, description="name of a configuration of the hub data set")
    limit: PositiveInt | None = Field(None, description="largest number of rows; the first rows are used; a builtin data set generates this number of rows; null uses all rows")
    unusable: Literal["stop", "drop"] | None = Field(None, description="what happens with a row that cannot be used (an empty completion, a wrong type, a chat that the template rejects): stop ends the run, drop drops and counts the row; null means drop if overflow is drop, else stop, because an error in every row should not look like a small data set")


class ShotsConfig(SourceConfig):
    """Solved examples (few-shot). The template of each row can read them as the list `shots`."""

    count: PositiveInt = Field(4, description="number of examples for each row")
    choose: Literal["first", "random"] = Field("first", description="first gives every row the first examples of the source; random draws examples for each row; an example that equals the row is never used, because it would tell the answer")
    seed: NonNegativeInt = Field(0, description="with choose: random, the seed of the draw")


class ChatSourceConfig(SourceConfig):
    """A data source with rows that may hold chats, and the inputs of the chat template."""

    template: str | None = Field(None, description="jinja template that writes the prompt as text from the columns of a row, such as 'Review: {{ text }}'; the result replaces prompt_field; the template runs in a sandbox")
    messages_template: list[dict[str, str]] | None = Field(None, min_length=1, description="messages with role and content that write the prompt as a chat; each content is a jinja template over the columns of a row; the result replaces prompt_field")
    shots: ShotsConfig | None = Field(None, description="source of solved examples for the template, which reads them as the list shots")
    weight: PositiveFloat | None = Field(None, description="in a mixture, the share of this source in a pass over the data, relative to the weights of the other sources; the source that is repeated least is read once")
    epochs: PositiveFloat | None = Field(None, description="in a mixture, how often each row of this source appears in a pass over the data; 0.5 takes a random half of the rows; null means 1")
    tools: list[dict[str, Any]] | None = Field(None, description="JSON schemas of the tools of every chat, for the chat template; if a row has tools, they replace these tools")
    tools_field: str = Field("tools", description="column with the tools of a chat, as a list of JSON schemas or as JSON text; '' means no column")
    chat_template_kwargs: dict[str, Any] = Field({}, description="variables of the chat template, such as {enable_thinking: false}; variables of a row replace these variables")
    chat_template_kwargs_field: str = Field("chat_template_kwargs", description="column with template variables of a chat, as an object or as JSON text; '' means no column")

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_arguments(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        check_template_arguments(kwargs)
        return kwargs

    @field_validator("messages_template")
    @classmethod
    def _messages_template(cls, messages: list[dict[str, str]] | None) -> list[dict[str, str]] | None:
        for number, message in enumerate(messages or (), 1):
            if set(message) != {"role", "content"}:
                raise ValueError(f"message {number} must have exactly the keys role and content, not {sorted(message)}")
        return messages

    @model_validator(mode="after")
    def _writers_of_the_prompt(self) -> "ChatSourceConfig":
        writers = [name for name in ("template", "messages_template") if getattr(self, name) is not None]
        if self.shots is not None and not writers:
            raise ValueError("shots has no effect without a template that reads it; give template or messages_template, or leave shots out")
        # The config.yaml of a run gives every field, so a field with its default does not count.
        fields = type(self).model_fields
        readers = [
            name
            for name in ("messages_field", "text_field")
            if name in fields and getattr(self, name) != fields[name].default
        ]
        if len(writers + readers) > 1 and writers:
            raise ValueError(f"{' and '.join(writers + readers)} each give the prompt; give one of them")
        return self


class DemonstrationsSourceConfig(ChatSourceConfig):
    """Demonstrations. A row has prompt and response, chat messages, or plain text."""

    prompt_field: str = Field("prompt", description="column with the prompt, as text or chat messages")
    response_field: str = Field("response", description="column with the response, as text or chat messages; if this setting is not given and a row has no column response, the column completion is read")
    messages_field: str = Field("messages", description="column with a complete chat; the last assistant turn is the response")
    learn: Literal["last", "all"] = Field("last", description="which assistant turns of a chat are learned: the response, which is the last turn (last), or the earlier assistant turns too (all); all needs a chat template that writes a turn in the same way whether or not later turns follow")
    text_field: str = Field("text", description="column with plain text; every token of the text is learned")
    response_template: str | None = Field(None, description="jinja template that writes the response from the columns of a row, such as '{{ [\"negative\", \"positive\"][label] }}'; the result replaces response_field")


class PreferencesSourceConfig(ChatSourceConfig):
    """Preference pairs. A row has one prompt and two completions, or two full dialogues as in hh-rlhf, or two chats."""

    prompt_field: str = Field("prompt", description="column with the prompt, as text or chat messages; if a row has no prompt, chosen and rejected are full dialogues")
    chosen_field: str = Field("chosen", description="column with the better completion or dialogue")
    rejected_field: str = Field("rejected", description="column with the worse completion or dialogue")
    margin_field: str = Field("margin", description="optional column with the margin, a number that says how much better the chosen completion is")


class PromptsSourceConfig(ChatSourceConfig):
    """Prompts. The reward function receives the other columns of a row."""

    prompt_field: str = Field("prompt", description="column with the prompt, as text or chat messages; the completion continues a final assistant turn")
    messages_field: str = Field("messages", description="column with a chat; a final assistant turn is removed")
    text_field: str = Field("text", description="column with plain text; the first text_tokens tokens are the prompt")
    text_tokens: PositiveInt = Field(8, description="number of tokens at the start of a plain text that become the prompt")
    curriculum: str | None = Field(None, description="column with a number that orders the first pass over the prompts, from the lowest number to the highest; later passes are shuffled; in a mixture, prompts of sources without curriculum have the number 0")


MIX_WITH = "mix_with"
_MIX = Field([], description="further sources that are mixed with this source; each is a section with the same settings as this one, such as {path: more.jsonl, weight: 0.5}; weight or epochs of each source say how much of it a pass has")


_STREAMING = Field(False, description="reads the rows while the stage trains, window by window, so that a data set may be larger than memory; the files are JSON Lines, CSV or Parquet (also .gz), or a data set of the datasets library; false reads and checks all rows before training")
_ROWS = 10_000
_SHUFFLE_BUFFER = Field(_ROWS, description="with streaming, number of rows of a window: rows are shuffled and packed within a window, and two windows are in memory")


def _check_mixture(config: Any) -> Any:
    """Raises ValueError if weights, epochs and streaming of the sources do not fit each other."""
    sources = [config, *config.mix_with]
    if config.streaming:
        _check_streaming(sources)
    elif config.shuffle_buffer != _ROWS:
        raise ValueError("shuffle_buffer has no effect without streaming; give streaming: true, or leave shuffle_buffer out")
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and any(source.epochs is not None for source in sources):
        raise ValueError("a mixture has either weight or epochs; give one of the two")
    if any(weighted) and not config.mix_with:
        raise ValueError("weight has no effect without other sources; give mix_with, or leave weight out")
    if any(weighted) and not all(weighted):
        raise ValueError(f"source {weighted.index(False) + 1} of the mixture has no weight; give every source a weight")
    return config


def _check_streaming(sources: list[Any]) -> None:
    """Raises ValueError if a stream cannot obey the settings, because it does not know all its rows in advance."""
    for source in sources:
        if len(sources) > 1 and source.weight is None:
            raise ValueError(
                "a streamed mixture needs a weight for every source, because the numbers of rows are not known"
            )
        if source.epochs is not None:
            raise ValueError("a streamed source cannot have epochs, because its number of rows is not known; leave epochs out")
        if getattr(source, "curriculum", None) is not None:
            raise ValueError("curriculum sorts all rows, but a stream reads only some at a time; leave out curriculum or streaming")


def not_streamed(config: Any) -> Any:
    """Returns the source, which is read as a whole. Raises ValueError if its setting `streaming` is true."""
    if config is not None and config.streaming:
        raise ValueError("this data is read as a whole; leave streaming out")
    return config


class DemonstrationsConfig(DemonstrationsSourceConfig):
    """One source of demonstrations, or a mixture of several."""

    mix_with: list[DemonstrationsSourceConfig] = _MIX
    streaming: bool = _STREAMING
    shuffle_buffer: PositiveInt = _SHUFFLE_BUFFER
    _mixture = model_validator(mode="after")(_check_mixture)


class PreferencesConfig(PreferencesSourceConfig):
    """One source of preference pairs, or a mixture of several."""

    mix_with: list[PreferencesSourceConfig] = _MIX
    streaming: bool = _STREAMING
    shuffle_buffer: PositiveInt = _SHUFFLE_BUFFER
    _mixture = model_validator(mode="after")(_check_mixture)


class PromptsConfig(PromptsSourceConfig):
    """One source of prompts, or a mixture of several."""

    mix_with: list[PromptsSourceConfig] = _MIX
    streaming: bool = _STREAMING
    shuffle_buffer: PositiveInt = _SHUFFLE_BUFFER
    _mixture = model_validator(mode="after")(_check_mixture)
