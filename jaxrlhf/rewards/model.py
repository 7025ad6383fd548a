"""The reward adapter as a reward: the base scores its own kind of tokens."""

import jax

from jaxrlhf.models.adapters import bind
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.scoring import sequence_scores
from jaxrlhf.records import Adapter, Rollout
from jaxrlhf.rewards.answers import Answers
from jaxrlhf.runtime.programs import Program


def score_rollout(base: Decoder, adapter: Adapter, rollout: Rollout) -> jax.Array:
    """Scores f32[B] at the last real token: the stop token, or the last one of an unfinished answer."""
    return sequence_scores(bind(base, adapter), rollout.tokens, rollout.mask)


def score_program(mesh: jax.sharding.Mesh | None) -> Program:
    """`score_rollout`, as plans and benchmarks take it too."""
    return Program(score_rollout, "reward", mesh)


class ModelReward:
    """A reward (see `answers.Reward`) that never leaves the device."""

    name = "reward_model"

    def __init__(self, base: Decoder, adapter: Adapter, mesh: jax.sharding.Mesh | None = None):
        self.base, self.adapter = base, adapter
        self.program = score_program(mesh)

    def __call__(self, answers: Answers) -> jax.Array:
        return self.program(self.base, self.adapter, answers.rollout)
