"""A plan as text for people, and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxrlhf.planning.cards import GIB
from jaxrlhf.planning.planner import Plan, ProgramPlan, StagePlan
from jaxrlhf.planning.remat import POLICIES, Remat

PARTS = ("weights", "adapters", "optimizer", "rows", "cache", "activations")
_SHOWN_COLLECTIVES = 6


def as_text(plan: Plan) -> str:
    """The plan as tables for a terminal."""
    asked, mesh = plan.asked, " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"{plan.parameters:,} parameters in {plan.layers} layers, on {asked.devices} x {asked.card.name} ({mesh}); "
        f"{asked.memory / GIB:.1f} GiB of each may be filled",
    ]
    for stage in plan.stages:
        lines += ["", *_stage(stage, plan)]
    lines += ["", "Notes", *(f"- {note}" for note in (*plan.notes, *_method(plan)))]
    return "\n".join(lines)


def _stage(stage: StagePlan, plan: Plan) -> list[str]:
    what = "an iteration" if stage.stage == "ppo" else "an optimizer step"
    lines = [f"{stage.stage}: {what} with {stage.stage}.batch_size={stage.batch}", ""]
    memory = [("GiB per card", *PARTS, "peak", "fits")]
    for p in stage.programs:
        sizes = [_gib(p.parts[name]) for name in PARTS]
        memory.append((p.name, *sizes, _gib(p.peak), "yes" if p.peak <= plan.asked.memory else "no"))
    work = [("per card and call", "calls", "TFLOP", "s", "GiB moved", "s", "GiB sent", "s", "least time", "bound by")]
    for p in stage.programs:
        s = p.seconds
        pairs = [
            *(f"{p.flops / 1e12:,.1f}", _seconds(s.arithmetic)),
            *(f"{p.bytes / GIB:,.1f}", _seconds(s.memory)),
            *(_gib(p.wire), _seconds(s.exchange)),
        ]
        work.append((p.name, f"{p.times:g}", *pairs, f"{_seconds(s.bound)} s", s.bound_by))
    lines += [*_table(memory), "", *_table(work), "", f"{what}: at least {_seconds(stage.bound)} s"]
    for p in stage.programs:
        for c in p.collectives[:_SHOWN_COLLECTIVES]:
            span = f"{c.size} cards on {c.hosts} host{'s' if c.hosts > 1 else ''}"
            lines.append(f"  {p.name}: {c.kind} over {c.axes}, {span}: {c.count:,.0f} times, {_gib(c.wire)} GiB sent")
        if len(p.collectives) > _SHOWN_COLLECTIVES:
            rest = p.collectives[_SHOWN_COLLECTIVES:]
            lines.append(f"  {p.name}: {len(rest)} more kinds, {_gib(sum(c.wire for c in rest))} GiB sent")
    return [*lines, *_largest(stage), *remat_lines(stage.remat)]


def _largest(stage: StagePlan) -> list[str]:
    if stage.largest_batch is None:
        return []
    name = f"{stage.stage}.batch_size"
    if stage.largest_batch == 0:
        return [f"largest batch: none fits; {stage.held_back_by} takes too much with any"]
    held = f"; {stage.held_back_by} holds it back" if stage.held_back_by else ""
    return [f"largest batch: {name}={stage.largest_batch:,}{held}"]


def remat_lines(remat: Remat) -> list[str]:
    """Which policy of rematerialisation the update fits with, where there is a choice to tell of."""

    def size(policy: str) -> str:
        return f"{_gib(remat.peaks[policy])} GiB"

    def instead(policy: str) -> str:
        seconds = remat.seconds
        return f"{size(policy)}, at least {_seconds(seconds[policy])} s in place of {_seconds(seconds[remat.given])} s"

    given, cheapest, start = remat.given, remat.cheapest, f"{remat.setting}={remat.given}"
    others = [policy for policy in remat.peaks if policy != given]
    failed = " and ".join(f"{policy} ({size(policy)})" for policy in others if policy != cheapest)
    if cheapest == given:
        if given == POLICIES[0]:
            return []
        if not remat.complete:
            return [f"{start} fits; --remat finds out whether less need be computed again"]
        return [f"{start} fits ({size(given)}); {failed} would not"]
    if cheapest is not None and POLICIES.index(cheapest) < POLICIES.index(given):
        but = f", {failed} would not" if failed else ""
        return [f"{remat.setting}={cheapest} fits ({instead(cheapest)}){but}; {given} is not needed"]
    if cheapest is not None:
        but = f", nor would {failed}" if failed else ""
        return [f"{start} does not fit ({size(given)}){but}; {cheapest} would ({instead(cheapest)})"]
    if others:
        return [f"{start} does not fit ({size(given)}), nor would {failed}"]
    if given == POLICIES[-1]:
        return [f"{start} does not fit ({size(given)}), and keeps least of all"]
    return [f"{start} does not fit, nor would another: what it does not change takes {_gib(remat.fixed)} GiB"]


def _method(plan: Plan) -> list[str]:
    """What was measured, counted and extrapolated."""
    depths = plan.compiled_layers
    layers = "1 layer" if depths == (1,) else f"{depths[0]} layers"
    if len(depths) > 1:
        first, both, last = depths
        layers = f"{first} and {both} layers, updates with {both} and {last}"
    asked, card = plan.asked, plan.asked.card
    compiled = max((p.compiled for s in plan.stages for p in s.programs), default=0.0)
    notes = [f"partitioned by XLA for all {asked.devices} devices with {layers}, from shapes; nothing was run"]
    if len(depths) > 1:
        notes.append(f"extrapolated on the line through the two to {plan.layers} layers: all figures of the programs")
    notes += [
        "weights, adapters, optimizer, rows and cache: exact sums of each device's shares",
        "arithmetic: matrix products in the partitioned program; moved: what its kernels read and write, as drawn by "
        "rules of fusion; sent: by ring algorithms; each loop as often as it turns, answers at full length",
    ]
    notes.append(
        "activations: counted by a greedy schedule of those kernels, not laid out by a compiler for the card "
        f"(XLA's compiler for this CPU takes up to {_gib(compiled)} GiB of temporaries: it has products in float32, "
        "keeps what remat would compute again, and prefers speed)"
    )
    notes.append(
        f"least time: the largest of the three at peak rates of {card.name} ({card.flops / 1e12:,.0f} TFLOP/s in "
        f"bfloat16, {card.bandwidth / 1e12:.2f} TB/s, {card.link / 1e9:.0f} GB/s within a host of {asked.per_host}, "
        f"{card.network / 1e9:.0f} GB/s between hosts; {card.source}); no run reaches it"
    )
    return notes


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size >= 0.005 * GIB or size == 0 else "<0.01"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f}" if seconds >= 0.1 or seconds == 0 else f"{seconds:.2g}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns under each other, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; sizes in bytes, times in seconds."""
    asked = plan.asked
    return {
        "devices": asked.devices,
        "card": asked.card.name,
        "memory": asked.memory,
        "mesh": plan.mesh,
        "parameters": plan.parameters,
        "layers": plan.layers,
        "compiled_layers": list(plan.compiled_layers),
        "stages": [
            {
                "stage": stage.stage,
                "batch_size": stage.batch,
                "peak": stage.peak,
                "fits": stage.peak <= asked.memory,
                "least_seconds": stage.bound,
                "sent": stage.wire,
                "largest_batch": stage.largest_batch,
                "held_back_by": stage.held_back_by,
                "remat": dataclasses.asdict(stage.remat),
                "programs": [_program(program, asked.memory) for program in stage.programs],
            }
            for stage in plan.stages
        ],
        "notes": [*plan.notes, *_method(plan)],
    }


def _program(program: ProgramPlan, memory: float) -> dict[str, Any]:
    return {
        "name": program.name,
        "calls": program.times,
        "parts": program.parts,
        "peak": program.peak,
        "fits": program.peak <= memory,
        "temporaries": {"counted": program.counted, "compiled": program.compiled},
        "flops": program.flops,
        "moved": program.bytes,
        "sent": program.wire,
        "collectives": [dataclasses.asdict(c) for c in program.collectives],
        "seconds": dataclasses.asdict(program.seconds) | {"least": program.seconds.bound},
        "bound_by": program.seconds.bound_by,
    }
