"""The exact logprob of every choice after each prompt, from one pass.

Only nodes with several children matter, because a token without an alternative has logprob 0. A row of the pass is a
prompt followed by the beginning of a choice, and gives the distributions of all nodes on the path of this beginning. If
no two choices have the same first token, the rows hold only the prompts.

Sizes: B prompts of P tokens, C choices of at most R tokens, K beginnings, T tokens of the longest one.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrlhf.models.choices import Choices
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.scoring import from_logits, hidden_before_tokens
from jaxrlhf.records import Prompts


@struct.dataclass
class Paths:
    """The beginnings of choices, and which of them gives the distribution of each token of each choice."""

    beginnings: jax.Array  # i32[K,T]; 0 after the end
    mask: jax.Array  # bool[K,T]
    row: jax.Array  # i32[C,R]; a beginning that contains the tokens of the choice before position r
    tokens: jax.Array  # i32[C,R]; the choice
    real: jax.Array  # bool[C,R]; False after the end
    counts: jax.Array  # bool[C,R]; whether the token has an alternative

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]]) -> "Paths":
        """Returns the paths of `answers`, which are the answers that `Choices.of` was given."""
        answers = [tuple(answer) for answer in answers]
        followers: dict[tuple[int, ...], set[int]] = {}
        for answer in answers:
            for n, token in enumerate(answer):
                followers.setdefault(answer[:n], set()).add(token)
        branching = {beginning for beginning, tokens in followers.items() if len(tokens) > 1}
        inner = {beginning[:n] for beginning in branching for n in range(len(beginning))}
        longest = sorted(branching - inner)
        number = {path[:n]: k for k, path in enumerate(longest) for n in range(len(path) + 1)}
        T, R = max(map(len, longest)), max(map(len, answers))
        places = [[answer[:r] for r in range(R)] for answer in answers]
        arrays = (
            _padded(longest, T),
            np.array([[t < len(path) for t in range(T)] for path in longest], bool).reshape(len(longest), T),
            np.array([[number.get(place, 0) for place in of_answer] for of_answer in places], np.int32),
            _padded(answers, R),
            np.array([[r < len(answer) for r in range(R)] for answer in answers], bool),
            np.array([[r < len(a) and a[:r] in branching for r in range(R)] for a in answers], bool),
        )
        return cls(*map(jnp.asarray, arrays))


def _padded(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    return np.array([[*row, *[0] * (length - len(row))] for row in rows], np.int32).reshape(len(rows), length)


def choice_logprobs(
    model: Decoder, prompts: Prompts, choices: Choices, paths: Paths, temperature: jax.Array | float
) -> jax.Array:
    """Returns the logprob of each choice after each prompt, f32[B,C], under the model masked to the choices.

    The logits are divided by `temperature`.
    """
    (B, _), (K, T) = prompts.tokens.shape, paths.beginnings.shape

    def rows(of_prompts: jax.Array, of_beginnings: jax.Array) -> jax.Array:
        """Returns [B K, P + T + 1]: each prompt with each beginning, and a dummy token after it.

        The dummy token makes `hidden_before_tokens` also return the state of the last token of a beginning.
        """
        tail = jnp.pad(of_beginnings, ((0, 0), (0, 1)))
        return jnp.concatenate([jnp.repeat(of_prompts, K, axis=0), jnp.tile(tail, (B, 1))], axis=1)

    read = jnp.ones((B * K, T + 1), bool)
    hidden = hidden_before_tokens(
        model, rows(prompts.tokens, paths.beginnings), rows(prompts.mask, paths.mask), read, "none"
    )
    nodes = choices.nodes(choices.index_of(jnp.pad(paths.beginnings, ((0, 0), (0, 1)))))

    def logprobs(logits: jax.Array, nodes: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(choices.masked(logits, nodes) / temperature, axis=-1)

    found = from_logits(choices.head_of(model), hidden, jnp.tile(nodes, (B, 1)), logprobs)
    position = jnp.minimum(jnp.arange(paths.row.shape[1]), T)
    of_tokens = found.reshape(B, K, T + 1, -1)[:, paths.row, position, choices.index_of(paths.tokens)]
    return jnp.sum(jnp.where(paths.counts, of_tokens, 0.0), axis=-1)
