"""The rollout: samples completions for a batch of prompts, in one compiled program.

Rows wait in a queue. Some of them decode at the same time, each in a slot of the caches. When enough slots are free,
the next rows enter: their prompts are encoded, and their first tokens are sampled. So the program has one pass over
prompts and one decode loop, and its caches have the size of the slots, whatever the number of rows is. If every row has
a slot, the pass and the loop run once. On a CPU, the last rows go on in fewer slots, by loops of their own.

Sizes: B rows, Q queues, N slots of all queues, k rows that enter from a queue at a time, P prompt tokens, R response
tokens, S = P + R columns of the caches, and V the vocabulary size.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from jaxrlhf.algorithms.losses import token_logprobs
from jaxrlhf.config import Sampling
from jaxrlhf.distributed.mesh import BATCH_AXES, automatic_axes, constrain, rows_over_context, sampling_axes
from jaxrlhf.models.adapters import bind, for_decoding, with_merged_pairs
from jaxrlhf.models.cache import Cache, CacheIndex, LayerCache
from jaxrlhf.models.choices import Choices
from jaxrlhf.models.decoder import Decoder, named_parameters
from jaxrlhf.models.layer_scan import with_stacked_layers
from jaxrlhf.records import Adapter, Prompts, Rollout
from jaxrlhf.rollout.prefill import prefill
from jaxrlhf.rollout.sampling import draw, row_uniforms, truncate
from jaxrlhf.rollout.schedule import Schedule

# On a CPU, a step with fewer rows takes less time. When no row waits and the rest fits in the slots divided by these
# numbers, the rest goes on in so many slots. Each number is one more loop to compile. Not on a GPU: there a step takes
# the time to read the weights.
_LAST_DIVISORS = (2, 8)


@struct.dataclass
class _State:
    """The slots, the rows in them, and the completions of rows that have left their slots.

    The tokens of a step are in line step mod R of `new_tokens` and `new_logprobs`. A row has at most R tokens, in
    consecutive steps.
    """

    step: jax.Array  # i32[]; number of the next decode step, from 1 on
    taken: jax.Array  # i32[Q]; number of rows that have left each queue
    row: jax.Array  # i32[N]; B if the slot has had no row
    start: jax.Array  # i32[N]; the step of the row's first token: the step before its first decode step
    length: jax.Array  # i32[N]; prompt tokens
    alive: jax.Array  # bool[N]; False if the row has all its tokens, or if there is no row
    token: jax.Array  # i32[N]; the newest token
    node: jax.Array | None  # i32[N]; the node of `Choices` before the next token; None without choices
    new_tokens: jax.Array  # i32[R,N]
    new_logprobs: jax.Array  # f32[R,N]
    tokens: jax.Array  # i32[B,R]; arbitrary after a stop token
    logprobs: jax.Array  # f32[B,R]; arbitrary after a stop token
    cache: Cache | None  # None before the rows enter if all rows enter at once


@rows_over_context()
def rollout(
    base: Decoder,
    adapter: Adapter | None,
    prompts: Prompts,
    key: jax.Array,
    sampling: Sampling,
    choices: Choices | None = None,
) -> Rollout:
    """Samples `samples_per_prompt` completions of each prompt, and returns the rollout.

    The completions of a prompt are in adjacent rows. A completion ends with a stop token, or after `max_new_tokens`
    tokens. Padding follows. The stop token is a real token. Top-k, top-p or min-p may truncate the distribution for
    sampling, but logprobs are those of the full distribution at `temperature`. If the temperature is 0, completions are
    greedy, and their logprobs are those at temperature 1. Completions do not depend on the number of slots.

    If `choices` is given, each completion is one of the choices. Top-k, top-p and min-p then truncate the distribution
    of the allowed tokens, and logprobs are those of all allowed tokens. Raises `ValueError` if `sampling` has choices,
    but their tokens are not given.

    A prompt without tokens gets an empty completion, and its row is not decoded. The completions of other rows do not
    depend on it.
    """
    if sampling.choices is not None and choices is None:
        raise ValueError("sampling.choices are texts; give their tokens too, as the argument `choices`")
    n, R = sampling.samples_per_prompt, sampling.max_new_tokens
    B = prompts.tokens.shape[0] * n
    stop_tokens = base.config.stop_tokens if sampling.stop_tokens is None else sampling.stop_tokens
    pad_token = (base.config.pad_token or 0) if sampling.pad_token is None else sampling.pad_token
    temperature = jnp.where(jnp.asarray(sampling.temperature) == 0, 1.0, sampling.temperature)
    uniforms = constrain(row_uniforms(key, B, R), BATCH_AXES)
    model = bind(base, adapter)
    if choices is not None:
        model = choices.head_of(model)
    tokens, logprobs = _decode(model, prompts, uniforms, temperature, sampling, choices, stop_tokens)
    stops = jnp.isin(tokens, jnp.array(stop_tokens, jnp.int32))
    prompt_tokens, prompt_mask = jnp.repeat(prompts.tokens, n, axis=0), jnp.repeat(prompts.mask, n, axis=0)
    has_prompt = jnp.any(prompt_mask, axis=1)
    real = (jnp.cumsum(stops, axis=1) - stops == 0) & has_prompt[:, None]
    return Rollout(
        tokens=jnp.concatenate([prompt_tokens, jnp.where(real, tokens, pad_token)], axis=1),
        mask=jnp.concatenate([prompt_mask, real], axis=1),
        response_mask=real,
        sample_logprobs=jnp.where(real, logprobs, 0.0),
        ended=jnp.any(stops, axis=1) & has_prompt,
        temperature=jnp.full((B,), temperature, jnp.float32),
    )


def _decode(
    model: Decoder, prompts: Prompts, uniforms, temperature, sampling: Sampling, choices: Choices | None, stop_tokens
):
    """Returns (tokens i32[B,R], logprobs f32[B,R]), arbitrary after a stop token.

    Each share of the rows, over the mesh axes of batches, has its own queue and slots. If each device has all weights,
    it runs loops of its own. Otherwise the loops contain collectives, so all devices run the same loops.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = sampling_axes(sizes, prompts.tokens.shape[0], sampling.slots or 0)
    schedule = Schedule.of(sampling, prompts.tokens.shape[0], math.prod(sizes.get(axis, 1) for axis in axes))
    copies = [axis for axis in axes if axis != "fsdp"]  # along these axes, each device has all weights
    own_loops = schedule.shares > 1 and math.prod(sizes.get(axis, 1) for axis in copies) == math.prod(sizes.values())
    queues = 1 if own_loops else schedule.shares

    def run(*arrays) -> tuple[jax.Array, jax.Array]:
        return _Decoding(*arrays, stop_tokens, queues, schedule.rows, schedule.slots, schedule.entering).run()

    if own_loops:
        by_rows, copied = PartitionSpec(tuple(copies)), PartitionSpec()
        specs = copied, copied, by_rows, by_rows, copied, copied, copied
        run = jax.shard_map(run, in_specs=specs, out_specs=by_rows, check_vma=False)
    decoder = for_decoding(model, sampling.merge_adapter)
    reader = _reader(model, decoder, schedule, sampling)
    return run(decoder, reader, prompts, uniforms, temperature, sampling, choices)


