"""What was measured, as tables for people and as plain values for JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxrlhf.benching.machine import Rates
from jaxrlhf.benching.running import ProgramTimes, StageTimes

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Bench:
    """One run of the command."""

    machine: dict[str, Any]
    before: Rates
    after: Rates
    model: dict[str, Any]  # parameters, layers, dtype, attention, compiler_options
    lengths: str
    stages: list[StageTimes]
    counted: dict[str, dict[str, float]]  # stage -> program -> flops as compiled; empty: not asked
    peak_bytes: int

    @property
    def rates(self) -> Rates:
        """The better ones of before and after: what the machine can do."""
        return self.before.most(self.after)


def as_json(bench: Bench) -> dict[str, Any]:
    """Times in seconds, sizes in bytes, rates per second."""
    rates = bench.rates
    return {
        "machine": bench.machine
        | {
            "flops_per_second": rates.flops,
            "bytes_per_second": rates.bytes,
            "before": dataclasses.asdict(bench.before),
            "after": dataclasses.asdict(bench.after),
        },
        "model": bench.model,
        "lengths": bench.lengths,
        "peak_bytes": bench.peak_bytes,
        "stages": [_stage(stage, rates, bench.counted.get(stage.stage, {})) for stage in bench.stages],
    }


def _stage(stage: StageTimes, rates: Rates, counted: dict[str, float]) -> dict[str, Any]:
    programs = [_program(p, rates, counted.get(p.name)) for p in stage.programs]
    least = sum(p["calls"] * p["least_seconds"] for p in programs)
    found = {
        "stage": stage.stage,
        "seconds": stage.seconds,
        "least_seconds": least,
        "share": least / stage.seconds,
        "tokens": stage.sampled,
        "tokens_per_second": stage.sampled / stage.seconds,
        "programs": programs,
    }
    if stage.loop is not None:
        seconds, inside = _median(stage.loop.seconds), _median(stage.loop.programs)
        host = _median([whole - part for whole, part in zip(stage.loop.seconds, stage.loop.programs)])
        found["loop"] = {
            "seconds": seconds,
            "programs_seconds": inside,
            "host_seconds": host,
            "share": least / seconds,
            "tokens_per_second": stage.sampled / seconds,
            "all_seconds": stage.loop.seconds,
            "by_program": stage.loop.by_program,
        }
    return found


def _program(p: ProgramTimes, rates: Rates, counted: float | None) -> dict[str, Any]:
    least = p.work.least_seconds(rates)
    found = {
        "name": p.name,
        "calls": p.times,
        "seconds": p.median,
        "best_seconds": min(p.seconds),
        "all_seconds": p.seconds,
        "cpu_seconds": _median(p.cpu_seconds),
        "compile_seconds": p.compile_seconds,
        "tokens": p.work.tokens,
        "tokens_per_second": p.work.tokens / p.median,
        "flops": p.work.flops,
        "bytes": p.work.bytes,
        "flops_per_second": p.work.flops / p.median,
        "bytes_per_second": p.work.bytes / p.median,
        "least_seconds": least,
        "bound_by": p.work.bound_by(rates),
        "share": least / p.median,
        "best_share": least / min(p.seconds),
        "memory": p.memory,
    }
    return found if counted is None else found | {"counted_flops": counted}


def as_text(bench: Bench) -> str:
    """The tables."""
    machine, rates, found = bench.machine, bench.rates, as_json(bench)
    lines = [
        f"{machine['devices']} x {machine['device']} ({machine['backend']}, {machine['cores']} cores), jax "
        f"{machine['jax']}; {bench.model['parameters']:,} parameters in {bench.model['layers']} layers, "
        f"{bench.model['dtype']}, attention by {bench.model['attention']}; answers of {bench.lengths} length",
        f"products {_rate(rates.flops)}FLOP/s (before {_rate(bench.before.flops).strip()}, after "
        f"{_rate(bench.after.flops).strip()}), memory {_rate(rates.bytes)}B/s (before "
        f"{_rate(bench.before.bytes).strip()}, after {_rate(bench.after.bytes).strip()}); limits are the better ones",
    ]
    for program, options in bench.model["compiler_options"].items():
        lines.append(f"compiler_options.{program}: {', '.join(f'{name}={value}' for name, value in options.items())}")
    for stage in found["stages"]:
        lines += ["", *_stage_text(stage)]
    lines += ["", f"peak memory {bench.peak_bytes / MIB:,.0f} MiB" + _whose(machine["backend"]), "", *_NOTES]
    return "\n".join(lines)


_NOTES = (
    "least: max(FLOP / rate of products, bytes / rate of memory) of each phase, by formula for the lengths at hand;",
    "share: least by seconds. Seconds are medians; MiB are arguments, results and temporaries as the compiler laid",
    "them out. Where memory binds, a share above 100% means that what is read comes from caches.",
)


def _whose(backend: str) -> str:
    return " (of this process, with its compilers)" if backend == "cpu" else " (of the fullest device)"


def _stage_text(stage: dict[str, Any]) -> list[str]:
    counted = any("counted_flops" in p for p in stage["programs"])
    head = ("program", "calls", "seconds", "least", "share", "bound by", "GFLOP", "GFLOP/s", "GB/s", "tokens/s",
            "compile s", "MiB", *(["GFLOP as compiled"] if counted else []))  # fmt: skip
    rows = [head]
    for p in stage["programs"]:
        times = (f"{p['calls']:g}", _s(p["seconds"]), _s(p["least_seconds"]), f"{p['share']:.0%}", p["bound_by"])
        rates = (p["flops_per_second"], p["bytes_per_second"])
        giga = (f"{p['flops'] / 1e9:,.2f}", *(f"{rate / 1e9:,.1f}" for rate in rates))
        rest = (f"{p['tokens_per_second']:,.0f}", f"{p['compile_seconds']:.1f}", f"{p['memory']['peak'] / MIB:,.0f}")
        more = [f"{p['counted_flops'] / 1e9:,.2f}" if "counted_flops" in p else "-"] if counted else []
        rows.append((p["name"], *times, *giga, *rest, *more))
    what = "iteration" if stage["stage"] == "ppo" else "optimizer step"
    said = [
        stage["stage"],
        *_table(rows),
        f"{what}, sum of its programs: {_s(stage['seconds'])} s, at least {_s(stage['least_seconds'])} s "
        f"({stage['share']:.0%}), {stage['tokens_per_second']:,.0f} tokens/s",
    ]
    if loop := stage.get("loop"):
        said.append(
            f"{what} of the stage itself: {_s(loop['seconds'])} s, of which programs {_s(loop['programs_seconds'])} s, "
            f"host {_s(loop['host_seconds'])} s; {loop['tokens_per_second']:,.0f} tokens/s"
        )
    return said


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _s(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds >= 0.1 else f"{seconds:.2g}"


def _rate(rate: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "G")):
        if rate >= factor:
            return f"{rate / factor:,.1f} {unit}"
    return f"{rate / 1e6:,.1f} M"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns under each other, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]
