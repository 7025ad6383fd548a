"""Formats a plan as text for people, and as JSON values."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from jaxrlhf.plan.cards import GIB
from jaxrlhf.plan.planner import Plan, StagePlan

_SHOWN = 6  # largest number of collectives that are shown for a program


def as_json(plan: Plan) -> dict[str, Any]:
    """Returns the plan as JSON values. Sizes are in bytes and times in seconds."""
    values = dataclasses.asdict(plan)
    return values.pop("options") | values | {"card": plan.options.card.name, "notes": [*plan.notes, *_method(plan)]}


def as_text(plan: Plan) -> str:
    """Returns the plan as tables for a terminal."""
    options, mesh = plan.options, " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"{plan.parameters:,} parameters in {plan.layers} layers, on {options.devices} x {options.card.name} ({mesh}); "
        f"{options.memory / GIB:.1f} GiB of each card may be filled"
    ]
    for stage in plan.stages:
        lines += ["", *_stage(stage, options.memory)]
    return "\n".join([*lines, "", "Notes", *(f"- {note}" for note in (*plan.notes, *_method(plan)))])


def _stage(stage: StagePlan, memory: float) -> list[str]:
    unit = "an iteration" if stage.stage == "ppo" else "an optimizer step"
    sizes = [("GiB per card", "weights", "adapters", "optimizer", "rows", "temporaries", "peak", "fits")]
    work = [("per card and call", "calls", "TFLOP", "s", "GiB read", "s", "GiB sent", "s", "least time", "bound by")]
    exchanges = []
    for p in stage.programs:
        fits = "-" if p.peak is None else "yes" if p.peak <= memory else "no"
        sizes.append((p.name, *map(_gib, (*p.parts.values(), p.temporaries, p.peak)), fits))
        arithmetic, reading, links, least = map(_seconds, p.seconds.values())
        flops, read, sent = f"{p.flops / 1e12:,.1f}", f"{p.read / GIB:,.1f}", _gib(sum(p.sent.values()))
        work.append((p.name, f"{p.calls:g}", flops, arithmetic, read, reading, sent, links, f"{least} s", p.bound_by))
        for kind, e in list(p.compiled.collectives.items() if p.compiled else ())[:_SHOWN]:
            exchanges.append(f"  {p.name}: {kind}, {e.count:,.0f} times, {_gib(e.sent)} GiB sent")
    lines = [f"{stage.stage}: {unit} with {stage.stage}.batch_size={stage.batch_size}", "", *_table(sizes), ""]
    lines += [*_table(work), "", f"{unit}: at least {_seconds(stage.least_seconds)} s", *exchanges]
    if stage.largest_batch:
        rows = f"{stage.stage}.batch_size={stage.largest_batch:,}"
        lines.append(f"largest batch: {rows}; {stage.held_back_by} limits it")
    elif stage.largest_batch == 0:
        hint = "; a smaller microbatch_size needs less memory" if "update" in stage.held_back_by else ""
        lines.append(f"largest batch: none fits; {stage.held_back_by} needs too much memory for every size{hint}")
    if len(stage.remat) > 1:
        setting = "ppo.update.remat" if stage.stage == "ppo" else f"{stage.stage}.remat"
        peaks = (f"{p} {_gib(size)} GiB{'' if size <= memory else ', too much'}" for p, size in stage.remat.items())
        lines.append(f"peak of the update by {setting}: {'; '.join(peaks)}")
    return lines


def _method(plan: Plan) -> list[str]:
    """Returns notes that say which figures were compiled, counted and extrapolated."""
    card, layers, notes = plan.options.card, ", ".join(map(str, plan.compiled_layers)), []
    if plan.compiled_layers:
        notes.append(
            f"temporaries and exchanges come from programs that XLA compiled for {card.name} with {layers} layers; "
            "nothing was run, so XLA timed no kernels"
        )
    if plan.compiled_layers not in ([], [plan.layers]):
        notes.append(f"temporaries, results and exchanges are extrapolated linearly to {plan.layers} layers")
    return [
        *notes,
        "the columns TFLOP, read and sent are least values from formulas, for completions of full length; work that "
        "remat repeats is not counted",
        "largest batch: rows and temporaries are assumed to grow in proportion to the batch, except temporaries that a "
        "microbatch limits",
        f"least time: the longest of the three times at peak rates of {card.name} ({card.flops / 1e12:,.0f} TFLOP/s in "
        f"bfloat16, {card.bandwidth / 1e12:.2f} TB/s, {card.link / 1e9:.0f} GB/s within a host of "
        f"{plan.options.per_host}, {card.network / 1e9:.0f} GB/s between hosts; {card.source}); every run takes longer",
    ]


def _gib(size: float | None) -> str:
    if size is None:
        return "-"
    return f"{size / GIB:,.2f}" if size >= 0.005 * GIB or size == 0 else "<0.01"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f}" if seconds >= 0.1 or seconds == 0 else f"{seconds:.2g}"


def table_row(cells: Iterable[str], widths: Iterable[int]) -> str:
    """Returns one line of a table. The first column is left-aligned, and the others are right-aligned."""
    (name, width), *others = zip(cells, widths)
    return "  ".join([name.ljust(width), *(cell.rjust(width) for cell, width in others)]).rstrip()


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [table_row(row, widths) for row in rows]
