"""The plan of a run: memory, arithmetic, exchange and time of each of its programs on a mesh of cards."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from jaxrlhf.config import RunConfig
from jaxrlhf.models.decoder import named_parameters
from jaxrlhf.planning.cards import Card
from jaxrlhf.planning.checks import check, shares_of, valid_batches
from jaxrlhf.planning.compiling import Measured, extrapolated, measure
from jaxrlhf.planning.count import Collective, Layout
from jaxrlhf.planning.shapes import Shapes, read_model
from jaxrlhf.runtime.compilation_cache import compiled_anew
from jaxrlhf.runtime.mesh import make_mesh

DEPTHS = (2, 3)  # layers of the models that are compiled; with one the fullest moment may lie elsewhere


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked, beside the run's settings."""

    devices: int
    card: Card
    memory: float  # bytes of a card that a run may fill
    per_host: int = 8
    largest_batch: bool = True


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
        return _make_plan(_at_full_length(config), asked, devices, say)


def _make_plan(config: RunConfig, asked: Asked, devices: Sequence[jax.Device], say: Callable[[str], None]) -> Plan:
    mesh = make_mesh(config.mesh, devices)
    model = read_model(config.model)
    notes = check(config, mesh, model)
    shapes = Shapes(config, mesh, model)
    depths = (model.layers,) if model.layers <= DEPTHS[-1] else DEPTHS
    layout = Layout(dict(mesh.shape), asked.per_host)
    stages = [_stage_plan(stage, shapes, depths, layout, asked, say) for stage in config.stages]
    unknown = {p.name for s in stages for p in s.programs if p.counted < 0}
    if unknown:
        notes.append(f"loops of unknown length were counted once in {', '.join(sorted(unknown))}")
    parameters = sum(math.prod(leaf.shape) for leaf in named_parameters(shapes.base()).values())
    return Plan(asked, dict(mesh.shape), parameters, model.layers, depths, stages, notes)


def _at_full_length(config: RunConfig) -> RunConfig:
    """The same run with answers that all have their full length: no rows are left behind in decoding, or cut after."""
    if config.ppo is None:
        return config
    full = {
        "sampling": config.ppo.sampling.model_copy(update={"halvings": 0}),
        "update": config.ppo.update.model_copy(update={"buckets": 1}),
    }
    return config.model_copy(update={"ppo": config.ppo.model_copy(update=full)})


def _stage_plan(
    stage: str, shapes: Shapes, depths: tuple[int, ...], layout: Layout, asked: Asked, say: Callable[[str], None]
) -> StagePlan:
    batch = getattr(shapes.config, stage).batch_size
    sizes = (batch, 2 * batch) if asked.largest_batch else (batch,)
    jobs = [(size, depth) for size in sizes for depth in depths]

    def run(job: tuple[int, int]) -> dict[str, Measured]:
        size, depth = job
        section = getattr(shapes.config, stage).model_copy(update={"batch_size": size})
        config = shapes.config.model_copy(update={stage: section})
        return measure(stage, dataclasses.replace(shapes, config=config).with_layers(depth), layout, say)

    with ThreadPoolExecutor(2) as threads:
        measured = dict(zip(jobs, threads.map(run, jobs)))
    by_size = {size: _whole([measured[size, depth] for depth in depths], shapes.model.layers) for size in sizes}
    programs = [_program_plan(stage, m, asked, shapes.config.model.dtype) for m in by_size[batch].values()]
    largest = held = None
    if asked.largest_batch:
        double = [_program_plan(stage, m, asked, shapes.config.model.dtype) for m in by_size[2 * batch].values()]
        largest, held = _largest_batch(stage, shapes, batch, programs, double, asked.memory)
    return StagePlan(stage, batch, programs, largest, held)


def _whole(by_depth: list[dict[str, Measured]], layers: int) -> dict[str, Measured]:
    """The programs of the whole model from those of a few layers."""
    if len(by_depth) == 1:
        return by_depth[0]
    few, more = by_depth
    return {name: extrapolated(few[name], more[name], layers) for name in more}


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
