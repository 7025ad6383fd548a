"""Prompts for rollouts. Rows become left-padded token ids; reward functions read the other columns of the rows."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrlhf.config import Overflow, PromptsConfig, PromptsSourceConfig
from jaxrlhf.data.chats import Chat, Prompt
from jaxrlhf.data.fields import (
    chat_of,
    columns_beside_text,
    has_field,
    messages_field,
    number_field,
    text_field,
    text_or_messages_field,
)
from jaxrlhf.data.mixture import Reader, mixed
from jaxrlhf.data.order import batch_rows, checksum
from jaxrlhf.data.report import LoadReport, drops_unusable
from jaxrlhf.data.sources import Row, read_rows
from jaxrlhf.data.success import Success
from jaxrlhf.data.templates import template_writer
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.records import Prompts


def left_pad(ids: Sequence[Sequence[int]], length: int | None = None, pad_id: int | None = None) -> Prompts:
    """Left-pads B lists of ids into numpy Prompts [B, length]. `length` None means the length of the longest list."""
    length = max(map(len, ids)) if length is None else length
    tokens = np.full((len(ids), length), 0 if pad_id is None else pad_id, np.int32)
    mask = np.zeros((len(ids), length), bool)
    for b, prompt in enumerate(ids):
        if not 0 < len(prompt) <= length:
            raise ValueError(f"prompt {b} must have 1 to {length} tokens, not {len(prompt)}")
        tokens[b, length - len(prompt) :] = prompt
        mask[b, length - len(prompt) :] = True
    return Prompts(tokens=tokens, mask=mask)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of the rows; entry i of each list belongs to prompt i."""

    ids: list[np.ndarray]  # i32[p] each
    texts: list[str]  # as reward functions receive them
    chats: list[Chat | None]  # the uncut chat of the prompt; None for a text prompt
    columns: list[dict[str, Any]]  # the row's other fields
    max_prompt_tokens: int
    pad_id: int | None
    report: LoadReport
    keys: np.ndarray | None = None  # f64[N]; if given, the first epoch is in ascending order of these numbers
    success: Success | None = None  # if given, draws depend on the success so far, and there are no epochs

    def __len__(self) -> int:
        return len(self.ids)

    def checksum(self) -> str:
        """Returns a hash of these prompts and their columns in this order."""
        columns = json.dumps(self.columns, sort_keys=True, default=str).encode()
        return checksum([*self.ids, np.frombuffer(columns, np.uint8)])

    def rows(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """Returns the prompt numbers, i64[batch_size], at a step of an endless shuffled stream.

        Each epoch has each prompt once. With a curriculum, the first epoch goes from the lowest key to the highest.
        """
        if self.success is not None:
            return self.success.choose(seed, step, batch_size)
        return batch_rows(seed, step, batch_size, len(self), self.keys)

    def padded(self, rows: Sequence[int] | np.ndarray) -> Prompts:
        """Returns the prompts with these numbers as numpy Prompts [len(rows), max_prompt_tokens]."""
        return left_pad([self.ids[i] for i in rows], self.max_prompt_tokens, self.pad_id)


def read_prompts(config: PromptsConfig) -> tuple[list[Row], list[Prompt], str]:
    """Returns (rows, the prompt of each row, the config key of the field that holds the prompts).

    All rows are read from the same field: the prompt field (text or chat), the messages field (a chat whose last
    assistant turn is left out) or the text field. The first row decides which field this is. If the first row has
    several of these fields, a field that the config names is read, else the first field in the order above. A row that
    cannot be used raises UserError with its place.
    """
    rows = template_writer(config)(read_rows(config))
    key, read = form_of(config, rows[:1])
    return rows, [read(row, config) for row in rows], key


def load_prompts(
    config: PromptsConfig, tokenizer: Tokenizer, max_prompt_tokens: int, overflow: Overflow
) -> PromptSet:
    """Reads, checks and tokenizes all prompts of the sources. Returns the prompts of a pass."""
    sources = [config, *config.mix_with]
    loaded, report = mixed(sources, lambda source: prompts_reader(source, tokenizer, max_prompt_tokens, overflow))
    has_curriculum = any(source.curriculum is not None for source in sources)
    return prompt_set(loaded, report, max_prompt_tokens, tokenizer.pad_id, has_curriculum)


LoadedPrompt = tuple[np.ndarray, str, Chat | None, dict[str, Any], float]  # ids, text, chat, columns, key


def prompt_set(
    loaded: Sequence[LoadedPrompt], report: LoadReport, max_prompt_tokens: int, pad_id: int | None, by_key: bool = False
) -> PromptSet:
    """Returns loaded prompts as a set. If `by_key` is set, the first epoch is in ascending order of the keys."""
    ids, texts, chats, columns, keys = map(list, zip(*loaded))
    order = np.array(keys, np.float64) if by_key else None
    return PromptSet(ids, texts, chats, columns, max_prompt_tokens, pad_id, report, order)


def prompts_reader(
    config: PromptsSourceConfig, tokenizer: Tokenizer, max_prompt_tokens: int, overflow: Overflow
) -> Reader[LoadedPrompt]:
    """Returns the reader of a source. It checks and tokenizes rows. No prompt is longer than `max_prompt_tokens`.

    `read_prompts` explains which field is read. A prompt from the text field is BOS and the first `text_tokens` tokens
    of the text. `overflow` decides about a prompt that is too long. "cut" removes the start of the prompt but
    keeps BOS, "drop" drops the prompt, and "stop" raises UserError. A row that cannot be used raises UserError with its
    place. The first row decides which field is read. But if the config drops unusable rows, the field that most rows
    have is read.
    """
    drop, form = drops_unusable(config, overflow), None
    write = template_writer(config, drop)

    def read(rows: list[Row], first: int = 0) -> tuple[list[LoadedPrompt], LoadReport]:
        nonlocal form
        rows = write(rows, first)
        form = form or form_of(config, rows if drop else rows[:1])
        return _prompts(rows, *form, config, tokenizer, max_prompt_tokens, overflow)

    return read


def _prompts(
    rows: list[Row],
    key: str,
    form: "Form",
    config: PromptsSourceConfig,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    overflow: Overflow,
) -> tuple[list[LoadedPrompt], LoadReport]:
    drop, name = drops_unusable(config, overflow), getattr(config, key)
    report = LoadReport(config.path, len(rows))

    def rendered(row: Row) -> tuple[Prompt, Prompt, float]:
        prompt = form(row, config)
        report.beside_text |= columns_beside_text(row, config, prompt)
        key = 0.0 if config.curriculum is None else number_field(row, config.curriculum)
        return prompt, tokenizer.chats.rendered_prompt(prompt, f"{row.where}: "), key

    tokenizer.chats.unread.clear()
    usable = list(report.usable(rows, rendered, drop))
    report.unread = sorted(tokenizer.chats.unread)
    loaded: list[LoadedPrompt] = []
    texts = [text for _, (_, text, _) in usable]
    for (row, (prompt, _, order_key)), ids in zip(usable, tokenizer.encode_prompts(texts)):
        length = len(ids)
        if key == "text_field":
            length = min(length, len(tokenizer.prefix_ids) + config.text_tokens)
        empty = None if length else "the prompt is empty, and the tokenizer has no BOS; the prompt must have text"
        if report.refuses(row, empty or tokenizer.fault(ids[:length]), drop):
            continue
        if length > max_prompt_tokens and overflow == "stop":
            raise UserError(
                f"{row.where}: the prompt has {length} tokens, but max_prompt_tokens is {max_prompt_tokens}; "
                "raise max_prompt_tokens, or set overflow: cut or drop"
            )
        kept = tokenizer.cut_start(ids[:length], max_prompt_tokens)
        if kept is None or (overflow == "drop" and len(kept) < length):
            report.drop(f"longer than {max_prompt_tokens} tokens")
            continue
        report.cut += len(kept) < length
        is_unchanged = isinstance(prompt, str) and len(kept) == len(ids)
        text = prompt if is_unchanged else tokenizer.decode(kept)
        columns = {k: v for k, v in row.values.items() if k != name or not isinstance(prompt, str)}
        chat = None if isinstance(prompt, str) else prompt
        loaded.append((np.array(kept, np.int32), text, chat, columns, order_key))
    return loaded, report


Form = Callable[[Row, PromptsSourceConfig], Prompt]


def _prompt(row: Row, config: PromptsSourceConfig) -> Prompt:
    return chat_of(row, config, text_or_messages_field(row, config.prompt_field, empty=True))


def _chat(row: Row, config: PromptsSourceConfig) -> Prompt:
    messages = messages_field(row, config.messages_field)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError(
            f"{row.where}: field {config.messages_field!r} has no message before the assistant turn; a prompt needs one"
        )
    return chat_of(row, config, messages, continued=False)


def _text(row: Row, config: PromptsSourceConfig) -> Prompt:
    return text_field(row, config.text_field)


def form_of(config: PromptsSourceConfig, rows: Sequence[Row]) -> tuple[str, Form]:
    """Returns (config key of the field that holds the prompt in most of these rows, the reader of this field)."""
    forms = [("prompt_field", _prompt), ("messages_field", _chat), ("text_field", _text)]
    forms.sort(key=lambda form: form[0] not in config.model_fields_set)
    counts = [sum(has_field(row, getattr(config, key)) for row in rows) for key, _ in forms]
    if any(counts):
        return forms[counts.index(max(counts))]
    raise UserError(
        f"{rows[0].where}: the row must have the field {config.prompt_field!r}, {config.messages_field!r} or "
        f"{config.text_field!r}; its fields are: {', '.join(rows[0].values) or 'none'} "
        "(the settings prompt_field, messages_field and text_field name the field to read)"
    )
