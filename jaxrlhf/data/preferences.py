"""Preference pairs for the reward model: rows to two token sequences with one prompt, and batches of them."""

import os.path
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxrlhf.config import Overflow, PreferencesConfig
from jaxrlhf.data.chats import Prompt, Response, as_messages, content_text, without_empty_turn
from jaxrlhf.data.fields import (
    answer_field,
    chat_of,
    columns_beside_text,
    has_field,
    number_field,
    text_or_messages_field,
)
from jaxrlhf.data.order import Buckets, bucket_lengths, checksum
from jaxrlhf.data.sources import LoadReport, Message, Row, drops_unusable, read_rows
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.errors import UserError
from jaxrlhf.records import PreferenceBatch

TURN = "\n\nAssistant:"  # how hh-rlhf opens an answer in a dialogue that is one text


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, each a whole sequence: prompt, answer, EOS."""

    chosen_ids: np.ndarray  # i32[c]
    rejected_ids: np.ndarray  # i32[r]
    margin: float  # 0 where the data has none
    where: str

    def __len__(self) -> int:
        """Tokens of the longer one."""
        return max(len(self.chosen_ids), len(self.rejected_ids))


def load_preferences(
    config: PreferencesConfig, tokenizer: Tokenizer, max_length: int, overflow: Overflow
) -> tuple[list[Pair], LoadReport]:
    """Reads, checks and tokenizes all pairs; no sequence is longer than `max_length` tokens.

    Without a prompt field, chosen and rejected are whole dialogues, as texts in hh-rlhf's form or as chats,
    and the prompt is what they begin with alike, up to an answer. So it is where they are chats that hold the prompt
    field's turns, whatever stands around those. A longer pair: `cut` takes the same tokens
    off the start of both prompts, BOS excepted (the score stands at the answer's end; a pair is dropped
    where an answer leaves no room for a prompt), `drop` leaves it out, `stop` raises. Pairs of equal answers
    teach nothing and are dropped. UserError for a row that cannot be used, with its place, unless the settings
    say that such rows are dropped.
    """
    rows = read_rows(config)
    report = LoadReport(config.path, len(rows))
    template = tokenizer.chats

    def rendered(row: Row) -> tuple[float, list[tuple[Prompt, Response]]]:
        prompt, *answers = _split(row, config)
        report.beside_text |= columns_beside_text(row, config, prompt)
        place = f"{row.where}: "
        return number_field(row, config.margin_field, 0.0), [
            template.rendered_pair(prompt, answer, place) for answer in answers
        ]

    drop = drops_unusable(config, overflow)
    template.unread.clear()
    usable = list(report.usable(rows, rendered, drop))
    report.unread = sorted(template.unread)
    # Side by side: the tokenizer sees a prompt twice in a row, and tokenizes it once.
    sides = tokenizer.encode_pairs([pair for _, (_, both) in usable for pair in both])
    pairs = []
    tokenizer.cut_answers = 0
    for (row, (margin, _)), (prompt, chosen), (_, rejected) in zip(usable, sides, sides):
        if report.refuses(row, tokenizer.fault([*prompt, *chosen, *rejected]), drop):
            continue
        answer = max(len(chosen), len(rejected))
        total = len(prompt) + answer
        if total > max_length and overflow == "stop":
            raise UserError(
                f"{row.where}: {total} tokens (prompt {len(prompt)}, longer answer {answer}), but max_length is "
                f"{max_length}; raise it, or set overflow: cut or drop"
            )
        if chosen == rejected:
            report.drop("chosen and rejected are equal")
        elif total > max_length and overflow == "drop":
            report.drop(f"longer than {max_length} tokens")
        else:
            kept = tokenizer.cut_start(prompt, max_length - answer)
            if kept is None:
                report.drop(f"answer leaves no room for a prompt in {max_length} tokens")
                continue
            report.cut += len(kept) < len(prompt)
            pairs.append(
                Pair(np.array(kept + chosen, np.int32), np.array(kept + rejected, np.int32), margin, row.where)
            )
    report.past_stop = tokenizer.cut_answers
    report.check()
    return pairs, report


# ---------------------------------------------------------------- forms of a row


def _split(row: Row, config: PreferencesConfig) -> tuple[Prompt, Response, Response]:
    """Prompt, chosen answer, rejected answer."""
    has_prompt = has_field(row, config.prompt_field)
    prompt = text_or_messages_field(row, config.prompt_field, empty=True) if has_prompt else ""
    prompt = prompt if isinstance(prompt, str) else without_empty_turn(prompt)
    chosen, rejected = answer_field(row, config.chosen_field), answer_field(row, config.rejected_field)
    opening = as_messages(prompt, "user")
    if not prompt and not isinstance(chosen, str) and not isinstance(rejected, str):
        has_prompt = False  # an empty text before chats says nothing
    if has_prompt:
        whole = [not isinstance(side, str) and _holds(side[:-1], opening) for side in (chosen, rejected)]
        if not any(whole):
            for name, side in ((config.chosen_field, chosen), (config.rejected_field, rejected)):
                if not isinstance(side, str) and side[0]["role"] != "assistant":
                    raise UserError(
                        f"{row.where}: field {name!r} is a chat that begins with a turn of {side[0]['role']} and does "
                        f"not hold the turns of {config.prompt_field!r}; want one that does, or the answer alone"
                    )
            return chat_of(row, config, prompt), chosen, rejected
        if not all(whole):
            raise UserError(f"{row.where}: one of chosen and rejected holds the prompt, the other not; want two alike")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError(f"{row.where}: one of chosen and rejected is text and the other a chat; want two alike")
    if isinstance(chosen, str):
        return _split_texts(row, config, chosen, rejected)
    common, *answers = _split_chats(row, chosen, rejected)
    if has_prompt and not _holds(common, opening):
        raise UserError(
            f"{row.where}: chosen and rejected differ before the turns of {config.prompt_field!r} end; want them alike"
        )
    return chat_of(row, config, common, begun=False), *answers


def _holds(chat: list[Message], opening: list[Message]) -> bool:
    """Whether a chat has the prompt's turns in it, one after the other; blanks around what they say do not count."""
    turns, wanted = [[(m["role"], content_text(m).strip()) for m in messages] for messages in (chat, opening)]
    return any(turns[i : i + len(wanted)] == wanted for i in range(len(turns) - len(wanted) + 1))


