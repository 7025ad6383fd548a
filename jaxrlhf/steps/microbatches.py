"""Accumulates gradients over microbatches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.distributed.mesh import BATCH_AXES, constrain, split_rows
from jaxrlhf.steps.metrics import Metrics, merged


def take_rows(tree: Any, order: jax.Array) -> Any:
    """Returns the rows with the indices `order` i32[N] of each leaf [B, ...]. The result is sharded as a batch."""
    return jax.tree.map(lambda x: constrain(x[order], BATCH_AXES), tree)


def accumulate(
    loss: Callable[[Any, Any], tuple[jax.Array, Metrics]], params: Any, batch: Any, parts: int
) -> tuple[jax.Array, Metrics, Any]:
    """Returns (loss, metrics, gradient) of a batch, summed over `parts` equal microbatches.

    `loss(params, part)` must return the part that a microbatch adds to the loss of the batch: a sum over the
    microbatch, divided by a total of the batch. So the sum over microbatches is exact.
    """
    if parts == 1:
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return value, metrics, grads
    split = split_rows(batch, parts)
    zeros, add = _sums(loss, params, jax.tree.map(lambda x: x[0], split))
    return jax.lax.scan(lambda total, part: (add(total, part), None), zeros, split)[0]


def accumulate_parts(
    loss: Callable[[Any, Any], tuple[jax.Array, Metrics]],
    params: Any,
    part: Callable[[jax.Array], Any],
    parts: jax.Array,
) -> tuple[jax.Array, Metrics, Any]:
    """Returns what `accumulate` returns, for the microbatches part(0), ..., part(parts - 1). `parts` is i32[]."""
    zeros, add = _sums(loss, params, jax.eval_shape(part, parts))
    return jax.lax.fori_loop(0, parts, lambda i, total: add(total, part(i)), zeros)


def _sums(loss: Callable, params: Any, part: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """Returns (zeros, add). add(total, part) adds (loss, metrics, gradient) of a microbatch to the total."""
    gradient = jax.value_and_grad(loss, has_aux=True)

    def add(total: tuple[jax.Array, Metrics, Any], part: Any):
        (value, metrics), grads = gradient(params, part)
        return total[0] + value, merged(total[1], metrics), jax.tree.map(jnp.add, total[2], grads)

    (value, metrics), grads = jax.eval_shape(gradient, params, part)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (value, metrics, grads)), add
