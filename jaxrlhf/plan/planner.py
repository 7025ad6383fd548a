"""The plan of a run: memory, arithmetic, traffic and least time of each of its programs on a mesh of cards."""

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

# Depths that are compiled for a deeper model. All layers have the same shapes, so memory and collectives grow by the
# same with each; how XLA packs arrays is noise on that line, and less the farther apart the depths are. Updates keep
# much of each layer and take the longest to compile.
DEPTHS, UPDATE_DEPTHS = (6, 12), (3, 8)
POLICIES = ("none", "dots", "full")  # of remat; each keeps less than the one before it


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's own options."""

    devices: int
    card: Card
    memory: float  # bytes of a card that a run may fill
    per_host: int = 8  # cards of a host


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One program, per card and call: bytes and seconds. None without a compiler for the card."""

    name: str
    calls: float  # in an iteration or step
    parts: dict[str, float]  # weights, adapters, optimizer, rows
    temporaries: float | None
    peak: float | None
    flops: float
    read: float
    sent: dict[str, float]  # least, by mesh axis
    seconds: dict[str, float]  # least at the card's rates: arithmetic, memory, links; least: all together
    bound_by: str
    compiled: Compiled | None
    grows: bool  # whether temporaries grow with the batch


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage: an iteration (PPO) or an optimizer step."""

    stage: str
    batch_size: int
    programs: list[ProgramPlan]
    least_seconds: float
    peak: float | None = None
    largest_batch: int | None = None  # None: unknown; 0: none fits
    held_back_by: str | None = None  # the program that limits the largest batch
    remat: dict[str, float] = dataclasses.field(default_factory=dict)  # policy -> the update's peak; the run's first


@dataclasses.dataclass(frozen=True)
class Plan:
    options: Options
    mesh: dict[str, int]
    parameters: int
    layers: int
    compiled_layers: list[int]  # depths that were compiled; empty without a compiler
    stages: list[StagePlan]
    notes: list[str]


def make_plan(config: RunConfig, options: Options, say: Callable[[str], None] = lambda text: None) -> Plan:
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
                config = config.model_copy(update={"model": config.model.model_copy(update={"attention": "xla"})})
                notes.append("model.attention: this jax needs cuDNN for cudnn; planned with xla, which takes more")
        shapes = Shapes(config, mesh, model)
        planners = [_StagePlanner(stage, shapes, options, reason is None, say) for stage in config.stages]
        plans = [planner.plan() for planner in planners]
    parameters = sum(math.prod(leaf.shape) for leaf in named_parameters(shapes.base).values())
    depths = sorted(set().union(*(planner.depths for planner in planners)))
    notes += [reason] if reason else []
    return Plan(options, dict(mesh.shape), parameters, model.layers, depths, plans, notes)


def _at_full_length(config: RunConfig) -> RunConfig:
    """The same run with completions of full length: decoding drops no rows, and the update cuts none."""
    if config.ppo is None:
        return config
    sampling = config.ppo.sampling.model_copy(update={"max_compactions": 0})
    update = config.ppo.update.model_copy(update={"buckets": 1})
    ppo = config.ppo.model_copy(update={"sampling": sampling, "update": update})
    return config.model_copy(update={"ppo": ppo})


