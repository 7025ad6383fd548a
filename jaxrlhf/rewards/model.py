"""The run's reward adapter as a reward. The base with this adapter scores the tokens that the policy sampled."""

import jax

from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import split_rows
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.layer_scan import with_stacked_layers
from jaxrlhf.models.precision import compiler_options
from jaxrlhf.models.scoring import sequence_scores
from jaxrlhf.records import Adapter, Rollout
from jaxrlhf.rewards.completions import Completions


def score_rollout(
    base: Decoder, adapter: Adapter, rollout: Rollout, microbatch_size: int | None = None
) -> jax.Array:
    """Returns the scores f32[B] at the last real token.

    A completion that ended is scored at its stop token, a truncated completion at its last token. If
    `microbatch_size` divides B, the rows are scored in microbatches of this size, and activations take the memory of
    one microbatch.
    """
    base, adapter = with_stacked_layers(base, adapter)
    model, inputs = bind(base, adapter), (rollout.tokens, rollout.mask)
    B = rollout.tokens.shape[0]
    if microbatch_size is None or microbatch_size >= B or B % microbatch_size:
        return sequence_scores(model, *inputs)
    microbatches = split_rows(inputs, B // microbatch_size)
    return jax.lax.map(lambda rows: sequence_scores(model, *rows), microbatches).reshape(B)


def score_program(mesh: jax.sharding.Mesh | None, base: Decoder) -> Program:
    """Returns the program of `score_rollout`. Plans and benchmarks use the same program."""
    return Program(score_rollout, "reward", mesh, compiler_options(base), static_argnames=("microbatch_size",))


class ModelReward:
    """A reward (see `completions.Reward`) that leaves its scores on the device."""

    name = "reward_model"

    def __init__(
        self,
        base: Decoder,
        adapter: Adapter,
        mesh: jax.sharding.Mesh | None = None,
        microbatch_size: int | None = None,
    ):
        self.base, self.adapter, self.microbatch_size = base, adapter, microbatch_size
        self.program = score_program(mesh, base)

    def __call__(self, completions: Completions) -> jax.Array:
        return self.program(self.base, self.adapter, completions.rollout, microbatch_size=self.microbatch_size)
