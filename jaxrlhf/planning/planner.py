"""The plan of a run: memory, arithmetic, exchange and time of each of its programs on a mesh of cards."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax

from jaxrlhf.checkpoint.compilation_cache import compiled_anew
from jaxrlhf.config import RunConfig
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.models.decoder import named_parameters
from jaxrlhf.planning.cards import Card
from jaxrlhf.planning.checks import check, shares_of, valid_batches
from jaxrlhf.planning.compiling import Measured, depths_of, extrapolated, measure_depths, measure_with
from jaxrlhf.planning.count import Collective, Layout
from jaxrlhf.planning.remat import Remat, search
from jaxrlhf.planning.shapes import Shapes, read_model, resolved


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked, beside the run's settings."""

    devices: int
    card: Card
    memory: float  # bytes of a card that a run may fill
    per_host: int = 8
    largest_batch: bool = True
    less_remat: bool = False  # whether an update that fits is tried with less that is computed again


@dataclasses.dataclass(frozen=True)
class Seconds:
    """At the card's peak rates."""

    arithmetic: float
    memory: float
    exchange: float

    @property
    def bound(self) -> float:
        """No less is possible, even where all three go on at once."""
        return max(self.arithmetic, self.memory, self.exchange)

    @property
    def bound_by(self) -> str:
        return max(("arithmetic", "memory", "exchange"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One program, per device and call."""

    stage: str
    name: str
    times: float  # calls in an iteration or step
    parts: dict[str, float]  # bytes: weights, adapters, optimizer, rows, cache, activations
    counted: float  # bytes of temporaries, cache and activations, as counted
    compiled: float  # bytes of temporaries as the compiler laid them out
    flops: float
    bytes: float
    collectives: list[Collective]
    seconds: Seconds

    @property
    def peak(self) -> float:
        """Bytes in memory at the fullest moment."""
        return sum(self.parts.values())

    @property
    def wire(self) -> float:
        """Bytes that a device sends."""
        return sum(c.wire for c in self.collectives)


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage: what an iteration (PPO) or an optimizer step takes."""

    stage: str
    batch: int
    programs: list[ProgramPlan]
    largest_batch: int | None  # None: not asked; 0: none fits
    held_back_by: str | None  # the program that the largest batch fills
    remat: Remat

    @property
    def peak(self) -> float:
        return max(program.peak for program in self.programs)

    @property
    def bound(self) -> float:
        """Seconds at least."""
        return sum(program.times * program.seconds.bound for program in self.programs)

    @property
    def wire(self) -> float:
        return sum(program.times * program.wire for program in self.programs)


@dataclasses.dataclass(frozen=True)
class Plan:
    asked: Asked
    mesh: dict[str, int]
    parameters: int
    layers: int
    compiled_layers: tuple[int, ...]
    stages: list[StagePlan]
    notes: list[str]


def make_plan(
    config: RunConfig, asked: Asked, devices: Sequence[jax.Device], say: Callable[[str], None] = lambda text: None
) -> Plan:
    """Plans the run's stages on `devices`, which stand for the cards; `UserError` where the settings do not fit."""
    with compiled_anew():  # what a compiler tells of its programs is what is wanted
        return _make_plan(at_full_length(config), asked, devices, say)


def _make_plan(config: RunConfig, asked: Asked, devices: Sequence[jax.Device], say: Callable[[str], None]) -> Plan:
    mesh = make_mesh(config.mesh, devices)
    model = read_model(config.model)
    notes = check(config, mesh, model)
    config = resolved(config)
    if config.model.attention != "xla":
        notes.append(f"attention is planned as XLA computes it, not {config.model.attention}, which may hold less")
    shapes = Shapes(config, mesh, model)
    layout = Layout(dict(mesh.shape), asked.per_host)
    stages = [_stage_plan(stage, shapes, layout, asked, say) for stage in config.stages]
    unknown = {p.name for s in stages for p in s.programs if p.counted < 0}
    if unknown:
        notes.append(f"loops of unknown length were counted once in {', '.join(sorted(unknown))}")
    parameters = sum(math.prod(leaf.shape) for leaf in named_parameters(shapes.base()).values())
    return Plan(asked, dict(mesh.shape), parameters, model.layers, depths_of(model.layers), stages, notes)


def at_full_length(config: RunConfig) -> RunConfig:
    """The same run with answers that all have their full length: no rows are left behind in decoding, or cut after."""
    if config.ppo is None:
        return config
    full = {
        "sampling": config.ppo.sampling.model_copy(update={"halvings": 0}),
        "update": config.ppo.update.model_copy(update={"buckets": 1}),
    }
    return config.model_copy(update={"ppo": config.ppo.model_copy(update=full)})


def _stage_plan(
    stage: str, shapes: Shapes, layout: Layout, asked: Asked, say: Callable[[str], None]
) -> StagePlan:
    batch = getattr(shapes.config, stage).batch_size
    sizes = (batch, 2 * batch) if asked.largest_batch else (batch,)
    measured = measure_depths(stage, shapes, layout, sizes, say)
    layers, dtype = shapes.model.layers, shapes.config.model.dtype

    def planned(found: list[Measured]) -> ProgramPlan:
        return _program_plan(stage, extrapolated(found, layers), asked, dtype)

    programs = [planned(found) for found in measured[batch].values()]
    largest = held = None
    if asked.largest_batch:
        double = [planned(found) for found in measured[2 * batch].values()]
        largest, held = _largest_batch(stage, shapes, batch, programs, double, asked.memory)
    (update,) = (found for found in measured[batch].values() if found[0].call.remat is not None)

    def planned_with(policy: str) -> ProgramPlan:
        if policy == update[0].call.remat:
            return planned(update)
        return planned(measure_with(policy, update, layout, lambda text: say(f"{stage}: {text}")))

    setting = "ppo.update.remat" if stage == "ppo" else f"{stage}.remat"
    remat = search(setting, update[0].call.remat, planned_with, asked.memory, asked.less_remat)
    return StagePlan(stage, batch, programs, largest, held, remat)


def _program_plan(stage: str, m: Measured, asked: Asked, dtype: str) -> ProgramPlan:
    counted, card = m.count.temporaries, asked.card
    temporaries = counted
    parts = {name: m.parts[name] for name in ("weights", "adapters", "optimizer")}
    parts["rows"] = m.parts["rows"] + m.parts["results"]
    parts["cache"] = min(m.cache, temporaries)
    parts["activations"] = temporaries - parts["cache"]
    seconds = Seconds(
        m.count.flops / (card.flops32 if dtype == "float32" else card.flops),
        m.count.bytes / card.bandwidth,
        sum(exchange_seconds(c, card) for c in m.count.collectives),
    )
    return ProgramPlan(
        stage, m.call.name, m.call.times, parts, counted, m.compiled, m.count.flops, m.count.bytes,
        m.count.collectives, seconds,
    )  # fmt: skip


def exchange_seconds(c: Collective, card: Card) -> float:
    """The least time of an exchange: along the links of a host, and between hosts if it spans several.

    Between hosts each must get what it lacks, (hosts - 1) / hosts of the buffer, through the adapters of the group's
    own cards there; an all-reduce passes twice. Cards that exchange one to one share nothing.
    """
    within = c.wire / card.link
    if c.hosts == 1:
        return within
    passes, shared = (2 if c.kind == "all-reduce" else 1), c.size / c.hosts
    if c.kind == "collective-permute":
        return max(within, c.bytes / card.network)
    if c.kind == "all-to-all":
        shared = 1
    return max(within, passes * c.bytes * (c.hosts - 1) / c.hosts / shared / card.network)


def _largest_batch(
    stage: str, shapes: Shapes, batch: int, one: list[ProgramPlan], double: list[ProgramPlan], memory: float
) -> tuple[int, str | None]:
    """(rows, the program that holds it back): on the line through the batch and its double."""
    most, held = math.inf, None
    for first, second in zip(one, double):
        slope = (second.peak - first.peak) / batch
        fixed = first.peak - slope * batch
        rows = math.inf if slope <= 0 else (memory - fixed) / slope
        if fixed > memory:
            rows = 0
        if rows < most:
            most, held = rows, first.name
    if held is None:
        return batch, None
    shares = shares_of(shapes.mesh)
    return valid_batches(shapes.config, stage, shares, max(int(most), 0)) or 0, held
