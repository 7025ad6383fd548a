"""Metrics, each with its reduction over microbatches and over the steps of an update."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct


class Reduction(NamedTuple):
    """How a metric is reduced."""

    parts: Callable[[jax.Array, jax.Array], jax.Array]  # combines two microbatches
    steps: Callable[[jax.Array, jax.Array], jax.Array]  # (values f32[steps], `seen` f32[steps]) -> f32[]


REDUCTIONS = {
    "share": Reduction(jnp.add, lambda values, seen: jnp.sum(values * seen) / jnp.sum(seen)),
    "count": Reduction(jnp.add, lambda values, seen: jnp.sum(values)),
    "largest": Reduction(jnp.maximum, lambda values, seen: jnp.max(values)),
    "first": Reduction(jnp.maximum, lambda values, seen: values[0]),
}


@struct.dataclass
class Metric:
    """A number and its reduction."""

    value: jax.Array  # f32[]
    reduction: str = struct.field(pytree_node=False)  # a key of REDUCTIONS


Metrics = dict[str, Metric]


def share(value: jax.Array) -> Metric:
    """A metric that is summed over microbatches and averaged over steps. `value` is one microbatch's share."""
    return Metric(value, "share")


def count(value: jax.Array) -> Metric:
    """A metric that is summed over microbatches and steps."""
    return Metric(value, "count")


def largest(value: jax.Array) -> Metric:
    """A metric whose maximum is taken over microbatches and steps."""
    return Metric(value, "largest")


def of_first_step(value: jax.Array) -> Metric:
    """A metric of the first step only, whose maximum is taken over microbatches."""
    return Metric(value, "first")


def merged(one: Metrics, other: Metrics) -> Metrics:
    """Combines the metrics of two microbatches."""
    return {
        name: Metric(REDUCTIONS[a.reduction].parts(a.value, other[name].value), a.reduction) for name, a in one.items()
    }


def over_steps(metrics: Metrics, seen: jax.Array) -> dict[str, jax.Array]:
    """Reduces f32[steps] to f32[] per metric; `seen` f32[steps] is 1 for steps that were computed, else 0."""
    return {name: REDUCTIONS[metric.reduction].steps(metric.value, seen) for name, metric in metrics.items()}


def plain(metrics: Mapping[str, Metric]) -> dict[str, jax.Array]:
    """The values without their reductions."""
    return {name: metric.value for name, metric in metrics.items()}
