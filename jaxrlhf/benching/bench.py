"""One measurement of a run: the machine's rates, its stages, and the rates again."""

import dataclasses
import math
from collections.abc import Callable

from jaxrlhf.benching.lengths import with_lengths
from jaxrlhf.benching.machine import describe, forget_peak, measure_rates
from jaxrlhf.benching.report import Bench
from jaxrlhf.benching.running import time_stage
from jaxrlhf.checkpoint.compilation_cache import compiled_anew
from jaxrlhf.config import RunConfig
from jaxrlhf.distributed.compiler_options import compiled_with
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.distributed.programs import peak_memory_bytes
from jaxrlhf.models.decoder import named_parameters
from jaxrlhf.models.fused_attention import check_device
from jaxrlhf.models.target import Target
from jaxrlhf.planning.checks import check
from jaxrlhf.planning.compiling import measure
from jaxrlhf.planning.count import Layout
from jaxrlhf.planning.planner import at_full_length
from jaxrlhf.planning.shapes import Shapes, read_model, resolved

LENGTHS = ("full", "geometric")


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked, beside the run's settings."""

    lengths: str = "full"
    repeats: int = 5  # calls of each program
    iterations: int = 5  # of PPO
    count: bool = False  # arithmetic as compiled, too


def bench(config: RunConfig, asked: Asked, say: Callable[[str], None] = lambda text: None) -> Bench:
    """Measures on all devices; `UserError` where the settings do not fit them or the model."""
    with compiled_anew():  # compiling is timed, and memory is what the compiler says
        return _bench(config, asked, say)


def _bench(config: RunConfig, asked: Asked, say: Callable[[str], None]) -> Bench:
    mesh = make_mesh(config.mesh)
    model = read_model(config.model)
    config = with_lengths(config, asked.lengths, model.vocab_size)
    for note in check(config, mesh, model):
        say(note)
    config = resolved(config)
    if config.model.attention == "cudnn":
        check_device(model, config.model.dtype)
    shapes = Shapes(config, mesh, dataclasses.replace(model, target=Target(attention=config.model.attention)))
    parameters = sum(math.prod(leaf.shape) for leaf in named_parameters(shapes.base()).values())
    say("measures the machine")
    before = measure_rates(config.model.dtype, mesh.size)
    forget_peak()
    with compiled_with(config.compiler_options):
        stages = [time_stage(stage, shapes, asked.repeats, asked.iterations, say) for stage in config.stages]
    peak = peak_memory_bytes()
    say("measures the machine again")
    after = measure_rates(config.model.dtype, mesh.size)
    counted = {}
    if asked.count:
        layout = Layout(dict(mesh.shape))
        for stage in config.stages:
            whole = dataclasses.replace(shapes, config=at_full_length(config), model=model)  # with XLA's attention
            programs = measure(stage, whole, layout, say)
            counted[stage] = {name: found.count.flops * mesh.size for name, found in programs.items()}
    about = {"parameters": parameters, "layers": model.layers, "dtype": config.model.dtype}
    about |= {"attention": config.model.attention, "compiler_options": config.compiler_options}
    return Bench(describe(mesh.size), before, after, about, asked.lengths, stages, counted, peak)
