"""The plan of a run: memory, arithmetic, exchange and least time of each of its programs on a mesh of cards."""

import dataclasses
import math
from collections.abc import Callable

import jax

from jaxrlhf.config import RunConfig
from jaxrlhf.distributed.mesh import AXES, mesh_sizes
from jaxrlhf.models.decoder import named_parameters
from jaxrlhf.plan.cards import Card, target_file
from jaxrlhf.plan.compiling import Ask, Compiled, Compiler, extrapolated, missing
from jaxrlhf.plan.work import Rates, Role, Work, work_of
from jaxrlhf.stages.calls import Call, calls_of
from jaxrlhf.stages.settings import check_stage, shares_of, valid_batches
from jaxrlhf.stages.shapes import Shapes, bytes_per_device, read_model, resolved

# Layers of the models that are compiled for a deeper one: all layers have the same shapes, so that memory and
# collectives grow by the same with each. The first layer and the last are unlike the others: updates need more.
DEPTHS, UPDATE_DEPTHS = (2, 4), (3, 5)
POLICIES = ("none", "dots", "full")  # of remat: the more is computed again, the less is kept


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command asks, beside the run's settings."""

    devices: int
    card: Card
    memory: float  # bytes of a card that a run may fill
    per_host: int = 8
    remat: bool = False  # whether an update that fits is tried with less that is computed again


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One program, per card and call."""

    name: str
    times: float  # calls in an iteration or step
    parts: dict[str, float]  # bytes: weights, adapters, optimizer, rows, cache; of the cache the filled one
    temporaries: float | None  # bytes, the cache among them; None: no compiler for the card
    compiled: Compiled | None
    work: Work
    sent: dict[str, float]  # least bytes by mesh axis
    seconds: dict[str, float]  # least, at the card's rates: arithmetic, memory, links
    bound_by: str
    least: float  # seconds
    grows: bool  # whether temporaries grow with the batch

    @property
    def peak(self) -> float | None:
        """Bytes in memory at the fullest moment."""
        held = sum(size for name, size in self.parts.items() if name != "cache")
        return None if self.temporaries is None else held + self.temporaries


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage: what an iteration (PPO) or an optimizer step takes."""

    stage: str
    batch: int
    programs: list[ProgramPlan]
    largest_batch: int | None  # None: not known; 0: none fits
    held_back_by: str | None  # the program that the largest batch fills
    remat: dict[str, ProgramPlan]  # the update under the policies that were compiled, the given one first

    @property
    def peak(self) -> float | None:
        peaks = [program.peak for program in self.programs]
        return None if None in peaks else max(peaks)

    @property
    def least(self) -> float:
        """Seconds."""
        return sum(program.times * program.least for program in self.programs)


@dataclasses.dataclass(frozen=True)
class Plan:
    options: Options
    mesh: dict[str, int]
    parameters: int
    layers: int
    depths: tuple[int, ...]  # of the models that were compiled; empty: none was
    stages: list[StagePlan]
    notes: list[str]


def make_plan(config: RunConfig, options: Options, say: Callable[[str], None] = lambda text: None) -> Plan:
    """Plans the run's stages; `UserError` where a run would refuse its settings."""
    config = resolved(_at_full_length(config))
    sizes = mesh_sizes(config.mesh, options.devices)
    mesh = jax.sharding.AbstractMesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
    model = read_model(config.model)
    notes = [note for stage in config.stages for note in check_stage(config, stage, model, mesh)]
    shapes = Shapes(config, mesh, model)
    parameters = sum(math.prod(leaf.shape) for leaf in named_parameters(shapes.base).values())
    calls = {stage: calls_of(stage, shapes) for stage in config.stages}
    reason = missing()
    if reason is not None:
        stages = [_stage_plan(stage, calls[stage], {}, shapes, options, None) for stage in config.stages]
        return Plan(options, dict(mesh.shape), parameters, model.layers, (), stages, [*notes, reason])
    with Compiler(config, options.devices, options.per_host, target_file(options.card), say) as compiler:
        stages = []
        for stage in config.stages:
            found = _compiled(compiler, stage, [(call, None) for call in calls[stage]], model.layers)
            named = {call.name: one for call, one in zip(calls[stage], found)}
            stages.append(_stage_plan(stage, calls[stage], named, shapes, options, compiler))
    depths = tuple(sorted({d for s in config.stages for c in calls[s] for d in depths_of(c, model.layers)}))
    return Plan(options, dict(mesh.shape), parameters, model.layers, depths, stages, notes)


def _at_full_length(config: RunConfig) -> RunConfig:
    """The same run with answers that all have their full length: no rows are left behind in decoding, or cut after."""
    if config.ppo is None:
        return config
    full = {
        "sampling": config.ppo.sampling.model_copy(update={"halvings": 0}),
        "update": config.ppo.update.model_copy(update={"buckets": 1}),
    }
    return config.model_copy(update={"ppo": config.ppo.model_copy(update=full)})


def depths_of(call: Call, layers: int) -> tuple[int, ...]:
    """How many layers the models have that a program is compiled with, for a model of so many."""
    few = UPDATE_DEPTHS if call.remat is not None else DEPTHS
    return (layers,) if layers <= few[-1] or call.name.startswith("reward ") else few


