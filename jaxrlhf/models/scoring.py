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
    R = response_mask.shape[1]
    hidden = model.encode(tokens, mask.astype(jnp.int32), remat)
    logits = model.logits(hidden[:, -R - 1 : -1])
    logprobs, entropy = token_logprobs(logits, tokens[:, -R:], temperature)
    return jnp.where(response_mask, logprobs, 0.0), jnp.where(response_mask, entropy, 0.0)


def response_values(
    model: Decoder, tokens: jax.Array, mask: jax.Array, response_mask: jax.Array, remat: bool = False
) -> jax.Array:
    """Value of the state before each response token, f32[B,R]; 0 past the end."""
    R = response_mask.shape[1]
    hidden = model.encode(tokens, mask.astype(jnp.int32), remat)
    return jnp.where(response_mask, model.scores(hidden[:, -R - 1 : -1]), 0.0)
