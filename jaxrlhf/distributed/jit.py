"""Compiled programs. This file counts the compilations of each program, sets XLA options, and reads the peak memory."""

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
_running: list["Program"] = []  # programs that are running, the innermost last; only the main thread runs programs

ALL = "all"  # a key of `Options` that means every program
Options = Mapping[str, Mapping[str, Any]]  # program -> option -> value

_active_options: Options = {}
_watch: Callable[[str | None], None] | None = None  # see `watch_compiles`


class Program:
    """A function under `jax.jit`. The program has a name and counts how often it is compiled.

    `compiles` is 1 as long as every call has the same shapes, dtypes, static values and shardings as the first call. If
    a sharding is new, or if an array is not yet committed to its device, jax compiles again without a new trace. So
    traces and compilations are both counted, and `compiles` is the larger number. XLA gets the options
    `compiler_options`. Options of `compiled_with` replace them. The function may call `mesh.constrain`, which uses the
    mesh of the program.
    """

    def __init__(
        self,
        function: Callable,
        name: str,
        mesh: jax.sharding.Mesh | None = None,
        compiler_options: Mapping[str, Any] | None = None,
        **jit_options: Any,
    ):
        @functools.wraps(function)  # keeps the signature, because static_argnames needs it
        def traced(*args, **kwargs):
            self.traces += 1
            if _watch is not None and _running and _running[-1] is self:
                _watch(name)
            with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*args, **kwargs)

        traced.__name__ = traced.__qualname__ = name
        self.name = name
        self.static = tuple(jit_options.get("static_argnames", ()))  # arguments that are constants of the program
        self.traces = 0
        self._backend_compiles = 0
        self._jitted = jax.jit(traced, compiler_options=options_of(name, compiler_options), **jit_options)

    @property
    def compiles(self) -> int:
        """The number of times that the program has been compiled."""
        return max(self.traces, self._backend_compiles)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        traces = self.traces
        _running.append(self)
        try:
            return self._jitted(*args, **kwargs)
        finally:
            _running.pop()
            if _watch is not None and self.traces != traces:
                _watch(None)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Traces the program for these arguments and does not compile it. The arguments are arrays or shapes."""
        return self._jitted.lower(*args, **kwargs)


def _count_compile(event: str, seconds: float, **details: Any) -> None:
    # During tracing, jax also compiles small programs for constants. These have other names than the program.
    if event == _BACKEND_COMPILE and _running and details.get("fun_name") == f"jit({_running[-1].name})":
        _running[-1]._backend_compiles += 1


jax.monitoring.register_event_duration_secs_listener(_count_compile)


def watch_compiles(watch: Callable[[str | None], None] | None) -> None:
    """Calls `watch` with the name of each program whose compilation starts, and with None when it is over."""
    global _watch
    _watch = watch


@contextlib.contextmanager
def compiled_with(options: Options) -> Iterator[None]:
    """Compiles every `Program` that is created inside the block with these options.

    This holds for all threads of the process. Raises `UserError` if XLA refuses an option, see `check_options`.
    """
    global _active_options
    check_options(options)
    before, _active_options = _active_options, options
    try:
        yield
    finally:
        _active_options = before


def options_of(program: str, own: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Returns the XLA options of a program, or None if there are none.

    Options of `compiled_with` replace the options `own` of the program.
    """
    return {**(own or {}), **_active_options.get(ALL, {}), **_active_options.get(program, {})} or None


def check_options(options: Options) -> None:
    """Compiles a small program with each option. Raises `UserError` if XLA refuses an option or its value."""
    for program, values in options.items():
        for option, value in values.items():
            try:
                jax.jit(jax.lax.neg, compiler_options={option: value})(np.float32(0))
            except Exception as error:  # an error of jax or of XLA
                text = " ".join(str(error).split())
                if "No such compile option" in text:
                    reason = f"XLA in jax {jax.__version__} has no such option; remove the option, or use its new name"
                else:
                    detail = re.sub(r"^[A-Z_]+: (While setting option \w+, )?", "", text)
                    reason = f"XLA refuses the value: {detail[:200]}"
                raise UserError(f"compiler_options.{program}.{option}: {reason}") from None


def peak_memory_bytes() -> int:
    """Returns the peak memory, in bytes, of the local device with the largest peak.

    Devices on a CPU report no memory. Then the peak memory of this process is returned.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if sys.platform == "darwin" else rss * 1024  # Linux counts in KiB
