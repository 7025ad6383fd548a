"""A pretrained reward model as a reward. The model is a decoder with its own base, head and tokenizer.

It runs on the run's mesh. If the completion of a text ended, EOS is appended, as in the stage reward_model. For a chat,
the chat template writes the whole text. The score is read at the last token that is not the pad token, as in
transformers. So if the pad token is EOS, the score is read at the token before EOS.
"""

import jax
import numpy as np

from jaxrlhf.config import ModelRewardConfig
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
from jaxrlhf.rewards.reading import Reading, batches, check_tokenizer, finite, readings

BUCKETS = 4  # number of padded lengths; a length is half of the next, and is compiled when a text first needs it


def score_tokens(base: Decoder, adapter: Adapter, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the scores f32[B] of right-padded tokens i32[B,L], read at the last real token."""
    return sequence_scores(bind(base, adapter), tokens, mask)


def token_score_program(mesh: jax.sharding.Mesh, base: Decoder) -> Program:
    """Returns the program of `score_tokens`. The program puts all scores on every device.

    Plans and benchmarks use the same program.
    """
    return Program(score_tokens, "reward", mesh, compiler_options(base), out_shardings=replicated(mesh))


class PretrainedReward:
    """A reward (see `completions.Reward`) from a folder or hub id that `load_sequence_classifier` reads."""

    def __init__(
        self, config: ModelRewardConfig, mesh: jax.sharding.Mesh, key_path: str, matmul_precision: str = "highest"
    ):
        """Loads model and tokenizer. Raises `UserError` if settings cannot be used.

        `key_path` is the config section. Error messages contain it.
        """
        self.config, self.mesh, self.name = config, mesh, str(config.path)
        check_batch(mesh, config.batch_size, f"{key_path}.batch_size")
        base, adapter, self.tokenizer = load_sequence_classifier(config.path, config.dtype, mesh)
        self.base = with_target(base, target_of(mesh, matmul_precision))
        self.adapter = shard(mesh, adapter)
        self.max_length = min(config.max_length, self.base.config.max_positions)
        check_tokenizer(self.tokenizer, self.base.config.vocab_size, config, key_path)
        if config.end_at_eos and not self.tokenizer.stop_ids:
            raise UserError(f"{key_path}.end_at_eos: must be false; the tokenizer of {self.name} has no EOS token")
        self.chats = self.tokenizer.chats
        self.lengths = _lengths(self.max_length)
        self.program = token_score_program(mesh, self.base)

    def __call__(self, completions: Completions) -> np.ndarray:
        ids = self.encode(readings(completions, self.config, self.tokenizer.has_chat_template), completions.ended)
        size = min(self.config.batch_size, len(ids))
        parts = batches([len(row) for row in ids], size)
        # All batches are sent to the devices before the first result is fetched.
        results = [self.program(self.base, self.adapter, *self._pad([ids[i] for i in rows], size)) for rows in parts]
        scores = np.empty(len(ids), np.float32)
        for rows, result in zip(parts, results):
            scores[rows] = np.asarray(result)[: len(rows)]
        return finite(self.name, scores)

    def encode(self, readings: list[Reading], ended: list[bool]) -> list[list[int]]:
        """Returns the token ids of each reading. A reading has at least one and at most `max_length` tokens."""
        encoded: list[list[int]] = [[]] * len(readings)
        texts = [i for i, (prompt, _) in enumerate(readings) if prompt is None]
        end = self.tokenizer.text_end_id if self.config.end_at_eos is not False else None
        for i, ids in zip(texts, self.tokenizer.encode_prompts([readings[i][1] for i in texts])):
            encoded[i] = [*ids, end] if end is not None and ended[i] else ids
        rows = [i for i, (prompt, _) in enumerate(readings) if prompt is not None]
        chats = [readings[i][0].followed_by(readings[i][1]) for i in rows]
        for i, ids in zip(rows, self.tokenizer.encode_chats(chats)):
            encoded[i] = ids
        if self.config.end_at_eos:
            rows = [i for i in rows if ended[i]]
            for i, (prompt, response) in zip(rows, self.tokenizer.encode_pairs([readings[i] for i in rows])):
                encoded[i] = prompt + response
        return [self._cut(ids) for ids in encoded]

    def _cut(self, ids: list[int]) -> list[int]:
        """Returns the ids without pad tokens at the end, because transformers does not read these tokens.

        If the text is too long, its start is cut off.
        """
        ids = [token for token in ids if token < self.base.config.vocab_size]  # text may contain any added token
        padding = next((i for i, token in enumerate(ids[::-1]) if token != self.base.config.pad_token), len(ids) - 1)
        ids = ids[: len(ids) - padding] or [self.tokenizer.text_end_id or 0]  # an empty text is read as EOS
        return self.tokenizer.cut_start(ids, self.max_length) or ids[-self.max_length :]

    def _pad(self, rows: list[list[int]], size: int) -> tuple[jax.Array, jax.Array]:
        """Returns tokens i32[size,L] and mask bool[size,L] on the mesh. Copies of the first row fill a short batch."""
        length = next(length for length in self.lengths if length >= max(map(len, rows)))
        tokens, mask = np.zeros((size, length), np.int32), np.zeros((size, length), bool)
        for i, row in enumerate(rows + rows[:1] * (size - len(rows))):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        return shard_batch(self.mesh, (tokens, mask))


def _lengths(longest: int) -> list[int]:
    """Returns the padded lengths in ascending order, at most `longest`.

    They are `longest`, half of `longest` and so on, rounded up to multiples of 8.
    """
    return sorted({min(max(-(-(longest >> i) // 8) * 8, 8), longest) for i in range(BUCKETS)})
