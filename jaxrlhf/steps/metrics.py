"""Metrics that carry how they are reduced: over the parts of a batch, and over the steps of an update."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct


class Reduction(NamedTuple):
    """How the values of one metric become one."""

    parts: Callable[[jax.Array, jax.Array], jax.Array]  # of two parts of a batch
    steps: Callable[[jax.Array, jax.Array], jax.Array]  # values f32[steps] and which were computed, f32[steps] of 0, 1


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
    """A part's share of the whole batch's number: shares add up. Over steps: the mean."""
    return Metric(value, "share")


def count(value: jax.Array) -> Metric:
    """A count: adds up over parts and over steps."""
    return Metric(value, "count")


def largest(value: jax.Array) -> Metric:
    """A maximum, over parts and over steps."""
    return Metric(value, "largest")


def of_first_step(value: jax.Array) -> Metric:
    """A maximum over parts; of an update's steps the first counts."""
    return Metric(value, "first")


def merged(one: Metrics, other: Metrics) -> Metrics:
    """The metrics of two parts of a batch together."""
    return {
        name: Metric(REDUCTIONS[a.reduction].parts(a.value, other[name].value), a.reduction) for name, a in one.items()
    }


def over_steps(metrics: Metrics, seen: jax.Array) -> dict[str, jax.Array]:
    """Numbers f32[] of one update from those of its steps, f32[steps]; `seen` f32[steps]: 1 where one was computed."""
    return {name: REDUCTIONS[metric.reduction].steps(metric.value, seen) for name, metric in metrics.items()}


def plain(metrics: Mapping[str, Metric]) -> dict[str, jax.Array]:
    """The numbers alone."""
    return {name: metric.value for name, metric in metrics.items()}
