"""Preference pairs for the reward model. Rows become pairs of token sequences, and these pairs become batches."""

import os.path
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxrlhf.config import Overflow, PreferencesConfig, PreferencesSourceConfig
from jaxrlhf.data.chats import Prompt, Response, as_messages, content_text, without_empty_turn
from jaxrlhf.data.fields import (
    answer_field,
    chat_of,
    columns_beside_text,
    has_field,
    number_field,
    text_or_messages_field,
)
from jaxrlhf.data.mixture import Reader, mixed
from jaxrlhf.data.order import Buckets, bucket_lengths, checksum
from jaxrlhf.data.report import LoadReport, drops_unusable
from jaxrlhf.data.sources import Message, Row
from jaxrlhf.data.templates import template_writer
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.records import PreferenceBatch

TURN = "\n\nAssistant:"  # the start of an assistant turn in a dialogue of hh-rlhf, which is one text


@dataclass(frozen=True)
class Pair:
    """A preference pair. It has two token sequences with the same prompt. A sequence is prompt, response and EOS."""

    chosen_ids: np.ndarray  # i32[c]
    rejected_ids: np.ndarray  # i32[r]
    margin: float  # 0 if the row has no margin
    where: str

    def __len__(self) -> int:
        """The number of tokens of the longer sequence."""
        return max(len(self.chosen_ids), len(self.rejected_ids))


def load_preferences(
    config: PreferencesConfig, tokenizer: Tokenizer, max_length: int, overflow: Overflow
) -> tuple[list[Pair], LoadReport]:
    """Reads, checks and tokenizes all pairs of the sources. Returns the pairs of a pass, and a report."""
    sources = [config, *config.mix_with]
    return mixed(sources, lambda source: preferences_reader(source, tokenizer, max_length, overflow))


def preferences_reader(
    config: PreferencesSourceConfig, tokenizer: Tokenizer, max_length: int, overflow: Overflow
) -> Reader[Pair]:
    """Returns the reader of a source. It checks and tokenizes rows. No sequence is longer than `max_length` tokens.

    If a row has no prompt field, chosen and rejected are whole dialogues, either texts in hh-rlhf's form or chats. The
    prompt is then their common start up to an assistant turn. This also holds for chosen and rejected chats that
    contain the turns of the prompt field. A pair with equal responses is dropped.

    `overflow` decides about a pair that is longer than `max_length`. "cut" removes the start of the prompt but keeps
    BOS, because the score is read at the end of the response. If a response leaves no room for a prompt, "cut" drops
    the pair. "drop" drops the pair, and "stop" raises UserError. A row that cannot be used raises UserError with its
    place, unless the config drops unusable rows.
    """
    drop = drops_unusable(config, overflow)
    write = template_writer(config, drop)

    def read(rows: list[Row], first: int = 0) -> tuple[list[Pair], LoadReport]:
        return _pairs(write(rows, first), config, tokenizer, max_length, overflow)

    return read


def _pairs(
    rows: list[Row], config: PreferencesSourceConfig, tokenizer: Tokenizer, max_length: int, overflow: Overflow
) -> tuple[list[Pair], LoadReport]:
    drop = drops_unusable(config, overflow)
    report = LoadReport(config.path, len(rows))
    template = tokenizer.chats

    def rendered(row: Row) -> tuple[float, list[tuple[Prompt, Response]]]:
        prompt, *responses = split_pair(row, config)
        report.beside_text |= columns_beside_text(row, config, prompt)
        sides = [template.rendered_pair(prompt, response, f"{row.where}: ") for response in responses]
        return number_field(row, config.margin_field, 0.0), sides

    template.unread.clear()
    usable = list(report.usable(rows, rendered, drop))
    report.unread = sorted(template.unread)
    # The two sequences of a pair are adjacent, so that the tokenizer encodes their common prompt once.
    sides = tokenizer.encode_pairs([side for _, (_, both) in usable for side in both])
    pairs = []
    tokenizer.cut_responses = 0
    for (row, (margin, _)), (prompt, chosen), (_, rejected) in zip(usable, sides, sides):
        if report.refuses(row, tokenizer.fault([*prompt, *chosen, *rejected]), drop):
            continue
        longer = max(len(chosen), len(rejected))
        total = len(prompt) + longer
        if total > max_length and overflow == "stop":
            raise UserError(
                f"{row.where}: the pair has {total} tokens (prompt {len(prompt)}, longer response {longer}), but "
                f"max_length is {max_length}; raise max_length, or set overflow: cut or drop"
            )
        if chosen == rejected:
            report.drop("chosen and rejected are equal")
        elif total > max_length and overflow == "drop":
            report.drop(f"longer than {max_length} tokens")
        else:
            kept = tokenizer.cut_start(prompt, max_length - longer)
            if kept is None:
                report.drop(f"the response leaves no room for a prompt in {max_length} tokens")
                continue
            report.cut += len(kept) < len(prompt)
            chosen_ids, rejected_ids = (np.array(kept + response, np.int32) for response in (chosen, rejected))
            pairs.append(Pair(chosen_ids, rejected_ids, margin, row.where))
    report.past_stop = tokenizer.cut_responses
    return pairs, report


