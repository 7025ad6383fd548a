"""Computes scores of sequences, and logprobs and values of completions. The decoder has an adapter attached.

A batch has B rows of S tokens. A row is a left-padded prompt, followed by a completion in the last R positions.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.losses import token_logprobs
from jaxrlhf.distributed.mesh import BATCH_AXES, POSITION_AXIS, constrain, position_parts, take_positions
from jaxrlhf.models.attention import needs_mask
from jaxrlhf.models.choices import Choices
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.packing import PackedRows, Places, moved

# Largest number of logits in memory at a time on each device. On a CPU, 16 MiB of logits fit in the cache. On other
# platforms, 512 MiB of logits make the matrix products large.
_MAX_LOGITS, _MAX_LOGITS_ON_CPU = 2**27, 2**22
# If not all positions are needed: number of parts, and smallest number of positions in a part.
_PARTS, _LEAST_POSITIONS = 8, 64


def sequence_scores(model: Decoder, tokens: jax.Array, mask: jax.Array, remat: str = "none") -> jax.Array:
    """Returns the output of the scalar head at the last real token of each row, f32[B].

    Rows may be padded on the left or on the right.
    """
    S = tokens.shape[1]
    last = jnp.maximum(S - 1 - jnp.argmax(mask[:, ::-1], axis=1), 0)
    if needs_mask(model.config.target, model.config.attention_softcap):
        hidden = model.encode(tokens, mask.astype(jnp.int32), remat)
    else:
        start = jnp.argmax(mask, axis=1)
        hidden, last = model.encode(_rolled(tokens, start), None, remat), jnp.maximum(last - start, 0)
    return model.scores(jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0]


def token_scores(model: Decoder, tokens: jax.Array, mask: jax.Array, count: int, remat: str = "none") -> jax.Array:
    """Returns the output of the scalar head at each of the last `count` positions, f32[B,count].

    The output at a position depends on the token there and on those before it. Rows may be padded on the left or on
    the right.
    """
    if needs_mask(model.config.target, model.config.attention_softcap):
        hidden = model.encode(tokens, mask.astype(jnp.int32), remat)
    else:
        start = jnp.argmax(mask, axis=1)
        hidden = _rolled(model.encode(_rolled(tokens, start), None, remat), -start)
    return model.scores(take_positions(hidden, tokens.shape[1] - count, None))


def response_logprobs(
    model: Decoder,
    tokens: jax.Array,
    mask: jax.Array,
    response_mask: jax.Array,
    temperature: jax.Array,
    remat: str = "none",
    packed: PackedRows | None = None,
    choices: Choices | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (logprobs, entropies) of the response tokens, f32[B,R] each; 0 past the end of a completion.

    The logits are divided by `temperature` f32[B]. Logits are computed only for the positions of the completion. If
    `packed` is given, its sequences are computed in place of `tokens`, and the result is 0 outside `packed.mask`. If
    `choices` is given, the distributions are those of the tokens that the choices allow at each position.
    """
    hidden = hidden_before_tokens(model, tokens, mask, response_mask, remat, packed)
    return logprobs_of_hidden(model, hidden, tokens, response_mask, temperature, packed, choices)


def response_values(
    model: Decoder,
    tokens: jax.Array,
    mask: jax.Array,
    response_mask: jax.Array,
    remat: str = "none",
    packed: PackedRows | None = None,
) -> jax.Array:
    """Returns the value of the state before each response token, f32[B,R]; 0 past the end of a completion."""
    hidden = hidden_before_tokens(model, tokens, mask, response_mask, remat, packed)
    return values_of_hidden(model, hidden, response_mask, packed)


