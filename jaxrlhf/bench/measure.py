"""Measures a run. First the rates of the machine are measured, then each program alone, then whole PPO iterations."""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from jaxrlhf.bench import report
from jaxrlhf.bench.filling import Filler
from jaxrlhf.bench.iterations import time_iterations
from jaxrlhf.bench.machine import describe, forget_peak, measure_rates
from jaxrlhf.bench.timing import Timed, time_program
from jaxrlhf.checkpoint.compilation_cache import cached_programs
from jaxrlhf.config import RunConfig
from jaxrlhf.distributed.jit import compiled_with, peak_memory_bytes
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.errors import UserError
from jaxrlhf.models.decoder import named_parameters
from jaxrlhf.models.fused_attention import check_device
from jaxrlhf.plan.work import work_of
from jaxrlhf.stages.calls import Call, calls_of
from jaxrlhf.stages.checks import check_no_environment, check_one_mesh, check_stage
from jaxrlhf.stages.shapes import Shapes, read_model, resolved

_MEAN_SHARE = 4  # the mean of geometric lengths is the limit divided by this number, before lengths are cut


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command `bench`."""

    lengths: str = "full"  # lengths of completions: full or geometric
    repeats: int = 5  # number of timed calls of each program
    iterations: int = 5  # number of timed PPO iterations
    only: Collection[str] = ()  # names of the programs to time; if empty, all programs and PPO iterations
    profile: str | None = None  # a folder for traces; if None, there are no traces


def measure(config: RunConfig, options: Options, say: Callable[[str], None]) -> Iterator[tuple[dict[str, Any], str]]:
    """Measures on all devices. After each measurement, yields (all results so far as JSON values, new results as text).

    The rates of the machine are measured first. Then, for each stage, each program and the whole stage are measured.
    `say` prints progress messages. If `options.only` leaves out a program, programs that need its results get random
    arrays instead.
    Raises `UserError` if the settings do not fit the devices or the model.
    """
    check_one_mesh(config)
    check_no_environment(config)
    mesh, model = make_mesh(config.mesh), read_model(config.model)
    config = resolved(with_lengths(config, options.lengths, model.vocab_size))
    shapes, filler, began = Shapes(config, mesh, model), Filler(model, config.seed), time.perf_counter()
    with cached_programs(None, say), compiled_with(config.compiler_options):  # no cache, because compilations are timed
        calls = _checked_calls(shapes, options.only, say)
        say("measures the machine")
        start = time.perf_counter()
        rates = measure_rates(config.model.dtype, mesh.size, shapes.base.config.target)
        elsewhere = time.perf_counter() - start  # seconds of compilations and of running programs
        forget_peak()
        machine = {"flops_per_second": rates.flops, "bytes_per_second": rates.bytes}
        results = {"machine": describe(mesh.size) | machine, "model": _model(shapes), "lengths": options.lengths,
                   "peak_bytes": 0, "host_seconds": 0.0, "stages": []}  # fmt: skip
        yield results, report.opening(results)
        for stage, stage_calls in calls.items():
            timed: dict[str, Timed] = {}
            entry = {"stage": stage, "programs": []}
            results["stages"].append(entry)
            for call in stage_calls:
                say(f"{stage}: compiles {call.name}")
                program = timed[call.name] = Timed(call, filler.fill(call.args), filler.fill(call.kwargs))
                result = program.again()  # a first call, which also makes the arguments of the next program
                if call.result is not None:
                    filler.give(call.result, result[: len(call.result)] if isinstance(call.result, tuple) else result)
                work = work_of(call.name, program.args, program.kwargs, result, config)
                folder = options.profile and Path(options.profile) / f"{stage}.{call.name.replace('/', '_')}"
                entry["programs"].append(time_program(program, work, rates, options.repeats, folder))
                elsewhere += program.compile_seconds + sum(program.seconds)
                results["peak_bytes"] = peak_memory_bytes()
                results["host_seconds"] = time.perf_counter() - began - elsewhere - filler.seconds
                yield results, report.program_row(entry)
            if options.only:
                continue
            entry |= _sums(entry["programs"])
            if stage == "ppo" and options.iterations:
                say(f"{stage}: {options.iterations} iterations")
                start = time.perf_counter()
                entry["loop"] = time_iterations(shapes, timed, options.iterations)
                elsewhere += time.perf_counter() - start
            yield results, report.stage_sums(entry)
    yield results, report.closing(results)


def _checked_calls(shapes: Shapes, only: Collection[str], say: Callable[[str], None]) -> dict[str, list[Call]]:
    """Checks the settings and returns the programs of each stage. If `only` is not empty, only its programs remain."""
    config = shapes.config
    for stage in config.stages:
        for note in check_stage(config, stage, shapes.model, shapes.mesh):
            say(note)
    if config.model.attention == "cudnn":
        check_device(shapes.model, config.model.dtype)
    calls = {stage: calls_of(stage, shapes) for stage in config.stages}
    names = [call.name for stage_calls in calls.values() for call in stage_calls]
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"--only: this run has no program {unknown[0]!r}; the programs are {', '.join(names)}")
    chosen = {stage: [c for c in stage_calls if not only or c.name in only] for stage, stage_calls in calls.items()}
    return {stage: stage_calls for stage, stage_calls in chosen.items() if stage_calls}


def _model(shapes: Shapes) -> dict[str, Any]:
    config = shapes.config
    return {
        "parameters": sum(math.prod(leaf.shape) for leaf in named_parameters(shapes.base).values()),
        "layers": shapes.model.layers,
        "dtype": config.model.dtype,
        "attention": config.model.attention,
        "compiler_options": config.compiler_options,
    }


def _sums(programs: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the summed seconds of the programs of a PPO iteration or an optimizer step, and the token rates."""
    seconds, least = (sum(p["calls"] * p[name] for p in programs) for name in ("seconds", "least_seconds"))
    tokens = programs[0]["tokens"]
    return {"seconds": seconds, "least_seconds": least, "share": least / seconds, "tokens": tokens,
            "tokens_per_second": tokens / seconds}  # fmt: skip


def with_lengths(config: RunConfig, kind: str, vocabulary: int) -> RunConfig:
    """Returns the settings with other stop tokens, which make completions as long as `kind` says.

    If `kind` is "full", there are no stop tokens, and all completions have full length. If it is "geometric", a share
    of the vocabulary are stop tokens.

    Random weights give every token about the same probability. If a share p of the vocabulary are stop tokens, each
    sampled token ends its completion with probability p. The lengths then have a geometric distribution with mean
    1 / p, and are cut at the limit.
    """
    if config.ppo is None:
        return config
    sampling = config.ppo.sampling
    every = max(round(sampling.max_new_tokens / _MEAN_SHARE), 2)
    stops = () if kind == "full" else tuple(range(0, vocabulary, every))
    sampling = sampling.model_copy(update={"stop_tokens": stops, "pad_token": sampling.pad_token or 0})
    return config.model_copy(update={"ppo": config.ppo.model_copy(update={"sampling": sampling})})