def _reader(model: Decoder, decoder: Decoder, schedule: Schedule, sampling: Sampling) -> Decoder:
    """Returns the model that reads prompts: `decoder`, or the same weights with stacked layers; see `layer_scan`.

    The stacked weights take memory until all prompts are read. If some rows enter later, other rows already decode
    during this time, so layers are not stacked then.
    """
    if schedule.slots < schedule.rows or sampling.prefill_chunk is not None:
        return decoder
    (reader,) = with_stacked_layers(with_merged_pairs(model, sampling.merge_adapter), last_apart=True)
    return decoder if reader.stacked is None else reader


@dataclasses.dataclass(frozen=True)
class _Decoding:
    """Decodes the rows of all queues. The queues share the steps, and each queue has its own slots."""

    model: Decoder
    reader: Decoder  # the same model for the pass over prompts
    prompts: Prompts
    uniforms: jax.Array  # f32[B,R,3]
    temperature: jax.Array  # f32[]
    sampling: Sampling
    choices: Choices | None
    stop_tokens: tuple[int, ...]
    queues: int
    rows: int  # of each queue, as in `Schedule`
    slots: int
    entering: int

    def run(self) -> tuple[jax.Array, jax.Array]:
        """Returns (tokens i32[B,R], logprobs f32[B,R]), arbitrary after a stop token."""
        last_slots = self._last_slots()

        def go_on(state: _State) -> jax.Array:
            least = jnp.where((state.taken < self.rows).any(), 0, max(last_slots, default=0))
            return (jnp.sum(state.alive) > least) & ~self._ready(state).any()

        def enter_and_decode(state: _State) -> _State:
            return jax.lax.while_loop(go_on, self._step, self._enter(state))

        state = self._start()
        if self.slots == self.rows:
            state = enter_and_decode(state)
        else:
            state = jax.lax.while_loop(lambda s: (s.taken < self.rows).any(), enter_and_decode, state)
        for size, next_size in zip(last_slots, (*last_slots[1:], 0)):
            state = self._in_fewer_slots(state, size)
            state = jax.lax.while_loop(lambda s, least=next_size: jnp.sum(s.alive) > least, self._step, state)
        return self._leave(state, jnp.arange(len(state.row)))

    def _last_slots(self) -> list[int]:
        """Returns the numbers of slots to which decoding changes when no row waits and fewer slots have rows."""
        if not self.ring or self.queues > 1:
            return []
        return [self.slots // divisor for divisor in _LAST_DIVISORS if self.slots >= 2 * divisor]

    def _in_fewer_slots(self, state: _State, slots: int) -> _State:
        """Returns the state with `slots` slots, in which all rows that decode have a place."""
        tokens, logprobs = self._leave(state, jnp.arange(len(state.row)))
        kept = jnp.argsort(~state.alive, stable=True)[:slots]
        of_slots = {name: getattr(state, name)[kept] for name in ("row", "start", "length", "alive", "token")}
        of_slots["node"] = None if state.node is None else state.node[kept]
        lines = {name: getattr(state, name)[:, kept] for name in ("new_tokens", "new_logprobs")}
        cache = jax.tree.map(lambda x: x[kept], state.cache)
        return state.replace(tokens=tokens, logprobs=logprobs, cache=cache, **of_slots, **lines)

    @property
    def columns(self) -> int:
        return self.prompts.tokens.shape[1] + self.sampling.max_new_tokens

    @property
    def ring(self) -> bool:
        """Whether all slots write one column of the caches in each step; see `CacheIndex`."""
        return self.model.config.target.platform == "cpu"

    def _start(self) -> _State:
        """Returns the state in which all rows wait."""
        (B, R, _), N, config = self.uniforms.shape, self.queues * self.slots, self.model.config
        K, H, S = config.kv_heads, config.head_dim, self.columns
        dtype = named_parameters(self.model)["embed_tokens/embedding"].dtype
        shapes = (N, K, H, S), (N, K, S, H)
        empty = [
            LayerCache(*(constrain(jnp.zeros(shape, dtype), BATCH_AXES, "tensor") for shape in shapes))
            for _ in range(config.layers)
        ]
        return _State(
            step=jnp.int32(1),
            taken=jnp.zeros(self.queues, jnp.int32),
            row=jnp.full(N, B, jnp.int32),
            start=jnp.zeros(N, jnp.int32),
            length=jnp.zeros(N, jnp.int32),
            alive=jnp.zeros(N, bool),
            token=jnp.zeros(N, jnp.int32),
            node=None if self.choices is None else jnp.zeros(N, jnp.int32),
            new_tokens=jnp.zeros((R, N), jnp.int32),
            new_logprobs=jnp.zeros((R, N), jnp.float32),
            tokens=jnp.zeros((B, R), jnp.int32),
            logprobs=jnp.zeros((B, R), jnp.float32),
            cache=None if self.slots == self.rows else empty,
        )

    def _ready(self, state: _State) -> jax.Array:
        """Returns bool[Q]: the queues whose next rows enter now. A queue needs free slots for `entering` rows.

        Passes over prompts are shared too, so at least half of the queues with waiting rows must have free slots.
        """
        waiting = self.rows - state.taken
        free = self.slots - jnp.sum(state.alive.reshape(self.queues, self.slots), axis=1)
        ready = (waiting > 0) & (free >= jnp.minimum(self.entering, waiting))
        return ready & (2 * jnp.sum(ready) >= jnp.sum(waiting > 0))

    def _enter(self, state: _State) -> _State:
        """Puts the next rows of the ready queues into free slots, with the first token of each row."""
        Q, k, n = self.queues, self.entering, self.sampling.samples_per_prompt
        queue, groups = jnp.arange(Q)[:, None], max(k // n, 1)
        at_Qk = state.taken[:, None] + jnp.arange(k)  # place of each row in its queue
        enters_Qk = self._ready(state)[:, None] & (at_Qk < self.rows)
        free_Qk = jnp.argsort(state.alive.reshape(Q, self.slots), axis=1, stable=True)[:, :k]
        # Rows that do not enter get places after the last one, where nothing is written.
        slot_Qk = jnp.where(enters_Qk, free_Qk, self.slots)
        slots = jnp.where(enters_Qk, queue * self.slots + free_Qk, Q * self.slots).ravel()
        rows = (queue * self.rows + jnp.minimum(at_Qk, self.rows - 1)).ravel()
        tokens, logprobs = self._leave(state, slots)

        first = jnp.minimum(state.taken[:, None] // n + jnp.arange(groups), self.rows // n - 1)
        chosen = (queue * (self.rows // n) + first).ravel()
        prompts = jax.tree.map(lambda x: constrain(jnp.asarray(x)[chosen], BATCH_AXES), self.prompts)
        chunk = self.sampling.prefill_chunk
        prompt_cache, hidden = prefill(self.reader, prompts, self.columns, not self.ring, chunk)
        copies = k // groups
        lengths = jnp.repeat(jnp.sum(prompts.mask, axis=1, dtype=jnp.int32), copies)
        logits = jnp.repeat(self.model.logits(hidden)[:, 0], copies, axis=0)
        node = None if self.choices is None else jnp.zeros(len(rows), jnp.int32)
        token, logprob, node = self._sample(logits, rows, 0, node)

        def put(old: jax.Array, new: jax.Array | int) -> jax.Array:
            return old.at[slots].set(new, mode="drop")

        line = (state.step - 1) % self.sampling.max_new_tokens
        return state.replace(
            taken=state.taken + jnp.sum(enters_Qk, axis=1),
            row=put(state.row, rows),
            start=put(state.start, state.step - 1),
            length=put(state.length, lengths),
            alive=put(state.alive, self._continues(token, 0) & (lengths > 0)),
            token=put(state.token, token),
            node=jax.tree.map(put, state.node, node),
            new_tokens=state.new_tokens.at[line, slots].set(token, mode="drop"),
            new_logprobs=state.new_logprobs.at[line, slots].set(logprob, mode="drop"),
            tokens=tokens,
            logprobs=logprobs,
            cache=self._with_rows(state, prompt_cache, slot_Qk, copies),
        )

    def _step(self, state: _State) -> _State:
        """Runs the model on the newest token of each row, and samples the next token."""
        t = state.step - state.start  # i32[N]; number of the next token of each row
        filled = jnp.where(state.alive, state.length + t, 0)
        column = self.prompts.tokens.shape[1] + state.step - 1
        index = CacheIndex.ring(column, filled, self.columns) if self.ring else CacheIndex.contiguous(filled)
        hidden, cache = self.model.decode(state.token, state.cache, index)
        token, logprob, node = self._sample(self.model.logits(hidden)[:, 0], state.row, t, state.node)
        line = state.step % self.sampling.max_new_tokens

        def with_line(lines: jax.Array, new: jax.Array) -> jax.Array:
            return lines.at[line].set(jnp.where(state.alive, new, lines[line]))

        return state.replace(
            step=state.step + 1,
            alive=state.alive & self._continues(token, t),
            token=token,
            node=node,
            new_tokens=with_line(state.new_tokens, token),
            new_logprobs=with_line(state.new_logprobs, logprob),
            cache=cache,
        )

    def _leave(self, state: _State, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (tokens, logprobs) of the state with the completions of the rows in `slots`."""
        R = self.sampling.max_new_tokens
        rows = state.row.at[slots].get(mode="fill", fill_value=len(state.tokens))
        lines = (state.start[slots][:, None] + jnp.arange(R)) % R
        return tuple(
            left.at[rows].set(new[lines, slots[:, None]], mode="drop")
            for left, new in ((state.tokens, state.new_tokens), (state.logprobs, state.new_logprobs))
        )

    def _sample(
        self, logits: jax.Array, rows: jax.Array, t: jax.Array | int, node: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Samples token number `t` of the rows i32[b] from logits f32[b,V]. Returns (tokens, logprobs, next nodes).

        With choices, the logits f32[b,U] are those of their tokens, and the node i32[b] says which of them may follow.
        """
        if self.choices is not None:
            logits = self.choices.masked(logits, node)
        greedy, target = jnp.asarray(self.sampling.temperature) == 0, self.model.config.target
        uniforms = self.uniforms.at[rows, t].get(mode="clip")
        use_kernel = target.platform == "gpu" and target.decode_kernels and not automatic_axes()

        def sampled(logits: jax.Array, temperature: jax.Array, uniforms: jax.Array) -> jax.Array:
            return draw(truncate(logits / temperature, self.sampling), uniforms, use_kernel)

        if target.platform == "cpu":
            token = jax.lax.cond(
                greedy,
                lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
                lambda: sampled(logits, self.temperature, uniforms),
            )
        else:
            # The host would wait for the condition. At a tiny temperature only the largest logit has a probability. The
            # largest logit is subtracted first: a product with 1e30 would round it differently in two places.
            below = logits - jnp.max(logits, axis=-1, keepdims=True)
            token = sampled(below, jnp.where(greedy, 1e-30, self.temperature), jnp.where(greedy, 0.0, uniforms))
        # Scoring and the update use this function too. Sums in another order would give other logprobs.
        logprob = token_logprobs(logits[:, None], token[:, None], self.temperature)[0][:, 0]
        if self.choices is None:
            return token, logprob, None
        return self.choices.tokens[token], logprob, self.choices.after(node, token)

    def _continues(self, token: jax.Array, t: jax.Array | int) -> jax.Array:
        """Returns bool[b]: whether rows go on after `token`, their token number t."""
        stops = jnp.isin(token, jnp.array(self.stop_tokens, jnp.int32))
        return ~stops & (t + 1 < self.sampling.max_new_tokens)

    def _with_rows(self, state: _State, prompts: Cache, slot_Qk: jax.Array, copies: int) -> Cache:
        """Returns the caches of the state with `copies` rows of each prompt in their slots."""
        column = self.prompts.tokens.shape[1] + state.step - 1
        new = [LayerCache(*(jnp.repeat(x, copies, axis=0) for x in layer)) for layer in prompts]
        if self.ring:
            new = [layer.as_ring(self.columns, column) for layer in new]
        if state.cache is None:
            return [layer.widened(self.columns) for layer in new]
        return [old.with_rows(layer, slot_Qk) for old, layer in zip(state.cache, new)]
