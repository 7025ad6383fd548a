"""Text and chats to token ids and back: one small class around a transformers fast tokenizer.

Left out on purpose: padding and truncation (the data files decide both, and masks say what is real), adding
tokens (a pad token that the model was not trained with would need a new embedding row), slow tokenizers and
remote code.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from typing import Any

from jaxrlhf.data import ends
from jaxrlhf.data.chats import ChatTemplate, Prompt, Response, last_turn
from jaxrlhf.data.sources import Message
from jaxrlhf.data.tokenizer_files import find_folder, read_files, write_files
from jaxrlhf.errors import SharedFault, UserError

# A response that is tokenized without its prompt stands behind one of these, the first that does not merge
# with it, so that tokenizers which put a space before a text put it there.
ANCHORS = ("\n", ".", "a")
CHUNK = 512  # texts per call: bounds the memory that offsets take


class Tokenizer:
    """Token ids of prompts and responses as the model will see them.

    `name` is where it came from, for messages; `eos_id` and `pad_id` are None where the tokenizer has none;
    `prefix_ids` is what it puts before every text (BOS, mostly); `vocab_size` is its largest id + 1, `text_size` the
    same of those ids that text reaches without spelling out an added token. `added` are the added tokens by id.
    `turn_end_id` is the token that the chat template ends an answer with, None where it is none. `stop_ids` end
    answers: its own, or with a model (`for_model`) the model's as well; `notes` are lines on what does not fit.
    """

    def __init__(self, tokenizer: Any, name: str, file: bytes | None = None):
        """`file` is the `tokenizer.json` that it was read from."""
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{name}: no fast tokenizer; save one with a tokenizer.json")
        self._tokenizer = tokenizer
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
        self.cut_responses = 0  # answers in text that went on behind a stop token; for who sets it to 0 to say
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
        """What an answer in plain text ends with: EOS, or else the first stop token."""
        return self.eos_id if self.eos_id in self.stop_ids else next(iter(self.stop_ids), None)

    @property
    def chat_end_id(self) -> int | None:
        """What an answer in a chat ends with: as the template says, or else as a text."""
        return self.turn_end_id if self.turn_end_id in self.stop_ids else self.text_end_id

    def for_model(self, rows: int, stop_tokens: Sequence[int], foreign: bool = False) -> "Tokenizer":
        """This tokenizer for a model with an embedding of so many rows whose files name these stop tokens.

        Its `stop_ids` are the union; see `ends.union`, also for a tokenizer that is `foreign` to those files. `fault`
        then finds tokens without a row.
        """
        fitted = copy.copy(self)
        fitted.stop_ids, lines = ends.union(stop_tokens, self._own_ends(), rows, self.added, self.name, foreign)
        if not fitted.stop_ids:
            lines.append(f"{self.name}: no token ends an answer: answers go on to max_new_tokens")
        elif self.has_chat_template and self.turn_end_id is None and self._template_runs:
            end = self._tokenizer.convert_ids_to_tokens(fitted.chat_end_id)
            lines.append(f"{self.name}: the chat template ends answers in plain text; sft and reward_model teach {end}")
        fitted.notes = tuple(lines)
        fitted.pad_id = self.pad_id if self.pad_id is None or self.pad_id < rows else None
        fitted._rows = rows
        return fitted

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt: text behind BOS (if the tokenizer has it, and never a trailing EOS), or chat
        messages through the chat template, ending where the assistant begins to speak."""
        return next(self.encode_prompts([prompt]))

    def encode_pair(self, prompt: Prompt, response: Response, end: bool = True) -> tuple[list[int], list[int]]:
        """Ids of a prompt, exactly as `encode_prompt` gives them, and of the response that follows it.

        The response's ids are those of both tokenized together where that leaves the prompt's ids as they
        are, or else of the response alone. `end` cuts them after the first of `stop_ids`, or puts one after them.
        A text without a prompt is one document: it is ended, but nothing inside ends it.
        """
        return next(self.encode_pairs([(prompt, response)], end))

    def encode_prompts(self, prompts: Sequence[Prompt], where: Sequence[str] = ()) -> Iterator[list[int]]:
        """`encode_prompt` of many; `where` names their places in messages."""
        for start in range(0, len(prompts), CHUNK):
            part = prompts[start : start + CHUNK]
            texts = [self.chats.prompt_text(prompt, _place(where, start + i)) for i, prompt in enumerate(part)]
            for prompt, encoding in zip(part, self._encode(texts)):
                yield self._with_prefix(encoding.ids) if isinstance(prompt, str) else encoding.ids

    def encode_chats(self, chats: Sequence[list[Message]], where: Sequence[str] = ()) -> Iterator[list[int]]:
        """Ids of whole chats through the chat template, which ends them; `where` names their places in messages."""
        for start in range(0, len(chats), CHUNK):
            part = chats[start : start + CHUNK]
            texts = [self.chats.whole_text(chat, _place(where, start + i)) for i, chat in enumerate(part)]
            yield from (encoding.ids for encoding in self._encode(texts))

    def encode_pairs(
        self, pairs: Sequence[tuple[Prompt, Response]], end: bool = True, where: Sequence[str] = ()
    ) -> Iterator[tuple[list[int], list[int]]]:
        """`encode_pair` of many; `where` names their places in messages."""
        if end and not self.stop_ids:
            raise UserError(f"{self.name}: the tokenizer has no EOS token, so answers could not end; set eos_token")
        for start in range(0, len(pairs), CHUNK):
            part = pairs[start : start + CHUNK]
            texts = [self.chats.pair_texts(*pair, _place(where, start + i)) for i, pair in enumerate(part)]
            prompts = self._encode_once([prompt for prompt, _ in texts])
            joints = self._encode([prompt + response for prompt, response in texts])
            splits = [_splits(prompts[text], joint, len(text)) for (text, _), joint in zip(texts, joints)]
            rest = self._encode_alone([response for (_, response), split in zip(texts, splits) if not split])
            for pair, (prompt_text, text), joint, split in zip(part, texts, joints, splits):
                prompt_ids = prompts[prompt_text].ids
                ids = joint.ids[len(prompt_ids) :] if split else next(rest)
                if all(isinstance(side, str) for side in pair):
                    prompt_ids, ids = self._with_prefix_once(prompt_ids, ids)
                yield prompt_ids, self._ended(*pair, text, ids) if end else ids

    def fault(self, ids: Sequence[int]) -> str | None:
        """What is wrong with ids that hold one without an embedding row: a text spelled out an added token."""
        if self._rows is None or self._rows >= self.vocab_size:
            return None
        tokens = (f"{self.added.get(token, 'a token')} (id {token})" for token in ids if token >= self._rows)
        token = next(tokens, None)
        if token is None:
            return None
        return f"holds {token}, but the model has {self._rows} tokens; leave it out, or take a model that has it"

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens and without those that end answers."""
        hidden = {self._tokenizer.bos_token_id, self.eos_id, *self.stop_ids}
        return self._tokenizer.decode(
            [int(i) for i in ids if int(i) not in hidden], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def decode_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Text of ids as it follows the prompt's: SentencePiece drops a blank at the start of what it decodes alone."""
        before, whole = self.decode(prompt), self.decode([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(ids)

    def cut_start(self, prompt: list[int], room: int) -> list[int] | None:
        """A prompt in at most `room` tokens: its end, behind the BOS that it began with.

        None where not one token of its own would be left.
        """
        if len(prompt) <= room:
            return prompt
        kept = self.prefix_ids if prompt[: len(self.prefix_ids)] == self.prefix_ids else []
        if room <= len(kept):
            return None
        return kept + prompt[len(prompt) - (room - len(kept)) :]

    @property
    def fast(self) -> Any:
        """The transformers tokenizer itself, for a model of transformers."""
        return self._tokenizer

    @property
    def special_ids(self) -> list[int]:
        """Ids of BOS, EOS and all else that is marked as special, in their order."""
        added = self._tokenizer.added_tokens_decoder.items()
        return sorted({*self._tokenizer.all_special_ids, *(index for index, token in added if token.special)})

    def save(self, path: str, pad_id: int | None = None) -> None:
        """Writes the tokenizer's files, chat template included, into a folder that `load_tokenizer` reads.

        `pad_id` is the token that the folder's readers shall pad with; None: the tokenizer's own, if it has one.
        """
        write_files(self._tokenizer, self._file, path, None if pad_id == self.pad_id else pad_id)

    def _encode(self, texts: list[str]) -> list[Any]:
        """A `tokenizers.Encoding` per text, without special tokens, padding and truncation."""
        # verbose=False: how long a text may be is the data's business, not model_max_length's.
        return self._tokenizer(texts, add_special_tokens=False, verbose=False).encodings if texts else []

    def _encode_once(self, texts: list[str]) -> dict[str, Any]:
        """The encoding of each different text."""
        different = list(dict.fromkeys(texts))
        return dict(zip(different, self._encode(different)))

    def _find_prefix(self) -> list[int]:
        """What the tokenizer puts before every text. A trailing EOS would end a prompt, and is left behind."""
        probe = "a"
        inner = self._encode([probe])[0].ids
        outer = self._tokenizer(probe, add_special_tokens=True, verbose=False)["input_ids"]
        for start in range(len(outer) - len(inner) + 1):
            if outer[start : start + len(inner)] == inner:
                return outer[:start]
        raise UserError(f"{self.name}: the tokenizer changes a text's own tokens when it adds special ones")

    def _with_prefix(self, ids: list[int]) -> list[int]:
        """Behind BOS, and once only: texts that were rendered before often spell it out."""
        return ids if ids[: len(self.prefix_ids)] == self.prefix_ids else self.prefix_ids + ids

    def _encode_alone(self, texts: list[str]) -> Iterator[list[int]]:
        """Ids of texts as they are in the middle of a text."""
        plain = self._encode(texts)
        anchors = self._encode(list(ANCHORS))
        joints = [self._encode([anchor + text for text in texts]) for anchor in ANCHORS]
        for i, encoding in enumerate(plain):
            fits = (joint[i].ids[len(a.ids) :] for a, joint in zip(anchors, joints) if _splits(a, joint[i], 1))
            yield next(fits, encoding.ids)

    def _with_prefix_once(self, prompt: list[int], response: list[int]) -> tuple[list[int], list[int]]:
        """Both, the prompt behind BOS; a text without a prompt may spell it out itself."""
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
        """The response's ids, whose text is `text`, with a stop token at their end."""
        if isinstance(prompt, str) and isinstance(response, str):
            if prompt:
                kept = ends.ended(ids, self.stop_ids, self.text_end_id)
                self.cut_responses += bool(self._tokenizer.decode(ids[len(kept) :], skip_special_tokens=True).strip())
                return kept
            return ends.ended_text(ids, self.stop_ids, self.text_end_id, self._tokenizer)
        start = last_turn(response, text)
        if start < 0:
            return ends.ended_text(ids, self.stop_ids, self.chat_end_id, self._tokenizer)
        passed = sum(token in self.stop_ids for token in self._encode([text[:start]])[0].ids) if start else 0
        return ends.ended(ids, self.stop_ids, self.chat_end_id, passed)


def load_tokenizer(path: str) -> Tokenizer | None:
    """The tokenizer of a local folder or hub id; None where there are no tokenizer files.

    UserError where the folder is missing or its files cannot be used. Remote code is never run.
    """
    folder = find_folder(path)
    if folder is None:
        return None
    tokenizer, file = read_files(folder, path)
    return Tokenizer(tokenizer, path, file)


def build_word_tokenizer(
    words: Sequence[str],
    pad: str = "<pad>",
    bos: str = "<bos>",
    eos: str = "<eos>",
    unk: str = "<unk>",
    chat_template: str | None = None,
) -> Tokenizer:
    """A tokenizer of whole words between blanks, BOS in front; decoding joins words by single spaces.

    Ids: pad 0, bos 1, eos 2, unk 3, then the words in the order given.
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
    """Whether the encoding `joint` of a text is that of its first `border` characters and something more."""
    count = len(first.ids)
    if joint.ids[:count] != first.ids or len(joint.ids) == count:
        return False
    # A token for an unknown word may reach over the border and still have the same id.
    return not count or (joint.token_to_chars(count - 1) or (0, 0))[1] <= border


def _place(where: Sequence[str], index: int) -> str:
    return f"{where[index]}: " if where else ""
