"""Which kernels took most of the time, from a trace of `jax.profiler`."""

import collections
import dataclasses
from pathlib import Path

import jax

_SHOWN = 10
_HOST_LINES = "tf_XLA"  # threads on which XLA runs a program on a CPU


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All calls of one kernel in a trace."""

    name: str
    calls: int
    seconds: float


def slowest(folder: Path) -> list[Kernel]:
    """The kernels with the largest sums of time, of all devices; of a CPU, the operations of XLA's threads.

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
                    if device or "::" not in event.name:  # the runtime's own functions
                        times[event.name].append(event.duration_ns / 1e9)
    found = [Kernel(name, len(seconds), sum(seconds)) for name, seconds in times.items()]
    return sorted(found, key=lambda kernel: -kernel.seconds)[:_SHOWN]
