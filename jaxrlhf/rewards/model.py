"""The run's reward adapter as a reward. The base with this adapter scores the tokens that the policy sampled."""

import jax
import numpy as np

from jaxrlhf.distributed.jit import Program
from jaxrlhf.distributed.mesh import fetch, split_rows
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.layer_scan import with_stacked_layers
from jaxrlhf.models.precision import compiler_options
from jaxrlhf.models.scoring import sequence_scores, token_scores
from jaxrlhf.records import Adapter, Rollout
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.rewards.reading import finite
from jaxrlhf.rewards.steps import Granularity


def score_rollout(
    base: Decoder,
    adapter: Adapter,
    rollout: Rollout,
    microbatch_size: int | None = None,
    by_token: bool = False,
) -> jax.Array:
    """Returns the scores f32[B] at the last real token, or with `by_token` those at all response tokens, f32[B,R].

    A completion that ended is scored at its stop token, a truncated completion at its last token. If
    `microbatch_size` divides B, the rows are scored in microbatches of this size, and activations take the memory of
    one microbatch.
    """
    base, adapter = with_stacked_layers(base, adapter)
    model, inputs = bind(base, adapter), (rollout.tokens, rollout.mask)
    B, R = rollout.response_mask.shape

    def score(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        return token_scores(model, *rows, R) if by_token else sequence_scores(model, *rows)

    if microbatch_size is None or microbatch_size >= B or B % microbatch_size:
        return score(inputs)
    scores = jax.lax.map(score, split_rows(inputs, B // microbatch_size))
    return scores.reshape(B, *scores.shape[2:])


def score_program(mesh: jax.sharding.Mesh | None, base: Decoder) -> Program:
    """Returns the program of `score_rollout`. Plans and benchmarks use the same program."""
    static = ("microbatch_size", "by_token")
    return Program(score_rollout, "reward", mesh, compiler_options(base), static_argnames=static)


class ModelReward:
    """A reward (see `completions.Reward`) that leaves its scores on the device.

    If there is a `granularity`, the score is read at the last token of each step, in one forward pass. `step_reward`
    says what the reward of a step is, see `ModelRewardConfig`.
    """

    name = "reward_model"

    def __init__(
        self,
        base: Decoder,
        adapter: Adapter,
        mesh: jax.sharding.Mesh | None = None,
        microbatch_size: int | None = None,
        granularity: Granularity | None = None,
        step_reward: str = "score",
    ):
        self.base, self.adapter, self.microbatch_size = base, adapter, microbatch_size
        self.granularity, self.step_reward, self.by_step = granularity, step_reward, granularity is not None
        self.program = score_program(mesh, base)

    def __call__(self, completions: Completions) -> jax.Array | np.ma.MaskedArray:
        rows = self.base, self.adapter, completions.rollout
        scores = self.program(*rows, microbatch_size=self.microbatch_size, by_token=self.by_step)
        if self.granularity is None:
            return scores
        rewards = self.granularity.take(fetch(scores), completions, self.step_reward)
        finite(self.name, rewards.filled(0).sum(axis=1))
        return rewards
