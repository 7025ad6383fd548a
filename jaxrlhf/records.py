"""What flows between the steps: frozen pytrees of arrays, complete when made. One shape comment per field.

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
`lora_scale` []. Other leaves replace the module's own; the path `score` adds the scalar head."""


@struct.dataclass
class SFTBatch:
    """Right-padded sequences for next-token training."""

    tokens: jax.Array  # i32[B,L]
    segments: jax.Array  # i32[B,L]; 0 is padding, rows packed into one sequence count 1, 2, ...
    loss_mask: jax.Array  # bool[B,L]; True on the tokens that are learnt


@struct.dataclass
class PreferenceBatch:
    """Right-padded pairs; row i of both sides has the same prompt."""

    chosen: jax.Array  # i32[B,L]
    chosen_mask: jax.Array  # bool[B,L]
    rejected: jax.Array  # i32[B,L]
    rejected_mask: jax.Array  # bool[B,L]
    margin: jax.Array  # f32[B]; 0 where the data has none
    weight: jax.Array  # f32[B]; 0 on rows that only fill up the last batch


@struct.dataclass
class Prompts:
    """Left-padded prompts."""

    tokens: jax.Array  # i32[B,P]
    mask: jax.Array  # bool[B,P]


@struct.dataclass
class Rollout:
    """Prompts with sampled answers. Masks, not token ids, say what is real."""

    tokens: jax.Array  # i32[B,S]
    mask: jax.Array  # bool[B,S]; prompt and response tokens that are real
    response_mask: jax.Array  # bool[B,R]; up to and including the stop token
    sample_logprobs: jax.Array  # f32[B,R]; of the sampled token at `temperature`; 0 past the end
    ended: jax.Array  # bool[B]; the answer ended with a stop token
    temperature: jax.Array  # f32[B]; that divided the logits


@struct.dataclass
class Annotated:
    """What policy, reference and value say of a rollout's response tokens. 0 past the end."""

    logprobs: jax.Array  # f32[B,R]
    ref_logprobs: jax.Array  # f32[B,R]
    values: jax.Array  # f32[B,R]; V of the state before the token at t


@struct.dataclass
class Experience:
    """All that an update needs."""

    tokens: jax.Array  # i32[B,S]
    mask: jax.Array  # bool[B,S]
    response_mask: jax.Array  # bool[B,R]; tokens that are learnt from: of an answer all, or none with `mask_truncated`
    temperature: jax.Array  # f32[B]
    sample_logprobs: jax.Array  # f32[B,R]
    logprobs: jax.Array  # f32[B,R]; old, from the policy that sampled
    ref_logprobs: jax.Array  # f32[B,R]
    values: jax.Array  # f32[B,R]; old
    advantages: jax.Array  # f32[B,R]
    returns: jax.Array  # f32[B,R]
    kl_coef: jax.Array  # f32[B]; of the KL term in the loss, 0 where KL is part of the reward


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
    value: Any  # Adapter; only a head where it shares the policy's trunk; empty where there is none
    average: Any  # Adapter; moving average of the policy, empty where none is kept
    policy_optimizer: Any  # optax state
    value_optimizer: Any  # optax state
    step: jax.Array  # i32[]; optimizer steps done


def _register_settings(cls: type[Settings]) -> None:
    """Makes a settings class a pytree: fields noted as traced and sections are leaves, the rest is structure."""
    moving = tuple(name for name in cls.model_fields if note(cls, name, "traced") or _is_section(cls, name))

    def flatten(settings):
        structure = tuple((n, getattr(settings, n)) for n in cls.model_fields if n not in moving)
        return tuple(getattr(settings, n) for n in moving), structure

    def unflatten(structure, leaves):
        # Leaves may be tracers or batched arrays here, and have been validated where they were written.
        return cls.model_construct(**dict(structure), **dict(zip(moving, leaves)))

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


def _is_section(cls: type[Settings], name: str) -> bool:
    annotation = cls.model_fields[name].annotation
    return isinstance(annotation, type) and issubclass(annotation, Settings)


for _settings in (Sampling, OptimizerConfig, PPOConfig, KLConfig, AdvantageConfig, ScoreConfig):
    _register_settings(_settings)