class _StagePlanner:
    """Makes the plan of one stage. `depths` collects how many layers the compiled models have."""

    def __init__(self, stage: str, shapes: Shapes, options: Options, compiles: bool, say: Callable[[str], None]):
        self.stage, self.shapes, self.options, self.compiles, self.say = stage, shapes, options, compiles, say
        self.calls, self.layers = calls_of(stage, shapes), shapes.model.layers
        self.depths: set[int] = set()

    def plan(self) -> StagePlan:
        batch, programs = getattr(self.shapes.config, self.stage).batch_size, self._programs(self.calls)
        least = sum(program.calls * program.seconds["least"] for program in programs)
        if not self.compiles:
            return StagePlan(self.stage, batch, programs, least)
        peak, limit = max(program.peak for program in programs), self._largest_batch(batch, programs)
        return StagePlan(self.stage, batch, programs, least, peak, *limit, self._remat(programs))

    def _programs(self, calls: list[Call]) -> list[ProgramPlan]:
        if not self.compiles:
            return [self._program(call, None) for call in calls]
        depths = [self._depths_of(call) for call in calls]
        layers = {n for few in depths for n in few}
        shallow = {n: {c.name: c for c in calls_of(self.stage, self.shapes.with_layers(n))} for n in layers}
        self.depths |= layers

        def compile_at(n: int, call: Call) -> Compiled:
            shallow_call = shallow[n][call.name]
            if call.remat is not None:
                shallow_call = shallow_call.with_remat(call.remat)
            made = compiled(shallow_call, self.shapes.mesh.shape)
            remat = "" if call.remat is None else f" and remat={call.remat}"
            self.say(f"{self.stage}: {call.name} with {n} layers{remat} compiled in {made.seconds:.0f} s")
            return made

        with ThreadPoolExecutor(2) as threads:
            futures = [[threads.submit(compile_at, n, call) for n in few] for call, few in zip(calls, depths)]
        plans = []
        for call, few, of_call in zip(calls, depths, futures):
            made = [future.result() for future in of_call]
            plans.append(self._program(call, made[0] if len(few) == 1 else extrapolated(*made, few, self.layers)))
        return plans

    def _depths_of(self, call: Call) -> tuple[int, ...]:
        few = UPDATE_DEPTHS if call.remat is not None else DEPTHS
        return (self.layers,) if self.layers <= few[-1] or call.name.startswith("reward ") else few

    def _program(self, call: Call, made: Compiled | None) -> ProgramPlan:
        config, card, mesh = self.shapes.config, self.options.card, self.shapes.mesh.shape
        kinds = ("weights", "adapters", "optimizer")
        parts = {kind: float(bytes_per_device(call.resident.get(kind))) for kind in kinds}
        parts["rows"] = float(bytes_per_device(call.rows)) + (made.results if made else 0.0)
        # Decoding holds at least its cache; at few layers the pass over the prompts may have the peak instead.
        temporaries = max(made.temporaries, cache_bytes(call, self.shapes)) if made else None
        work, sent = work_of(call.name, call.args, call.kwargs, call.result, config).on_card(mesh)
        flops, read = float(work.flops.sum()), float(work.bytes.sum())
        rates = Rates(card.flops32 if config.model.dtype == "float32" else card.flops, card.bandwidth)
        links, least = links_seconds(sent, mesh, self.options), work.least_seconds(rates)
        seconds = {"arithmetic": flops / rates.flops, "memory": read / rates.bytes, "links": links}
        section = getattr(config, self.stage)
        size = section.update.microbatch_size if self.stage == "ppo" else section.microbatch_size
        whole = size is None or call.name in ("rollout", "greedy", "experience")
        return ProgramPlan(
            name=call.name,
            calls=call.times,
            parts=parts,
            temporaries=temporaries,
            peak=sum(parts.values()) + temporaries if made else None,
            flops=flops,
            read=read,
            sent=sent,
            seconds=seconds | {"least": max(least, links)},
            bound_by="links" if links > least else work.bound_by(rates),
            compiled=made,
            grows=whole and not call.name.startswith("reward "),
        )

    def _remat(self, programs: list[ProgramPlan]) -> dict[str, float]:
        """The update's peak by policy: the run's own, then those that keep less, up to the first that fits."""
        ((update, own),) = ((call, p) for call, p in zip(self.calls, programs) if call.remat is not None)
        peaks = {update.remat: own.peak}
        for policy in POLICIES[POLICIES.index(update.remat) + 1 :]:
            if min(peaks.values()) > self.options.memory:
                peaks[policy] = self._programs([update.with_remat(policy)])[0].peak
        return peaks

    def _largest_batch(self, batch: int, programs: list[ProgramPlan]) -> tuple[int, str]:
        """(rows, the program that limits them), where rows and growing temporaries are proportional to the batch."""
        limits = {}
        for p in programs:
            growing = p.parts["rows"] + (p.temporaries if p.grows else 0.0)
            limits[p.name] = max(self.options.memory - (p.peak - growing), 0.0) / (growing / batch)
        name = min(limits, key=limits.get)
        return valid_batches(self.shapes.config, self.stage, shares_of(self.shapes.mesh), int(limits[name])) or 0, name


def cache_bytes(call: Call, shapes: Shapes) -> float:
    """Bytes per card of the keys and values of all positions, which a decode loop holds at least; 0 without a loop."""
    if call.trips == 1:
        return 0.0
    model, mesh, (rows, positions) = shapes.model, shapes.mesh.shape, call.result.tokens.shape
    heads = model.kv_heads / (mesh["tensor"] if model.kv_heads % mesh["tensor"] == 0 else 1)
    size = jnp.dtype(shapes.config.model.dtype).itemsize
    return 2 * heads * model.head_dim * size * model.layers * rows * positions / shares_of(shapes.mesh)


def links_seconds(sent: dict[str, float], mesh: dict[str, int], options: Options) -> float:
    """The least time to send these bytes: along the links of a host, and over the network on axes that span hosts.

    The cards of a group in one host share the network's adapters.
    """
    total, stride = 0.0, 1
    for axis in reversed(AXES):
        size = mesh[axis]
        if size > 1:
            of_host = max(min(options.per_host // stride, size), 1)
            across = sent[axis] / of_host / options.card.network if stride * size > options.per_host else 0.0
            total += max(sent[axis] / options.card.link if of_host > 1 else 0.0, across)
        stride *= size
    return total
