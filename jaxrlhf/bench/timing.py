"""Times one program on arguments that are made for it, and finds the kernels that took most."""

import collections
import contextlib
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.plan.work import Rates, Work
from jaxrlhf.stages.calls import Call

_CHAINED = ("update", "sft_update", "reward_model_update")  # give the next state, and take over the memory of theirs
_SHOWN = 10  # kernels
_HOST_LINES = "tf_XLA"  # threads on which XLA runs a program on a CPU


class Timed:
    """A compiled program that notes how long each call took. Stands in for the `Program` that it was made from."""

    compiles = 1

    def __init__(self, call: Call, args: tuple, kwargs: dict[str, Any]):
        self.name, self.times, self.args, self.kwargs = call.name, call.times, args, kwargs
        self._static = call.program.static
        start = time.perf_counter()
        self._compiled = call.program.lower(*args, **kwargs).compile()
        self.compile_seconds = time.perf_counter() - start
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []  # of all threads of this process: less of them than cores x seconds wait

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if name not in self._static}
        start, busy = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(self._compiled(*args, **given))
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - busy)
        return result

    def again(self) -> Any:
        """One more call, on the arguments that it was made with; an update goes on from its own state."""
        result = self(*self.args, **self.kwargs)
        if self.name in _CHAINED:
            self.args = (result[0], *self.args[1:])
        return result

    def memory(self) -> dict[str, int]:
        """Bytes per device, as the compiler laid them out. The peak counts arguments and results, each once."""
        sizes = self._compiled.memory_analysis()
        given, results = sizes.argument_size_in_bytes, sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        parts = {"arguments": given, "results": results, "temporaries": sizes.temp_size_in_bytes}
        return parts | {"peak": sum(parts.values())}


def time_program(program: Timed, work: Work, rates: Rates, repeats: int, traces: Path | None) -> dict[str, Any]:
    """Plain values of one call, of a program that has been called before; with `traces`, under jax's profiler."""
    with contextlib.nullcontext() if traces is None else jax.profiler.trace(str(traces)):
        for _ in range(repeats):
            program.again()
    taken, least = program.seconds[-repeats:], work.least_seconds(rates)
    seconds, flops, moved = statistics.median(taken), float(work.flops.sum()), float(work.bytes.sum())
    return {
        "name": program.name,
        "calls": program.times,  # in an iteration, or an optimizer step
        "seconds": seconds,  # the median
        "best_seconds": min(taken),
        "all_seconds": taken,
        "cpu_seconds": statistics.median(program.cpu_seconds[-repeats:]),
        "compile_seconds": program.compile_seconds,
        "tokens": work.tokens,
        "tokens_per_second": work.tokens / seconds,
        "flops": flops,
        "bytes": moved,
        "flops_per_second": flops / seconds,
        "bytes_per_second": moved / seconds,
        "least_seconds": least,
        "bound_by": work.bound_by(rates),
        "share": least / seconds,
        "best_share": least / min(taken),
        "memory": program.memory(),
        "kernels": [] if traces is None else slowest(traces, repeats),
    }


def slowest(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """The kernels with the largest sums of time in the last trace, of one of so many calls; of a CPU, XLA's operations.

    Empty where this jax cannot read its own traces, or where the trace has no kernels.
    """
    read = getattr(jax.profiler, "ProfileData", None)
    traces = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if read is None or not traces:
        return []
    times: dict[str, list[float]] = collections.defaultdict(list)
    for plane in read.from_file(str(traces[-1])).planes:
        device = plane.name.startswith("/device:")
        for line in plane.lines:
            # Beside the streams, a device's plane has lines that repeat their events by module and by step.
            if line.name.startswith("Stream" if device else _HOST_LINES):
                for event in line.events:
                    # Of a CPU not the runtime's own functions, and the ends of operations that run beside others.
                    if device or not ("::" in event.name or event.name.startswith("end: ")):
                        times[event.name].append(event.duration_ns / 1e9)
    found = [
        {"name": name, "calls": len(taken) / repeats, "seconds": sum(taken) / repeats} for name, taken in times.items()
    ]
    return sorted(found, key=lambda kernel: -kernel["seconds"])[:_SHOWN]
