"""Times PPO iterations. The PPO stage's own code runs the timed programs, on random prompts and scores."""

import statistics
import time
from typing import Any

import jax
import numpy as np

from jaxrlhf.bench.timing import Timed
from jaxrlhf.data.prompts import PromptSet
from jaxrlhf.data.report import LoadReport
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.rewards.load import gives_steps
from jaxrlhf.stages.loop import Run
from jaxrlhf.stages.ppo.iteration import Iteration, StageState
from jaxrlhf.stages.ppo.sampler import Sampler
from jaxrlhf.stages.roles import Roles
from jaxrlhf.stages.shapes import Shapes
from jaxrlhf.tracking.metrics import MetricsLog


def time_iterations(shapes: Shapes, timed: dict[str, Timed], iterations: int) -> dict[str, Any]:
    """Runs the `Iteration` of the PPO stage several times and returns median seconds as JSON values.

    The time includes the work of the host, but not logs, checkpoints and text. `timed` holds all programs of the stage
    by name.
    """
    iteration, state = _iteration(shapes, timed)
    prompts, wall, programs = _prompts(shapes), [], []
    for step in range(iterations + 1):  # the first iteration does not count, because it compiles small programs
        start = time.perf_counter()
        calls = {name: len(program.seconds) for name, program in timed.items()}
        state, *_ = iteration(state, step, prompts)
        if not iteration.overlaps:
            jax.block_until_ready(state)
        wall.append(time.perf_counter() - start)
        programs.append({name: sum(program.seconds[calls[name] :]) for name, program in timed.items()})
    wall, programs = wall[1:], programs[1:]
    sums = [sum(seconds.values()) for seconds in programs]
    return {
        "seconds": statistics.median(wall),
        "programs_seconds": statistics.median(sums),
        "host_seconds": statistics.median(a - b for a, b in zip(wall, sums)),
        "all_seconds": wall,
        "by_program": {name: statistics.median(seconds[name] for seconds in programs) for name in timed},
    }


def _iteration(shapes: Shapes, timed: dict[str, Timed]) -> tuple[Iteration, StageState]:
    """Returns (the iteration, the first state). Both are built from the arguments of the timed programs."""
    annotate, experience, update = timed["annotate"], timed["experience"], timed["update"]
    base, reference = annotate.args[0], annotate.args[3]
    state, control = update.args[0], experience.args[4]
    run = Run(shapes.config, shapes.mesh, MetricsLog(None), MetricsLog(None))
    choices = annotate.kwargs["choices"]
    sampler = Sampler(run, Roles(base, None), _RandomReward(shapes, timed), None, choices=choices)
    sampler.rollout = timed["rollout"]
    sampler.greedy_rollout = timed.get("greedy", timed["rollout"])
    iteration = Iteration(run, sampler.roles, sampler, update.args[-1], state, reference, None, choices)
    iteration.annotate, iteration.experience = annotate, experience
    iteration.update = lambda *args, **_: update(*args, **update.kwargs)  # each update gets the same rows for `mix`
    refreshed = reference if shapes.config.ppo.refresh_reference else None
    behind = iteration.copy(state.policy) if iteration.overlaps else None
    return iteration, StageState(state, control, iteration.count(0), refreshed, behind)


class _RandomReward:
    """A reward that runs the programs of the run's reward models.

    If the run has process rewards (rewards inside completions), each token gets a random reward. Otherwise the scores
    are those of the program `reward`, or random if the run does not have this program.
    """

    name = "bench"

    def __init__(self, shapes: Shapes, timed: dict[str, Timed]):
        self.own = timed.get("reward")
        self.models = [program for name, program in timed.items() if name.startswith("reward ")]
        self.random = np.random.default_rng(shapes.config.seed)
        self.by_step = gives_steps(shapes.config.ppo.reward)

    def __call__(self, completions: Completions) -> np.ndarray | jax.Array:
        for model in self.models:
            for _ in range(round(model.times)):
                model.again()
        own = None if self.own is None else self.own(*self.own.args[:2], completions.rollout)
        if self.by_step:
            mask = completions.response_mask
            return np.ma.MaskedArray(self.random.standard_normal(mask.shape).astype(np.float32), ~mask)
        if own is not None:
            return own
        return self.random.standard_normal(completions.rollout.tokens.shape[0]).astype(np.float32)


def _prompts(shapes: Shapes) -> PromptSet:
    """Returns four batches of random prompts with full length."""
    config = shapes.config.ppo
    count, length = 4 * config.batch_size, config.max_prompt_tokens
    ids = np.random.default_rng(shapes.config.seed).integers(0, shapes.model.vocab_size, (count, length), np.int32)
    return PromptSet(list(ids), [""] * count, [None] * count, [{}] * count, length, 0, LoadReport("random", count))
