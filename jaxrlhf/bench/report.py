"""Formats the results of `measure` as text. The JSON document has the same figures."""

from typing import Any

from jaxrlhf.plan.report import table_row

_MIB = 2**20
_COLUMNS = {"program": 12, "calls": 5, "seconds": 8, "least": 8, "share": 5, "bound by": 10, "GFLOP/s": 9, "GB/s": 7,
            "tokens/s": 9, "compile s": 9, "peak MiB": 8, "temporary": 9}  # fmt: skip


def opening(results: dict[str, Any]) -> str:
    """Returns the first lines, which describe the model and the rates of the machine."""
    machine, model = results["machine"], results["model"]
    lines = [
        f"{machine['devices']} x {machine['device']} ({machine['backend']}, {machine['cores']} cores), jax "
        f"{machine['jax']}; {model['parameters']:,} parameters in {model['layers']} layers, {model['dtype']}, "
        f"attention by {model['attention']}; completions of {results['lengths']} length",
        f"products {machine['flops_per_second'] / 1e9:,.1f} GFLOP/s, "
        f"memory {machine['bytes_per_second'] / 1e9:,.1f} GB/s",
    ]
    for program, options in model["compiler_options"].items():
        lines.append(f"compiler_options.{program}: {', '.join(f'{name}={value}' for name, value in options.items())}")
    return "\n".join(lines)


def program_row(stage: dict[str, Any]) -> str:
    """Returns the table row of the program that was timed last, and a line for each of its slowest kernels.

    The head of the table is added before the first program of a stage.
    """
    p, widths = stage["programs"][-1], _COLUMNS.values()
    head = [] if stage["programs"][1:] else ["", stage["stage"], table_row(_COLUMNS, widths)]
    name = p["name"] if len(p["name"]) <= _COLUMNS["program"] else f"{p['name']}\n{'':<{_COLUMNS['program']}}"
    cells = (
        name, f"{p['calls']:g}", f"{p['seconds']:.4g}", f"{p['least_seconds']:.3g}", f"{p['share']:.0%}",
        p["bound_by"], f"{p['flops_per_second'] / 1e9:,.1f}", f"{p['bytes_per_second'] / 1e9:,.1f}",
        f"{p['tokens_per_second']:,.0f}", f"{p['compile_seconds']:.1f}", f"{p['memory']['peak'] / _MIB:,.0f}",
        f"{p['memory']['temporaries'] / _MIB:,.0f}",
    )  # fmt: skip
    kernels = [f"    {kernel['seconds']:.3g} s in {kernel['calls']:,g} x {kernel['name']}" for kernel in p["kernels"]]
    return "\n".join([*head, table_row(cells, widths), *kernels])


def stage_sums(stage: dict[str, Any]) -> str:
    """Returns the sums over the programs of a stage, and the times of whole PPO iterations."""
    unit = "iteration" if stage["stage"] == "ppo" else "optimizer step"
    text = (
        f"{unit}, sum of its programs: {stage['seconds']:.4g} s, least {stage['least_seconds']:.3g} s "
        f"({stage['share']:.0%}), {stage['tokens_per_second']:,.0f} tokens/s"
    )
    if loop := stage.get("loop"):
        parts = f"programs {loop['programs_seconds']:.4g} s, host {loop['host_seconds']:.3g} s"
        rate = stage["tokens"] / loop["seconds"]
        text += f"\n{unit} in the code of the stage: {loop['seconds']:.4g} s ({parts}); {rate:,.0f} tokens/s"
    return text


def closing(results: dict[str, Any]) -> str:
    """Returns the last lines, with the peak memory and the meaning of the columns."""
    owner = "this process, with its compilers" if results["machine"]["backend"] == "cpu" else "the fullest device"
    return (
        f"\npeak memory {results['peak_bytes'] / _MIB:,.0f} MiB (of {owner}); {results['host_seconds']:.1f} s for "
        "everything except compilations and programs\n\n"
        "Seconds are medians. least: max(FLOP / rate of matrix products, bytes / rate of memory), summed over phases;\n"
        "FLOP and bytes come from formulas for the actual lengths. share: least / seconds. peak MiB: arguments,\n"
        "results and temporaries of the compiled program.\n"
        "A program bound by memory can have a share above 100% when it reads from caches."
    )
