"""What a bound model says of tokens that are given: scores, and logprobs and values of answers.

B rows, S tokens, R of them the answer at the end (prompts are left-padded, answers start at S - R).
"""

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.losses import token_logprobs
from jaxrlhf.models.decoder import Decoder


def sequence_scores(model: Decoder, tokens: jax.Array, mask: jax.Array, remat: bool = False) -> jax.Array:
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
    remat: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Logprob of each response token and entropy of its distribution, f32[B,R]; 0 past the end.

    `temperature` f32[B] divides the logits. The head runs on the answer's positions only.
    """
    hidden = _before_answers(model, tokens, mask, response_mask, remat)
    return _logprobs(model, hidden, tokens, response_mask, temperature)


def response_values(
    model: Decoder, tokens: jax.Array, mask: jax.Array, response_mask: jax.Array, remat: bool = False
) -> jax.Array:
    """Value of the state before each response token, f32[B,R]; 0 past the end."""
    return _values(model, _before_answers(model, tokens, mask, response_mask, remat), response_mask)


def response_logprobs_and_values(
    model: Decoder,
    tokens: jax.Array,
    mask: jax.Array,
    response_mask: jax.Array,
    temperature: jax.Array,
    remat: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logprobs, entropy, values) of a model with both heads, f32[B,R] each, from one pass through its trunk."""
    hidden = _before_answers(model, tokens, mask, response_mask, remat)
    return *_logprobs(model, hidden, tokens, response_mask, temperature), _values(model, hidden, response_mask)


def _before_answers(model: Decoder, tokens, mask, response_mask, remat: bool) -> jax.Array:
    """Hidden states at the positions before each response token: [B,R,D]."""
    R = response_mask.shape[1]
    first = tokens.shape[1] - R - 1
    return model.encode(tokens, mask.astype(jnp.int32), remat, first)[:, :-1]


def _logprobs(model: Decoder, hidden, tokens, response_mask, temperature) -> tuple[jax.Array, jax.Array]:
    R = response_mask.shape[1]
    logprobs, entropy = token_logprobs(model.logits(hidden), tokens[:, -R:], temperature)
    return jnp.where(response_mask, logprobs, 0.0), jnp.where(response_mask, entropy, 0.0)


def _values(model: Decoder, hidden, response_mask) -> jax.Array:
    return jnp.where(response_mask, model.scores(hidden), 0.0)