def _compiled(compiler: Compiler, stage: str, asked: list[tuple[Call, str | None]], layers: int) -> list[Compiled]:
    """Each call under a policy of remat (None: its own), extrapolated to the model's depth."""
    asks = [
        Ask(stage, call.name, depth, policy) for call, policy in asked for depth in depths_of(call, layers)
    ]
    answers = iter(compiler.compiled(asks))
    found = []
    for call, _ in asked:
        depths = depths_of(call, layers)
        ends = [next(answers) for _ in depths]
        found.append(ends[0] if len(ends) == 1 else extrapolated(*ends, depths, layers))
    return found


def _stage_plan(
    stage: str,
    calls: list[Call],
    found: dict[str, Compiled],
    shapes: Shapes,
    options: Options,
    compiler: Compiler | None,
) -> StagePlan:
    batch = getattr(shapes.config, stage).batch_size
    programs = [_program_plan(stage, call, found.get(call.name), shapes, options) for call in calls]
    (update,) = (call for call in calls if call.remat is not None)
    given = next(program for program in programs if program.name == update.name)

    def under(policy: str) -> ProgramPlan:
        (one,) = _compiled(compiler, stage, [(update, policy)], shapes.model.layers)
        return _program_plan(stage, update.with_remat(policy), one, shapes, options)

    tried = {update.remat: given} if compiler is None else search(update.remat, given, under, options)
    return StagePlan(stage, batch, programs, *largest_batch(stage, batch, programs, shapes, options.memory), tried)


def search(
    given: str, plan: ProgramPlan, under: Callable[[str], ProgramPlan], options: Options
) -> dict[str, ProgramPlan]:
    """The update under the policies up to the first that fits: those that keep less where the given one does not fit,
    those that keep more where it does and `options.remat` asks for them. No more is compiled than needed.
    """
    plans, at, fits = {given: plan}, POLICIES.index(given), plan.peak <= options.memory
    others = POLICIES[:at] if fits else POLICIES[at + 1 :]
    if (fits and not options.remat) or plan.peak - plan.temporaries > options.memory:
        others = ()
    for policy in others:
        plans[policy] = under(policy)
        if plans[policy].peak <= options.memory:
            break
    return plans


def _program_plan(stage: str, call: Call, found: Compiled | None, shapes: Shapes, options: Options) -> ProgramPlan:
    config, card, mesh = shapes.config, options.card, shapes.mesh.shape
    parts = {name: float(bytes_per_device(call.lives.get(name))) for name in ("weights", "adapters", "optimizer")}
    parts["rows"] = float(bytes_per_device(call.rows)) + (0.0 if found is None else found.results)
    parts["cache"] = _cache(call, shapes)
    # The line through few layers may be the prompts' pass, and the loop the fuller moment of many: it holds the cache.
    temporaries = None if found is None else max(found.temporaries, parts["cache"])
    work, sent = work_of(call.name, call.args, call.kwargs, call.result, config).on_card(mesh)
    rates = Rates(card.flops32 if config.model.dtype == "float32" else card.flops, card.bandwidth)
    seconds = {
        "arithmetic": float(work.flops.sum()) / rates.flops,
        "memory": float(work.bytes.sum()) / rates.bytes,
        "links": links_seconds(sent, mesh, options),
    }
    least, bound = work.least_seconds(rates), work.bound_by(rates)
    if seconds["links"] > least:
        least, bound = seconds["links"], "links"
    section = getattr(config, stage)
    size = section.update.microbatch_size if stage == "ppo" else section.microbatch_size
    grows = size is None or call.name in ("rollout", "greedy", "experience")
    return ProgramPlan(
        call.name, call.times, parts, temporaries, found, work, sent, seconds, bound, least,
        grows and not call.name.startswith("reward "),
    )  # fmt: skip


def _cache(call: Call, shapes: Shapes) -> float:
    """Bytes of keys and values of all positions, per card: what a loop of decoding holds."""
    if call.turns == 1:
        return 0.0
    base, answers = call.args[0], call.result
    role, (rows, positions) = Role(base, None), answers.tokens.shape
    heads = shapes.model.kv_heads
    tensor = shapes.mesh.shape["tensor"] if heads % shapes.mesh.shape["tensor"] == 0 else 1
    return role.cache_bytes(rows * positions * shapes.model.layers) / shares_of(shapes.mesh) / tensor


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


def largest_batch(
    stage: str, batch: int, programs: list[ProgramPlan], shapes: Shapes, memory: float
) -> tuple[int | None, str | None]:
    """(rows, the program that holds it back), with rows and what grows with them in proportion to the batch."""
    most, held = math.inf, None
    for p in programs:
        if p.temporaries is None:
            return None, None
        fixed = p.parts["weights"] + p.parts["adapters"] + p.parts["optimizer"] + (0.0 if p.grows else p.temporaries)
        slope = (p.parts["rows"] + (p.temporaries if p.grows else 0.0)) / batch
        rows = 0.0 if fixed > memory else (memory - fixed) / slope
        if rows < most:
            most, held = rows, p.name
    return valid_batches(shapes.config, stage, shares_of(shapes.mesh), int(most)) or 0, held
