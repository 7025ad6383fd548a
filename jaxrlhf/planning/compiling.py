"""Compiles a stage's programs from shapes, for a model of a few layers, and measures what comes out."""

import dataclasses
import re
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.planning.count import Collective, Count, Layout, count
from jaxrlhf.planning.hlo import Module, parse
from jaxrlhf.planning.programs import STAGES, Call
from jaxrlhf.planning.shapes import Shapes, bytes_per_device

# Machine code is not wanted: what is measured is known before it is made. Names that a version lacks are left out.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
_PASSES = ("spmd-partitioning", "call-inliner")  # the text is taken after the first of these that ran


@dataclasses.dataclass(frozen=True)
class Measured:
    """One program: its counts, and what the compiler says of its memory; bytes per device."""

    call: Call
    count: Count
    compiled: float  # temporaries as the compiler has laid them out
    parts: dict[str, float]  # what lies in memory beside temporaries: weights, adapters, optimizer, rows, results
    cache: float  # keys and values, part of the temporaries
    layers: int  # of the model that it was compiled for, or that it is extrapolated to
    results: Any  # shapes of what it gives, where that lies


def measure(
    stage: str,
    shapes: Shapes,
    layout: Layout,
    say: Callable[[str], None],
    wanted: Callable[[Call], bool] = lambda call: True,
    known: Mapping[str, Measured] = types.MappingProxyType({}),
) -> dict[str, Measured]:
    """The stage's programs that are wanted, compiled one after another, by name.

    `known` are those of another number of layers: where a program that is not wanted stands before one that is, the
    results are taken from there, as their shapes do not depend on it.
    """
    calls, found, answer = STAGES[stage](shapes), {}, None
    while True:
        try:
            call = calls.send(answer)
        except StopIteration:
            return found
        if wanted(call):
            say(f"{stage}: compiles {call.name} with {shapes.model.layers} layers")
            found[call.name] = measure_call(call, shapes.model.layers, layout)
        elif call.name not in known:
            return found
        answer = (found if wanted(call) else known)[call.name].results


def measure_call(call: Call, layers: int, layout: Layout) -> Measured:
    """One program of a model of so many layers."""
    lowered = call.program.lower(*call.args, **call.kwargs)
    compiled, text = _compile(lowered)
    results = jax.tree.map(
        lambda given, sharding: jax.ShapeDtypeStruct(given.shape, given.dtype, sharding=sharding),
        lowered.out_info,
        compiled.output_shardings,
    )
    module = parse(text)
    counted = count(module, layout)
    parts = {name: float(bytes_per_device(tree)) for name, tree in call.lives.items()}
    parts |= {"rows": float(bytes_per_device(call.rows)), "results": counted.outputs}
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    cache = _cache(module, call.cache) if call.cache else 0.0
    return Measured(call, counted, temporaries, parts, cache, layers, results)


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """The compiled program, and the text of one device's part of it as the partitioner left it."""
    options = dict(_QUICK)
    while True:
        with tempfile.TemporaryDirectory() as folder:
            dump = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "|".join(_PASSES)}
            try:
                compiled = lowered.compile(compiler_options=options | dump)
            except jax.errors.JaxRuntimeError as error:
                unknown = re.search(r"No such compile option: '(\w+)'", str(error))
                if unknown is None or options.pop(unknown[1], None) is None:
                    raise
                continue
            return compiled, _partitioned(Path(folder))


def _partitioned(folder: Path) -> str:
    for name in _PASSES:
        texts = sorted(folder.glob(f"*.after_{name}.*.txt"), key=lambda file: file.stat().st_size)
        if texts:  # small programs may be compiled on the way: the largest is meant
            return texts[-1].read_text(encoding="utf-8")
    raise RuntimeError(f"XLA wrote no text after its passes {' or '.join(_PASSES)}")


def _cache(module: Module, positions: int) -> float:
    """Bytes of keys [rows, heads, size, positions] and values [rows, heads, positions, size] that a loop carries."""
    carried = (i.arrays for i in module.main.instructions.values() if i.op == "while")
    return float(sum(a.bytes for arrays in carried for a in arrays if len(a.shape) == 4 and positions in a.shape[2:]))


