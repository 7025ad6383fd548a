"""Times a stage's programs on random data: each alone, and for PPO in the stage's own iteration."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf.bench.filling import Filler
from jaxrlhf.bench.kernels import Kernel, slowest
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.data.sources import LoadReport
from jaxrlhf.distributed.mesh import fetch
from jaxrlhf.plan.work import Work, work_of
from jaxrlhf.records import SFTBatch
from jaxrlhf.rewards.answers import Answers
from jaxrlhf.stages.calls import Call, calls_of
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.ppo_iteration import Iteration
from jaxrlhf.stages.ppo_sampling import Sampler
from jaxrlhf.stages.roles import Roles
from jaxrlhf.stages.shapes import Shapes
from jaxrlhf.tracking.metrics import MetricsLog

_CHAINED = ("update", "sft_update", "reward_model_update")  # give the next state, and take over the memory of theirs


class Timed:
    """A compiled program that notes how long each call took. Stands in for the `Program` that it was made from."""

    compiles = 1

    def __init__(self, call: Call, args: tuple, kwargs: dict[str, Any]):
        self.name, self.times, self.args, self.kwargs = call.name, call.times, args, kwargs
        self._static = call.program.static
        start = time.perf_counter()
        self._compiled = call.program.lower(*args, **kwargs).compile()
        self.compile_seconds = time.perf_counter() - start
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []  # of all threads of this process: less of them than cores x seconds wait

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if name not in self._static}
        start, busy = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(self._compiled(*args, **given))
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - busy)
        return result

    def again(self) -> Any:
        """One more call, on the arguments that it was made with; an update goes on from its own state."""
        result = self(*self.args, **self.kwargs)
        if self.name in _CHAINED:
            self.args = (result[0], *self.args[1:])
        return result

    @property
    def memory(self) -> dict[str, int]:
        """Bytes per device, as the compiler laid them out. The peak counts arguments and results, each once."""
        sizes = self._compiled.memory_analysis()
        given, made, over = sizes.argument_size_in_bytes, sizes.output_size_in_bytes, sizes.alias_size_in_bytes
        temporary = sizes.temp_size_in_bytes
        return {
            "arguments": given,
            "results": made - over,
            "temporaries": temporary,
            "peak": given + made - over + temporary,
        }


@dataclasses.dataclass(frozen=True)
class ProgramTimes:
    """One program, called alone."""

    name: str
    times: float  # calls in an iteration, or an optimizer step
    seconds: list[float]  # of each call, after one to warm up
    cpu_seconds: list[float]  # that all threads of this process were busy in each
    compile_seconds: float
    warm_seconds: float
    work: Work
    memory: dict[str, int]
    kernels: list[Kernel]  # that took most of the time; empty: no profile

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class LoopTimes:
    """PPO's own iterations, with all that the host does in them but logs, checkpoints and text."""

    seconds: list[float]  # of each iteration
    programs: list[float]  # of which the programs took
    by_program: dict[str, float]  # medians


@dataclasses.dataclass
class StageTimes:
    """What is known of a stage so far."""

    stage: str
    programs: list[ProgramTimes] = dataclasses.field(default_factory=list)
    loop: LoopTimes | None = None  # of PPO only

    @property
    def seconds(self) -> float:
        """Of an iteration, or of an optimizer step: the sum of its programs."""
        return sum(p.times * p.median for p in self.programs)

    @property
    def sampled(self) -> float:
        """Tokens that an iteration samples, or that an optimizer step reads."""
        return self.programs[0].work.tokens


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command asks, beside the run's settings."""

    lengths: str = "full"
    repeats: int = 5  # calls of each program
    iterations: int = 5  # of PPO
    only: Collection[str] = ()  # names of programs; empty: all, and PPO's iterations
    profile: str | None = None  # a folder for traces


