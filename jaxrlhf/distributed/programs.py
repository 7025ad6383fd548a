"""Compiled programs that count how often they were compiled, and the memory that they took."""

import contextlib
import functools
import resource
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxrlhf.distributed.compiler_options import options_of

_BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"
_running: list["Program"] = []  # programs being called, innermost last; dispatch is on the main thread


class Program:
    """`jax.jit` of a function, under a name, that knows how often it was compiled; on `mesh`, see `mesh.laid_out`.

    `compiles` stays at 1 as long as every call has the shapes, dtypes, static values and placement of the first.
    A change of placement alone (another sharding, or an array that was not yet committed to its device) compiles
    again without tracing again, so both are counted and the larger number is told. XLA gets `compiler_options`, and
    before them what stands under its name where it is made: `compiler_options.compiled_with`.
    """

    def __init__(
        self,
        function: Callable,
        name: str,
        mesh: jax.sharding.Mesh | None = None,
        compiler_options: Mapping[str, Any] | None = None,
        **jit_options: Any,
    ):
        @functools.wraps(function)  # keeps the signature, which static_argnames needs
        def traced(*args, **kwargs):
            self.traces += 1
            with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*args, **kwargs)

        traced.__name__ = traced.__qualname__ = name
        self.name = name
        self.static = tuple(jit_options.get("static_argnames", ()))  # arguments that are part of what is compiled
        self.traces = 0
        self._backend_compiles = 0
        self._jitted = jax.jit(traced, compiler_options=options_of(name, compiler_options), **jit_options)

    @property
    def compiles(self) -> int:
        """How often the program was compiled so far."""
        return max(self.traces, self._backend_compiles)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _running.append(self)
        try:
            return self._jitted(*args, **kwargs)
        finally:
            _running.pop()

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """The program for these arguments (arrays or shapes), traced but not compiled."""
        return self._jitted.lower(*args, **kwargs)


def _count_compile(event: str, seconds: float, **details: Any) -> None:
    # Tracing runs small programs of its own (constants): only the one that carries the name is counted.
    if event == _BACKEND_COMPILE and _running and details.get("fun_name") == f"jit({_running[-1].name})":
        _running[-1]._backend_compiles += 1


jax.monitoring.register_event_duration_secs_listener(_count_compile)


def peak_memory_bytes() -> int:
    """Peak memory so far: of the fullest local device, or of this process where devices keep no count (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if sys.platform == "darwin" else rss * 1024  # Linux counts in KiB