def _alike(one: Message, other: Message) -> bool:
    """Whether two messages are the same, but for blanks around what they say and how that is cut into parts."""
    first, second = ({**message, "content": content_text(message).strip()} for message in (one, other))
    return first == second


def _split_texts(row: Row, config: PreferencesConfig, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two dialogues in one text each: the prompt ends with the last answer's opening that both have in common."""
    common = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 (by characters is what is meant)
    opening = common.rfind(TURN)
    if opening < 0:
        raise UserError(
            f"{row.where}: no field {config.prompt_field!r}, and {config.chosen_field!r} and "
            f"{config.rejected_field!r} do not begin alike up to {TURN!r} as whole dialogues do; "
            f"the row has {', '.join(row.values)}"
        )
    end = opening + len(TURN)
    return chosen[:end], chosen[end:], rejected[end:]


def _split_chats(row: Row, chosen: list[Message], rejected: list[Message]) -> tuple[Prompt, Response, Response]:
    """Two chats: the prompt is the turns that they have in common, up to an answer of the assistant."""
    end = 0
    while end < min(len(chosen), len(rejected)) and _alike(chosen[end], rejected[end]):
        end += 1
    # Equal chats, or one that goes on where the other ends: step back to the last answer of both.
    while end and (end == min(len(chosen), len(rejected)) or chosen[end]["role"] != "assistant"):
        end -= 1
    if not end:
        raise UserError(f"{row.where}: chosen and rejected are chats without a common turn before an assistant's")
    return chosen[:end], chosen[end:], rejected[end:]


# ---------------------------------------------------------------- batches


class PreferenceData:
    """Batches of pairs as a function of the step: `batch(step)` for ever, `len` of them an epoch.

    Pairs of similar length share a batch, padded to one of `buckets` lengths. Where a batch is short, copies
    of its first pair with weight 0 fill it up: real tokens, so that no score is taken of nothing.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        batch_size: int,
        max_length: int,
        seed: int,
        buckets: int = 4,
        pad_id: int | None = None,
    ):
        self.pairs = pairs
        self.seed = seed
        self.pad_id = pad_id
        self.batch_size = batch_size
        lengths = np.array([len(pair) for pair in pairs], np.int64)
        # A bucket that does not fill a batch would cost a program and mostly compute padding rows.
        bounds = bucket_lengths(lengths, min(buckets, max(1, len(pairs) // batch_size)), max_length)
        self.buckets = Buckets.of(lengths, bounds, batch_size)

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.buckets)

    def checksum(self) -> str:
        """Tells these pairs, in this order, from others."""
        margins = np.array([pair.margin for pair in self.pairs])
        return checksum([margins, *(ids for pair in self.pairs for ids in (pair.chosen_ids, pair.rejected_ids))])

    def batch(self, step: int) -> PreferenceBatch:
        """The batch at a step, from 0 on: always the same for one seed. Leaves are numpy arrays."""
        return self._fill(*self.buckets.batch(self.seed, step))

    def all_batches(self) -> list[PreferenceBatch]:
        """Every pair once with weight 1, unshuffled."""
        return [self._fill(length, rows) for length, rows in self.buckets.in_order()]

    def _fill(self, length: int, rows: np.ndarray) -> PreferenceBatch:
        shape = (self.batch_size, length)
        pad = 0 if self.pad_id is None else self.pad_id
        chosen, rejected = np.full(shape, pad, np.int32), np.full(shape, pad, np.int32)
        chosen_mask, rejected_mask = np.zeros(shape, bool), np.zeros(shape, bool)
        margin, weight = np.zeros(self.batch_size, np.float32), np.zeros(self.batch_size, np.float32)
        for b in range(self.batch_size):
            pair = self.pairs[rows[b] if b < len(rows) else rows[0]]
            chosen[b, : len(pair.chosen_ids)] = pair.chosen_ids
            chosen_mask[b, : len(pair.chosen_ids)] = True
            rejected[b, : len(pair.rejected_ids)] = pair.rejected_ids
            rejected_mask[b, : len(pair.rejected_ids)] = True
            margin[b] = pair.margin
            weight[b] = b < len(rows)
        return PreferenceBatch(
            chosen=chosen, chosen_mask=chosen_mask, rejected=rejected, rejected_mask=rejected_mask,
            margin=margin, weight=weight,
        )  # fmt: skip
