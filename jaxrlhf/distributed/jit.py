"""Compiled programs: counts how often each is compiled, sets XLA options, and reads the peak memory of the process."""

import contextlib
import functools
import re
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxrlhf.errors import UserError

_BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"
_running: list["Program"] = []  # programs that are being called, innermost last; only the main thread calls programs

ALL = "all"  # in `Options`, stands for every program
Options = Mapping[str, Mapping[str, Any]]  # program -> option -> value

_active_options: Options = {}


class Program:
    """A function under `jax.jit` with a name, which counts its compilations; `constrain` uses `mesh` during tracing.

    `compiles` stays at 1 as long as every call has the same shapes, dtypes, static values and shardings as the first. A
    new sharding, or an array that is not yet committed to its device, makes jax compile again without tracing again. So
    traces and compilations are both counted, and `compiles` is the larger number. XLA gets `compiler_options`; options
    of `compiled_with` override them.
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
        self.static = tuple(jit_options.get("static_argnames", ()))  # names of arguments that are compiled in
        self.traces = 0
        self._backend_compiles = 0
        self._jitted = jax.jit(traced, compiler_options=options_of(name, compiler_options), **jit_options)

    @property
    def compiles(self) -> int:
        """How often the program has been compiled."""
        return max(self.traces, self._backend_compiles)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _running.append(self)
        try:
            return self._jitted(*args, **kwargs)
        finally:
            _running.pop()

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Traces the program for these arguments (arrays or shapes), without compiling it."""
        return self._jitted.lower(*args, **kwargs)


def _count_compile(event: str, seconds: float, **details: Any) -> None:
    # While it traces, jax also compiles small programs (for constants); their names differ from the program's.
    if event == _BACKEND_COMPILE and _running and details.get("fun_name") == f"jit({_running[-1].name})":
        _running[-1]._backend_compiles += 1


jax.monitoring.register_event_duration_secs_listener(_count_compile)


@contextlib.contextmanager
def compiled_with(options: Options) -> Iterator[None]:
    """Compiles every `Program` that is created in the block with these options, on all threads of the process.

    Raises `UserError` as `check_options` does.
    """
    global _active_options
    check_options(options)
    before, _active_options = _active_options, options
    try:
        yield
    finally:
        _active_options = before


def options_of(program: str, own: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Returns the XLA options of a program: its `own`, overridden by those of `compiled_with`; None if it has none."""
    return {**(own or {}), **_active_options.get(ALL, {}), **_active_options.get(program, {})} or None


def check_options(options: Options) -> None:
    """Compiles a small program with each option; raises `UserError` if this XLA refuses an option or its value."""
    for program, values in options.items():
        for option, value in values.items():
            try:
                jax.jit(jax.lax.neg, compiler_options={option: value})(np.float32(0))
            except Exception as error:  # of jax or of XLA
                text = " ".join(str(error).split())
                if "No such compile option" in text:
                    reason = f"the XLA of jax {jax.__version__} has no such option; remove it, or look up its new name"
                else:
                    detail = re.sub(r"^[A-Z_]+: (While setting option \w+, )?", "", text)
                    reason = f"XLA refuses the value: {detail[:200]}"
                raise UserError(f"compiler_options.{program}.{option}: {reason}") from None


def peak_memory_bytes() -> int:
    """Returns the peak memory so far of the fullest local device; on CPU, the peak memory of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if sys.platform == "darwin" else rss * 1024  # Linux counts in KiB
