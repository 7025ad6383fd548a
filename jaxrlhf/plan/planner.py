"""The plan of a run: memory, arithmetic, exchange and least time of each of its programs on a mesh of cards."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from jaxrlhf.config import RunConfig
from jaxrlhf.distributed.jit import compiled_with
from jaxrlhf.distributed.mesh import AXES, mesh_sizes
from jaxrlhf.models.decoder import named_parameters
from jaxrlhf.plan.cards import Card, target_file
from jaxrlhf.plan.compiling import Compiled, compiled, extrapolated, mesh_of_cards, missing, without_cudnn
from jaxrlhf.plan.work import Rates, work_of
from jaxrlhf.stages.calls import Call, calls_of
from jaxrlhf.stages.checks import check_stage, shares_of, valid_batches
from jaxrlhf.stages.shapes import Shapes, bytes_per_device, read_model, resolved

# Layers of the models that are compiled for a deeper one: all layers have the same shapes, so that memory and
# collectives grow by the same with each. How XLA packs arrays is noise on that: the farther apart, the less. Updates,
# which keep much of each layer, take the longest to compile.
DEPTHS, UPDATE_DEPTHS = (6, 12), (3, 8)
POLICIES = ("none", "dots", "full")  # of remat: the more is computed again, the less is kept
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command asks, beside the run's settings."""

    devices: int
    card: Card
    memory: float  # bytes of a card that a run may fill
    per_host: int = 8  # cards of a host


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One program, per card and call: bytes and seconds. None: no compiler for the card."""

    name: str
    calls: float  # in an iteration or step
    parts: dict[str, float]  # weights, adapters, optimizer, rows
    temporaries: float | None
    peak: float | None  # in memory at the fullest moment
    flops: float
    read: float
    sent: dict[str, float]  # least, by mesh axis
    seconds: dict[str, float]  # least at the card's rates: arithmetic, memory, links; least: all together
    bound_by: str
    compiled: Compiled | None
    grows: bool  # whether temporaries grow with the batch


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage: what an iteration (PPO) or an optimizer step takes."""

    stage: str
    batch_size: int
    programs: list[ProgramPlan]
    least_seconds: float
    peak: float | None
    largest_batch: int | None  # None: not known; 0: none fits
    held_back_by: str | None  # the program that the largest batch fills
    remat: dict[str, float]  # the update's peak under the policies that were compiled, the given one first


@dataclasses.dataclass(frozen=True)
class Plan:
    options: Options
    mesh: dict[str, int]
    parameters: int
    layers: int
    compiled_layers: list[int]  # of the models that were compiled; empty: none was
    stages: list[StagePlan]
    notes: list[str]


def make_plan(config: RunConfig, options: Options, say: Say = lambda text: None) -> Plan:
    """Plans the run's stages; `UserError` where a run would refuse its settings."""
    config, reason = resolved(_at_full_length(config)), missing()
    mesh = jax.sharding.AbstractMesh(
        mesh_sizes(config.mesh, options.devices), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
    )
    model = read_model(config.model)
    notes = [note for stage in config.stages for note in check_stage(config, stage, model, mesh)]
    if reason is None:
        mesh = mesh_of_cards(config.mesh, options.devices, options.per_host, target_file(options.card))
    with contextlib.ExitStack() as stack:
        stack.enter_context(compiled_with(config.compiler_options))
        if config.model.attention == "cudnn" and reason is None:
            try:
                stack.enter_context(without_cudnn())
            except (AttributeError, ImportError):
                xla = config.model.model_copy(update={"attention": "xla"})
                config = config.model_copy(update={"model": xla})
                notes.append("model.attention: this jax wants cuDNN for cudnn; planned with xla, which takes more")
        shapes = Shapes(config, mesh, model)
        stages = [_StagePlanner(stage, shapes, options, reason is None, say) for stage in config.stages]
        plans = [stage.plan() for stage in stages]
    parameters = sum(math.prod(leaf.shape) for leaf in named_parameters(shapes.base).values())
    depths = sorted(set().union(*(stage.depths for stage in stages)))
    return Plan(options, dict(mesh.shape), parameters, model.layers, depths, plans, [*notes, *filter(None, [reason])])


def _at_full_length(config: RunConfig) -> RunConfig:
    """The same run with answers that all have their full length: no rows are left behind in decoding, or cut after."""
    if config.ppo is None:
        return config
    full = {
        "sampling": config.ppo.sampling.model_copy(update={"max_compactions": 0}),
        "update": config.ppo.update.model_copy(update={"buckets": 1}),
    }
    return config.model_copy(update={"ppo": config.ppo.model_copy(update=full)})


def depths_of(call: Call, layers: int) -> tuple[int, ...]:
    """How many layers the models have that a program is compiled with, for a model of so many."""
    few = UPDATE_DEPTHS if call.remat is not None else DEPTHS
    return (layers,) if layers <= few[-1] or call.name.startswith("reward ") else few