def time_stage(
    stage: str, shapes: Shapes, options: Options, say: Callable[[str], None] = lambda text: None
) -> Iterator[StageTimes]:
    """Makes the stage's programs and their arguments, and calls each so often; then so many whole iterations.

    Yields what is known after each. With `only`, what a program is given that another would have made is random.
    """
    filler, timed, found = Filler(shapes.model, shapes.config.seed), {}, StageTimes(stage)
    for call in calls_of(stage, shapes):
        if options.only and call.name not in options.only:
            continue
        say(f"{stage}: compiles {call.name}")
        program = timed[call.name] = Timed(call, filler.fill(call.args), filler.fill(call.kwargs))
        result = program.again()  # warms up, and is what the next program is given
        if call.result is not None:
            first = result[: len(call.result)] if isinstance(call.result, tuple) else result
            filler.give(call.result, first)
        work, warm = work_of(call.name, program.args, program.kwargs, result, shapes.config), len(program.seconds)
        folder = None if options.profile is None else Path(options.profile) / f"{stage}.{call.name.replace('/', '_')}"
        with contextlib.nullcontext() if folder is None else jax.profiler.trace(str(folder)):
            for _ in range(options.repeats):
                program.again()
        kernels = [] if folder is None else slowest(folder)
        alone = program.seconds[warm:], program.cpu_seconds[warm:]
        found.programs.append(
            ProgramTimes(
                call.name, call.times, *alone, program.compile_seconds, program.seconds[0], work, program.memory,
                kernels,
            )
        )
        yield found
    if stage == "ppo" and options.iterations and not options.only:
        say(f"{stage}: {options.iterations} iterations")
        found.loop = _loop(shapes, timed, options.iterations)
        yield found


# ---------------------------------------------------------------- PPO's iteration


def _loop(shapes: Shapes, timed: dict[str, Timed], iterations: int) -> LoopTimes:
    """The stage's own `Iteration` over the programs that are compiled already."""
    config = shapes.config.ppo
    annotate, experience, update = timed["annotate"], timed["experience"], timed["update"]
    base, control = annotate.args[0], experience.args[4]
    state, reference = update.args[0], annotate.args[3]
    run = Run(shapes.config, shapes.mesh, MetricsLog(None), MetricsLog(None))
    sampler = Sampler(run, Roles(base, None), _RandomReward(shapes, timed), None)
    sampler.rollout = timed["rollout"]
    sampler.greedy_rollout = timed.get("greedy", timed["rollout"])
    mix = update.kwargs.get("mix")
    iteration = Iteration(
        run, sampler.roles, sampler, update.args[-1], state, reference, None if mix is None else _Mix(mix, config)
    )
    iteration.annotate, iteration.experience, iteration.update = annotate, experience, update
    prompts = _prompts(shapes)
    carried = {"ppo": state, "control": control, "draws": iteration.count(0)}
    if config.refresh_reference:
        carried["reference"] = reference
    before, whole, inside = {name: len(p.seconds) for name, p in timed.items()}, [], []
    for step in range(iterations + 1):
        marks = {name: len(p.seconds) for name, p in timed.items()}
        start = time.perf_counter()
        carried, *_ = iteration(carried, step, prompts)
        jax.block_until_ready(carried)
        seconds = time.perf_counter() - start
        if step == 0:  # compiles the small programs of the host
            before = {name: len(p.seconds) for name, p in timed.items()}
            continue
        whole.append(seconds)
        inside.append(sum(sum(p.seconds[marks[name] :]) for name, p in timed.items()))
    by_program = {name: statistics.median(p.seconds[before[name] :]) for name, p in timed.items()}
    return LoopTimes(whole, inside, by_program)


class _RandomReward:
    """Random scores; before them the programs run that the run's own reward would run."""

    name = "bench"

    def __init__(self, shapes: Shapes, timed: dict[str, Timed]):
        self.own = timed.get("reward")
        self.models = [p for name, p in timed.items() if name.startswith("reward ")]
        self.random = np.random.default_rng(shapes.config.seed)

    def __call__(self, answers: Answers) -> np.ndarray | jax.Array:
        for model in self.models:
            for _ in range(round(model.times)):
                model.again()
        if self.own is not None:
            return self.own(*self.own.args[:2], answers.rollout)
        return self.random.standard_normal(answers.rollout.tokens.shape[0]).astype(np.float32)


class _Mix:
    """Rows of the language-model mix, the same in each iteration."""

    def __init__(self, mix: SFTBatch, config: Any):
        self.rows, self.size = fetch(mix), config.pretraining.batch_size
        self.steps = config.update.epochs * config.update.minibatches

    def batch(self, step: int) -> SFTBatch:
        at = step % self.steps * self.size
        return jax.tree.map(lambda x: x[at : at + self.size], self.rows)


def _prompts(shapes: Shapes) -> PromptSet:
    """Random prompts of full length, four batches of them."""
    config = shapes.config.ppo
    count, length = 4 * config.batch_size, config.max_prompt_tokens
    ids = np.random.default_rng(shapes.config.seed).integers(0, shapes.model.vocab_size, (count, length), np.int32)
    return PromptSet(list(ids), [""] * count, [None] * count, [{}] * count, length, 0, LoadReport("random", count))
