"""What this machine can do at most: the rate of its matrix products and of its memory, measured with XLA.

Many calls are in flight at a time and the last one is waited for: a device that waits for its host is not at its rate.
Random data everywhere: products of zeros take less power, and run faster on some cards.
"""

import contextlib
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxrlhf.models.target import Target
from jaxrlhf.plan.work import Rates

_REPEATS, _SECONDS, _MOST_CALLS = 5, 0.1, 64  # times that are measured, each of calls that take about so long
# (rows of a square product, bytes of one array that is beyond all caches) by platform; the rest as on a GPU
_SIZES = {"cpu": (2048, 2**27)}
_LARGE = (8192, 2**29)


def measure_rates(dtype: str, devices: int, target: Target) -> Rates:
    """The best of several products, of the precision that the run's have, and of several passes over memory.

    Measured on one device; others are taken to do the same, but for virtual devices of one processor.
    """
    size, length = _SIZES.get(target.platform, _LARGE)
    alike = 1 if target.platform == "cpu" else devices
    with target.products():
        products = _product_rate(size, jnp.dtype(dtype))
    return Rates(products * alike, _memory_rate(length) * alike)


def describe(devices: int) -> dict[str, str | int]:
    """Which machine this is, as plain values."""
    device = jax.devices()[0]
    return {
        "backend": jax.default_backend(),
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "devices": devices,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "jax": jax.__version__,
    }


def _processor() -> str:
    """The processor's name, and its family and model where the system tells them (Linux).

    The name alone does not say which processor it is: virtual machines shorten it.
    """
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
        if "model name" in told:
            exactly = [
                f"{word} {told[key]}" for key, word in (("cpu family", "family"), ("model", "model")) if key in told
            ]
            return f"{told['model name']} ({', '.join(exactly)})" if exactly else told["model name"]
    return platform.machine()


def forget_peak() -> None:
    """Has the kernel count this process' peak memory anew, where it can (Linux): what the rates took is not a run's."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _product_rate(size: int, dtype: jnp.dtype) -> float:
    """a <- a b, with b scaled so that a keeps its size."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.float32) for i in range(2))
    b = (b * size**-0.5).astype(dtype)
    return 2.0 * size**3 / _seconds(jax.jit(lambda a: a @ b), a.astype(dtype))


def _memory_rate(length: int) -> float:
    """y <- a x + y, in place: two arrays are read and one is written."""
    x, y = (jax.random.normal(jax.random.key(i), (length // 4,), jnp.float32) for i in range(2))
    axpy = jax.jit(lambda y, x: 1e-3 * x + y, donate_argnums=0)
    return 3.0 * length / _seconds(lambda y: axpy(y, x), y)


def _seconds(step: Callable[[jax.Array], jax.Array], state: jax.Array) -> float:
    """Seconds of a step, the best of several runs of steps that follow each other without waiting."""
    state, calls, best = step(state).block_until_ready(), 1, math.inf
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        for _ in range(calls):
            state = step(state)
        state.block_until_ready()
        best = min(best, (time.perf_counter() - start) / calls)
        calls = min(max(round(_SECONDS / best), 1), _MOST_CALLS)  # so many are long enough
    return best
