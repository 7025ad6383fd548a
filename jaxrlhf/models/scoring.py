"""What a bound model says of tokens that are given: scores, and logprobs and values of answers.

B rows, S tokens, R of them the answer at the end (prompts are left-padded, answers start at S - R).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.losses import token_logprobs
from jaxrlhf.distributed.mesh import BATCH_AXES, constrain
from jaxrlhf.models.decoder import Decoder

# Logits that are held at a time, on each device: on a CPU 16 MiB, which its cache may keep; elsewhere 512 MiB, so that
# the products stay large.
_HELD, _HELD_ON_CPU = 2**27, 2**22


def sequence_scores(model: Decoder, tokens: jax.Array, mask: jax.Array, remat: str = "none") -> jax.Array:
    """Scalar head at the last real token, f32[B]; padding may stand on either side."""
    S = tokens.shape[1]
    last = jnp.maximum(S - 1 - jnp.argmax(mask[:, ::-1], axis=1), 0)
    hidden = model.encode(tokens, mask.astype(jnp.int32), remat)
    return model.scores(jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0]


def response_logprobs(
    model: Decoder,
    tokens: jax.Array,
    mask: jax.Array,
    response_mask: jax.Array,
    temperature: jax.Array,
    remat: str = "none",
) -> tuple[jax.Array, jax.Array]:
    """Logprob of each response token and entropy of its distribution, f32[B,R]; 0 past the end.

    `temperature` f32[B] divides the logits. The head runs on the answer's positions only.
    """
    hidden = _before_answers(model, tokens, mask, response_mask, remat)
    return _logprobs(model, hidden, tokens, response_mask, temperature)


def response_values(
    model: Decoder, tokens: jax.Array, mask: jax.Array, response_mask: jax.Array, remat: str = "none"
) -> jax.Array:
    """Value of the state before each response token, f32[B,R]; 0 past the end."""
    return _values(model, _before_answers(model, tokens, mask, response_mask, remat), response_mask)


def response_logprobs_and_values(
    model: Decoder,
    tokens: jax.Array,
    mask: jax.Array,
    response_mask: jax.Array,
    temperature: jax.Array,
    remat: str = "none",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logprobs, entropy, values) of a model with both heads, f32[B,R] each, from one pass through its trunk."""
    hidden = _before_answers(model, tokens, mask, response_mask, remat)
    return *_logprobs(model, hidden, tokens, response_mask, temperature), _values(model, hidden, response_mask)


def _before_answers(model: Decoder, tokens, mask, response_mask, remat: str) -> jax.Array:
    """Hidden states at the positions before each response token: [B,R,D]."""
    R = response_mask.shape[1]
    first = tokens.shape[1] - R - 1
    return model.encode(tokens, mask.astype(jnp.int32), remat, first)[:, :-1]


def from_logits(
    model: Decoder,
    hidden: jax.Array,
    given: Any,
    reduce: Callable[[jax.Array, Any], Any],
    held: int | None = None,
) -> Any:
    """reduce(logits f32[B,r,V], given [B,r,...]) -> tree of [B,r,...], over all positions of hidden states [B,R,D].

    Logits of few positions are held at a time, at most `held` on each device, and are computed again in the backward
    pass: [B,R,V] of a large vocabulary would be the largest array of all. `given` is a tree of [B,R,...].
    """
    B, R, _ = hidden.shape
    if held is None:
        held = _HELD_ON_CPU if model.config.target.platform == "cpu" else _HELD
        held *= max(1, jax.sharding.get_abstract_mesh().size)
    size = max(1, held // (B * model.config.vocab_size))
    if size >= R:
        return reduce(model.logits(hidden), given)
    parts = -(-R // size)
    size = -(-R // parts)  # as equal as can be
    kernel = constrain(model.head_kernel(), None, "tensor")  # brought together once, not in each part

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, parts * size - R)) + ((0, 0),) * (x.ndim - 2))
        split = padded.reshape(B, parts, size, *x.shape[2:]).swapaxes(0, 1)
        return constrain(split, None, BATCH_AXES)

    def joined(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(B, parts * size, *x.shape[3:])[:, :R]

    part = jax.checkpoint(lambda x: reduce(model.logits(x[0], kernel), x[1]))
    return jax.tree.map(joined, jax.lax.map(part, jax.tree.map(cut, (hidden, given))))


def _logprobs(model: Decoder, hidden, tokens, response_mask, temperature) -> tuple[jax.Array, jax.Array]:
    R = response_mask.shape[1]
    logprobs, entropy = from_logits(
        model, hidden, tokens[:, -R:], lambda logits, tokens: token_logprobs(logits, tokens, temperature)
    )
    return jnp.where(response_mask, logprobs, 0.0), jnp.where(response_mask, entropy, 0.0)


def _values(model: Decoder, hidden, response_mask) -> jax.Array:
    return jnp.where(response_mask, model.scores(hidden), 0.0)
