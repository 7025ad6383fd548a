"""Converts text and chats to token ids and back, with a transformers fast tokenizer.

This module neither pads nor truncates, because the data modules do both, and masks mark the real tokens. It adds no
tokens, because a new pad token would need a new embedding row. Slow tokenizers and remote code are not supported, on
purpose.
"""

import copy
import itertools
import operator
import os
from collections.abc import Iterator, Sequence
from typing import Any

from jaxrlhf.data import ends
from jaxrlhf.data.chats import Chat, ChatTemplate, Prompt, Response, last_turn
from jaxrlhf.data.sources import Message
from jaxrlhf.data.tokenizer_files import find_folder, read_files, write_files
from jaxrlhf.errors import SharedFault, UserError, one_line

# If a response is tokenized without its prompt, an anchor text is put before the response. The first anchor that
# shares no token with the response is used. A tokenizer that inserts a space before each text then inserts the space
# before the anchor and not before the response.
ANCHORS = ("\n", ".", "a")
CONTEXT = 8  # ids of the prompt that `token_texts` reads
CHUNK = 512  # texts per call; this number limits the memory for character offsets


class Tokenizer:
    """Encodes prompts and responses as the model reads them, and decodes ids.

    name         folder or hub id; error messages contain it
    fast         the transformers tokenizer
    eos_id, pad_id  None if the tokenizer has none
    prefix_ids   ids that the tokenizer puts before every text, usually BOS
    added        added tokens by id
    vocab_size   largest id + 1
    text_size    largest id of a token that is not an added token, + 1
    turn_end_id  the token that the chat template writes at the end of a response; None if it writes plain text
    stop_ids     tokens that end a response; `for_model` returns a tokenizer that also has the model's stop tokens
    notes        lines about stop tokens that do not fit the model
    """

    def __init__(self, tokenizer: Any, name: str, file: bytes | None = None):
        """`file` is the content of the tokenizer's `tokenizer.json`."""
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{name}: this is not a fast tokenizer; use a tokenizer that has a tokenizer.json")
        self.fast = tokenizer
        self.name = name
        self.chats = ChatTemplate(tokenizer, name)
        self._file = file
        self.eos_id: int | None = tokenizer.eos_token_id
        self.pad_id: int | None = tokenizer.pad_token_id
        vocabulary = tokenizer.get_vocab().values()
        self.added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
        self.vocab_size: int = max(vocabulary, default=-1) + 1
        self.text_size: int = max((index for index in vocabulary if index not in self.added), default=-1) + 1
        self.prefix_ids = self._find_prefix()
        self.cut_responses = 0  # text responses that were cut after a stop token, since a caller reset this count
        self._template_runs = True
        self.turn_end_id = self._find_turn_end()
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(self._own_ends()))
        self.notes: tuple[str, ...] = ()
        self._rows: int | None = None

    @property
    def has_chat_template(self) -> bool:
        return self.chats.exists

    @property
    def text_end_id(self) -> int | None:
        """The end token of a plain text response. This is EOS if it is a stop token, else the first stop token."""
        return self.eos_id if self.eos_id in self.stop_ids else next(iter(self.stop_ids), None)

    @property
    def chat_end_id(self) -> int | None:
        """The end token of a chat response. This is the token that the chat template writes, else `text_end_id`."""
        return self.turn_end_id if self.turn_end_id in self.stop_ids else self.text_end_id

    def for_model(self, rows: int, stop_tokens: Sequence[int], foreign: bool = False) -> "Tokenizer":
        """Returns a copy for a model that has `rows` embeddings, and whose files name these stop tokens.

        `stop_ids` of the copy is the union of the stop tokens of tokenizer and model. `ends.union` explains `foreign`.
        `fault` of the copy reports tokens without an embedding.
        """
        fitted = copy.copy(self)
        fitted.stop_ids, lines = ends.union(stop_tokens, self._own_ends(), rows, self.added, self.name, foreign)
        if not fitted.stop_ids:
            lines.append(f"{self.name}: no token ends a response, so all completions have max_new_tokens tokens")
        elif self.has_chat_template and self.turn_end_id is None and self._template_runs:
            end = self.fast.convert_ids_to_tokens(fitted.chat_end_id)
            lines.append(
                f"{self.name}: the chat template writes no end token after a response; sft and reward_model add {end}"
            )
        fitted.notes = tuple(lines)
        fitted.pad_id = self.pad_id if self.pad_id is None or self.pad_id < rows else None
        fitted._rows = rows
        return fitted

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Returns the ids of a prompt, without EOS at the end.

        A text prompt begins with BOS if the tokenizer has BOS. A chat is rendered up to the start of the response.
        """
        return next(self.encode_prompts([prompt]))

    def encode_pair(self, prompt: Prompt, response: Response) -> tuple[list[int], list[int]]:
        """Returns (ids of the prompt, ids of the response).

        The ids of the prompt are the same as from `encode_prompt`. Prompt and response are tokenized together if this
        does not change the ids of the prompt. Otherwise the response is tokenized alone. The response is cut after its
        first stop token. If it has none, a stop token is appended. A text with an empty prompt is one document, so stop
        tokens inside this text are kept.
        """
        return next(self.encode_pairs([(prompt, response)]))

    def encode_prompts(self, prompts: Sequence[Prompt], where: Sequence[str] = ()) -> Iterator[list[int]]:
        """Yields the ids of each prompt, see `encode_prompt`. `where` holds the place of each prompt, for errors."""
        for start in range(0, len(prompts), CHUNK):
            part = prompts[start : start + CHUNK]
            places = [f"{place}: " for place in where[start : start + CHUNK]] or [""] * len(part)
            texts = [self.chats.prompt_text(prompt, place) for prompt, place in zip(part, places)]
            for prompt, encoding in zip(part, self._encode(texts)):
                yield self._with_prefix(encoding.ids) if isinstance(prompt, str) else encoding.ids

    def encode_with_ends(self, text: str, prefixed: bool) -> tuple[list[int], list[int]]:
        """Returns (ids, number of characters of the text up to the end of each token).

        `prefixed` puts BOS before the ids. A character that several tokens form counts only for the last of them.
        """
        (encoding,) = self._encode([text])
        ids = self._with_prefix(encoding.ids) if prefixed else encoding.ids
        ends = [end for _, end in encoding.offsets]
        for i in range(len(ends) - 2, -1, -1):
            if encoding.offsets[i] == encoding.offsets[i + 1]:
                ends[i] = encoding.offsets[i][0]
        return ids, [0] * (len(ids) - len(ends)) + ends

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text as if it were in the middle of a longer text: without BOS."""
        return list(self._encode_alone(list(texts)))

    def encode_chats(self, chats: Sequence[list[Message] | Chat]) -> Iterator[list[int]]:
        """Yields the ids of each finished chat. The chat template writes a chat as text, which is then tokenized."""
        for start in range(0, len(chats), CHUNK):
            texts = [self.chats.whole_text(chat, "") for chat in chats[start : start + CHUNK]]
            yield from (encoding.ids for encoding in self._encode(texts))

    def encode_pairs(self, pairs: Sequence[tuple[Prompt, Response]]) -> Iterator[tuple[list[int], list[int]]]:
        """Yields the ids of prompt and response of each pair, see `encode_pair`."""
        if not self.stop_ids:
            raise UserError(f"{self.name}: the tokenizer has no EOS token to end a response; set its eos_token")
        for start in range(0, len(pairs), CHUNK):
            part = pairs[start : start + CHUNK]
            texts = [self.chats.pair_texts(*pair, "") for pair in part]
            prompts = self._encode_unique([prompt for prompt, _ in texts])
            joints = self._encode([prompt + response for prompt, response in texts])
            splits = [_splits(prompts[text], joint, len(text)) for (text, _), joint in zip(texts, joints)]
            rest = self._encode_alone([response for (_, response), split in zip(texts, splits) if not split])
            for pair, (prompt_text, text), joint, split in zip(part, texts, joints, splits):
                prompt_ids = prompts[prompt_text].ids
                ids = joint.ids[len(prompt_ids) :] if split else next(rest)
                if all(isinstance(side, str) for side in pair):
                    prompt_ids, ids = self._with_prefix_once(prompt_ids, ids)
                yield prompt_ids, self._ended(*pair, text, ids)

    def fault(self, ids: Sequence[int]) -> str | None:
        """Returns an error text if the model has no embedding for one of the ids, else None."""
        if self._rows is None or self._rows >= self.vocab_size:
            return None
        tokens = (f"{self.added.get(token, 'a token')} (id {token})" for token in ids if token >= self._rows)
        token = next(tokens, None)
        if token is None:
            return None
        return (
            f"the text contains {token}, but the model has only {self._rows} tokens; remove this token, or use a model "
            "that has it"
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of these ids without special tokens and stop tokens."""
        hidden = self._hidden_ids()
        return self.fast.decode(
            [int(i) for i in ids if int(i) not in hidden], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _hidden_ids(self) -> set[int | None]:
        return {self.fast.bos_token_id, self.eos_id, *self.stop_ids}

    def decode_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Returns the text of ids that follow a prompt.

        The text keeps its leading blank. If SentencePiece decodes the ids without the prompt, this blank is lost.
        """
        before, whole = self.decode(prompt), self.decode([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(ids)

    def token_texts(self, prompt: Sequence[int], ids: Sequence[int], text: str) -> list[str]:
        """Returns the text of each id. Together these texts are `text`, which is `decode_after(prompt, ids)`.

        An id that is not part of the text, such as a stop token, has an empty text. If several ids form one character,
        the last of these ids has the character. Each id is decoded together with a few ids before it, so the time is
        proportional to the number of ids.
        """
        hidden, backend = self._hidden_ids(), self.fast.backend_tokenizer

        def decode(ids: Sequence[int]) -> str:  # `self.decode` takes four times as long
            return backend.decode([i for i in ids if i not in hidden], skip_special_tokens=True)

        given = [int(i) for i in (*prompt[-CONTEXT:], *ids)]
        first = read = len(given) - len(ids)
        start, parts = 0, []
        for end in range(first + 1, len(given) + 1):
            before, now = decode(given[start:read]), decode(given[start:end])
            whole = len(now) > len(before) and not now.endswith("\ufffd")
            parts.append(now[len(before) :] if whole else "")
            if whole:
                start, read = read, end
        if parts and text.startswith(joined := "".join(parts)):  # the rest is a character that is not complete
            return [*parts[:-1], parts[-1] + text[len(joined) :]]
        return self._token_texts_from_start(prompt, ids, text)

    def _token_texts_from_start(self, prompt: Sequence[int], ids: Sequence[int], text: str) -> list[str]:
        """Returns the same as `token_texts`. Used if the text of an id depends on more than a few ids before it.

        The time is proportional to the square of the number of ids.
        """
        borders = [0]
        for end in range(1, len(ids)):
            known = self.decode_after(prompt, ids[:end])
            same = sum(itertools.takewhile(bool, map(operator.eq, known, text)))
            borders.append(max(borders[-1], same))
        return [text[a:b] for a, b in itertools.pairwise([*borders, len(text)])] if ids else []

    def cut_start(self, prompt: list[int], room: int) -> list[int] | None:
        """Returns the last tokens of the prompt, at most `room` tokens. If the prompt begins with BOS, BOS is kept.

        Returns None if only BOS would be left.
        """
        if len(prompt) <= room:
            return prompt
        kept = self.prefix_ids if prompt[: len(self.prefix_ids)] == self.prefix_ids else []
        if room <= len(kept):
            return None
        return kept + prompt[len(prompt) - (room - len(kept)) :]

    @property
    def special_ids(self) -> list[int]:
        """The sorted ids of BOS, EOS and all other special tokens."""
        added = self.fast.added_tokens_decoder.items()
        return sorted({*self.fast.all_special_ids, *(index for index, token in added if token.special)})

    def save(self, path: str, pad_id: int | None = None) -> None:
        """Writes the tokenizer's files and chat template into a folder that `load_tokenizer` can read.

        `pad_id` is the pad token that the files name. If `pad_id` is None, the files name the tokenizer's pad token.
        """
        write_files(self.fast, self._file, path, None if pad_id == self.pad_id else pad_id)

    def _encode(self, texts: list[str]) -> list[Any]:
        """Returns a `tokenizers.Encoding` for each text, without special tokens, padding and truncation."""
        # verbose=False switches off a warning about model_max_length; the data modules limit lengths.
        return self.fast(texts, add_special_tokens=False, verbose=False).encodings if texts else []

    def _encode_unique(self, texts: list[str]) -> dict[str, Any]:
        """Returns the encoding of each distinct text."""
        unique = list(dict.fromkeys(texts))
        return dict(zip(unique, self._encode(unique)))

    def _find_prefix(self) -> list[int]:
        """Returns the ids that the tokenizer puts before every text. An EOS that it puts after a text is ignored."""
        probe = "a"
        inner = self._encode([probe])[0].ids
        outer = self.fast(probe, add_special_tokens=True, verbose=False)["input_ids"]
        for start in range(len(outer) - len(inner) + 1):
            if outer[start : start + len(inner)] == inner:
                return outer[:start]
        raise UserError(
            f"{self.name}: the tokenizer changes the tokens of a text when it adds special tokens to the text; use "
            "another tokenizer"
        )

    def _with_prefix(self, ids: list[int]) -> list[int]:
        """Puts BOS before the ids. Ids that already begin with BOS are returned unchanged."""
        return ids if ids[: len(self.prefix_ids)] == self.prefix_ids else self.prefix_ids + ids

    def _encode_alone(self, texts: list[str]) -> Iterator[list[int]]:
        """Yields the ids of each text. Each text is tokenized as if it were in the middle of a longer text."""
        plain = self._encode(texts)
        anchors = self._encode(list(ANCHORS))
        joints = [self._encode([anchor + text for text in texts]) for anchor in ANCHORS]
        for i, encoding in enumerate(plain):
            fits = (joint[i].ids[len(a.ids) :] for a, joint in zip(anchors, joints) if _splits(a, joint[i], 1))
            yield next(fits, encoding.ids)

    def _with_prefix_once(self, prompt: list[int], response: list[int]) -> tuple[list[int], list[int]]:
        """Returns prompt and response with BOS before the prompt.

        If the prompt is empty and the response begins with BOS, this BOS is removed.
        """
        if not prompt and response[: len(self.prefix_ids)] == self.prefix_ids:
            response = response[len(self.prefix_ids) :]
        return self._with_prefix(prompt), response

    def _own_ends(self) -> list[int]:
        return [token for token in (self.eos_id, self.turn_end_id) if token is not None]

    def _find_turn_end(self) -> int | None:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ends.PROBE}]
        try:
            return ends.end_of_turn(self.chats.whole_text(chat, ""), self.added)
        except UserError as error:  # no template, or one that refuses this chat
            self._template_runs = not isinstance(error, SharedFault)
            return None

    def _ended(self, prompt: Prompt, response: Response, text: str, ids: list[int]) -> list[int]:
        """Returns the response's ids with a stop token at the end, see `encode_pair`."""
        if isinstance(prompt, str) and isinstance(response, str):
            if prompt:
                kept = ends.ended(ids, self.stop_ids, self.text_end_id)
                self.cut_responses += bool(self.fast.decode(ids[len(kept) :], skip_special_tokens=True).strip())
                return kept
            return ends.ended_text(ids, self.stop_ids, self.text_end_id, self.fast)
        start = last_turn(response, text)
        if start < 0:
            return ends.ended_text(ids, self.stop_ids, self.chat_end_id, self.fast)
        passed = sum(token in self.stop_ids for token in self._encode([text[:start]])[0].ids) if start else 0
        return ends.ended(ids, self.stop_ids, self.chat_end_id, passed)


def load_tokenizer(path: str) -> Tokenizer | None:
    """Loads the tokenizer of a local folder or hub id. Returns None if there are no tokenizer files.

    Raises UserError if the folder is missing or if the files cannot be used. Remote code is never run.
    """
    folder = find_folder(path)
    if folder is None:
        return None
    tokenizer, file = read_files(folder, path)
    try:
        return Tokenizer(tokenizer, path, file)
    except UserError:
        raise
    except Exception as error:  # an entry of the wrong type, such as a model_max_length that is text
        raise UserError(f"{path}: the tokenizer cannot be used: {type(error).__name__}: {one_line(error)}") from error


def build_word_tokenizer(
    words: Sequence[str],
    chat_template: str | None = None,
    pad: str = "<pad>",
    bos: str = "<bos>",
    eos: str = "<eos>",
    unk: str = "<unk>",
) -> Tokenizer:
    """Returns a tokenizer for words that are separated by blanks. It puts BOS before each text.

    Decoding joins the words with single spaces. The ids of pad, bos, eos and unk are 0, 1, 2 and 3. The ids of the
    words follow in order.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    entries = [pad, bos, eos, unk, *words]
    if len(set(entries)) != len(entries) or any(len(entry.split()) != 1 for entry in entries):
        raise ValueError("words of a word tokenizer must be distinct and must not contain blanks")
    vocabulary = {word: index for index, word in enumerate(entries)}
    backend = Backend(WordLevel(vocabulary, unk_token=unk))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = chat_template
    return Tokenizer(fast, "word tokenizer")


def _splits(first: Any, joint: Any, border: int) -> bool:
    """Whether the encoding `joint` of a text begins with the encoding `first` of the text's first `border` characters.

    The result is False if `joint` is not longer than `first`.
    """
    count = len(first.ids)
    if joint.ids[:count] != first.ids or len(joint.ids) == count:
        return False
    # A token for an unknown word may cross the border and still have the same id.
    return not count or (joint.token_to_chars(count - 1) or (0, 0))[1] <= border
