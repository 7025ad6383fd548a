"""Converts text and chats to token ids and back, with a transformers fast tokenizer.

Left out on purpose: padding and truncation (the data modules do both, and masks mark the real tokens), adding tokens
(a pad token that the model was not trained with would need a new embedding row), slow tokenizers and remote code.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from typing import Any

from jaxrlhf.data import ends
from jaxrlhf.data.chats import Chat, ChatTemplate, Prompt, Response, last_turn
from jaxrlhf.data.sources import Message, one_line
from jaxrlhf.data.tokenizer_files import find_folder, read_files, write_files
from jaxrlhf.errors import SharedFault, UserError

# A response without its prompt is tokenized after an anchor text: the first of these that shares no token with the
# response. A tokenizer that inserts a space before a text then inserts it before the anchor.
ANCHORS = ("\n", ".", "a")
CHUNK = 512  # texts per call; bounds the memory of offsets


class Tokenizer:
    """Encodes prompts and responses as the model reads them, and decodes ids.

    name         folder or hub id, for messages
    fast         the transformers tokenizer
    eos_id, pad_id  None if the tokenizer has none
    prefix_ids   ids that the tokenizer puts before every text, usually BOS
    added        added tokens by id
    vocab_size   largest id + 1; `text_size` leaves out added tokens
    turn_end_id  the token with which the chat template ends a response; None if that is plain text
    stop_ids     tokens that end a response: those of the tokenizer, and after `for_model` also those of the model
    notes        lines on stop tokens that do not fit the model
    """

    def __init__(self, tokenizer: Any, name: str, file: bytes | None = None):
        """`file` is the content of the tokenizer's `tokenizer.json`."""
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{name}: no fast tokenizer; save one with a tokenizer.json")
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
        self.cut_responses = 0  # text responses that were cut after a stop token, since a caller set it to 0
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
        """The end token of a plain text response: EOS, or else the first stop token."""
        return self.eos_id if self.eos_id in self.stop_ids else next(iter(self.stop_ids), None)

    @property
    def chat_end_id(self) -> int | None:
        """The end token of a chat response: the token that the chat template writes, or else `text_end_id`."""
        return self.turn_end_id if self.turn_end_id in self.stop_ids else self.text_end_id

    def for_model(self, rows: int, stop_tokens: Sequence[int], foreign: bool = False) -> "Tokenizer":
        """A copy for a model with `rows` embeddings whose files name these stop tokens.

        Its `stop_ids` are the union, see `ends.union`, which also explains `foreign`. `fault` of the copy reports
        tokens without an embedding.
        """
        fitted = copy.copy(self)
        fitted.stop_ids, lines = ends.union(stop_tokens, self._own_ends(), rows, self.added, self.name, foreign)
        if not fitted.stop_ids:
            lines.append(f"{self.name}: no token ends a response: all completions have max_new_tokens tokens")
        elif self.has_chat_template and self.turn_end_id is None and self._template_runs:
            end = self.fast.convert_ids_to_tokens(fitted.chat_end_id)
            lines.append(
                f"{self.name}: the chat template ends responses in plain text; sft and reward_model append {end}"
            )
        fitted.notes = tuple(lines)
        fitted.pad_id = self.pad_id if self.pad_id is None or self.pad_id < rows else None
        fitted._rows = rows
        return fitted

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt: BOS (if the tokenizer has it) and text without EOS, or a chat up to the assistant's turn."""
        return next(self.encode_prompts([prompt]))

    def encode_pair(self, prompt: Prompt, response: Response) -> tuple[list[int], list[int]]:
        """(ids of the prompt, exactly as from `encode_prompt`; ids of the response).

        Prompt and response are tokenized together if this does not change the ids of the prompt; else the response is
        tokenized alone. The response's ids are cut after the first stop token, or a stop token is appended. A text
        without a prompt is one document, so stop tokens inside the text are kept.
        """
        return next(self.encode_pairs([(prompt, response)]))

    def encode_prompts(self, prompts: Sequence[Prompt], where: Sequence[str] = ()) -> Iterator[list[int]]:
        """Calls `encode_prompt` for several prompts. `where` holds the place of each prompt, for messages."""
        for start in range(0, len(prompts), CHUNK):
            part = prompts[start : start + CHUNK]
            places = [f"{place}: " for place in where[start : start + CHUNK]] or [""] * len(part)
            texts = [self.chats.prompt_text(prompt, place) for prompt, place in zip(part, places)]
            for prompt, encoding in zip(part, self._encode(texts)):
                yield self._with_prefix(encoding.ids) if isinstance(prompt, str) else encoding.ids

    def encode_chats(self, chats: Sequence[list[Message] | Chat]) -> Iterator[list[int]]:
        """Ids of finished chats, which the chat template writes as text."""
        for start in range(0, len(chats), CHUNK):
            texts = [self.chats.whole_text(chat, "") for chat in chats[start : start + CHUNK]]
            yield from (encoding.ids for encoding in self._encode(texts))

    def encode_pairs(self, pairs: Sequence[tuple[Prompt, Response]]) -> Iterator[tuple[list[int], list[int]]]:
        """Calls `encode_pair` for several pairs."""
        if not self.stop_ids:
            raise UserError(f"{self.name}: the tokenizer has no EOS token to end responses with; set eos_token")
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
        """An error text if the ids contain an added token for which the model has no embedding; else None."""
        if self._rows is None or self._rows >= self.vocab_size:
            return None
        tokens = (f"{self.added.get(token, 'a token')} (id {token})" for token in ids if token >= self._rows)
        token = next(tokens, None)
        if token is None:
            return None
        return f"holds {token}, but the model has {self._rows} tokens; leave it out, or take a model that has it"

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens and stop tokens."""
        hidden = {self.fast.bos_token_id, self.eos_id, *self.stop_ids}
        return self.fast.decode(
            [int(i) for i in ids if int(i) not in hidden], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def decode_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Text of ids that follow a prompt. It keeps a leading blank, which SentencePiece drops without the prompt."""
        before, whole = self.decode(prompt), self.decode([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(ids)

    def cut_start(self, prompt: list[int], room: int) -> list[int] | None:
        """Cuts the prompt to `room` tokens: its BOS, if it has one, and its end. None if only BOS would be left."""
        if len(prompt) <= room:
            return prompt
        kept = self.prefix_ids if prompt[: len(self.prefix_ids)] == self.prefix_ids else []
        if room <= len(kept):
            return None
        return kept + prompt[len(prompt) - (room - len(kept)) :]

    @property
    def special_ids(self) -> list[int]:
        """Sorted ids of BOS, EOS and all other special tokens."""
        added = self.fast.added_tokens_decoder.items()
        return sorted({*self.fast.all_special_ids, *(index for index, token in added if token.special)})

    def save(self, path: str, pad_id: int | None = None) -> None:
        """Writes the tokenizer's files, chat template included, into a folder that `load_tokenizer` reads.

        `pad_id` is the pad token named in the folder; None: the tokenizer's own.
        """
        write_files(self.fast, self._file, path, None if pad_id == self.pad_id else pad_id)

    def _encode(self, texts: list[str]) -> list[Any]:
        """A `tokenizers.Encoding` per text, without special tokens, padding and truncation."""
        # verbose=False: no warning about model_max_length, because the data modules limit lengths.
        return self.fast(texts, add_special_tokens=False, verbose=False).encodings if texts else []

    def _encode_unique(self, texts: list[str]) -> dict[str, Any]:
        """The encoding of each distinct text."""
        unique = list(dict.fromkeys(texts))
        return dict(zip(unique, self._encode(unique)))

    def _find_prefix(self) -> list[int]:
        """Ids that the tokenizer puts before every text. A trailing EOS is ignored: it would end a prompt."""
        probe = "a"
        inner = self._encode([probe])[0].ids
        outer = self.fast(probe, add_special_tokens=True, verbose=False)["input_ids"]
        for start in range(len(outer) - len(inner) + 1):
            if outer[start : start + len(inner)] == inner:
                return outer[:start]
        raise UserError(f"{self.name}: the tokenizer changes a text's own tokens when it adds special ones")

    def _with_prefix(self, ids: list[int]) -> list[int]:
        """Puts BOS before the ids, unless they begin with BOS, which a chat template may have written."""
        return ids if ids[: len(self.prefix_ids)] == self.prefix_ids else self.prefix_ids + ids

    def _encode_alone(self, texts: list[str]) -> Iterator[list[int]]:
        """Tokenizes each text as if it stood in the middle of a longer text, and returns its ids."""
        plain = self._encode(texts)
        anchors = self._encode(list(ANCHORS))
        joints = [self._encode([anchor + text for text in texts]) for anchor in ANCHORS]
        for i, encoding in enumerate(plain):
            fits = (joint[i].ids[len(a.ids) :] for a, joint in zip(anchors, joints) if _splits(a, joint[i], 1))
            yield next(fits, encoding.ids)

    def _with_prefix_once(self, prompt: list[int], response: list[int]) -> tuple[list[int], list[int]]:
        """Returns prompt and response with BOS before the prompt.

        If the prompt is empty, the response may begin with BOS; this BOS is removed.
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
    """Loads the tokenizer of a local folder or hub id; None if there are no tokenizer files.

    UserError if the folder is missing or its files cannot be used. Remote code is never run.
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
        raise UserError(f"{path}: its tokenizer cannot be used: {type(error).__name__}: {one_line(error)}") from error


def build_word_tokenizer(
    words: Sequence[str],
    pad: str = "<pad>",
    bos: str = "<bos>",
    eos: str = "<eos>",
    unk: str = "<unk>",
    chat_template: str | None = None,
) -> Tokenizer:
    """A tokenizer of words separated by blanks, with BOS in front; decoding joins words with single spaces.

    Ids: pad 0, bos 1, eos 2, unk 3, then the words in order.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    entries = [pad, bos, eos, unk, *words]
    if len(set(entries)) != len(entries) or any(len(entry.split()) != 1 for entry in entries):
        raise ValueError("words of a word tokenizer must be distinct and hold no blanks")
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
    """Whether the encoding `joint` of a text begins with the encoding `first` of its first `border` characters.

    `joint` must also be longer than `first`.
    """
    count = len(first.ids)
    if joint.ids[:count] != first.ids or len(joint.ids) == count:
        return False
    # A token for an unknown word may cross the border and still have the same id.
    return not count or (joint.token_to_chars(count - 1) or (0, 0))[1] <= border
