"""Gradient accumulation: a batch in parts, with the gradient of the whole."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.runtime.mesh import BATCH_AXES, laid_out


def split_rows(batch: Any, parts: int) -> Any:
    """A tree of [B, ...] as a tree of [parts, B / parts, ...]; raises ValueError where B does not divide."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % parts:
        raise ValueError(f"{rows} rows cannot be split into {parts} equal parts")
    return jax.tree.map(lambda x: laid_out(x.reshape(parts, rows // parts, *x.shape[1:]), None, BATCH_AXES), batch)


def accumulate(
    loss: Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]], params: Any, batch: Any, parts: int
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """(loss, metrics, gradient) of a whole batch, computed in `parts` equal parts one after another.

    `loss(params, part)` must return its part's share of the whole batch's loss (divided by the whole's
    totals), so that sums over parts are exact. Metrics are shares too, except names that end in `max`.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (value, metrics), grads = gradient(params, batch)
        return value, metrics, grads

    def combine(name: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.maximum(a, b) if name.endswith("max") else a + b

    def add(total, part):
        (value, metrics), grads = gradient(params, part)
        metrics = {name: combine(name, total[1][name], x) for name, x in metrics.items()}
        return (total[0] + value, metrics, jax.tree.map(jnp.add, total[2], grads)), None

    split = split_rows(batch, parts)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], split))
    (value, metrics), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, (value, metrics, grads), split)
    return total
