"""The rollout: samples completions for a batch of prompts, in one compiled program.

Sizes: B rows, P prompt tokens, R response tokens, S = P + R, V the vocabulary size, and b active rows. When half of the
active rows are finished, the finished rows are removed from the active rows. This happens at most
`Sampling.max_compactions` times.
"""

import jax
import jax.numpy as jnp
from flax import struct

from jaxrlhf.algorithms.losses import token_logprobs
from jaxrlhf.config import Sampling
from jaxrlhf.distributed.mesh import BATCH_AXES, constrain
from jaxrlhf.models.adapters import bind, for_decoding
from jaxrlhf.models.attention import causal_mask, positions_of
from jaxrlhf.models.decoder import Cache, Decoder
from jaxrlhf.records import Adapter, Prompts, Rollout
from jaxrlhf.rollout.sampling import draw, row_uniforms, truncate


@struct.dataclass
class _Responses:
    """The tokens that were sampled so far, for each row of the batch."""

    tokens: jax.Array  # i32[B,R]
    logprobs: jax.Array  # f32[B,R]
    mask: jax.Array  # bool[B,R]
    alive: jax.Array  # bool[B]; True until the row samples a stop token


@struct.dataclass
class _ActiveRows:
    """The rows that still decode, and the inputs of their next step."""

    index: jax.Array | None  # i32[b]; row numbers in the batch; None means that every row is active
    alive: jax.Array  # bool[b]; True until the row samples a stop token
    token: jax.Array  # i32[b]; the newest token
    prompt_slots: jax.Array  # bool[b,S]; slots that hold a prompt token
    prompt_length: jax.Array  # i32[b]
    cache: Cache

    @property
    def places(self) -> jax.Array | slice:
        """The index of the active rows in the batch. If all rows are active, a slice is used: rows are not moved."""
        return slice(None) if self.index is None else self.index


