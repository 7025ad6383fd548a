"""Measures two rates of this machine with XLA: operations per second of matrix products, and memory bandwidth.

The host starts many calls before it waits for the last call, because a device that waits for its host is slower. All
data are random. Matrix products of zeros need less power and run faster on some cards.
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

_REPEATS = 5  # number of measurements
_SECONDS, _MAX_CALLS = 0.1, 64  # a measurement takes about this number of seconds, and at most this number of calls
# Platform -> (rows of square matrices, bytes of an array that is larger than all caches). Others have `_LARGE`.
_SIZES = {"cpu": (2048, 2**27)}
_LARGE = (8192, 2**29)


def measure_rates(dtype: str, devices: int, target: Target) -> Rates:
    """Returns the best measured rates of matrix products (in the run's precision) and of memory.

    One device is measured. The other devices are assumed to have the same rates. All virtual devices of a CPU together
    have the rates of this CPU.
    """
    size, length = _SIZES.get(target.platform, _LARGE)
    count = 1 if target.platform == "cpu" else devices
    with target.products():
        return Rates(_product_rate(size, jnp.dtype(dtype)) * count, _memory_rate(length) * count)


def describe(devices: int) -> dict[str, str | int]:
    """Returns a description of this machine as JSON values."""
    device = jax.devices()[0]
    return {
        "backend": jax.default_backend(),
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "devices": devices,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "jax": jax.__version__,
    }


def _processor() -> str:
    """Returns the name of the processor. On Linux, the name includes family and model.

    Virtual machines shorten the name, but not family and model.
    """
    with contextlib.suppress(OSError, KeyError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
        numbers = [f"{word} {info[key]}" for key, word in (("cpu family", "family"), ("model", "model")) if key in info]
        return f"{info['model name']} ({', '.join(numbers)})" if numbers else info["model name"]
    return platform.machine()


def forget_peak() -> None:
    """Resets the peak memory of this process on Linux, so that the memory of `measure_rates` does not count."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _product_rate(size: int, dtype: jnp.dtype) -> float:
    """Returns the operations per second of matrix products a <- a b.

    The matrix b is scaled so that the numbers in a keep their size.
    """
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.float32) for i in range(2))
    b = (b * size**-0.5).astype(dtype)
    return 2.0 * size**3 / _seconds(jax.jit(lambda a: a @ b), a.astype(dtype))


def _memory_rate(length: int) -> float:
    """Returns the memory bandwidth in bytes per second. The step y <- a x + y reads two arrays and writes one array."""
    x, y = (jax.random.normal(jax.random.key(i), (length // 4,), jnp.float32) for i in range(2))
    axpy = jax.jit(lambda y, x: 1e-3 * x + y, donate_argnums=0)
    return 3.0 * length / _seconds(lambda y: axpy(y, x), y)


def _seconds(step: Callable[[jax.Array], jax.Array], state: jax.Array) -> float:
    """Returns the seconds per step of the fastest of several series. In a series, the host waits only at the end."""
    state, calls, best = step(state).block_until_ready(), 1, math.inf
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        for _ in range(calls):
            state = step(state)
        state.block_until_ready()
        best = min(best, (time.perf_counter() - start) / calls)
        calls = min(max(round(_SECONDS / best), 1), _MAX_CALLS)
    return best
