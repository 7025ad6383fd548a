"""The compiled programs of the stages: names, donated arguments and output shardings.

Stages run these programs, `plan` compiles them and `bench` times them; `stages.calls` has their arguments' shapes. A
program that computes with the base gets the compiler options for the base's dtype (`models.precision`). `rewards.model`
and `rewards.pretrained` have the programs of rewards.
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

Mesh = jax.sharding.Mesh


def train_program(step: Callable, mesh: Mesh, base: Decoder, state: TrainState) -> Program:
    """`sft_update` or `reward_model_update`. Donates the state; `state` may hold arrays or shapes."""
    static = ("microbatches", "remat")
    sharding = (tree_shardings(mesh, state), None)
    options = {"donate_argnums": 0, "static_argnames": static, "out_shardings": sharding}
    return Program(step, step.__name__, mesh, compiler_options(base), **options)


def static_arguments(config: SFTConfig | RewardModelConfig) -> dict[str, Any]:
    """The static arguments of a `train_program`."""
    size = config.microbatch_size or config.batch_size
    return {"microbatches": config.batch_size // size, "remat": config.remat}


def rollout_program(mesh: Mesh, base: Decoder) -> Program:
    """`rollout`, with rows split over the mesh."""
    return _by_rows(rollout, "rollout", mesh, base)


def greedy_program(mesh: Mesh, base: Decoder, samples: Program, group: int) -> Program:
    """`rollout` for greedy completions: the program `samples` if groups have size 1, else a program of its own."""
    return samples if group == 1 else _by_rows(rollout, "rollout_greedy", mesh, base)


def merge_program(mesh: Mesh) -> Program:
    """Selects rows of two rollouts. The result has a rollout's sharding, so that later programs compile once."""
    return _by_rows(_merge, "merge", mesh)


def annotate_program(mesh: Mesh, base: Decoder) -> Program:
    """`annotate_for_update`: the forward passes over a rollout, which need no scores."""
    return _by_rows(annotate_for_update, "annotate", mesh, base)


def experience_program(mesh: Mesh) -> Program:
    """`score_experience`. The next control is replicated like the first, so that the program compiles once."""
    sharding = (batch_sharding(mesh), replicated(mesh), None)
    return Program(score_experience, "experience", mesh, out_shardings=sharding)


def update_program(mesh: Mesh, base: Decoder, state: PPOState) -> Program:
    """`ppo_update`. Donates the state; `state` may hold arrays or shapes."""
    sharding = (tree_shardings(mesh, state), None)
    return Program(ppo_update, "update", mesh, compiler_options(base), donate_argnums=0, out_shardings=sharding)


def _by_rows(function: Callable, name: str, mesh: Mesh, base: Decoder | None = None) -> Program:
    """A program whose outputs are split by rows. `base` is None if it computes nothing in the base's dtype."""
    options = None if base is None else compiler_options(base)
    return Program(function, name, mesh, options, out_shardings=batch_sharding(mesh))


def _merge(first: Rollout, second: Rollout, source: jax.Array) -> Rollout:
    """Selects rows i32[B] of the two rollouts, numbered one after the other."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[source], first, second)
