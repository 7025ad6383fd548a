"""The rollout: sample answers to a batch of prompts, in one compiled program.

B rows, P prompt tokens, R response tokens, S = P + R, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import struct

from jaxrlhf.algorithms.losses import token_logprobs
from jaxrlhf.config import Sampling
from jaxrlhf.models.adapters import bind, for_decoding
from jaxrlhf.models.attention import causal_mask, positions_of
from jaxrlhf.models.decoder import Cache, Decoder, LayerCache
from jaxrlhf.records import Adapter, Prompts, Rollout
from jaxrlhf.rollout.sampling import draw, row_uniforms, truncate


@struct.dataclass
class _Answers:
    """The loop's state after `length` tokens."""

    length: jax.Array  # i32[]
    tokens: jax.Array  # i32[B,R]
    logprobs: jax.Array  # f32[B,R]
    mask: jax.Array  # bool[B,R]
    alive: jax.Array  # bool[B]; no stop token yet
    cache: Cache


def rollout(base: Decoder, adapter: Adapter | None, prompts: Prompts, key: jax.Array, sampling: Sampling) -> Rollout:
    """Samples `samples_per_prompt` answers to each prompt, n, side by side: B prompts give n B rows; see
    `records.Rollout`. Each prompt is read once.

    An answer ends with a stop token (kept, and real) or at `max_new_tokens`; what follows is pad and counts
    for nothing. Logprobs are those of the whole distribution at `temperature`, also where top-k, top-p or
    min-p narrow what is sampled; greedy answers (temperature 0) get logprobs at temperature 1.
    """
    model = for_decoding(bind(base, adapter))
    n, P = sampling.samples_per_prompt, prompts.tokens.shape[1]
    B = prompts.tokens.shape[0] * n
    R = sampling.max_new_tokens
    stop_tokens = base.config.stop_tokens if sampling.stop_tokens is None else sampling.stop_tokens
    pad_token = (base.config.pad_token or 0) if sampling.pad_token is None else sampling.pad_token
    greedy = jnp.asarray(sampling.temperature) == 0
    temperature = jnp.where(greedy, 1.0, sampling.temperature)
    uniforms = row_uniforms(key, B, R)

    def extend(answers: _Answers, logits: jax.Array) -> _Answers:
        """Samples one token per row from logits f32[B,V]."""
        t = answers.length
        token = jax.lax.cond(
            greedy,
            lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
            lambda: draw(truncate(logits / temperature, sampling), uniforms[:, t]),
        )
        # The same function as when logprobs are recomputed: another order of the same sums would show.
        logprob = token_logprobs(logits[:, None], token[:, None], temperature)[0][:, 0]
        stopped = jnp.isin(token, jnp.array(stop_tokens, jnp.int32))
        return answers.replace(
            length=t + 1,
            tokens=answers.tokens.at[:, t].set(jnp.where(answers.alive, token, pad_token)),
            logprobs=answers.logprobs.at[:, t].set(jnp.where(answers.alive, logprob, 0.0)),
            mask=answers.mask.at[:, t].set(answers.alive),
            alive=answers.alive & ~stopped,
        )

    prompt_tokens, prompt_mask = jnp.repeat(prompts.tokens, n, axis=0), jnp.repeat(prompts.mask, n, axis=0)
    prompt_lengths = jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)
    slots = jnp.arange(P + R)
    prompt_slots = jnp.pad(prompt_mask, ((0, 0), (0, R)))

    def decode(answers: _Answers) -> _Answers:
        """Runs the model on the newest token, whose slot is P + length - 1, and samples the next."""
        at = P + answers.length - 1
        token = jax.lax.dynamic_index_in_dim(answers.tokens, answers.length - 1, axis=1)
        seen = prompt_slots | ((slots >= P) & (slots <= at))
        positions = (prompt_lengths + answers.length - 1)[:, None]
        hidden, cache = model.hidden(token, positions, seen[:, None, :], answers.cache, at)
        return extend(answers.replace(cache=cache), model.logits(hidden)[:, 0])

    segments = prompts.mask.astype(jnp.int32)
    hidden, prompt_cache = model.hidden(prompts.tokens, positions_of(segments), causal_mask(segments))
    answers = _Answers(
        length=jnp.int32(0),
        tokens=jnp.full((B, R), pad_token, jnp.int32),
        logprobs=jnp.zeros((B, R), jnp.float32),
        mask=jnp.zeros((B, R), bool),
        alive=jnp.ones((B,), bool),
        cache=[_with_room(layer, n, R) for layer in prompt_cache],
    )
    answers = extend(answers, jnp.repeat(model.logits(hidden[:, -1:])[:, 0], n, axis=0))
    answers = jax.lax.while_loop(lambda a: (a.length < R) & jnp.any(a.alive), decode, answers)
    return Rollout(
        tokens=jnp.concatenate([prompt_tokens, answers.tokens], axis=1),
        mask=jnp.concatenate([prompt_mask, answers.mask], axis=1),
        response_mask=answers.mask,
        sample_logprobs=answers.logprobs,
        ended=~answers.alive,
        temperature=jnp.full((B,), temperature, jnp.float32),
    )


def _with_room(layer: LayerCache, copies: int, slots: int) -> LayerCache:
    """The prompts' cache, once for each answer, with empty slots for it."""
    room = ((0, 0), (0, 0), (0, slots), (0, 0))
    return LayerCache(*(jnp.pad(jnp.repeat(x, copies, axis=0), room) for x in layer))
