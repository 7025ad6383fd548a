"""A plan as text for people, and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxrlhf.plan.cards import GIB
from jaxrlhf.plan.planner import POLICIES, Plan, ProgramPlan, StagePlan

PARTS = ("weights", "adapters", "optimizer", "rows", "temporaries")
_SHOWN_COLLECTIVES = 6


def as_text(plan: Plan) -> str:
    """The plan as tables for a terminal."""
    options, mesh = plan.options, " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"{plan.parameters:,} parameters in {plan.layers} layers, on {options.devices} x {options.card.name} ({mesh}); "
        f"{options.memory / GIB:.1f} GiB of each may be filled",
    ]
    for stage in plan.stages:
        lines += ["", *_stage(stage, plan)]
    return "\n".join([*lines, "", "Notes", *(f"- {note}" for note in (*plan.notes, *_method(plan)))])


def _stage(stage: StagePlan, plan: Plan) -> list[str]:
    what = "an iteration" if stage.stage == "ppo" else "an optimizer step"
    memory = [("GiB per card", *PARTS, "of them cache", "peak", "fits")]
    work = [("per card and call", "calls", "TFLOP", "s", "GiB read", "s", "GiB sent", "s", "least time", "bound by")]
    for p in stage.programs:
        fits = "-" if p.peak is None else "yes" if p.peak <= plan.options.memory else "no"
        sizes = [_gib(size) for size in ({**p.parts, "temporaries": p.temporaries}[name] for name in PARTS)]
        memory.append((p.name, *sizes, _gib(p.parts["cache"]), _gib(p.peak), fits))
        s = p.seconds
        pairs = [
            *(f"{p.work.flops.sum() / 1e12:,.1f}", _seconds(s["arithmetic"])),
            *(f"{p.work.bytes.sum() / GIB:,.1f}", _seconds(s["memory"])),
            *(_gib(sum(p.sent.values())), _seconds(s["links"])),
        ]
        work.append((p.name, f"{p.times:g}", *pairs, f"{_seconds(p.least)} s", p.bound_by))
    lines = [f"{stage.stage}: {what} with {stage.stage}.batch_size={stage.batch}", "", *table(memory), "", *table(work)]
    lines += ["", f"{what}: at least {_seconds(stage.least)} s"]
    for p in stage.programs:
        found = [] if p.compiled is None else p.compiled.collectives
        for c in found[:_SHOWN_COLLECTIVES]:
            lines.append(
                f"  {p.name}: {c.kind} over {c.axes}, {c.size} cards: {c.count:,.0f} times, {_gib(c.wire)} GiB sent"
            )
        if len(found) > _SHOWN_COLLECTIVES:
            rest = found[_SHOWN_COLLECTIVES:]
            lines.append(f"  {p.name}: {len(rest)} more kinds, {_gib(sum(c.wire for c in rest))} GiB sent")
    return [*lines, *_largest(stage), *remat_lines(stage, plan.options.memory, plan.options.remat)]


def _largest(stage: StagePlan) -> list[str]:
    if stage.largest_batch is None:
        return []
    if stage.largest_batch == 0:
        return [f"largest batch: none fits; {stage.held_back_by} takes too much with any"]
    name = f"{stage.stage}.batch_size"
    return [f"largest batch: {name}={stage.largest_batch:,}; {stage.held_back_by} holds it back"]


def remat_lines(stage: StagePlan, memory: float, asked: bool) -> list[str]:
    """Which policy of rematerialisation the update fits with, where there is a choice to tell of."""
    setting = "ppo.update.remat" if stage.stage == "ppo" else f"{stage.stage}.remat"
    (given, first), *others = stage.remat.items()
    if first.peak is None:
        return []

    def size(policy: str) -> str:
        return f"{_gib(stage.remat[policy].peak)} GiB"

    start, fits = f"{setting}={given}", first.peak <= memory
    cheapest = next((policy for policy, p in others if p.peak <= memory), None)
    failed = " and ".join(f"{policy} ({size(policy)})" for policy, p in others if p.peak > memory)
    if fits and cheapest is None:
        if given == POLICIES[0]:
            return []
        if not asked:
            return [f"{start} fits; --remat finds out whether less need be computed again"]
        return [f"{start} fits ({size(given)}); {failed} would not"]
    if fits:
        but = f", {failed} would not" if failed else ""
        return [f"{setting}={cheapest} fits ({size(cheapest)}){but}; {given} is not needed"]
    if cheapest is not None:
        but = f", nor would {failed}" if failed else ""
        return [f"{start} does not fit ({size(given)}){but}; {cheapest} would ({size(cheapest)})"]
    if failed:
        return [f"{start} does not fit ({size(given)}), nor would {failed}"]
    if given == POLICIES[-1]:
        return [f"{start} does not fit ({size(given)}), and keeps least of all"]
    fixed = first.peak - first.temporaries
    return [f"{start} does not fit, nor would another: what it does not change takes {_gib(fixed)} GiB"]


def _method(plan: Plan) -> list[str]:
    """What was compiled, counted and extrapolated."""
    card, notes = plan.options.card, []
    if plan.depths:
        layers = ", ".join(map(str, plan.depths[:-1])) + " and " if plan.depths[1:] else ""
        notes.append(
            f"temporaries and exchanges: XLA's own, compiled for {plan.options.devices} x {card.name} with "
            f"{layers}{plan.depths[-1]} layers, from shapes; nothing was run; without autotuning"
        )
        if plan.depths != (plan.layers,):
            notes.append(
                f"extrapolated to {plan.layers} layers on a line: temporaries, results, exchanges; temporaries are at "
                "least the cache"
            )
    return [
        *notes,
        "weights, adapters, optimizer, rows and cache: exact sums of each card's shares",
        "arithmetic, read and sent: the least by formula, answers at full length; what remat computes again is no part",
        "largest batch: with rows, and temporaries that are not held to a microbatch, in proportion to the batch",
        f"least time: the largest of the three at peak rates of {card.name} ({card.flops / 1e12:,.0f} TFLOP/s in "
        f"bfloat16, {card.bandwidth / 1e12:.2f} TB/s, {card.link / 1e9:.0f} GB/s within a host of "
        f"{plan.options.per_host}, {card.network / 1e9:.0f} GB/s between hosts; {card.source}); no run reaches it",
    ]


def _gib(size: float | None) -> str:
    if size is None:
        return "-"
    return f"{size / GIB:,.2f}" if size >= 0.005 * GIB or size == 0 else "<0.01"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f}" if seconds >= 0.1 or seconds == 0 else f"{seconds:.2g}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns under each other, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; sizes in bytes, times in seconds."""
    options = plan.options
    return {
        "devices": options.devices,
        "card": options.card.name,
        "memory": options.memory,
        "mesh": plan.mesh,
        "parameters": plan.parameters,
        "layers": plan.layers,
        "compiled_layers": list(plan.depths),
        "stages": [
            {
                "stage": stage.stage,
                "batch_size": stage.batch,
                "peak": stage.peak,
                "fits": None if stage.peak is None else stage.peak <= options.memory,
                "least_seconds": stage.least,
                "largest_batch": stage.largest_batch,
                "held_back_by": stage.held_back_by,
                "remat": {policy: program.peak for policy, program in stage.remat.items()},
                "programs": [_program(program, options.memory) for program in stage.programs],
            }
            for stage in plan.stages
        ],
        "notes": [*plan.notes, *_method(plan)],
    }


def _program(p: ProgramPlan, memory: float) -> dict[str, Any]:
    return {
        "name": p.name,
        "calls": p.times,
        "parts": p.parts,
        "temporaries": p.temporaries,
        "peak": p.peak,
        "fits": None if p.peak is None else p.peak <= memory,
        "flops": float(p.work.flops.sum()),
        "read": float(p.work.bytes.sum()),
        "sent": p.sent,
        "seconds": p.seconds | {"least": p.least},
        "bound_by": p.bound_by,
        "compiled": None if p.compiled is None else dataclasses.asdict(p.compiled),
    }
