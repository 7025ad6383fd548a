"""A batch in parts, with the gradient of the whole; and parts cut to the length of their longest answer.

B rows, R response tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.distributed.mesh import split_rows
from jaxrlhf.steps.metrics import Metrics, merged


def shortest_first(rows: Any) -> jax.Array:
    """Order i32[B] of rows (`records.Rollout` or `Experience`) by the length of their answers: parts of like length."""
    return jnp.argsort(jnp.sum(rows.response_mask, axis=1), stable=True)


def by_longest(run: Callable[[Any], Any], rows: Any, buckets: int) -> Any:
    """run(rows), with answers cut to the least of `buckets` lengths that holds the longest of them.

    `rows` is a `records.Rollout` or `Experience`, whose arrays of two dimensions end with the R response tokens. Each
    length is compiled; one of them runs. What `run` returns must have the same shapes for all.
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
    """(loss, metrics, gradient) of a whole batch, computed in `parts` equal parts one after another.

    `loss(params, part)` must return its part's share of the whole batch's loss (divided by the whole's
    totals), so that sums over parts are exact. Each metric says how its parts are put together.
    With `buckets` each part is cut, see `by_longest`.
    """

    def gradient(params: Any, part: Any):
        # The choice of a length stands outside of the gradient: inside, each would keep the activations of all.
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
