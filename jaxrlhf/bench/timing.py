"""Times one program with fixed arguments, and finds the slowest kernels of the program."""

import collections
import contextlib
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.plan.work import Rates, Work
from jaxrlhf.stages.calls import Call

# The first result of these programs is the next state. They donate the old state.
_CHAINED = ("update", "sft_update", "reward_model_update")
_SHOWN = 10  # number of kernels
_HOST_LINES = "tf_XLA"  # threads on which XLA runs a program on a CPU


class Timed:
    """A compiled program that records the time of each call. It can be called instead of the original `Program`."""

    compiles = 1

    def __init__(self, call: Call, args: tuple, kwargs: dict[str, Any]):
        self.name, self.times, self.args, self.kwargs = call.name, call.times, args, kwargs
        self._static = call.program.static
        start = time.perf_counter()
        self._compiled = call.program.lower(*args, **kwargs).compile()
        self.compile_seconds = time.perf_counter() - start
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []  # summed over threads; the cores are idle for the rest of cores x seconds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        traced = {name: value for name, value in kwargs.items() if name not in self._static}
        start, busy = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(self._compiled(*args, **traced))
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - busy)
        return result

    def again(self) -> Any:
        """Calls the program once more with the same arguments. An update starts from the state of its previous call."""
        result = self(*self.args, **self.kwargs)
        if self.name in _CHAINED:
            self.args = (result[0], *self.args[1:])
        return result

    def memory(self) -> dict[str, int]:
        """Returns the bytes per device of the compiled program.

        Memory that arguments and results share is counted once in the peak.
        """
        sizes = self._compiled.memory_analysis()
        arguments, results = sizes.argument_size_in_bytes, sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        parts = {"arguments": arguments, "results": results, "temporaries": sizes.temp_size_in_bytes}
        return parts | {"peak": sum(parts.values())}


def time_program(program: Timed, work: Work, rates: Rates, repeats: int, traces: Path | None) -> dict[str, Any]:
    """Times a program and returns the figures of one call as JSON values.

    The program must have been called before. If `traces` is a folder, the calls run under jax's profiler.
    """
    with contextlib.nullcontext() if traces is None else jax.profiler.trace(str(traces)):
        for _ in range(repeats):
            program.again()
    times, least = program.seconds[-repeats:], work.least_seconds(rates)
    seconds, flops, moved = statistics.median(times), float(work.flops.sum()), float(work.bytes.sum())
    return {
        "name": program.name,
        "calls": program.times,  # number of calls in a PPO iteration or an optimizer step
        "seconds": seconds,
        "best_seconds": min(times),
        "all_seconds": times,
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
        "best_share": least / min(times),
        "memory": program.memory(),
        "kernels": [] if traces is None else slowest(traces, repeats),
    }


def slowest(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Returns the kernels that took most time in the last trace, with seconds and counts per call of the program.

    On a CPU, XLA's operations are the kernels. The list is empty if the trace has no kernels, or if this version of jax
    cannot read its traces.
    """
    reader = getattr(jax.profiler, "ProfileData", None)
    traces = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if reader is None or not traces:
        return []
    times: dict[str, list[float]] = collections.defaultdict(list)
    for plane in reader.from_file(str(traces[-1])).planes:
        device = plane.name.startswith("/device:")
        for line in plane.lines:
            # Other lines of a device have the same events as its streams, by module and by step.
            if line.name.startswith("Stream" if device else _HOST_LINES):
                for event in line.events:
                    # On a CPU, functions of the runtime and end events of parallel operations are skipped.
                    if device or not ("::" in event.name or event.name.startswith("end: ")):
                        times[event.name].append(event.duration_ns / 1e9)
    kernels = [{"name": name, "calls": len(each) / repeats, "seconds": sum(each) / repeats}
               for name, each in times.items()]  # fmt: skip
    return sorted(kernels, key=lambda kernel: -kernel["seconds"])[:_SHOWN]
