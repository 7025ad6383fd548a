"""Prompts for rollouts: rows to left-padded token ids, with the columns that a reward function may want."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrlhf.config import Overflow, PromptsConfig
from jaxrlhf.data.chats import Chat, Prompt
from jaxrlhf.data.fields import (
    chat_of,
    columns_beside_text,
    has_field,
    messages_field,
    text_field,
    text_or_messages_field,
)
from jaxrlhf.data.order import batch_rows, checksum
from jaxrlhf.data.sources import LoadReport, Row, drops_unusable, read_rows
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.records import Prompts


def left_pad(ids: Sequence[Sequence[int]], length: int | None = None, pad_id: int | None = None) -> Prompts:
    """Prompts [B, length], numpy, from B lists of ids, each at the right edge; `length` None: the longest one's."""
    length = max(map(len, ids)) if length is None else length
    tokens = np.full((len(ids), length), 0 if pad_id is None else pad_id, np.int32)
    mask = np.zeros((len(ids), length), bool)
    for b, prompt in enumerate(ids):
        if not 0 < len(prompt) <= length:
            raise ValueError(f"prompt {b} has {len(prompt)} tokens; want 1 to {length}")
        tokens[b, length - len(prompt) :] = prompt
        mask[b, length - len(prompt) :] = True
    return Prompts(tokens=tokens, mask=mask)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their rows; field i of each list belongs to prompt i."""

    ids: list[np.ndarray]  # i32[p] each
    texts: list[str]  # as the reward function sees it
    chats: list[Chat | None]  # the whole chat, also of a prompt that was cut; None where a prompt is text
    columns: list[dict[str, Any]]  # the row's other fields
    max_prompt_tokens: int
    pad_id: int | None
    report: LoadReport

    def __len__(self) -> int:
        return len(self.ids)

    def checksum(self) -> str:
        """Tells these prompts, in this order, from others."""
        return checksum(self.ids)

    def batch(self, seed: int, step: int, batch_size: int) -> tuple[Prompts, list[dict[str, Any]], list[str]]:
        """The batch at a step of an endless shuffled stream: prompts [batch_size, max_prompt_tokens], numpy,
        with their columns and texts. Each prompt comes once an epoch; the step is all that need be saved."""
        return self.take(self.rows(seed, step, batch_size))

    def rows(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """The numbers i64[batch_size] of that batch's prompts."""
        return batch_rows(seed, step, batch_size, len(self))

    def take(self, rows: Sequence[int] | np.ndarray) -> tuple[Prompts, list[dict[str, Any]], list[str]]:
        """The prompts of the given numbers, as `batch` gives them."""
        prompts = left_pad([self.ids[i] for i in rows], self.max_prompt_tokens, self.pad_id)
        return prompts, [self.columns[i] for i in rows], [self.texts[i] for i in rows]


def read_prompts(config: PromptsConfig) -> tuple[list[Row], list[Prompt], str]:
    """(rows, their prompts, the settings key of the field that held them).

    The first row's fields decide the form of all rows: a prompt (text or chat), a chat whose last assistant
    turn is left out, or plain text; where several are there, the one whose field the settings name, then in
    this order. UserError for a row that cannot be used, with its place.
    """
    rows = read_rows(config)
    key, read = _form(config, rows[:1])
    return rows, [read(row, config) for row in rows], key


def load_prompts(
    config: PromptsConfig, tokenizer: Tokenizer, max_prompt_tokens: int, overflow: Overflow
) -> PromptSet:
    """Reads, checks and tokenizes all prompts (see `read_prompts`); none is longer than `max_prompt_tokens`.

    Of plain text the first `text_tokens` tokens (BOS not counted) are the prompt. A longer prompt: `cut` takes off
    its start, BOS excepted, `drop` leaves it out, `stop` raises. UserError for a row that cannot be used, with
    its place, unless the settings say that such rows are dropped; most rows then decide the form.
    """
    rows = read_rows(config)
    drop = drops_unusable(config, overflow)
    key, read = _form(config, rows if drop else rows[:1])
    name = getattr(config, key)
    report = LoadReport(config.path, len(rows))

    def rendered(row: Row) -> tuple[Prompt, Prompt]:
        prompt = read(row, config)
        report.beside_text |= columns_beside_text(row, config, prompt)
        return prompt, tokenizer.chats.rendered_prompt(prompt, f"{row.where}: ")

    tokenizer.chats.unread.clear()
    usable = list(report.usable(rows, rendered, drop))
    report.unread = sorted(tokenizer.chats.unread)
    kept_ids, texts, chats, columns = [], [], [], []
    for (row, (prompt, _)), ids in zip(usable, tokenizer.encode_prompts([text for _, (_, text) in usable])):
        whole = len(ids)
        if key == "text_field":
            whole = min(whole, len(tokenizer.prefix_ids) + config.text_tokens)
        empty = None if whole else "an empty prompt, and the tokenizer has no BOS to begin with; want text"
        if report.refuses(row, empty or tokenizer.fault(ids[:whole]), drop):
            continue
        if whole > max_prompt_tokens and overflow == "stop":
            raise UserError(
                f"{row.where}: prompt of {whole} tokens, but max_prompt_tokens is {max_prompt_tokens}; "
                "raise it, or set overflow: cut or drop"
            )
        kept = tokenizer.cut_start(ids[:whole], max_prompt_tokens)
        if kept is None or (overflow == "drop" and len(kept) < whole):
            report.drop(f"longer than {max_prompt_tokens} tokens")
            continue
        report.cut += len(kept) < whole
        as_given = isinstance(prompt, str) and len(kept) == len(ids)
        kept_ids.append(np.array(kept, np.int32))
        texts.append(prompt if as_given else tokenizer.decode(kept))
        chats.append(None if isinstance(prompt, str) else prompt)
        columns.append({k: v for k, v in row.values.items() if k != name or not isinstance(prompt, str)})
    report.check()
    return PromptSet(kept_ids, texts, chats, columns, max_prompt_tokens, tokenizer.pad_id, report)


Reader = Callable[[Row, PromptsConfig], Prompt]


def _prompt(row: Row, config: PromptsConfig) -> Prompt:
    return chat_of(row, config, text_or_messages_field(row, config.prompt_field, empty=True))


def _chat(row: Row, config: PromptsConfig) -> Prompt:
    messages = messages_field(row, config.messages_field)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError(f"{row.where}: field {config.messages_field!r} has no message before the assistant's; want one")
    return chat_of(row, config, messages, begun=False)


def _text(row: Row, config: PromptsConfig) -> Prompt:
    return text_field(row, config.text_field)


def _form(config: PromptsConfig, rows: Sequence[Row]) -> tuple[str, Reader]:
    """The settings key of the field that holds the prompts in most of the given rows, and its reader."""
    forms = [("prompt_field", _prompt), ("messages_field", _chat), ("text_field", _text)]
    forms.sort(key=lambda form: form[0] not in config.model_fields_set)
    counts = [sum(has_field(row, getattr(config, key)) for row in rows) for key, _ in forms]
    if any(counts):
        return forms[counts.index(max(counts))]
    raise UserError(
        f"{rows[0].where}: want field {config.prompt_field!r}, {config.messages_field!r} or {config.text_field!r}; "
        f"the row has {', '.join(rows[0].values) or 'no fields'} "
        "(prompt_field, messages_field and text_field name them)"
    )
