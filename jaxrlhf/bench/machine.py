"""The rates of this machine: of its matrix products and of its memory, measured with XLA.

Many calls are in flight at a time, and only the last is waited for: a device that waits for its host is slower. All
data is random: products of zeros take less power, and run faster on some cards.
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

_REPEATS, _SECONDS, _MAX_CALLS = 5, 0.1, 64  # measurements, each of about so many seconds and at most so many calls
# (rows of a square product, bytes of an array that exceeds all caches) by platform; other platforms are as a GPU
_SIZES = {"cpu": (2048, 2**27)}
_LARGE = (8192, 2**29)


def measure_rates(dtype: str, devices: int, target: Target) -> Rates:
    """The best rates of several products, in the run's precision, and of several passes over memory.

    One device is measured, and the others are taken to be the same; virtual devices of one processor share its rates.
    """
    size, length = _SIZES.get(target.platform, _LARGE)
    count = 1 if target.platform == "cpu" else devices
    with target.products():
        return Rates(_product_rate(size, jnp.dtype(dtype)) * count, _memory_rate(length) * count)


def describe(devices: int) -> dict[str, str | int]:
    """This machine as plain values."""
    device = jax.devices()[0]
    return {
        "backend": jax.default_backend(),
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "devices": devices,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "jax": jax.__version__,
    }


def _processor() -> str:
    """The processor's name, with family and model on Linux: virtual machines shorten the name."""
    with contextlib.suppress(OSError, KeyError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
        numbers = [f"{word} {info[key]}" for key, word in (("cpu family", "family"), ("model", "model")) if key in info]
        return f"{info['model name']} ({', '.join(numbers)})" if numbers else info["model name"]
    return platform.machine()


def forget_peak() -> None:
    """Resets this process' peak memory on Linux, so that it is the run's and not that of measuring rates."""
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
    """Seconds of a step: the best of several series of steps that do not wait for each other."""
    state, calls, best = step(state).block_until_ready(), 1, math.inf
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        for _ in range(calls):
            state = step(state)
        state.block_until_ready()
        best = min(best, (time.perf_counter() - start) / calls)
        calls = min(max(round(_SECONDS / best), 1), _MAX_CALLS)
    return best