# ---------------------------------------------------------------- forms of a row


def split_pair(row: Row, config: PreferencesSourceConfig) -> tuple[Prompt, Response, Response]:
    """Returns (prompt, chosen response, rejected response) of a row."""
    has_prompt = has_field(row, config.prompt_field)
    prompt = text_or_messages_field(row, config.prompt_field, empty=True) if has_prompt else ""
    prompt = prompt if isinstance(prompt, str) else without_empty_turn(prompt)
    chosen, rejected = answer_field(row, config.chosen_field), answer_field(row, config.rejected_field)
    opening = as_messages(prompt, "user")
    if not prompt and not isinstance(chosen, str) and not isinstance(rejected, str):
        has_prompt = False  # chats with an empty text as prompt have no prompt
    if has_prompt:
        whole = [not isinstance(side, str) and _holds(side[:-1], opening) for side in (chosen, rejected)]
        if not any(whole):
            for name, side in ((config.chosen_field, chosen), (config.rejected_field, rejected)):
                if not isinstance(side, str) and side[0]["role"] != "assistant":
                    raise UserError(
                        f"{row.where}: the chat in field {name!r} begins with a turn of {side[0]['role']}, but does "
                        f"not contain the turns of field {config.prompt_field!r}; give these turns too, or only the "
                        "response"
                    )
            return chat_of(row, config, prompt), chosen, rejected
        if not all(whole):
            raise UserError(
                f"{row.where}: only one of chosen and rejected contains the prompt; both or neither must contain it"
            )
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError(
            f"{row.where}: one of chosen and rejected is text and the other is a chat; give two texts or two chats"
        )
    if isinstance(chosen, str):
        return _split_texts(row, config, chosen, rejected)
    common, *responses = _split_chats(row, chosen, rejected)
    if has_prompt and not _holds(common, opening):
        raise UserError(
            f"{row.where}: chosen and rejected differ within the turns of field {config.prompt_field!r}; both must "
            "begin with the same turns"
        )
    return chat_of(row, config, common, continued=False), *responses


def _holds(chat: list[Message], opening: list[Message]) -> bool:
    """Whether a chat contains the prompt's turns `opening` in sequence. Blanks around a turn's content are ignored."""
    turns, prompt = [[(m["role"], content_text(m).strip()) for m in messages] for messages in (chat, opening)]
    return any(turns[i : i + len(prompt)] == prompt for i in range(len(turns) - len(prompt) + 1))


def _same_message(one: Message, other: Message) -> bool:
    """Whether two messages are equal. Blanks around the content and its division into parts are ignored."""
    first, second = ({**message, "content": content_text(message).strip()} for message in (one, other))
    return first == second


