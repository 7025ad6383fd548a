"""The data that flows between steps: frozen pytrees of arrays.

B rows, P prompt tokens (left-padded), R response tokens, S = P + R, L tokens of a training sequence. Response
position t holds token P + t; logprobs, values and rewards at index t belong to that token.
"""

from typing import Any

import jax
from flax import struct

from jaxrlhf.config import AdvantageConfig, KLConfig, OptimizerConfig, PPOConfig, Sampling, ScoreConfig, Settings
from jaxrlhf.config.base import metadata

Adapter = dict[str, dict[str, jax.Array]]
"""Module path -> leaf name -> array. A LoRA pair is `lora_a` [in, rank], `lora_b` [rank, out] and the constant
`lora_scale` []. Any other leaf replaces the module's leaf of that name. The path `score` is the scalar head."""


@struct.dataclass
class SFTBatch:
    """Right-padded sequences for next-token training."""

    tokens: jax.Array  # i32[B,L]
    segments: jax.Array  # i32[B,L]; 0 is padding, rows packed into one sequence are 1, 2, ...
    loss_mask: jax.Array  # bool[B,L]; the tokens to learn

    @property
    def token_count(self) -> int:
        """B * L."""
        return self.tokens.size


@struct.dataclass
class PreferenceBatch:
    """Right-padded preference pairs; row i of both sides has the same prompt."""

    chosen: jax.Array  # i32[B,L]
    chosen_mask: jax.Array  # bool[B,L]
    rejected: jax.Array  # i32[B,L]
    rejected_mask: jax.Array  # bool[B,L]
    margin: jax.Array  # f32[B]; 0 if the data has none
    weight: jax.Array  # f32[B]; 0 on padding rows of the last batch

    @property
    def token_count(self) -> int:
        """Number of tokens of chosen and rejected sequences together, padding included."""
        return self.chosen.size + self.rejected.size


@struct.dataclass
class Prompts:
    """Left-padded prompts."""

    tokens: jax.Array  # i32[B,P]
    mask: jax.Array  # bool[B,P]


@struct.dataclass
class Rollout:
    """Prompts with sampled completions. Only the masks tell real tokens from padding; token ids do not."""

    tokens: jax.Array  # i32[B,S]
    mask: jax.Array  # bool[B,S]; real tokens of prompt and completion
    response_mask: jax.Array  # bool[B,R]; up to and including the stop token
    sample_logprobs: jax.Array  # f32[B,R]; logprob of the sampled token at `temperature`; 0 past the end
    ended: jax.Array  # bool[B]; the completion ended with a stop token
    temperature: jax.Array  # f32[B]; the logits were divided by it


@struct.dataclass
class Annotated:
    """Logprobs and values of a rollout's response tokens; 0 past the end."""

    logprobs: jax.Array  # f32[B,R]
    ref_logprobs: jax.Array  # f32[B,R]
    values: jax.Array  # f32[B,R]; value of the state before the token at t


@struct.dataclass
class Experience:
    """The input of a PPO update."""

    tokens: jax.Array  # i32[B,S]
    mask: jax.Array  # bool[B,S]
    response_mask: jax.Array  # bool[B,R]; tokens in the losses; with `mask_truncated` no token of truncated completions
    temperature: jax.Array  # f32[B]
    sample_logprobs: jax.Array  # f32[B,R]
    logprobs: jax.Array  # f32[B,R]; old, from the policy that sampled
    ref_logprobs: jax.Array  # f32[B,R]
    values: jax.Array  # f32[B,R]; old
    advantages: jax.Array  # f32[B,R]
    returns: jax.Array  # f32[B,R]
    kl_coef: jax.Array  # f32[B]; weight of the KL term in the loss, 0 if the KL is part of the reward


@struct.dataclass
class TrainState:
    """One trainable tree and its optimizer (SFT and reward model)."""

    adapter: Any  # Adapter
    optimizer: Any  # optax state
    step: jax.Array  # i32[]; optimizer steps done


@struct.dataclass
class PPOState:
    """Policy and value with their optimizers, and the number of optimizer steps."""

    policy: Any  # Adapter
    value: Any  # Adapter; a head only if it shares the policy's trunk; empty without a value model
    average: Any  # Adapter; moving average of the policy, or empty
    policy_optimizer: Any  # optax state
    value_optimizer: Any  # optax state
    step: jax.Array  # i32[]; optimizer steps done


def _register_settings(cls: type[Settings]) -> None:
    """Registers a settings class as a pytree: traced fields and nested sections are children, the rest is static."""
    fields = cls.model_fields
    sections = [n for n, f in fields.items() if isinstance(f.annotation, type) and issubclass(f.annotation, Settings)]
    children = tuple(n for n in fields if n in sections or metadata(cls, n, "traced"))

    def flatten(settings):
        static = tuple((n, getattr(settings, n)) for n in fields if n not in children)
        return tuple(getattr(settings, n) for n in children), static

    def unflatten(static, leaves):
        # Not validated again: leaves may be tracers or batched arrays.
        return cls.model_construct(**dict(static), **dict(zip(children, leaves)))

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


for _settings in (Sampling, OptimizerConfig, PPOConfig, KLConfig, AdvantageConfig, ScoreConfig):
    _register_settings(_settings)
