"""What was measured, as tables for people and as plain values for JSON."""

import dataclasses
import statistics
from typing import Any

from jaxrlhf.bench.running import ProgramTimes, StageTimes
from jaxrlhf.plan.report import table
from jaxrlhf.plan.work import Rates

MIB = 2**20


@dataclasses.dataclass
class Bench:
    """One run of the command, so far."""

    machine: dict[str, Any]
    before: Rates
    after: Rates | None  # None: not measured yet
    model: dict[str, Any]  # parameters, layers, dtype, attention, compiler_options
    lengths: str
    stages: list[StageTimes]
    peak_bytes: int
    seconds: float  # since the command began, rates left out

    @property
    def rates(self) -> Rates:
        """The better ones of before and after: what the machine can do."""
        return self.before if self.after is None else self.before.most(self.after)

    @property
    def host_seconds(self) -> float:
        """Beside compiling and the programs."""
        programs = [p for stage in self.stages for p in stage.programs]
        inside = sum(p.compile_seconds + p.warm_seconds + sum(p.seconds) for p in programs)
        loops = sum(sum(stage.loop.seconds) for stage in self.stages if stage.loop is not None)
        return self.seconds - inside - loops


def as_json(bench: Bench) -> dict[str, Any]:
    """Times in seconds, sizes in bytes, rates per second."""
    rates = bench.rates
    return {
        "machine": bench.machine
        | {
            "flops_per_second": rates.flops,
            "bytes_per_second": rates.bytes,
            "before": dataclasses.asdict(bench.before),
            "after": None if bench.after is None else dataclasses.asdict(bench.after),
        },
        "model": bench.model,
        "lengths": bench.lengths,
        "peak_bytes": bench.peak_bytes,
        "host_seconds": bench.host_seconds,
        "stages": [_stage(stage, rates) for stage in bench.stages],
    }


def _stage(stage: StageTimes, rates: Rates) -> dict[str, Any]:
    programs = [_program(p, rates) for p in stage.programs]
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
        seconds, inside = statistics.median(stage.loop.seconds), statistics.median(stage.loop.programs)
        host = statistics.median([whole - part for whole, part in zip(stage.loop.seconds, stage.loop.programs)])
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


def _program(p: ProgramTimes, rates: Rates) -> dict[str, Any]:
    least, flops, moved = p.work.least_seconds(rates), float(p.work.flops.sum()), float(p.work.bytes.sum())
    return {
        "name": p.name,
        "calls": p.times,
        "seconds": p.median,
        "best_seconds": min(p.seconds),
        "all_seconds": p.seconds,
        "cpu_seconds": statistics.median(p.cpu_seconds),
        "compile_seconds": p.compile_seconds,
        "tokens": p.work.tokens,
        "tokens_per_second": p.work.tokens / p.median,
        "flops": flops,
        "bytes": moved,
        "flops_per_second": flops / p.median,
        "bytes_per_second": moved / p.median,
        "least_seconds": least,
        "bound_by": p.work.bound_by(rates),
        "share": least / p.median,
        "best_share": least / min(p.seconds),
        "memory": p.memory,
        "kernels": [dataclasses.asdict(kernel) for kernel in p.kernels],
    }


def opening(bench: Bench) -> str:
    """What is measured, and the machine's rates."""
    machine, rates = bench.machine, bench.rates
    lines = [
        f"{machine['devices']} x {machine['device']} ({machine['backend']}, {machine['cores']} cores), jax "
        f"{machine['jax']}; {bench.model['parameters']:,} parameters in {bench.model['layers']} layers, "
        f"{bench.model['dtype']}, attention by {bench.model['attention']}; answers of {bench.lengths} length",
        f"products {_rate(rates.flops)}FLOP/s, memory {_rate(rates.bytes)}B/s",
    ]
    for program, options in bench.model["compiler_options"].items():
        lines.append(f"compiler_options.{program}: {', '.join(f'{name}={value}' for name, value in options.items())}")
    return "\n".join(lines)


def program_line(stage: str, p: ProgramTimes, rates: Rates) -> str:
    """A program as soon as it is known, with the rates that were measured before."""
    found = _program(p, rates)
    text = (
        f"{stage} {p.name}: {_s(found['seconds'])} s, least {_s(found['least_seconds'])} s ({found['share']:.0%}, "
        f"{found['bound_by']}), compiled in {found['compile_seconds']:.1f} s, "
        f"{found['memory']['temporaries'] / MIB:,.0f} MiB of temporaries"
    )
    kernels = [f"    {_s(kernel.seconds)} s in {kernel.calls:,} x {kernel.name}" for kernel in p.kernels]
    return "\n".join([text, *kernels])


def as_text(bench: Bench) -> str:
    """The tables, at the better rates of before and after."""
    found, lines = as_json(bench), [opening(bench)]
    if bench.after is not None:
        sides = [f"{_rate(rates.flops)}FLOP/s and {_rate(rates.bytes)}B/s" for rates in (bench.before, bench.after)]
        lines.append(f"measured before: {sides[0]}, after: {sides[1]}; limits are the better ones")
    for stage in found["stages"]:
        lines += ["", *_stage_text(stage)]
    peak = f"peak memory {bench.peak_bytes / MIB:,.0f} MiB{_whose(bench.machine['backend'])}"
    return "\n".join([*lines, "", f"{peak}; {bench.host_seconds:.1f} s beside compiling and programs", "", *_NOTES])


_NOTES = (
    "least: max(FLOP / rate of products, bytes / rate of memory) of each phase, by formula for the lengths at hand;",
    "share: least by seconds. Seconds are medians; MiB are arguments, results and temporaries as the compiler laid",
    "them out. Where memory binds, a share above 100% means that what is read comes from caches.",
)


def _whose(backend: str) -> str:
    return " (of this process, with its compilers)" if backend == "cpu" else " (of the fullest device)"


def _stage_text(stage: dict[str, Any]) -> list[str]:
    head = ("program", "calls", "seconds", "least", "share", "bound by", "GFLOP", "GFLOP/s", "GB/s", "tokens/s",
            "compile s", "MiB")  # fmt: skip
    rows = [head]
    for p in stage["programs"]:
        times = (f"{p['calls']:g}", _s(p["seconds"]), _s(p["least_seconds"]), f"{p['share']:.0%}", p["bound_by"])
        rates = (p["flops_per_second"], p["bytes_per_second"])
        giga = (f"{p['flops'] / 1e9:,.2f}", *(f"{rate / 1e9:,.1f}" for rate in rates))
        rest = (f"{p['tokens_per_second']:,.0f}", f"{p['compile_seconds']:.1f}", f"{p['memory']['peak'] / MIB:,.0f}")
        rows.append((p["name"], *times, *giga, *rest))
    what = "iteration" if stage["stage"] == "ppo" else "optimizer step"
    said = [
        stage["stage"],
        *table(rows),
        f"{what}, sum of its programs: {_s(stage['seconds'])} s, at least {_s(stage['least_seconds'])} s "
        f"({stage['share']:.0%}), {stage['tokens_per_second']:,.0f} tokens/s",
    ]
    if loop := stage.get("loop"):
        said.append(
            f"{what} of the stage itself: {_s(loop['seconds'])} s, of which programs {_s(loop['programs_seconds'])} s, "
            f"host {_s(loop['host_seconds'])} s; {loop['tokens_per_second']:,.0f} tokens/s"
        )
    return said


def _s(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds >= 0.1 else f"{seconds:.2g}"


def _rate(rate: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "G")):
        if rate >= factor:
            return f"{rate / factor:,.1f} {unit}"
    return f"{rate / 1e6:,.1f} M"
