"""Metrics and their reductions. A metric is reduced over the microbatches of a step, then over the steps of an update.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct


class Reduction(NamedTuple):
    """The two functions that reduce a metric."""

    parts: Callable[[jax.Array, jax.Array], jax.Array]  # combines the values of two microbatches
    steps: Callable[[jax.Array, jax.Array], jax.Array]  # (values f32[steps], `seen` f32[steps]) -> f32[]


REDUCTIONS = {
    "share": Reduction(jnp.add, lambda values, seen: jnp.sum(values * seen) / jnp.sum(seen)),
    "count": Reduction(jnp.add, lambda values, seen: jnp.sum(values)),
    "largest": Reduction(jnp.maximum, lambda values, seen: jnp.max(values)),
    "first": Reduction(jnp.maximum, lambda values, seen: values[0]),
}


@struct.dataclass
class Metric:
    """The value of a metric, and the name of its reduction."""

    value: jax.Array  # f32[]
    reduction: str = struct.field(pytree_node=False)  # a key of REDUCTIONS


Metrics = dict[str, Metric]


def share(value: jax.Array) -> Metric:
    """Returns a metric that is summed over microbatches and averaged over steps. `value` belongs to one microbatch."""
    return Metric(value, "share")


def count(value: jax.Array) -> Metric:
    """Returns a metric that is summed over microbatches and over steps."""
    return Metric(value, "count")


def largest(value: jax.Array) -> Metric:
    """Returns a metric that is reduced to its maximum over microbatches and steps."""
    return Metric(value, "largest")


def of_first_step(value: jax.Array) -> Metric:
    """Returns a metric that is reduced to its maximum over the microbatches of the first step."""
    return Metric(value, "first")


def merged(one: Metrics, other: Metrics) -> Metrics:
    """Returns the metrics of two microbatches together."""
    return {
        name: Metric(REDUCTIONS[a.reduction].parts(a.value, other[name].value), a.reduction) for name, a in one.items()
    }


def over_steps(metrics: Metrics, seen: jax.Array) -> dict[str, jax.Array]:
    """Reduces each metric from f32[steps] to f32[]. `seen` f32[steps] is 1 for computed steps, 0 for skipped steps."""
    return {name: REDUCTIONS[metric.reduction].steps(metric.value, seen) for name, metric in metrics.items()}


def plain(metrics: Mapping[str, Metric]) -> dict[str, jax.Array]:
    """Returns the values of the metrics without the reductions."""
    return {name: metric.value for name, metric in metrics.items()}
