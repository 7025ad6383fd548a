"""One measurement of a run: the machine's rates, its stages' programs, and the rates again."""

import math
import time
from collections.abc import Iterator
from typing import Any

from jaxrlhf.bench.lengths import with_lengths
from jaxrlhf.bench.machine import describe, forget_peak, measure_rates
from jaxrlhf.bench.report import Bench
from jaxrlhf.bench.running import Options, time_stage
from jaxrlhf.checkpoint.compilation_cache import compiled_anew
from jaxrlhf.config import RunConfig
from jaxrlhf.distributed.compiler_options import check_options, compiled_with
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.distributed.programs import peak_memory_bytes
from jaxrlhf.errors import UserError
from jaxrlhf.models.decoder import named_parameters
from jaxrlhf.models.fused_attention import check_device
from jaxrlhf.plan.work import Rates
from jaxrlhf.stages.calls import calls_of
from jaxrlhf.stages.settings import check_stage
from jaxrlhf.stages.shapes import Shapes, read_model, resolved


def measure(config: RunConfig, options: Options, say: Any = lambda text: None) -> Iterator[Bench]:
    """Measures on all devices, and yields what is known: at first the rates, then after each program.

    `UserError` where the settings do not fit the devices or the model.
    """
    began, mesh, model = time.perf_counter(), make_mesh(config.mesh), read_model(config.model)
    config = resolved(with_lengths(config, options.lengths, model.vocab_size))
    check_options(config.compiler_options)
    for stage in config.stages:
        for note in check_stage(config, stage, model, mesh):
            say(note)
    if config.model.attention == "cudnn":
        check_device(model, config.model.dtype)
    shapes = Shapes(config, mesh, model)
    _check_only(shapes, options.only)
    parameters = sum(math.prod(leaf.shape) for leaf in named_parameters(shapes.base).values())
    about = {"parameters": parameters, "layers": model.layers, "dtype": config.model.dtype}
    about |= {"attention": config.model.attention, "compiler_options": config.compiler_options}
    before, took = _rates(config, mesh.size, say)
    forget_peak()
    bench = Bench(describe(mesh.size), before, None, about, options.lengths, [], 0, 0.0)
    yield bench
    # Compiling is timed, and memory is what the compiler says.
    with compiled_anew(), compiled_with(config.compiler_options):
        for stage in config.stages:
            for number, times in enumerate(time_stage(stage, shapes, options, say)):
                if number == 0:
                    bench.stages.append(times)
                bench.peak_bytes, bench.seconds = peak_memory_bytes(), time.perf_counter() - began - took
                yield bench
    bench.after, _ = _rates(config, mesh.size, say)
    yield bench


def _rates(config: RunConfig, devices: int, say: Any) -> tuple[Rates, float]:
    """(rates of the machine, seconds that measuring them took)."""
    say("measures the machine")
    start = time.perf_counter()
    return measure_rates(config.model.dtype, devices), time.perf_counter() - start


def _check_only(shapes: Shapes, only: Any) -> None:
    known = [call.name for stage in shapes.config.stages for call in calls_of(stage, shapes)] if only else []
    for name in only:
        if name not in known:
            raise UserError(f"--only: this run has no program {name!r}; it has {', '.join(known)}")
