"""Compiled programs: how often each was compiled, with which of XLA's options, and the memory that they took."""

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
_running: list["Program"] = []  # programs being called, innermost last; dispatch is on the main thread

ALL = "all"  # what stands under this name is for every program
Options = Mapping[str, Mapping[str, Any]]  # program -> option -> value

_given: Options = {}


class Program:
    """`jax.jit` of a function, under a name, that knows how often it was compiled; on `mesh`, see `mesh.constrain`.

    `compiles` stays at 1 as long as every call has the shapes, dtypes, static values and placement of the first.
    A change of placement alone (another sharding, or an array that was not yet committed to its device) compiles
    again without tracing again, so both are counted and the larger number is told. XLA gets `compiler_options`, and
    before them what stands under its name where it is made: `compiled_with`.
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


@contextlib.contextmanager
def compiled_with(options: Options) -> Iterator[None]:
    """Programs that are made inside the block are compiled with their options; `UserError` as from `check_options`.

    Of the whole process, as what compiles at the same time belongs to one run.
    """
    global _given
    check_options(options)
    before, _given = _given, options
    try:
        yield
    finally:
        _given = before


def options_of(program: str, own: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """What the program of this name is compiled with: its `own` options, unless the given ones say otherwise.

    None: nothing is said.
    """
    return {**(own or {}), **_given.get(ALL, {}), **_given.get(program, {})} or None


def check_options(options: Options) -> None:
    """`UserError` where this XLA knows an option not at all, or not with that value: it is asked, with a sum."""
    for program, named in options.items():
        for option, value in named.items():
            try:
                jax.jit(_probe, compiler_options={option: value})(np.float32(0))
            except Exception as error:  # jax or XLA, and in the words of either
                raise UserError(f"compiler_options.{program}.{option}: {_reason(error)}") from None


def _probe(x: jax.Array) -> jax.Array:
    return x + 1


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "No such compile option" in text:
        return f"the XLA of jax {jax.__version__} knows no such option; leave it out, or look up how it is called there"
    text = re.sub(r"^[A-Z_]+: (While setting option \w+, )?", "", text)
    return f"XLA does not take it: {text[:200]}"


def peak_memory_bytes() -> int:
    """Peak memory so far: of the fullest local device, or of this process where devices keep no count (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if sys.platform == "darwin" else rss * 1024  # Linux counts in KiB
