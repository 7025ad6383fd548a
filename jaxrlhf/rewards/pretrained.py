"""A pretrained reward model as a reward. The model is a decoder with its own base, head and tokenizer.

It runs on the run's mesh. A text whose completion ended gets EOS at its end, as in the stage reward_model. For a chat,
the chat template writes the whole text. The score is read at the last token that is not the pad token, as in
transformers. So if the pad token is EOS, the score is read at the token before EOS.

With granularity step, the score is read at the end of each step, in the same forward pass. The end of a step
is found in the input by counting characters from the start of the completion.
"""

import jax
import numpy as np

from jaxrlhf.config import ModelRewardConfig
from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import check_batch, replicated, shard_batch
from jaxrlhf.errors import UserError
from jaxrlhf.hf.classifiers import is_token_classifier, load_sequence_classifier, load_token_classifier
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.decoder import Decoder, with_target
from jaxrlhf.models.precision import compiler_options
from jaxrlhf.models.scoring import sequence_scores, token_scores
from jaxrlhf.models.sharding import shard
from jaxrlhf.models.target import target_of
from jaxrlhf.records import Adapter
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.rewards.functions import RewardFault
from jaxrlhf.rewards.reading import Reading, batches, check_tokenizer, finite, readings
from jaxrlhf.rewards.steps import Placed, granularity_of, step_ends, step_values, tokens_at

BUCKETS = 4  # number of padded lengths; a length is half of the next, and is compiled when a text first needs it


def score_tokens(
    base: Decoder, adapter: Adapter, tokens: jax.Array, mask: jax.Array, by_token: bool = False
) -> jax.Array:
    """Returns the scores f32[B] of right-padded tokens i32[B,L], read at the last real token.

    With `by_token`, returns the scores f32[B,L] at all tokens.
    """
    model = bind(base, adapter)
    return token_scores(model, tokens, mask, tokens.shape[1]) if by_token else sequence_scores(model, tokens, mask)


def token_score_program(mesh: jax.sharding.Mesh, base: Decoder) -> Program:
    """Returns the program of `score_tokens`. The program puts all scores on every device.

    Plans and benchmarks use the same program.
    """
    options = {"out_shardings": replicated(mesh), "static_argnames": ("by_token",)}
    return Program(score_tokens, "reward", mesh, compiler_options(base), **options)


class PretrainedReward:
    """A reward (see `completions.Reward`) from a folder or hub id that `load_sequence_classifier` reads.

    With granularity step, the folder may also be one for `load_token_classifier`. The score of a step is then the
    probability of label 1.
    """

    def __init__(
        self, config: ModelRewardConfig, mesh: jax.sharding.Mesh, key_path: str, matmul_precision: str = "highest"
    ):
        """Loads model and tokenizer. Raises `UserError` if settings cannot be used.

        `key_path` is the config section. Error messages contain it.
        """
        self.config, self.mesh, self.name = config, mesh, str(config.path)
        self.granularity = granularity_of(config)
        self.by_step = self.granularity is not None
        check_batch(mesh, config.batch_size, f"{key_path}.batch_size")
        self.probability = self.by_step and is_token_classifier(config.path)
        load = load_token_classifier if self.probability else load_sequence_classifier
        base, adapter, self.tokenizer = load(config.path, config.dtype, mesh)
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
        read = readings(completions, self.config, self.tokenizer.has_chat_template)
        if self.granularity is not None:
            return self._score_steps(read, completions)
        return finite(self.name, np.array(self._scores(self.encode(read, completions.ended)), np.float32))

    def _scores(self, ids: list[list[int]]) -> list[np.ndarray]:
        """Returns for each row its score f32[], or with granularity step the scores at its tokens f32[L]."""
        size = min(self.config.batch_size, len(ids))
        parts = batches([len(row) for row in ids], size)
        # All batches are sent to the devices before the first result is fetched.
        padded = (self._pad([ids[i] for i in rows], size) for rows in parts)
        results = [self.program(self.base, self.adapter, *batch, by_token=self.by_step) for batch in padded]
        scores: list[np.ndarray] = [np.zeros(0)] * len(ids)
        for rows, result in zip(parts, results):
            for i, score in zip(rows, np.asarray(result)):
                scores[i] = score
        return scores

    def _score_steps(self, readings: list[Reading], completions: Completions) -> np.ma.MaskedArray:
        """Returns the scores at the ends of steps as rewards f32[B,R].

        If a long input loses its start, steps that end there have no reward.
        """
        (steps,) = self.granularity.texts(completions).values()
        ends = [step_ends(of_row, self.granularity.separator) for of_row in steps]
        rows = [self._encode_steps(reading, completions, i, ends[i]) for i, reading in enumerate(readings)]
        placed: list[Placed] = []
        for (_, places), scores, of_row in zip(rows, self._scores([ids for ids, _ in rows]), ends):
            values = scores[places[places >= 0]]
            if self.probability:
                values = 1 / (1 + np.exp(-values))
            placed.append((of_row[places >= 0], step_values(values, self.config.step_reward)))
        finite(self.name, np.array([values.sum() for _, values in placed], np.float32))
        return self.granularity.at_tokens(placed, completions)

    def _encode_steps(
        self, reading: Reading, completions: Completions, row: int, ends: np.ndarray
    ) -> tuple[list[int], np.ndarray]:
        """Returns (token ids, numbers of the tokens that complete the steps); -1 for a step that was cut off.

        `ends` are those of `step_ends` in the text of the completion. The last step ends at the last token.
        """
        prompt, completion = reading
        text = completion if prompt is None else self.chats.whole_text(prompt.followed_by(completion), "")
        ids, token_ends = self.tokenizer.encode_with_ends(text, prefixed=prompt is None)
        written = completions.texts[row].strip()  # a chat template may strip blanks
        first, blanks = text.rfind(written), len(completions.texts[row]) - len(completions.texts[row].lstrip())
        if first < 0:
            raise RewardFault(
                f"reward {self.name}: the chat template changes the text of completion {row}, so the ends of its steps "
                "are unknown; set input: text"
            )
        places = tokens_at(first + np.clip(ends - blanks, 0, len(written)), np.array(token_ends or [0]))
        end = self.tokenizer.text_end_id if self.config.end_at_eos is None and prompt is None else None
        ids = [*ids, end] if end is not None and completions.ended[row] else ids
        known = np.array([token < self.base.config.vocab_size for token in ids])
        cut = self._cut(ids)
        lost = len(self._without_padding(ids)) - len(cut)  # tokens at the start
        places = np.cumsum(known)[places] - 1 - lost if ids else np.zeros(len(ends), int)
        places = np.where((places < len(self.tokenizer.prefix_ids)) & (lost > 0), -1, np.minimum(places, len(cut) - 1))
        places[-1] = len(cut) - 1
        return cut, places

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
        """Returns the ids without pad tokens at the end. If the text is too long, its start is cut off."""
        ids = self._without_padding(ids)
        return self.tokenizer.cut_start(ids, self.max_length) or ids[-self.max_length :]

    def _without_padding(self, ids: list[int]) -> list[int]:
        """Returns the ids without pad tokens at the end, because transformers does not read these tokens."""
        ids = [token for token in ids if token < self.base.config.vocab_size]  # text may contain any added token
        padding = next((i for i, token in enumerate(ids[::-1]) if token != self.base.config.pad_token), len(ids) - 1)
        return ids[: len(ids) - padding] or [self.tokenizer.text_end_id or 0]  # an empty text is read as EOS

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
