"""The plan of a run. It has the memory, arithmetic, traffic and least time of each program on a mesh of cards."""

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
from jaxrlhf.stages.checks import check_no_environment, check_one_mesh, check_stage, shares_of, valid_batches
from jaxrlhf.stages.shapes import Shapes, bytes_per_device, read_model, resolved

# Models with these numbers of layers are compiled instead of a deeper model. All layers have the same shapes, so memory
# and collectives grow linearly with the number of layers. The way in which XLA packs arrays adds noise. This noise
# matters less if the two numbers are far apart. Updates take the longest time to compile. They save much of each layer,
# so that fewer layers are enough.
DEPTHS, UPDATE_DEPTHS = (6, 12), (3, 8)
# Values of remat. Each value keeps fewer activations on the device than the one before.
POLICIES = ("none", "dots", "full", "offload")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command `plan`."""

    devices: int
    card: Card
    memory: float  # bytes of each card that a run may fill
    per_host: int = 8  # number of cards in a host


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """The plan of one program. It has the bytes and seconds of one call, on one card.

    If there is no compiler for the card, `temporaries`, `peak` and `compiled` are None.
    """

    name: str
    calls: float  # number of calls in a PPO iteration or an optimizer step
    parts: dict[str, float]  # bytes of weights, adapters, optimizer, rows
    temporaries: float | None  # bytes
    peak: float | None  # bytes
    flops: float  # least number of operations
    read: float  # least bytes from and to memory
    sent: dict[str, float]  # mesh axis -> least bytes sent
    seconds: dict[str, float]  # least seconds of "arithmetic", "memory" and "links" alone, and of the call ("least")
    bound_by: str  # arithmetic, memory or links
    compiled: Compiled | None
    grows: bool  # whether the temporaries grow with the batch


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """The plan of one stage, for one PPO iteration or for one optimizer step of another stage."""

    stage: str
    batch_size: int
    programs: list[ProgramPlan]
    least_seconds: float
    peak: float | None = None
    largest_batch: int | None = None  # None if unknown; 0 if no batch fits
    held_back_by: str | None = None  # the program that limits the largest batch
    # Value of remat -> peak bytes of the update. The first value is that of the run's settings.
    remat: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    options: Options
    mesh: dict[str, int]
    parameters: int
    layers: int
    compiled_layers: list[int]  # numbers of layers of the compiled models; empty without a compiler
    stages: list[StagePlan]
    notes: list[str]


def make_plan(config: RunConfig, options: Options, say: Callable[[str], None] = lambda text: None) -> Plan:
    """Returns the plan of all stages of the run. Raises `UserError` if the run would refuse the settings."""
    check_one_mesh(config)
    check_no_environment(config)
    config, reason = resolved(config), missing()
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
                notes.append(
                    "model.attention: without cuDNN, this version of jax cannot trace cudnn attention; the plan is for "
                    "xla attention, which needs more memory"
                )
        shapes = Shapes(config, mesh, model)
        planners = [_StagePlanner(stage, shapes, options, reason is None, say) for stage in config.stages]
        plans = [planner.plan() for planner in planners]
    parameters = sum(math.prod(leaf.shape) for leaf in named_parameters(shapes.base).values())
    depths = sorted(set().union(*(planner.depths for planner in planners)))
    notes += [reason] if reason else []
    return Plan(options, dict(mesh.shape), parameters, model.layers, depths, plans, notes)


class _StagePlanner:
    """Makes the plan of one stage. `depths` has the number of layers of each model that was compiled for the plan."""

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
        # Decoding needs at least the memory of its cache. In models with few layers, the pass over the prompts may have
        # the peak, and the extrapolation then misses the cache.
        temporaries = max(made.temporaries, cache_bytes(call, self.shapes)) if made else None
        work, sent = work_of(call.name, call.args, call.kwargs, call.result, config).on_card(mesh)
        flops, read = float(work.flops.sum()), float(work.bytes.sum())
        rates = Rates(card.flops32 if config.model.dtype == "float32" else card.flops, card.bandwidth)
        links, least = links_seconds(sent, mesh, self.options), work.least_seconds(rates)
        seconds = {"arithmetic": flops / rates.flops, "memory": read / rates.bytes, "links": links}
        section = getattr(config, self.stage)
        size = section.update.microbatch_size if self.stage == "ppo" else section.microbatch_size
        decodes_all = call.slots > 0 and self.shapes.config.ppo.sampling.slots is None
        whole = decodes_all or (not call.slots and (size is None or call.name == "experience"))
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
        """Returns the peak bytes of the update by value of remat.

        The first value is that of the run's settings. Values that save less follow until one of them fits.
        """
        ((update, own),) = ((call, p) for call, p in zip(self.calls, programs) if call.remat is not None)
        peaks = {update.remat: own.peak}
        for policy in POLICIES[POLICIES.index(update.remat) + 1 :]:
            if min(peaks.values()) > self.options.memory:
                peaks[policy] = self._programs([update.with_remat(policy)])[0].peak
        return peaks

    def _largest_batch(self, batch: int, programs: list[ProgramPlan]) -> tuple[int, str]:
        """Returns (the largest batch that fits, the program that limits it).

        The memory of rows and of growing temporaries is assumed to be proportional to the batch.
        """
        limits = {}
        for p in programs:
            growing = p.parts["rows"] + (p.temporaries if p.grows else 0.0)
            limits[p.name] = max(self.options.memory - (p.peak - growing), 0.0) / (growing / batch)
        name = min(limits, key=limits.get)
        return valid_batches(self.shapes.config, self.stage, shares_of(self.shapes.mesh), int(limits[name])) or 0, name


def cache_bytes(call: Call, shapes: Shapes) -> float:
    """Returns the bytes per card of the keys and values of all positions of the rows that decode at the same time.

    A decode loop needs at least these bytes. For a program without a decode loop, the result is 0.
    """
    if not call.slots:
        return 0.0
    model, mesh, positions = shapes.model, shapes.mesh.shape, call.result.tokens.shape[1]
    heads = model.kv_heads / (mesh["tensor"] if model.kv_heads % mesh["tensor"] == 0 else 1)
    size = jnp.dtype(shapes.config.model.dtype).itemsize
    shares = shares_of(shapes.mesh)
    shares *= mesh["context"] if call.slots % (shares * mesh["context"]) == 0 else 1
    return 2 * heads * model.head_dim * size * model.layers * call.slots * positions / shares


def links_seconds(sent: dict[str, float], mesh: dict[str, int], options: Options) -> float:
    """Returns the least seconds to send the bytes `sent`, which maps a mesh axis to bytes per card.

    Bytes are sent over the links inside a host. If an axis spans hosts, bytes are also sent over the network. The
    longer of the two times counts. Cards of one host that belong to the same group share their network adapters.
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