def _split_texts(row: Row, config: PreferencesSourceConfig, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Splits two dialogues, each of which is one text. The prompt ends with the last common marker `TURN`."""
    common = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 (compares characters, on purpose)
    opening = common.rfind(TURN)
    if opening < 0:
        raise UserError(
            f"{row.where}: the row has no field {config.prompt_field!r}, and {config.chosen_field!r} and "
            f"{config.rejected_field!r} have no common start that ends with {TURN!r}; give a prompt field, or two "
            f"whole dialogues with a common start; the row's fields are: {', '.join(row.values)}"
        )
    end = opening + len(TURN)
    return chosen[:end], chosen[end:], rejected[end:]


def _split_chats(row: Row, chosen: list[Message], rejected: list[Message]) -> tuple[Prompt, Response, Response]:
    """Splits two chats. The prompt consists of their common turns up to an assistant turn."""
    end = 0
    while end < min(len(chosen), len(rejected)) and _same_message(chosen[end], rejected[end]):
        end += 1
    # If the chats are equal, or if one continues the other, the responses begin at the last common assistant turn.
    while end and (end == min(len(chosen), len(rejected)) or chosen[end]["role"] != "assistant"):
        end -= 1
    if not end:
        raise UserError(
            f"{row.where}: the chats of chosen and rejected have no common turn before an assistant's turn; both chats "
            "must begin with the turns of the prompt"
        )
    return chosen[:end], chosen[end:], rejected[end:]


# ---------------------------------------------------------------- batches


class PreferenceData:
    """An endless sequence of batches of pairs. `batch(step)` returns a batch; `len` is the number of batches per epoch.

    A batch has pairs of similar length and is padded to one of at most `buckets` lengths. A short batch is
    filled with copies of its first pair, because a score needs real tokens. These copies have weight 0.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        batch_size: int,
        max_length: int,
        seed: int,
        buckets: int = 4,
        pad_id: int | None = None,
        bounds: np.ndarray | None = None,
    ):
        """`bounds` are the padded lengths in ascending order. None means the quantiles of these pairs' lengths."""
        self.pairs, self.seed, self.pad_id, self.batch_size = pairs, seed, pad_id, batch_size
        lengths = np.array([len(pair) for pair in pairs], np.int64)
        # A bucket that is smaller than a batch would need one more compiled program, mostly for padding rows.
        if bounds is None:
            bounds = bucket_lengths(lengths, min(buckets, max(1, len(pairs) // batch_size)), max_length)
        self.bounds, self.buckets = bounds, Buckets.of(lengths, bounds, batch_size)

    def __len__(self) -> int:
        """The number of batches per epoch."""
        return len(self.buckets)

    def checksum(self) -> str:
        """Returns a hash of these pairs in this order."""
        margins = np.array([pair.margin for pair in self.pairs])
        return checksum([margins, *(ids for pair in self.pairs for ids in (pair.chosen_ids, pair.rejected_ids))])

    def batch(self, step: int) -> PreferenceBatch:
        """Returns the batch at a step as numpy arrays. Steps are counted from 0. The same seed gives the same batch."""
        return self._fill(*self.buckets.batch(self.seed, step))

    def all_batches(self) -> list[PreferenceBatch]:
        """Returns unshuffled batches in which every pair has weight 1 exactly once."""
        return [self._fill(length, rows) for length, rows in self.buckets.in_order()]

    def _fill(self, length: int, rows: np.ndarray) -> PreferenceBatch:
        pairs = [self.pairs[rows[b] if b < len(rows) else rows[0]] for b in range(self.batch_size)]
        chosen, chosen_mask = self._pad([pair.chosen_ids for pair in pairs], length)
        rejected, rejected_mask = self._pad([pair.rejected_ids for pair in pairs], length)
        margin = np.array([pair.margin for pair in pairs], np.float32)
        weight = (np.arange(self.batch_size) < len(rows)).astype(np.float32)
        return PreferenceBatch(
            chosen=chosen, chosen_mask=chosen_mask, rejected=rejected, rejected_mask=rejected_mask,
            margin=margin, weight=weight,
        )  # fmt: skip

    def _pad(self, rows: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns right-padded tokens, i32[B,length], and their mask, bool[B,length]."""
        tokens = np.full((len(rows), length), 0 if self.pad_id is None else self.pad_id, np.int32)
        for b, ids in enumerate(rows):
            tokens[b, : len(ids)] = ids
        return tokens, np.arange(length) < np.array([len(ids) for ids in rows])[:, None]
