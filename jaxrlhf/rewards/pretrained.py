"""A pretrained reward model as a reward: a decoder with base, head and tokenizer of its own, on the run's mesh.

Texts end with its EOS where the answer ended, as in the stage reward_model; a chat is what its chat template makes
of it, to the last character. The score stands at the last token that is not its pad token, as in transformers: a
checkpoint that pads with EOS is not read at an EOS.
"""

import jax
import numpy as np

from jaxrlhf.config import ModelRewardConfig
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import check_batch, replicated, shard_batch
from jaxrlhf.errors import UserError
from jaxrlhf.hf.classifiers import load_sequence_classifier
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.decoder import Decoder, with_target
from jaxrlhf.models.precision import compiler_options
from jaxrlhf.models.scoring import sequence_scores
from jaxrlhf.models.sharding import shard
from jaxrlhf.models.target import target_of
from jaxrlhf.records import Adapter
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.rewards.reading import Reading, batches, chats_read, finite, readings

BUCKETS = 4  # padded lengths, each half of the next; each is compiled once, when the first text needs it


def score_tokens(base: Decoder, adapter: Adapter, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Scores f32[B] of right-padded tokens i32[B,L] at the last real one."""
    return sequence_scores(bind(base, adapter), tokens, mask)


def token_score_program(mesh: jax.sharding.Mesh, base: Decoder) -> Program:
    """`score_tokens`, as plans and benchmarks take it too; every device has all scores."""
    return Program(score_tokens, "reward", mesh, compiler_options(base), out_shardings=replicated(mesh))


class PretrainedReward:
    """A reward (see `completions.Reward`) from a folder or hub id that `load_sequence_classifier` reads."""

    def __init__(
        self, config: ModelRewardConfig, mesh: jax.sharding.Mesh, key_path: str, matmul_precision: str = "highest"
    ):
        """`key_path` is the section of the settings, for messages. Raises `UserError` where they cannot be used."""
        self.config, self.mesh, self.name = config, mesh, str(config.path)
        check_batch(mesh, config.batch_size, f"{key_path}.batch_size")
        base, adapter, self.tokenizer = load_sequence_classifier(config.path, config.dtype, mesh)
        self.base = with_target(base, target_of(mesh, matmul_precision))
        self.adapter = shard(mesh, adapter)
        self.max_length = min(config.max_length, self.base.config.max_positions)
        self._check_tokenizer(key_path)
        self.chats = self.tokenizer.chats
        self.lengths = _lengths(self.max_length)
        self.program = token_score_program(mesh, self.base)

    def check_prompts(self, prompts: PromptSet) -> None:
        """`UserError` where the chat template refuses a chat."""
        chats = chats_read(prompts.texts, prompts.chats, self.config, self.tokenizer.has_chat_template)
        where = [f"prompt {number}" for number in range(1, len(chats) + 1)]
        for _ in self.tokenizer.encode_chats([chat.followed_by("a") for chat in chats], where):
            pass

    def __call__(self, completions: Completions) -> np.ndarray:
        ids = self.encode(readings(completions, self.config, self.tokenizer.has_chat_template), completions.ended)
        size = min(self.config.batch_size, len(ids))
        chosen = batches([len(row) for row in ids], size)
        # All are under way before the first is waited for.
        parts = [self.program(self.base, self.adapter, *self._padded([ids[i] for i in rows], size)) for rows in chosen]
        scores = np.empty(len(ids), np.float32)
        for rows, part in zip(chosen, parts):
            scores[rows] = np.asarray(part)[: len(rows)]
        return finite(self.name, scores)

    def encode(self, read: list[Reading], ended: list[bool]) -> list[list[int]]:
        """Ids of the readings, none empty and none longer than `max_length`."""
        found: list[list[int]] = [[]] * len(read)
        texts = [i for i, (prompt, _) in enumerate(read) if prompt is None]
        end = self.tokenizer.text_end_id if self.config.end_at_eos is not False else None
        for i, ids in zip(texts, self.tokenizer.encode_prompts([read[i][1] for i in texts])):
            found[i] = [*ids, end] if end is not None and ended[i] else ids
        chats = [i for i, (prompt, _) in enumerate(read) if prompt is not None]
        for i, ids in zip(chats, self.tokenizer.encode_chats([read[i][0].followed_by(read[i][1]) for i in chats])):
            found[i] = ids
        if self.config.end_at_eos:
            chats = [i for i in chats if ended[i]]
            for i, (prompt, answer) in zip(chats, self.tokenizer.encode_pairs([read[i] for i in chats])):
                found[i] = prompt + answer
        return [self._cut(ids) for ids in found]

    def _cut(self, ids: list[int]) -> list[int]:
        """Without the pad tokens at the end, which transformers does not read, and with no more than fits."""
        ids = [token for token in ids if token < self.base.config.vocab_size]  # a text may spell out any added token
        last = next((i for i, token in enumerate(ids[::-1]) if token != self.base.config.pad_token), len(ids) - 1)
        ids = ids[: len(ids) - last] or [self.tokenizer.text_end_id or 0]  # an empty text is its end
        return self.tokenizer.cut_start(ids, self.max_length) or ids[-self.max_length :]

    def _padded(self, rows: list[list[int]], size: int) -> tuple[jax.Array, jax.Array]:
        """Tokens i32[size,L] and mask bool[size,L] on the mesh; the first row is repeated where rows are missing."""
        length = next(length for length in self.lengths if length >= max(map(len, rows)))
        tokens, mask = np.zeros((size, length), np.int32), np.zeros((size, length), bool)
        for i in range(size):
            row = rows[i if i < len(rows) else 0]
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        return shard_batch(self.mesh, (tokens, mask))

    def _check_tokenizer(self, key_path: str) -> None:
        if self.tokenizer is None:
            raise UserError(f"{key_path}.path: {self.name} has no tokenizer files; a reward model needs its own")
        if self.tokenizer.text_size > self.base.config.vocab_size:
            raise UserError(
                f"{key_path}.path: the tokenizer of {self.name} has {self.tokenizer.text_size} tokens, "
                f"the model {self.base.config.vocab_size}"
            )
        if self.config.input == "chat" and not self.tokenizer.has_chat_template:
            raise UserError(f"{key_path}.input: chat, but the tokenizer of {self.name} has no chat template; try text")
        if self.config.end_at_eos and not self.tokenizer.stop_ids:
            raise UserError(f"{key_path}.end_at_eos: the tokenizer of {self.name} has no EOS token")


def _lengths(longest: int) -> list[int]:
    """Padded lengths, ascending: the longest, half of it, ..., in multiples of 8."""
    return sorted({min(max(-(-(longest >> halvings) // 8) * 8, 8), longest) for halvings in range(BUCKETS)})
