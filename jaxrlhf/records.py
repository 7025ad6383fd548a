"""The records that steps pass to each other: frozen pytrees of arrays, each field with its shape.

B rows, P prompt tokens (left-padded), R response tokens, S = P + R, L tokens of a training sequence.
Response position t holds token P + t; logprobs, values and rewards at t belong to that token.
"""

from typing import Any

import jax
from flax import struct

from jaxrlhf.config import AdvantageConfig, KLConfig, OptimizerConfig, PPOConfig, Sampling, ScoreConfig, Settings
from jaxrlhf.config.base import note

Adapter = dict[str, dict[str, jax.Array]]
"""Module path -> leaf name -> array. LoRA: `lora_a` [in, rank], `lora_b` [rank, out] and the constant
`lora_scale` []. Other leaves replace those of the module; the path `score` adds the scalar head."""


@struct.dataclass
class SFTBatch:
    """Right-padded sequences for next-token training."""

    tokens: jax.Array  # i32[B,L]
    segments: jax.Array  # i32[B,L]; 0 is padding, rows packed into one sequence count 1, 2, ...
    loss_mask: jax.Array  # bool[B,L]; True on tokens that count in the loss


@struct.dataclass
class PreferenceBatch:
    """Right-padded pairs; row i of both sides has the same prompt."""

    chosen: jax.Array  # i32[B,L]
    chosen_mask: jax.Array  # bool[B,L]
    rejected: jax.Array  # i32[B,L]
    rejected_mask: jax.Array  # bool[B,L]
    margin: jax.Array  # f32[B]; 0 where the data has none
    weight: jax.Array  # f32[B]; 0 on rows that pad the last batch


@struct.dataclass
class Prompts:
    """Left-padded prompts."""

    tokens: jax.Array  # i32[B,P]
    mask: jax.Array  # bool[B,P]


@struct.dataclass
class Rollout:
    """Prompts with sampled completions. Masks, not token ids, mark real tokens."""

    tokens: jax.Array  # i32[B,S]
    mask: jax.Array  # bool[B,S]; real prompt and response tokens
    response_mask: jax.Array  # bool[B,R]; up to and including the stop token
    sample_logprobs: jax.Array  # f32[B,R]; of the sampled token at `temperature`; 0 past the end
    ended: jax.Array  # bool[B]; the completion ended with a stop token
    temperature: jax.Array  # f32[B]; divided the logits


@struct.dataclass
class Annotated:
    """Logprobs and values of a rollout's response tokens. 0 past the end."""

    logprobs: jax.Array  # f32[B,R]
    ref_logprobs: jax.Array  # f32[B,R]
    values: jax.Array  # f32[B,R]; V of the state before the token at t


@struct.dataclass
class Experience:
    """The input of a PPO update."""

    tokens: jax.Array  # i32[B,S]
    mask: jax.Array  # bool[B,S]
    response_mask: jax.Array  # bool[B,R]; tokens in the loss: all of a completion, or none with `mask_truncated`
    temperature: jax.Array  # f32[B]
    sample_logprobs: jax.Array  # f32[B,R]
    logprobs: jax.Array  # f32[B,R]; old, from the policy that sampled
    ref_logprobs: jax.Array  # f32[B,R]
    values: jax.Array  # f32[B,R]; old
    advantages: jax.Array  # f32[B,R]
    returns: jax.Array  # f32[B,R]
    kl_coef: jax.Array  # f32[B]; of the KL term in the loss; 0 if the KL is in the reward


@struct.dataclass
class TrainState:
    """One trainable tree and its optimizer (SFT and reward model)."""

    adapter: Any  # Adapter
    optimizer: Any  # optax state
    step: jax.Array  # i32[]; optimizer steps done


@struct.dataclass
class PPOState:
    """Policy and value, their optimizers, and the count of optimizer steps."""

    policy: Any  # Adapter
    value: Any  # Adapter; only a head if it shares the policy's trunk; empty without a value model
    average: Any  # Adapter; moving average of the policy, or empty
    policy_optimizer: Any  # optax state
    value_optimizer: Any  # optax state
    step: jax.Array  # i32[]; optimizer steps done


def _register_settings(cls: type[Settings]) -> None:
    """Registers a settings class as a pytree: traced fields and sections are leaves, the rest is static."""

    def is_section(name: str) -> bool:
        annotation = cls.model_fields[name].annotation
        return isinstance(annotation, type) and issubclass(annotation, Settings)

    dynamic = tuple(name for name in cls.model_fields if note(cls, name, "traced") or is_section(name))

    def flatten(settings):
        structure = tuple((n, getattr(settings, n)) for n in cls.model_fields if n not in dynamic)
        return tuple(getattr(settings, n) for n in dynamic), structure

    def unflatten(structure, leaves):
        # No validation: leaves may be tracers or batched arrays.
        return cls.model_construct(**dict(structure), **dict(zip(dynamic, leaves)))

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


for _settings in (Sampling, OptimizerConfig, PPOConfig, KLConfig, AdvantageConfig, ScoreConfig):
    _register_settings(_settings)