def rollout(base: Decoder, adapter: Adapter | None, prompts: Prompts, key: jax.Array, sampling: Sampling) -> Rollout:
    """Samples `samples_per_prompt` completions of each prompt, and returns the rollout.

    The completions of a prompt are in adjacent rows. Each prompt is encoded once. A completion ends with a stop token,
    or after `max_new_tokens` tokens. Padding follows. The stop token is a real token. Top-k, top-p or min-p may
    truncate the distribution for sampling, but logprobs are those of the full distribution at `temperature`. If the
    temperature is 0, completions are greedy, and their logprobs are those at temperature 1.
    """
    model = for_decoding(bind(base, adapter))
    n, P = sampling.samples_per_prompt, prompts.tokens.shape[1]
    B = prompts.tokens.shape[0] * n
    R = sampling.max_new_tokens
    stop_tokens = base.config.stop_tokens if sampling.stop_tokens is None else sampling.stop_tokens
    pad_token = (base.config.pad_token or 0) if sampling.pad_token is None else sampling.pad_token
    greedy = jnp.asarray(sampling.temperature) == 0
    temperature = jnp.where(greedy, 1.0, sampling.temperature)
    uniforms = constrain(row_uniforms(key, B, R), BATCH_AXES)

    def extend(
        t: jax.Array, responses: _Responses, active: _ActiveRows, logits: jax.Array
    ) -> tuple[_Responses, _ActiveRows]:
        """Samples token t of each active row from the logits f32[b,V], and adds the tokens to the responses."""
        rows = active.places
        token = jax.lax.cond(
            greedy,
            lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
            lambda: draw(truncate(logits / temperature, sampling), uniforms[rows, t]),
        )
        # Scoring and the update use this function too. Sums in another order would give other logprobs.
        logprob = token_logprobs(logits[:, None], token[:, None], temperature)[0][:, 0]
        alive = active.alive & ~jnp.isin(token, jnp.array(stop_tokens, jnp.int32))
        responses = _Responses(
            tokens=responses.tokens.at[rows, t].set(jnp.where(active.alive, token, pad_token)),
            logprobs=responses.logprobs.at[rows, t].set(jnp.where(active.alive, logprob, 0.0)),
            mask=responses.mask.at[rows, t].set(active.alive),
            alive=responses.alive.at[rows].set(alive),
        )
        return responses, active.replace(alive=alive, token=token)

    slots = jnp.arange(P + R)

    def decode(state: tuple[jax.Array, _Responses, _ActiveRows]) -> tuple[jax.Array, _Responses, _ActiveRows]:
        """Runs the model on the newest token, and samples token t. The newest token t - 1 is in slot P + t - 1."""
        t, responses, active = state
        at = P + t - 1
        visible = active.prompt_slots | ((slots >= P) & (slots <= at))
        positions = (active.prompt_length + t - 1)[:, None]
        hidden, cache = model.hidden(active.token[:, None], positions, visible[:, None, :], active.cache, at)
        return t + 1, *extend(t, responses, active.replace(cache=cache), model.logits(hidden)[:, 0])

    segments = prompts.mask.astype(jnp.int32)
    hidden, prompt_cache = model.hidden(
        prompts.tokens, positions_of(segments), causal_mask(segments), first=P - 1, slots=P + R
    )
    prompt_tokens, prompt_mask = jnp.repeat(prompts.tokens, n, axis=0), jnp.repeat(prompts.mask, n, axis=0)
    active = _ActiveRows(
        index=None,
        alive=jnp.ones((B,), bool),
        token=jnp.zeros((B,), jnp.int32),
        prompt_slots=jnp.pad(prompt_mask, ((0, 0), (0, R))),
        prompt_length=jnp.sum(prompt_mask, axis=1, dtype=jnp.int32),
        cache=[layer.with_room(n, R) for layer in prompt_cache],
    )
    responses = _Responses(
        tokens=jnp.full((B, R), pad_token, jnp.int32),
        logprobs=jnp.zeros((B, R), jnp.float32),
        mask=jnp.zeros((B, R), bool),
        alive=active.alive,
    )
    first_logits = jnp.repeat(model.logits(hidden)[:, 0], n, axis=0)
    state = (jnp.int32(1), *extend(jnp.int32(0), responses, active, first_logits))
    sizes = _batch_sizes(B, sampling.max_compactions)
    for size, next_size in zip(sizes, (*sizes[1:], 0)):
        state = (*state[:2], _compact(state[2], size))
        state = jax.lax.while_loop(lambda s, n=next_size: (s[0] < R) & (jnp.sum(s[2].alive) > n), decode, state)
    responses = state[1]
    return Rollout(
        tokens=jnp.concatenate([prompt_tokens, responses.tokens], axis=1),
        mask=jnp.concatenate([prompt_mask, responses.mask], axis=1),
        response_mask=responses.mask,
        sample_logprobs=responses.logprobs,
        ended=~responses.alive,
        temperature=jnp.full((B,), temperature, jnp.float32),
    )


def _batch_sizes(rows: int, max_compactions: int) -> list[int]:
    """Returns the numbers of active rows that a rollout goes through. The first number is `rows`.

    If the batch is split over several devices, finished rows are never removed. Moving the caches between devices would
    take longer than decoding the finished rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if any(mesh.shape.get(axis, 1) > 1 for axis in BATCH_AXES):
        return [rows]
    smaller = (-(-rows // 2**i) for i in range(1, max_compactions + 1))
    return [rows, *dict.fromkeys(size for size in smaller if size < rows)]


def _compact(active: _ActiveRows, size: int) -> _ActiveRows:
    """Returns the first `size` active rows in an order in which unfinished rows come before finished rows."""
    rows = active.alive.shape[0]
    if size == rows:
        return active
    if active.index is None:
        active = active.replace(index=jnp.arange(rows))
    kept = jnp.argsort(~active.alive, stable=True)[:size]
    return jax.tree.map(lambda x: x[kept], active)
