"""Demonstrations for supervised fine-tuning. Rows become token ids, and token ids become batches of fixed shape.

Unless a set is streamed (`streams.py`), all rows are read and tokenized before anything is compiled, so that a bad row
stops the run immediately and not after a day.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxrlhf.config import DemonstrationsConfig, DemonstrationsSourceConfig, Overflow
from jaxrlhf.data.chats import Prompt, Response
from jaxrlhf.data.fields import (
    answer_field,
    chat_of,
    check_answer,
    columns_beside_text,
    has_field,
    messages_field,
    text_field,
    text_or_messages_field,
)
from jaxrlhf.data.mixture import Reader, mixed
from jaxrlhf.data.order import Buckets, bucket_lengths, checksum
from jaxrlhf.data.report import LoadReport, drops_unusable
from jaxrlhf.data.sources import Row
from jaxrlhf.data.templates import template_writer
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.data.turns import earlier_turns, learned_spans
from jaxrlhf.errors import UserError
from jaxrlhf.records import SFTBatch

COMPLETION = "completion"  # TRL's name of the response field; read if a row has no field with the default name
LENGTH_BUCKETS = 4  # number of padded lengths of unpacked sequences; the program of each length is compiled once


@dataclass(frozen=True)
class Example:
    """One demonstration. Training learns the response, and the tokens of `earlier` if there are any.

    The response ends with EOS unless its end was cut off.
    """

    prompt_ids: np.ndarray  # i32[p]
    response_ids: np.ndarray  # i32[r], r >= 1
    where: str
    earlier: tuple[tuple[int, int], ...] = ()  # (start, end) in prompt_ids of assistant turns that are learned too

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def arrays(self) -> list[np.ndarray]:
        """Returns the arrays of this example that training reads."""
        spans = [np.array(self.earlier, np.int32).reshape(-1)] if self.earlier else []
        return [self.prompt_ids, self.response_ids, *spans]


def load_demonstrations(
    config: DemonstrationsConfig, tokenizer: Tokenizer, max_length: int, overflow: Overflow
) -> tuple[list[Example], LoadReport]:
    """Reads, checks and tokenizes all rows of the sources. Returns the examples of one pass, and a report."""
    sources = [config, *config.mix_with]
    return mixed(sources, lambda source: demonstrations_reader(source, tokenizer, max_length, overflow))


def demonstrations_reader(
    config: DemonstrationsSourceConfig, tokenizer: Tokenizer, max_length: int, overflow: Overflow
) -> Reader[Example]:
    """Returns the reader of a source. It checks and tokenizes rows. No example is longer than `max_length` tokens.

    All rows have the same form: prompt and response, a chat, or plain text. The first row's fields decide which form
    this is. If the first row has the fields of several forms, a form whose fields the config sets is preferred, and
    then the first form in the order above. A row that cannot be used raises UserError with its place. If the config
    drops unusable rows, the form that most rows have is read instead of the first row's form.

    `overflow` says what happens to a row longer than `max_length`. "cut" removes the end of the row. If no assistant
    turn to learn begins within `max_length` tokens, "cut" drops the row. "drop" drops the row, and "stop" raises
    UserError.
    """
    drop, form = drops_unusable(config, overflow), None
    write = template_writer(config, drop)

    def read(rows: list[Row], first: int = 0) -> tuple[list[Example], LoadReport]:
        nonlocal form
        rows = write(rows, first)
        form = form or form_of(config, rows if drop else rows[:1])
        return _examples(rows, form, config, tokenizer, max_length, overflow)

    return read


def _examples(
    rows: list[Row],
    form: "Form",
    config: DemonstrationsSourceConfig,
    tokenizer: Tokenizer,
    max_length: int,
    overflow: Overflow,
) -> tuple[list[Example], LoadReport]:
    drop = drops_unusable(config, overflow)
    report = LoadReport(config.path, len(rows))

    def rendered(row: Row) -> list[tuple[Prompt, Response]]:
        """Returns (text before the turn, turn) of each earlier turn to learn, and then (prompt, response)."""
        prompt, response = form(row, config)
        report.beside_text |= columns_beside_text(row, config, prompt)
        place = f"{row.where}: "
        earlier = earlier_turns(tokenizer.chats, prompt, place) if config.learn == "all" else []
        return [*earlier, tokenizer.chats.rendered_pair(prompt, response, place)]

    tokenizer.chats.unread.clear()
    usable = list(report.usable(rows, rendered, drop))
    report.unread = sorted(tokenizer.chats.unread)
    examples = []
    tokenizer.cut_responses = 0
    encoded = tokenizer.encode_pairs([pair for _, pairs in usable for pair in pairs])
    for row, pairs in usable:
        *earlier, (prompt, response) = itertools.islice(encoded, len(pairs))
        if report.refuses(row, tokenizer.fault([*prompt, *response]), drop):
            continue
        total = len(prompt) + len(response)
        if total > max_length and overflow == "stop":
            raise UserError(
                f"{row.where}: the row has {total} tokens (prompt {len(prompt)}, response {len(response)}), but "
                f"max_length is {max_length}; raise max_length, or set overflow: cut or drop"
            )
        if total > max_length and overflow == "drop":
            report.drop(f"longer than {max_length} tokens")
            continue
        try:
            spans = learned_spans(prompt, earlier, f"{row.where}: ", tokenizer.name)
        except UserError as error:
            report.refuses(row, str(error).removeprefix(f"{row.where}: "), drop)
            continue
        while len(prompt) >= max_length and spans:  # the last turn that begins within max_length becomes the response
            *spans, (start, end) = spans
            prompt, response = prompt[:start], prompt[start:end]
        if len(prompt) >= max_length:
            report.drop(f"the prompt leaves no room for a response in {max_length} tokens")
        else:
            report.cut += total > max_length
            response = response[: max_length - len(prompt)]
            examples.append(
                Example(np.array(prompt, np.int32), np.array(response, np.int32), row.where, tuple(spans))
            )
    report.past_stop = tokenizer.cut_responses
    return examples, report


# ---------------------------------------------------------------- forms of a row


Form = Callable[[Row, DemonstrationsSourceConfig], tuple[Prompt, Response]]


def prompt_and(response_field: str) -> Form:
    def read(row: Row, config: DemonstrationsSourceConfig) -> tuple[Prompt, Response]:
        prompt = text_or_messages_field(row, config.prompt_field, empty=True)
        return chat_of(row, config, prompt), answer_field(row, response_field)

    return read


def read_chat(row: Row, config: DemonstrationsSourceConfig) -> tuple[Prompt, Response]:
    messages = messages_field(row, config.messages_field)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or not turns[-1]:
        raise UserError(
            f"{row.where}: field {config.messages_field!r} must have an assistant turn after the first message; "
            f"the roles of the messages are {', '.join(m['role'] for m in messages)}"
        )
    check_answer(row, config.messages_field, messages[turns[-1]])
    return chat_of(row, config, messages[: turns[-1]], continued=False), messages[turns[-1]]


def read_text(row: Row, config: DemonstrationsSourceConfig) -> tuple[Prompt, Response]:
    return "", text_field(row, config.text_field)


def form_of(config: DemonstrationsSourceConfig, rows: Sequence[Row]) -> Form:
    """Returns the reader for the form that most of these rows have."""
    named = config.model_fields_set
    forms = [((config.prompt_field, config.response_field), {"prompt_field", "response_field"})]
    if "response_field" not in named:
        forms.append(((config.prompt_field, COMPLETION), {"prompt_field"}))
    readers = [(fields, keys, prompt_and(fields[1])) for fields, keys in forms]
    readers += [((config.messages_field,), {"messages_field"}, read_chat)]
    readers += [((config.text_field,), {"text_field"}, read_text)]
    readers.sort(key=lambda form: not named.intersection(form[1]))
    counts = [sum(all(has_field(row, field) for field in fields) for row in rows) for fields, _, _ in readers]
    if any(counts):
        return readers[counts.index(max(counts))][2]
    if any(has_field(row, field) for row in rows for field in forms[0][0]):
        return prompt_and(config.response_field)  # this reader raises an error that names the missing field
    raise UserError(
        f"{rows[0].where}: the row must have the fields {config.prompt_field!r} and {config.response_field!r}, or the "
        f"field {config.messages_field!r}, or the field {config.text_field!r}; its fields are: "
        f"{', '.join(rows[0].values) or 'none'} (the settings prompt_field, response_field, messages_field and "
        "text_field name the fields to read)"
    )


# ---------------------------------------------------------------- sequences and batches


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs items of these lengths into bins of `capacity` and returns the item numbers of each bin.

    The method is best fit, and the longest items are packed first. The result is deterministic. The number of bins is
    at most about 11/9 of the smallest possible number (Johnson et al. 1974).
    """
    bins: list[list[int]] = []
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # entry r: the bins with free room r
    rooms = 0  # bit r is set if an open bin has room r; the bits give the tightest fit without a search
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"item {index} has length {length}, but bins have capacity {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = open_bins[room].pop()
            if not open_bins[room]:
                rooms &= ~(1 << room)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        if room > length:
            open_bins[room - length].append(number)
            rooms |= 1 << (room - length)
    return bins


