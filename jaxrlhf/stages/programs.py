"""The programs that the stages compile: what each is called, what it gives away, and where its results lie.

Those that run a base, arrays or shapes, are compiled as its dtype needs it (`models.precision`).
The stages run them, plans compile them and benchmarks time them: all take them from here, and what each is given stands
in `stages.calls`. The programs of rewards stand beside their rewards (`rewards.model`, `rewards.pretrained`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.config import RewardModelConfig, SFTConfig
from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import batch_sharding, replicated
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.precision import compiler_options
from jaxrlhf.models.sharding import tree_shardings
from jaxrlhf.records import PPOState, Rollout, TrainState
from jaxrlhf.rollout.decode import rollout
from jaxrlhf.steps.annotate import annotate_for_update, score_experience
from jaxrlhf.steps.ppo import ppo_update
from jaxrlhf.steps.reward_model import reward_model_update
from jaxrlhf.steps.sft import sft_update

Mesh = jax.sharding.Mesh
_STATIC = ("microbatches", "remat")  # of the steps of sft and reward_model: part of what is compiled


def sft_program(mesh: Mesh, base: Decoder, state: TrainState) -> Program:
    """`sft_update`; it takes over the memory of its state, arrays or shapes as in `state`."""
    return _training(sft_update, mesh, base, state)


def reward_model_program(mesh: Mesh, base: Decoder, state: TrainState) -> Program:
    """`reward_model_update`; it takes over the memory of its state."""
    return _training(reward_model_update, mesh, base, state)


def static_arguments(config: SFTConfig | RewardModelConfig) -> dict[str, Any]:
    """What the settings say of the arguments that are part of what is compiled."""
    size = config.microbatch_size or config.batch_size
    return {"microbatches": config.batch_size // size, "remat": config.remat}


def rollout_program(mesh: Mesh, base: Decoder) -> Program:
    """Answers, by rows over the mesh."""
    return _rows(rollout, "rollout", mesh, base)


def greedy_program(mesh: Mesh, base: Decoder, samples: Program, group: int) -> Program:
    """Greedy answers: of no group they are the program `samples` at another temperature; beside groups its own."""
    return samples if group == 1 else _rows(rollout, "rollout_greedy", mesh, base)


def merge_program(mesh: Mesh) -> Program:
    """Chosen rows of two rollouts. They lie as those of a rollout: what is given either is compiled once."""
    return _rows(_merge, "merge", mesh)


def annotate_program(mesh: Mesh, base: Decoder) -> Program:
    """`annotate_for_update`: the passes over a rollout, which need no scores."""
    return _rows(annotate_for_update, "annotate", mesh, base)


def experience_program(mesh: Mesh) -> Program:
    """`score_experience`; what the next iteration is given lies where the first was given it."""
    placed = (batch_sharding(mesh), replicated(mesh), None)
    return Program(score_experience, "experience", mesh, out_shardings=placed)


def update_program(mesh: Mesh, base: Decoder, state: PPOState) -> Program:
    """`ppo_update`; it takes over the memory of its state, arrays or shapes as in `state`."""
    placed = (tree_shardings(mesh, state), None)
    return Program(ppo_update, "update", mesh, compiler_options(base), donate_argnums=0, out_shardings=placed)


def _training(step: Callable, mesh: Mesh, base: Decoder, state: TrainState) -> Program:
    return Program(
        step,
        step.__name__,
        mesh,
        compiler_options(base),
        donate_argnums=0,
        static_argnames=_STATIC,
        out_shardings=(tree_shardings(mesh, state), None),
    )


def _rows(function: Callable, name: str, mesh: Mesh, base: Decoder | None = None) -> Program:
    """Without a base: a program that computes nothing in its dtype."""
    options = None if base is None else compiler_options(base)
    return Program(function, name, mesh, options, out_shardings=batch_sharding(mesh))


def _merge(first: Rollout, second: Rollout, source: jax.Array) -> Rollout:
    """Rows i32[B] of both rollouts, one after the other."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[source], first, second)
