"""PPO's own iterations over programs that are compiled and timed already, with random prompts and scores."""

import statistics
import time
from typing import Any

import jax
import numpy as np

from jaxrlhf.bench.timing import Timed
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.data.sources import LoadReport
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.ppo.iteration import Iteration, StageState
from jaxrlhf.stages.ppo.sampler import Sampler
from jaxrlhf.stages.roles import Roles
from jaxrlhf.stages.shapes import Shapes
from jaxrlhf.tracking.metrics import MetricsLog


def time_iterations(shapes: Shapes, timed: dict[str, Timed], iterations: int) -> dict[str, Any]:
    """Seconds of the stage's own `Iteration`, in medians: with all that the host does but logs, checkpoints and text.

    `timed` has all programs of ppo, by name.
    """
    iteration, carried = _iteration(shapes, timed)
    prompts, whole, inside = _prompts(shapes), [], []
    for step in range(iterations + 1):  # the first compiles the small programs of the host
        start = time.perf_counter()
        marks = {name: len(program.seconds) for name, program in timed.items()}
        carried, *_ = iteration(carried, step, prompts)
        jax.block_until_ready(carried)
        whole.append(time.perf_counter() - start)
        inside.append({name: sum(program.seconds[marks[name] :]) for name, program in timed.items()})
    whole, inside = whole[1:], inside[1:]
    sums = [sum(taken.values()) for taken in inside]
    return {
        "seconds": statistics.median(whole),
        "programs_seconds": statistics.median(sums),
        "host_seconds": statistics.median(a - b for a, b in zip(whole, sums)),
        "all_seconds": whole,
        "by_program": {name: statistics.median(taken[name] for taken in inside) for name in timed},
    }


def _iteration(shapes: Shapes, timed: dict[str, Timed]) -> tuple[Iteration, StageState]:
    """(the iteration, its first state), from what the programs were given."""
    annotate, experience, update = timed["annotate"], timed["experience"], timed["update"]
    base, reference = annotate.args[0], annotate.args[3]
    state, control = update.args[0], experience.args[4]
    run = Run(shapes.config, shapes.mesh, MetricsLog(None), MetricsLog(None))
    sampler = Sampler(run, Roles(base, None), _RandomReward(shapes, timed), None)
    sampler.rollout = timed["rollout"]
    sampler.greedy_rollout = timed.get("greedy", timed["rollout"])
    iteration = Iteration(run, sampler.roles, sampler, update.args[-1], state, reference, None)
    iteration.annotate, iteration.experience = annotate, experience
    iteration.update = lambda *args, mix: update(*args, **update.kwargs)  # rows of a mix are the same each time
    refreshed = reference if shapes.config.ppo.refresh_reference else None
    return iteration, StageState(state, control, iteration.count(0), refreshed)


class _RandomReward:
    """Random scores; before them the programs run that the run's own reward would run."""

    name = "bench"

    def __init__(self, shapes: Shapes, timed: dict[str, Timed]):
        self.own = timed.get("reward")
        self.models = [program for name, program in timed.items() if name.startswith("reward ")]
        self.random = np.random.default_rng(shapes.config.seed)

    def __call__(self, completions: Completions) -> np.ndarray | jax.Array:
        for model in self.models:
            for _ in range(round(model.times)):
                model.again()
        if self.own is not None:
            return self.own(*self.own.args[:2], completions.rollout)
        return self.random.standard_normal(completions.rollout.tokens.shape[0]).astype(np.float32)


def _prompts(shapes: Shapes) -> PromptSet:
    """Random prompts of full length, four batches of them."""
    config = shapes.config.ppo
    count, length = 4 * config.batch_size, config.max_prompt_tokens
    ids = np.random.default_rng(shapes.config.seed).integers(0, shapes.model.vocab_size, (count, length), np.int32)
    return PromptSet(list(ids), [""] * count, [None] * count, [{}] * count, length, 0, LoadReport("random", count))