def fill(
    examples: Sequence[Example], sequences: Sequence[Sequence[int]], rows: int, length: int, pad_id: int | None
) -> SFTBatch:
    """Returns a batch [rows, length]. Row b holds the examples with the numbers `sequences[b]`, one after the other.

    Rows after the last sequence are empty and have segment 0. The loss mask is True on response tokens including EOS,
    and on earlier turns that are learned. It is False on the first token of a segment, because this token has no
    context.
    """
    tokens = np.full((rows, length), 0 if pad_id is None else pad_id, np.int32)
    segments = np.zeros((rows, length), np.int32)
    loss_mask = np.zeros((rows, length), bool)
    for b, sequence in enumerate(sequences):
        start = 0
        for segment, index in enumerate(sequence, 1):
            example = examples[index]
            middle, end = start + len(example.prompt_ids), start + len(example)
            tokens[b, start:middle] = example.prompt_ids
            tokens[b, middle:end] = example.response_ids
            segments[b, start:end] = segment
            for first, last in ((len(example.prompt_ids), len(example)), *example.earlier):
                loss_mask[b, start + max(first, 1) : start + last] = True
            start = end
    return SFTBatch(tokens=tokens, segments=segments, loss_mask=loss_mask)


class SFTData:
    """An endless sequence of numpy batches. `batch(step)` returns a batch; `len` is the number of batches per epoch.

    With packing, several examples share a sequence of `max_length` tokens, and each epoch shuffles the sequences.
    Without packing, each example is one sequence and is padded to one of a few lengths.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        max_length: int,
        seed: int,
        packing: bool = True,
        pad_id: int | None = None,
        bounds: np.ndarray | None = None,
    ):
        """`bounds` are the padded lengths in ascending order. None means the quantiles of these examples' lengths."""
        self.examples, self.batch_size, self.seed, self.pad_id = examples, batch_size, seed, pad_id
        lengths = np.array([len(example) for example in examples], np.int64)
        if packing:
            self.sequences = pack(lengths.tolist(), max_length)
            totals = np.full(len(self.sequences), max_length)
            bounds = np.array([max_length])
        else:
            self.sequences = [[i] for i in range(len(examples))]
            totals = lengths
            buckets = min(LENGTH_BUCKETS, max(1, len(examples) // batch_size))
            bounds = bucket_lengths(lengths, buckets, max_length) if bounds is None else bounds
        self.bounds, self.buckets = bounds, Buckets.of(totals, bounds, batch_size)

    def __len__(self) -> int:
        """The number of batches per epoch."""
        return len(self.buckets)

    def checksum(self) -> str:
        """Returns a hash of these examples in this order."""
        return checksum(array for example in self.examples for array in example.arrays())

    def batch(self, step: int) -> SFTBatch:
        """Returns the batch at a step. Steps are counted from 0. The same seed gives the same batch."""
        return self._fill(*self.buckets.batch(self.seed, step))

    def all_batches(self) -> list[SFTBatch]:
        """Returns unshuffled batches that hold every example once."""
        return [self._fill(length, rows) for length, rows in self.buckets.in_order()]

    def _fill(self, length: int, rows: np.ndarray) -> SFTBatch:
        return fill(self.examples, [self.sequences[i] for i in rows], self.batch_size, length, self.pad_id)