def response_logprobs_and_values(
    model: Decoder,
    tokens: jax.Array,
    mask: jax.Array,
    response_mask: jax.Array,
    temperature: jax.Array,
    remat: str = "none",
    packed: PackedRows | None = None,
    choices: Choices | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (logprobs, entropies, values), f32[B,R] each, from one forward pass of a model with both heads."""
    hidden = hidden_before_tokens(model, tokens, mask, response_mask, remat, packed)
    logprobs, entropies = logprobs_of_hidden(model, hidden, tokens, response_mask, temperature, packed, choices)
    return logprobs, entropies, values_of_hidden(model, hidden, response_mask, packed)


def hidden_before_tokens(model: Decoder, tokens, mask, response_mask, remat: str, packed=None) -> jax.Array:
    """Returns the hidden state at the position before each response token, [B,R,D].

    If `packed` is given, returns its needed states instead, [G,C S,D] (see `PackedRows`).
    """
    if packed is not None:
        return packed.states(model.encode(packed.tokens, packed.segments, remat, slots=tokens.shape[1]))
    R = response_mask.shape[1]
    first = tokens.shape[1] - R - 1
    if position_parts() > 1:  # the last layer skips no queries, because their positions would lie unevenly
        return take_positions(model.encode(tokens, mask.astype(jnp.int32), remat), first, -1)
    if needs_mask(model.config.target, model.config.attention_softcap):
        return model.encode(tokens, mask.astype(jnp.int32), remat, first)[:, :-1]
    start = jnp.argmax(mask, axis=1)
    hidden = model.encode(_rolled(tokens, start), None, remat)
    return _rolled(hidden, -start)[:, first:-1]


def _rolled(x: jax.Array, by: jax.Array) -> jax.Array:
    """Returns x [B,S,...] with each row's column by[b] in column 0. Columns wrap around."""
    columns = jnp.arange(x.shape[1])
    there, back = ((columns + shift[:, None]) % x.shape[1] for shift in (by, -by))
    return moved(x, *(Places(index, jnp.ones(index.shape, bool)) for index in (there, back)))


def from_logits(
    model: Decoder,
    hidden: jax.Array,
    inputs: Any,
    reduce: Callable[[jax.Array, Any], Any],
    max_logits: int | None = None,
    count: jax.Array | None = None,
) -> Any:
    """Applies `reduce` to the logits of hidden states [B,R,D], a few positions at a time.

    reduce(logits f32[B,r,V], inputs [B,r,...]) returns [B,r,...] for r positions. `inputs` and the result are trees of
    arrays [B,R,...]. At most `max_logits` logits are in memory at a time, summed over all devices. An array of all
    logits [B,R,V] would be the largest array of the program. The backward pass computes the logits again.
    """
    B, R, _ = hidden.shape
    if max_logits is None:
        max_logits = _MAX_LOGITS_ON_CPU if model.config.target.platform == "cpu" else _MAX_LOGITS
        max_logits *= max(1, jax.sharding.get_abstract_mesh().size)
    shares = position_parts() if R % position_parts() == 0 else 1
    tokens = model.config.vocab_size if model.lm_head is None else model.lm_head.shape[1]
    size = max(1, max_logits // (B * tokens) // shares)
    R //= shares  # each part has `size` positions of each share
    if count is not None:
        size = min(size, max(_LEAST_POSITIONS, -(-R // _PARTS)))
    if size >= R:
        return reduce(model.logits(hidden), inputs)
    parts = -(-R // size)
    size = -(-R // parts)  # the parts have nearly equal sizes
    kernel = constrain(model.head_kernel(), None, "tensor")  # the kernel is gathered once, not in each part

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(B, shares, R, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, parts * size - R)) + ((0, 0),) * (x.ndim - 3))
        x = jnp.moveaxis(x.reshape(B, shares, parts, size, *x.shape[3:]), 2, 0)
        return constrain(x.reshape(parts, B, shares * size, *x.shape[4:]), None, BATCH_AXES, POSITION_AXIS)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(parts, B, shares, size, *x.shape[3:]), 0, 2)
        x = x.reshape(B, shares, parts * size, *x.shape[4:])[:, :, :R]
        return x.reshape(B, shares * R, *x.shape[3:])

    xs = jax.tree.map(split, (hidden, inputs))

    def run_part(x: tuple[jax.Array, Any]) -> Any:
        return reduce(model.logits(x[0], kernel), x[1])

    if count is None:
        return jax.tree.map(join, jax.lax.map(jax.checkpoint(run_part), xs))
    needed = (jnp.minimum(count, R) + size - 1) // size
    return jax.tree.map(join, _first_parts(run_part, xs, needed))


def _first_parts(run_part: Callable[[Any], Any], xs: tuple[jax.Array, Any], needed: jax.Array) -> Any:
    """Returns run_part((hidden[i], inputs[i])) for each of the first `needed` i32[] parts, and 0 for the others.

    `xs` is (hidden, inputs). The inputs get no gradient. The backward pass computes each part again. A loop of static
    length with a condition inside would keep a copy of the head's kernel for each of its parts.
    """

    def at(tree: Any, i: jax.Array) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)

    def put(tree: Any, part: Any, i: jax.Array) -> Any:
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), tree, part)

    hidden, inputs = xs
    first = jax.tree.map(lambda x: x[0], xs)
    shapes = jax.eval_shape(run_part, first)
    run, read = jax.closure_convert(lambda hidden, inputs: run_part((hidden, inputs)), *first)

    @jax.custom_vjp
    def all_parts(hidden: jax.Array, read: list[jax.Array], inputs: Any, needed: jax.Array) -> Any:
        zeros = jax.tree.map(lambda s: jnp.zeros((len(hidden), *s.shape), s.dtype), shapes)
        return jax.lax.fori_loop(0, needed, lambda i, found: put(found, run(*at((hidden, inputs), i), *read), i), zeros)

    def backward(saved: tuple, d: Any) -> tuple:
        hidden, read, inputs, needed = saved

        def add(i: jax.Array, total: tuple) -> tuple:
            found = jax.vjp(lambda hidden, read: run(hidden, at(inputs, i), *read), at(hidden, i), read)[1](at(d, i))
            return put(total[0], found[0], i), jax.tree.map(jnp.add, total[1], found[1])

        return *jax.lax.fori_loop(0, needed, add, jax.tree.map(jnp.zeros_like, (hidden, read))), None, None

    all_parts.defvjp(lambda *args: (all_parts(*args), args), backward)
    return all_parts(hidden, read, inputs, needed)


def logprobs_of_hidden(
    model: Decoder, hidden, tokens, response_mask, temperature, packed=None, choices=None
) -> tuple[jax.Array, jax.Array]:
    if choices is not None:
        return _logprobs_of_choices(model, hidden, tokens, response_mask, temperature, packed, choices)
    if packed is not None:
        inputs = packed.targets, packed.temperature
        found = from_logits(model, hidden, inputs, lambda logits, x: token_logprobs(logits, *x), count=packed.count)
        return tuple(packed.rows(x) for x in found)
    R = response_mask.shape[1]
    logprobs, entropy = from_logits(
        model, hidden, tokens[:, -R:], lambda logits, tokens: token_logprobs(logits, tokens, temperature)
    )
    return jnp.where(response_mask, logprobs, 0.0), jnp.where(response_mask, entropy, 0.0)


def _logprobs_of_choices(
    model: Decoder, hidden, tokens, response_mask, temperature, packed, choices: Choices
) -> tuple[jax.Array, jax.Array]:
    """Returns the results of `logprobs_of_hidden` under the model that is masked to the choices.

    A token that may not follow has logprob -inf. A token without an alternative has a gradient of exactly 0.
    """
    response = tokens[:, -response_mask.shape[1] :]
    index = choices.index_of(response)
    nodes = choices.nodes(index)
    inputs = index, nodes, jnp.broadcast_to(temperature[:, None], index.shape)
    if packed is not None:
        number = packed.response_of_state.index
        index_and_nodes = (jnp.take_along_axis(x.reshape(len(number), -1), number, axis=1) for x in inputs[:2])
        inputs = *index_and_nodes, packed.temperature

    def reduce(logits: jax.Array, x: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        index, nodes, temperature = x
        return token_logprobs(choices.masked(logits, nodes), index, temperature)

    count = None if packed is None else packed.count
    found = from_logits(choices.head_of(model), hidden, inputs, reduce, count=count)
    logprobs, entropies = found if packed is None else map(packed.rows, found)
    logprobs = jnp.where(choices.tokens[index] == response, logprobs, -jnp.inf)
    forced = choices.forced(nodes)
    logprobs, entropies = (jnp.where(forced, jax.lax.stop_gradient(x), x) for x in (logprobs, entropies))
    return jnp.where(response_mask, logprobs, 0.0), jnp.where(response_mask, entropies, 0.0)


def values_of_hidden(model: Decoder, hidden, response_mask, packed=None) -> jax.Array:
    values = model.scores(hidden)
    return jnp.where(response_mask, values, 0.0) if packed is None else packed.rows(values)