# ---------------------------------------------------------------- a few layers -> all

# Layers of the models that are compiled. The first layer and the last are unlike the others (nobody wants the gradient
# of the embedding, nor what the last would say of the prompt): what an update holds at its fullest moment grows evenly
# from three layers on. Programs without gradients grow evenly from two on.
DEPTHS, UPDATE_DEPTHS = (2, 3), (3, 4)


def depths_of(layers: int) -> tuple[int, ...]:
    """How many layers the models have that are compiled for one of so many."""
    return (layers,) if layers <= UPDATE_DEPTHS[-1] else (*DEPTHS, UPDATE_DEPTHS[-1])


def measure_depths(
    stage: str, shapes: Shapes, layout: Layout, sizes: Sequence[int], say: Callable[[str], None]
) -> dict[int, dict[str, list[Measured]]]:
    """By batch size and name, each program of models of one or two numbers of layers, the fewer first."""

    def run(size: int, depth: int, *which: Any) -> dict[str, Measured]:
        section = getattr(shapes.config, stage).model_copy(update={"batch_size": size})
        config = shapes.config.model_copy(update={stage: section})
        return measure(stage, dataclasses.replace(shapes, config=config).with_layers(depth), layout, say, *which)

    fewest, *more = depths_of(shapes.model.layers)
    common = more[0] if more else fewest
    with ThreadPoolExecutor(2) as threads:
        first = dict(zip(sizes, threads.map(lambda size: run(size, common), sizes)))
        found = {size: {name: [m] for name, m in programs.items()} for size, programs in first.items()}
        if not more:
            return found
        others = [(fewest, lambda call: call.remat is None), (more[-1], lambda call: call.remat is not None)]
        asked = [(size, threads.submit(run, size, *other, first[size])) for size in sizes for other in others]
        for size, programs in asked:
            for name, m in programs.result().items():
                found[size][name] = sorted([*found[size][name], m], key=lambda m: m.layers)
    return found


def measure_with(
    policy: str, update: Sequence[Measured], layout: Layout, say: Callable[[str], None]
) -> list[Measured]:
    """The same update under another policy of rematerialisation."""

    def run(m: Measured) -> Measured:
        say(f"compiles {m.call.name} with {m.layers} layers and remat={policy}")
        return measure_call(m.call.with_remat(policy), m.layers, layout)

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(run, update))


def extrapolated(found: Sequence[Measured], layers: int) -> Measured:
    """What a model of `layers` layers has, on the line through two of fewer layers; the one itself where there is one.

    All layers have the same shapes, so that every number is a sum of a part per layer and a part that stays; largest
    sums may bend, where another moment becomes the fullest.
    """
    if len(found) == 1:
        return found[0]
    few, more = found
    a, b = few.layers, more.layers

    def line(x: float, y: float) -> float:
        return max(x + (y - x) * (layers - a) / (b - a), 0.0)

    first, second = few.count, more.count
    kinds = {_kind(c): c for c in (*first.collectives, *second.collectives)}
    collectives = []
    for kind, c in kinds.items():
        ends = [next((x for x in side.collectives if _kind(x) == kind), None) for side in (first, second)]
        values = [
            line(*(0.0 if end is None else getattr(end, field) for end in ends)) for field in ("count", "bytes", "wire")
        ]
        collectives.append(dataclasses.replace(c, count=values[0], bytes=values[1], wire=values[2]))
    summed = ("flops", "bytes", "peak", "outputs")
    numbers = {name: line(getattr(first, name), getattr(second, name)) for name in summed}
    joined = Count(**numbers, collectives=sorted(collectives, key=lambda c: -c.wire), unknown_loops=first.unknown_loops)
    return Measured(
        more.call,
        joined,
        line(few.compiled, more.compiled),
        {name: line(few.parts[name], more.parts[name]) for name in more.parts},
        line(few.cache, more.cache),
        layers,
        more.results,
    )


def _kind(c: Collective) -> tuple:
    return c.kind, c.axes, c.size, c.hosts