class _StagePlanner:
    """Makes the plan of one stage."""

    def __init__(self, stage: str, shapes: Shapes, options: Options, compiles: bool, say: Say):
        self.stage, self.shapes, self.options, self.compiles, self.say = stage, shapes, options, compiles, say
        self.calls = calls_of(stage, shapes)
        self.depths: set[int] = set()

    def plan(self) -> StagePlan:
        batch, programs = getattr(self.shapes.config, self.stage).batch_size, self._programs(self.calls)
        least = sum(program.calls * program.seconds["least"] for program in programs)
        if not self.compiles:
            return StagePlan(self.stage, batch, programs, least, None, None, None, {})
        peak = max(program.peak for program in programs)
        held = self._largest_batch(batch, programs)
        return StagePlan(self.stage, batch, programs, least, peak, *held, self._remat(programs))

    def _programs(self, calls: list[Call]) -> list[ProgramPlan]:
        if not self.compiles:
            return [self._program(call, None) for call in calls]
        layers = self.shapes.model.layers
        asked = [(call, depth) for call in calls for depth in depths_of(call, layers)]
        self.depths |= {depth for _, depth in asked}
        made = {n: {c.name: c for c in calls_of(self.stage, self.shapes.with_layers(n))} for n in {n for _, n in asked}}

        def compile_one(call: Call, depth: int) -> Compiled:
            shallow = made[depth][call.name]
            shallow = shallow if call.remat is None else shallow.with_remat(call.remat)
            found = compiled(shallow, self.shapes.mesh.shape)
            how = "" if call.remat is None else f" and remat={call.remat}"
            self.say(f"{self.stage}: {call.name} with {depth} layers{how} compiled in {found.seconds:.0f} s")
            return found

        with ThreadPoolExecutor(2) as threads:
            answers = iter(list(threads.map(compile_one, *zip(*asked))))
        plans = []
        for call in calls:
            depths = depths_of(call, layers)
            ends = [next(answers) for _ in depths]
            plans.append(self._program(call, ends[0] if len(ends) == 1 else extrapolated(*ends, depths, layers)))
        return plans

    def _program(self, call: Call, found: Compiled | None) -> ProgramPlan:
        config, card, mesh = self.shapes.config, self.options.card, self.shapes.mesh.shape
        kinds = ("weights", "adapters", "optimizer")
        parts = {kind: float(bytes_per_device(call.resident.get(kind))) for kind in kinds}
        parts["rows"] = float(bytes_per_device(call.rows)) + (0.0 if found is None else found.results)
        # The line through few layers may be that of the prompts' pass, while with many the loop is the fuller moment.
        temporaries = None if found is None else max(found.temporaries, cache_bytes(call, self.shapes))
        peak = None if found is None else sum(parts.values()) + temporaries
        work, sent = work_of(call.name, call.args, call.kwargs, call.result, config).on_card(mesh)
        rates = Rates(card.flops32 if config.model.dtype == "float32" else card.flops, card.bandwidth)
        links, least = links_seconds(sent, mesh, self.options), work.least_seconds(rates)
        section = getattr(config, self.stage)
        size = section.update.microbatch_size if self.stage == "ppo" else section.microbatch_size
        whole = size is None or call.name in ("rollout", "greedy", "experience")
        return ProgramPlan(
            name=call.name,
            calls=call.times,
            parts=parts,
            temporaries=temporaries,
            peak=peak,
            flops=float(work.flops.sum()),
            read=float(work.bytes.sum()),
            sent=sent,
            seconds={
                "arithmetic": float(work.flops.sum()) / rates.flops,
                "memory": float(work.bytes.sum()) / rates.bytes,
                "links": links,
                "least": max(least, links),
            },
            bound_by="links" if links > least else work.bound_by(rates),
            compiled=found,
            grows=whole and not call.name.startswith("reward "),
        )

    def _remat(self, programs: list[ProgramPlan]) -> dict[str, float]:
        """The update's peak by policy: where the given one does not fit also of those that keep less, up to the first
        that fits."""
        ((update, given),) = ((call, p) for call, p in zip(self.calls, programs) if call.remat is not None)
        peaks = {update.remat: given.peak}
        for policy in POLICIES[POLICIES.index(update.remat) + 1 :]:
            if min(peaks.values()) > self.options.memory:
                (program,) = self._programs([update.with_remat(policy)])
                peaks[policy] = program.peak
        return peaks

    def _largest_batch(self, batch: int, programs: list[ProgramPlan]) -> tuple[int, str]:
        """(rows, the program that holds it back), with rows and what grows with them in proportion to the batch."""
        most = {}
        for p in programs:
            grown = p.parts["rows"] + (p.temporaries if p.grows else 0.0)
            most[p.name] = max(self.options.memory - (p.peak - grown), 0.0) / (grown / batch)
        held = min(most, key=most.get)
        return valid_batches(self.shapes.config, self.stage, shares_of(self.shapes.mesh), int(most[held])) or 0, held


def cache_bytes(call: Call, shapes: Shapes) -> float:
    """Bytes of keys and values of all positions, per card: what a loop of decoding holds at least."""
    if call.trips == 1:
        return 0.0
    model, mesh, (rows, positions) = shapes.model, shapes.mesh.shape, call.result.tokens.shape
    heads = model.kv_heads / (mesh["tensor"] if model.kv_heads % mesh["tensor"] == 0 else 1)
    size = jnp.dtype(shapes.config.model.dtype).itemsize
    return 2 * heads * model.head_dim * size * model.layers * rows * positions / shares_of(shapes.mesh)


def links_seconds(sent: dict[str, float], mesh: dict[str, int], options: Options) -> float:
    """The least time of what a card sends: along the links of a host, and over the network on axes that span hosts.

    An axis whose groups span hosts shares the network's adapters among the group's cards of a host.
    """
    total, stride = 0.0, 1
    for axis in reversed(AXES):
        size = mesh[axis]
        if size > 1:
            of_host = max(min(options.per_host // stride, size), 1)
            spans = stride * size > options.per_host
            across = sent[axis] / of_host / options.card.network if spans else 0.0
            total += max(sent[axis] / options.card.link if of_host > 1 else 0.0, across)
        stride *= size
    return total
