"""Lines for people about what `measure` has found; the JSON document that it fills has the same figures."""

from collections.abc import Iterable
from typing import Any

_MIB = 2**20
_COLUMNS = {"program": 12, "calls": 5, "seconds": 8, "least": 8, "share": 5, "bound by": 10, "GFLOP/s": 9, "GB/s": 7,
            "tokens/s": 9, "compile s": 9, "peak MiB": 8, "temporary": 9}  # fmt: skip


def opening(found: dict[str, Any]) -> str:
    """What is measured, and the machine's rates."""
    machine, model = found["machine"], found["model"]
    lines = [
        f"{machine['devices']} x {machine['device']} ({machine['backend']}, {machine['cores']} cores), jax "
        f"{machine['jax']}; {model['parameters']:,} parameters in {model['layers']} layers, {model['dtype']}, "
        f"attention by {model['attention']}; answers of {found['lengths']} length",
        f"products {machine['flops_per_second'] / 1e9:,.1f} GFLOP/s, "
        f"memory {machine['bytes_per_second'] / 1e9:,.1f} GB/s",
    ]
    for program, options in model["compiler_options"].items():
        lines.append(f"compiler_options.{program}: {', '.join(f'{name}={value}' for name, value in options.items())}")
    return "\n".join(lines)


def program_row(stage: dict[str, Any]) -> str:
    """The row of the program that was timed last, with the table's head above the first, and kernels below."""
    p = stage["programs"][-1]
    head = [] if stage["programs"][1:] else ["", stage["stage"], _row(_COLUMNS)]
    cells = (
        p["name"], f"{p['calls']:g}", f"{p['seconds']:.4g}", f"{p['least_seconds']:.3g}", f"{p['share']:.0%}",
        p["bound_by"], f"{p['flops_per_second'] / 1e9:,.1f}", f"{p['bytes_per_second'] / 1e9:,.1f}",
        f"{p['tokens_per_second']:,.0f}", f"{p['compile_seconds']:.1f}", f"{p['memory']['peak'] / _MIB:,.0f}",
        f"{p['memory']['temporaries'] / _MIB:,.0f}",
    )  # fmt: skip
    kernels = [f"    {kernel['seconds']:.3g} s in {kernel['calls']:,g} x {kernel['name']}" for kernel in p["kernels"]]
    return "\n".join([*head, _row(cells), *kernels])


def stage_sums(stage: dict[str, Any]) -> str:
    """The sums over a stage's programs, and PPO's own iterations."""
    what = "iteration" if stage["stage"] == "ppo" else "optimizer step"
    text = (
        f"{what}, sum of its programs: {stage['seconds']:.4g} s, at least {stage['least_seconds']:.3g} s "
        f"({stage['share']:.0%}), {stage['tokens_per_second']:,.0f} tokens/s"
    )
    if (loop := stage.get("loop")) is None:
        return text
    inside, host = loop["programs_seconds"], loop["host_seconds"]
    return (
        f"{text}\n{what} of the stage itself: {loop['seconds']:.4g} s, of which programs {inside:.4g} s, "
        f"host {host:.3g} s; {stage['tokens'] / loop['seconds']:,.0f} tokens/s"
    )


def closing(found: dict[str, Any]) -> str:
    """The peak of memory, and what the columns mean."""
    whose = "this process, with its compilers" if found["machine"]["backend"] == "cpu" else "the fullest device"
    return (
        f"\npeak memory {found['peak_bytes'] / _MIB:,.0f} MiB (of {whose}); {found['host_seconds']:.1f} s beside "
        "compiling and programs\n\n"
        "Seconds are medians. least: max(FLOP / rate of products, bytes / rate of memory) of each phase, by formula\n"
        "for the lengths at hand; share: least by seconds. MiB: arguments, results and temporaries, as the compiler\n"
        "laid them out. Where memory binds, a share above 100% means that what is read comes from caches."
    )


def _row(cells: Iterable[str]) -> str:
    (name, width), *rest = zip(cells, _COLUMNS.values())
    name = name if len(name) <= width else f"{name}\n{'':<{width}}"  # the folder of a model
    return "  ".join([f"{name:<{width}}", *(f"{cell:>{width}}" for cell, width in rest)])
