"""The compiled programs of the stages: names, donated arguments and output shardings.

Stages run these programs, `plan` compiles them and `bench` times them. `stages.calls` has the shapes of their
arguments. A program that computes with the base gets the compiler options for the base's dtype (`models.precision`).
The programs of rewards are in `rewards.model` and `rewards.pretrained`.
"""

import functools
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
from jaxrlhf.records import Adapter, PPOState, Rollout, TrainState
from jaxrlhf.rollout.decode import rollout
from jaxrlhf.steps.annotate import annotate_for_update, score_experience
from jaxrlhf.steps.ppo import ppo_update

Mesh = jax.sharding.Mesh


def train_program(step: Callable, mesh: Mesh, base: Decoder, state: TrainState) -> Program:
    """Returns the program of `sft_update` or `reward_model_update`. It donates the state.

    `state` may hold arrays or shapes.
    """
    static = ("microbatches", "remat")
    sharding = (tree_shardings(mesh, state), None)
    options = {"donate_argnums": 0, "static_argnames": static, "out_shardings": sharding}
    return Program(step, step.__name__, mesh, compiler_options(base), **options)


def static_arguments(config: SFTConfig | RewardModelConfig) -> dict[str, Any]:
    """Returns the static arguments of the program that `train_program` returns."""
    size = config.microbatch_size or config.batch_size
    return {"microbatches": config.batch_size // size, "remat": config.remat}


def rollout_program(mesh: Mesh, base: Decoder) -> Program:
    """Returns the program of `rollout`, with rows split over the mesh."""
    return _by_rows(rollout, "rollout", mesh, base)


def greedy_program(mesh: Mesh, base: Decoder, samples: Program, group: int) -> Program:
    """Returns the program of `rollout` for greedy completions.

    This is `samples` if groups have size 1, else a new program.
    """
    return samples if group == 1 else _by_rows(rollout, "rollout_greedy", mesh, base)


def merge_program(mesh: Mesh) -> Program:
    """Returns the program that selects rows of two rollouts.

    Its result has a rollout's sharding, so later programs compile once.
    """
    return _by_rows(_merge, "merge", mesh)


def annotate_program(mesh: Mesh, base: Decoder, behind: bool = False) -> Program:
    """Returns the program of `annotate_for_update`. It runs the forward passes over a rollout, without the scores.

    `behind` says whether an earlier policy sampled the rollout.
    """
    return _by_rows(functools.partial(annotate_for_update, behind=behind), "annotate", mesh, base)


def experience_program(mesh: Mesh) -> Program:
    """Returns the program of `score_experience`.

    Each device has a copy of the `Control`, in the arguments and in the results. So the program compiles only once.
    """
    sharding = (batch_sharding(mesh), replicated(mesh), None)
    return Program(score_experience, "experience", mesh, out_shardings=sharding)


def update_program(mesh: Mesh, base: Decoder, state: PPOState) -> Program:
    """Returns the program of `ppo_update`. It donates the state. `state` may hold arrays or shapes."""
    sharding = (tree_shardings(mesh, state), None)
    return Program(ppo_update, "update", mesh, compiler_options(base), donate_argnums=0, out_shardings=sharding)


def copy_program(mesh: Mesh, adapter: Adapter) -> Callable[[Adapter], Adapter]:
    """Returns a function that copies an adapter. The copy stays valid if a program donates the original."""
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=tree_shardings(mesh, adapter))


def _by_rows(function: Callable, name: str, mesh: Mesh, base: Decoder | None = None) -> Program:
    """Returns a program whose outputs are split by rows.

    `base` is None if the program computes nothing in the base's dtype.
    """
    options = None if base is None else compiler_options(base)
    return Program(function, name, mesh, options, out_shardings=batch_sharding(mesh))


def _merge(first: Rollout, second: Rollout, source: jax.Array) -> Rollout:
    """Selects rows i32[B] of two rollouts. The numbers of the second rollout's rows follow those of the first."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[source], first, second)
