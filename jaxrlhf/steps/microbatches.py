"""Accumulates gradients over microbatches, and cuts microbatches to their longest completion.

Sizes: B rows and R response tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.distributed.mesh import BATCH_AXES, constrain, split_rows
from jaxrlhf.steps.metrics import Metrics, merged


def shortest_first(rows: Any) -> jax.Array:
    """Returns the row numbers i32[B] of a `Rollout` or `Experience`, sorted by the length of the completion."""
    return jnp.argsort(jnp.sum(rows.response_mask, axis=1), stable=True)


def take_rows(tree: Any, order: jax.Array) -> Any:
    """Returns the rows with the numbers `order` i32[N] from each leaf [B, ...]. The result is sharded as a batch."""
    return jax.tree.map(lambda x: constrain(x[order], BATCH_AXES), tree)


def by_longest(run: Callable[[Any], Any], rows: Any, buckets: int) -> Any:
    """Returns run(rows), with the rows cut to a shorter length. There are `buckets` lengths to choose from.

    The chosen length is the shortest one that holds every completion. `rows` is a `Rollout` or an `Experience`. The
    two-dimensional arrays of `rows` end with the R response tokens. `run` is compiled for every length, and executed
    for one. So `run` must return the same shapes for every length.
    """
    if buckets == 1:
        return run(rows)
    R = rows.response_mask.shape[1]
    sizes = sorted({-(-R * i // buckets) for i in range(1, buckets + 1)})

    def cut_to(size: int) -> Callable[[Any], Any]:
        return lambda rows: run(jax.tree.map(lambda x: x if x.ndim < 2 else x[:, : x.shape[1] - (R - size)], rows))

    longest = jnp.max(jnp.where(rows.response_mask, jnp.arange(1, R + 1), 0))
    bucket = jnp.sum(longest > jnp.array(sizes[:-1]))
    return jax.lax.switch(bucket, [cut_to(size) for size in sizes], rows)


def accumulate(
    loss: Callable[[Any, Any], tuple[jax.Array, Metrics]],
    params: Any,
    batch: Any,
    parts: int,
    buckets: int = 1,
) -> tuple[jax.Array, Metrics, Any]:
    """Returns (loss, metrics, gradient) of a batch, summed over `parts` equal microbatches.

    `loss(params, part)` must return the part that a microbatch adds to the loss of the batch: a sum over the
    microbatch, divided by a total of the batch. So the sum over microbatches is exact. `by_longest` cuts each
    microbatch to one of `buckets` lengths.
    """

    def gradient(params: Any, part: Any):
        # The switch over lengths must be outside the gradient. Inside the gradient, it would keep the activations of
        # all lengths.
        return by_longest(lambda rows: jax.value_and_grad(loss, has_aux=True)(params, rows), part, buckets)

    if parts == 1:
        (value, metrics), grads = gradient(params, batch)
        return value, metrics, grads

    def add(total, part):
        (value, metrics), grads = gradient(params, part)
        return (total[0] + value, merged(total[1], metrics), jax.tree.map(jnp.add, total[2], grads)), None

    split = split_rows(batch, parts)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], split))
    (value, metrics), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, (value, metrics, grads), split)
    return total
