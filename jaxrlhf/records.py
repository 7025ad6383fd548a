"""The data that steps pass to each other: frozen pytrees of arrays.

Sizes: B rows, P prompt tokens (left-padded), R response tokens, S = P + R, and L tokens of a training sequence.
Response position t is token P + t of a row. Logprobs, values and rewards at index t belong to this token.

A completion may be an episode with an environment. Its response tokens are then the turns of the policy and, between
them, the answers of the environment. The latter are real (`mask`), but not in `response_mask`, and their logprobs,
values, rewards and advantages are 0.
"""

from typing import Any

import jax
from flax import struct

from jaxrlhf.config import AdvantageConfig, KLConfig, OptimizerConfig, PPOConfig, Sampling, ScoreConfig, Settings
from jaxrlhf.config.base import metadata

Adapter = dict[str, dict[str, jax.Array]]
"""Module path -> leaf name -> array. A LoRA pair is `lora_a` [in, rank], `lora_b` [rank, out] and the constant
`lora_scale` []. Any other leaf replaces the leaf of the same name in the module. The scalar head has the path `score`.
"""


@struct.dataclass
class SFTBatch:
    """Right-padded sequences for next-token training."""

    tokens: jax.Array  # i32[B,L]
    segments: jax.Array  # i32[B,L]; 0 on padding; 1, 2, ... on the rows that are packed into one sequence
    loss_mask: jax.Array  # bool[B,L]; True on the tokens to learn

    @property
    def token_count(self) -> int:
        """The number of tokens in the batch, B * L, including padding."""
        return self.tokens.size


@struct.dataclass
class PreferenceBatch:
    """Right-padded preference pairs. Row i of `chosen` and row i of `rejected` have the same prompt."""

    chosen: jax.Array  # i32[B,L]
    chosen_mask: jax.Array  # bool[B,L]
    rejected: jax.Array  # i32[B,L]
    rejected_mask: jax.Array  # bool[B,L]
    margin: jax.Array  # f32[B]; 0 if the data has no margin
    weight: jax.Array  # f32[B]; 0 on padding rows of the last batch

    @property
    def token_count(self) -> int:
        """The number of tokens in chosen and rejected sequences, including padding."""
        return self.chosen.size + self.rejected.size


@struct.dataclass
class Prompts:
    """Left-padded prompts."""

    tokens: jax.Array  # i32[B,P]
    mask: jax.Array  # bool[B,P]


@struct.dataclass
class Rollout:
    """Prompts with sampled completions. The masks mark the real tokens. A padding token may have any token id."""

    tokens: jax.Array  # i32[B,S]
    mask: jax.Array  # bool[B,S]; True on the real tokens of prompt and completion
    response_mask: jax.Array  # bool[B,R]; True on the policy's tokens of the completion, including stop tokens
    sample_logprobs: jax.Array  # f32[B,R]; logprobs of the sampled tokens at `temperature`; else 0
    ended: jax.Array  # bool[B]; True if the completion ended with a stop token (an episode: also by the environment)
    temperature: jax.Array  # f32[B]; the logits were divided by this temperature


@struct.dataclass
class Annotated:
    """Logprobs and values of the response tokens of a rollout; 0 outside its `response_mask`."""

    logprobs: jax.Array  # f32[B,R]
    ref_logprobs: jax.Array  # f32[B,R]
    values: jax.Array  # f32[B,R]; index t is the value of the state before token t


@struct.dataclass
class Experience:
    """The input of a PPO update."""

    tokens: jax.Array  # i32[B,S]
    mask: jax.Array  # bool[B,S]
    response_mask: jax.Array  # bool[B,R]; True on the tokens in the losses (see `mask_truncated`)
    temperature: jax.Array  # f32[B]
    sample_logprobs: jax.Array  # f32[B,R]
    logprobs: jax.Array  # f32[B,R]; old logprobs, of the policy before the update
    ref_logprobs: jax.Array  # f32[B,R]
    values: jax.Array  # f32[B,R]; old values
    advantages: jax.Array  # f32[B,R]
    returns: jax.Array  # f32[B,R]
    kl_coef: jax.Array  # f32[B]; weight of the KL in the loss; 0 if the KL is part of the reward


@struct.dataclass
class TrainState:
    """One adapter and its optimizer state, for SFT and the reward model."""

    adapter: Any  # Adapter
    optimizer: Any  # optax state
    step: jax.Array  # i32[]; number of optimizer steps so far


@struct.dataclass
class PPOState:
    """The adapters of policy and value model with their optimizer states, and the number of optimizer steps."""

    policy: Any  # Adapter
    value: Any  # Adapter; only a head if it shares the policy's trunk; empty if there is no value model
    average: Any  # Adapter; moving average of the policy, or empty
    policy_optimizer: Any  # optax state
    value_optimizer: Any  # optax state
    step: jax.Array  # i32[]; number of optimizer steps so far


def _register_settings(cls: type[Settings]) -> None:
    """Registers a settings class as a pytree. Traced fields and nested sections are children; the rest is static."""
    fields = cls.model_fields
    sections = [n for n, f in fields.items() if isinstance(f.annotation, type) and issubclass(f.annotation, Settings)]
    children = tuple(n for n in fields if n in sections or metadata(cls, n, "traced"))

    def flatten(settings):
        static = tuple((n, getattr(settings, n)) for n in fields if n not in children)
        return tuple(getattr(settings, n) for n in children), static

    def unflatten(static, leaves):
        # The values are not validated again, because leaves may be tracers or batched arrays.
        return cls.model_construct(**dict(static), **dict(zip(children, leaves)))

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


for _settings in (Sampling, OptimizerConfig, PPOConfig, KLConfig, AdvantageConfig, ScoreConfig):
    _register_settings(_settings)
