"""The rollout: sample answers to a batch of prompts, in one compiled program.

B rows, P prompt tokens, R response tokens, S = P + R, V vocabulary. Of the rows b are at work: those whose answers have
ended are left behind when half of them have, again and again (`Sampling.max_compactions`).
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
class _Answers:
    """All rows: what they have so far."""

    tokens: jax.Array  # i32[B,R]
    logprobs: jax.Array  # f32[B,R]
    mask: jax.Array  # bool[B,R]
    alive: jax.Array  # bool[B]; no stop token yet


@struct.dataclass
class _AtWork:
    """The rows at work, and what the next step of decoding needs of each."""

    row: jax.Array | None  # i32[b]; place among all rows; None: all of them are at work
    alive: jax.Array  # bool[b]
    token: jax.Array  # i32[b]; the newest
    prompt_slots: jax.Array  # bool[b,S]; slots with a token of the prompt
    prompt_length: jax.Array  # i32[b]
    cache: Cache


def rollout(base: Decoder, adapter: Adapter | None, prompts: Prompts, key: jax.Array, sampling: Sampling) -> Rollout:
    """Samples n = `samples_per_prompt` answers to each prompt, side by side. Each prompt is read once.

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
    uniforms = constrain(row_uniforms(key, B, R), BATCH_AXES)

    def extend(t: jax.Array, answers: _Answers, work: _AtWork, logits: jax.Array) -> tuple[_Answers, _AtWork]:
        """Samples token t of each row at work from logits f32[b,V]."""
        token = jax.lax.cond(
            greedy,
            lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
            lambda: draw(truncate(logits / temperature, sampling), uniforms[_rows(work), t]),
        )
        # The same function as when logprobs are recomputed: another order of the same sums would show.
        logprob = token_logprobs(logits[:, None], token[:, None], temperature)[0][:, 0]
        alive = work.alive & ~jnp.isin(token, jnp.array(stop_tokens, jnp.int32))
        rows = _rows(work)
        answers = _Answers(
            tokens=answers.tokens.at[rows, t].set(jnp.where(work.alive, token, pad_token)),
            logprobs=answers.logprobs.at[rows, t].set(jnp.where(work.alive, logprob, 0.0)),
            mask=answers.mask.at[rows, t].set(work.alive),
            alive=answers.alive.at[rows].set(alive),
        )
        return answers, work.replace(alive=alive, token=token)

    slots = jnp.arange(P + R)

    def decode(state: tuple[jax.Array, _Answers, _AtWork]) -> tuple[jax.Array, _Answers, _AtWork]:
        """Runs the model on the newest token, t - 1, whose slot is P + t - 1, and samples token t."""
        t, answers, work = state
        at = P + t - 1
        seen = work.prompt_slots | ((slots >= P) & (slots <= at))
        positions = (work.prompt_length + t - 1)[:, None]
        hidden, cache = model.hidden(work.token[:, None], positions, seen[:, None, :], work.cache, at)
        return t + 1, *extend(t, answers, work.replace(cache=cache), model.logits(hidden)[:, 0])

    segments = prompts.mask.astype(jnp.int32)
    given = prompts.tokens, positions_of(segments), causal_mask(segments)
    hidden, prompt_cache = model.hidden(*given, first=P - 1, slots=P + R)
    prompt_tokens, prompt_mask = jnp.repeat(prompts.tokens, n, axis=0), jnp.repeat(prompts.mask, n, axis=0)
    work = _AtWork(
        row=None,
        alive=jnp.ones((B,), bool),
        token=jnp.zeros((B,), jnp.int32),
        prompt_slots=jnp.pad(prompt_mask, ((0, 0), (0, R))),
        prompt_length=jnp.sum(prompt_mask, axis=1, dtype=jnp.int32),
        cache=[layer.with_room(n, R) for layer in prompt_cache],
    )
    answers = _Answers(
        tokens=jnp.full((B, R), pad_token, jnp.int32),
        logprobs=jnp.zeros((B, R), jnp.float32),
        mask=jnp.zeros((B, R), bool),
        alive=work.alive,
    )
    first = jnp.repeat(model.logits(hidden)[:, 0], n, axis=0)
    state = (jnp.int32(1), *extend(jnp.int32(0), answers, work, first))
    sizes = _sizes(B, sampling.max_compactions)
    for rows, fewer in zip(sizes, (*sizes[1:], 0)):
        state = (*state[:2], _first_alive(state[2], rows))
        state = jax.lax.while_loop(lambda s, fewer=fewer: (s[0] < R) & (jnp.sum(s[2].alive) > fewer), decode, state)
    _, answers, _ = state
    return Rollout(
        tokens=jnp.concatenate([prompt_tokens, answers.tokens], axis=1),
        mask=jnp.concatenate([prompt_mask, answers.mask], axis=1),
        response_mask=answers.mask,
        sample_logprobs=answers.logprobs,
        ended=~answers.alive,
        temperature=jnp.full((B,), temperature, jnp.float32),
    )


def _sizes(rows: int, max_compactions: int) -> list[int]:
    """How many rows are at work, from all on.

    Rows that lie on several devices stay at work there: to move their caches takes longer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if any(mesh.shape.get(axis, 1) > 1 for axis in BATCH_AXES):
        return [rows]
    smaller = (-(-rows // 2**i) for i in range(1, max_compactions + 1))
    return [rows, *dict.fromkeys(size for size in smaller if size < rows)]


def _first_alive(work: _AtWork, rows: int) -> _AtWork:
    """So many of the rows at work, those first whose answers go on."""
    if rows == work.alive.shape[0]:
        return work
    if work.row is None:
        work = work.replace(row=jnp.arange(work.alive.shape[0]))
    kept = jnp.argsort(~work.alive, stable=True)[:rows]
    return jax.tree.map(lambda x: x[kept], work)


def _rows(work: _AtWork) -> jax.Array | slice:
    """Where the rows at work stand among all. All are a slice, which leaves each row on its own device."""
    return slice(None) if work.row is None else work.row
