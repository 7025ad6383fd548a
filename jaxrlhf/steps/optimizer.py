"""AdamW with clipping and a schedule; its numbers are traced, so changing one compiles nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.config import OptimizerConfig
from jaxrlhf.config.steps import LEARNING_RATES, RATED_WIDTH
from jaxrlhf.models.adapters import is_full
from jaxrlhf.steps.metrics import Metrics, count, share


def with_rate(config: OptimizerConfig, role: str, params: Any) -> OptimizerConfig:
    """The optimizer with the learning rate of a role in `LEARNING_RATES`, by what `params` is, where it has none."""
    if config.learning_rate is not None:
        return config
    rates = LEARNING_RATES[role]
    rate = rates.full * _narrowness(params) if is_full(params) else rates.lora
    return config.model_copy(update={"learning_rate": rate})


def _narrowness(params: Any) -> float:
    """How many times narrower than `RATED_WIDTH` a whole model is; at least 1."""
    embedding = params.get("embed_tokens", {}).get("embedding")
    return 1.0 if embedding is None else max(1.0, RATED_WIDTH / embedding.shape[-1])


def init_optimizer(params: Any) -> optax.OptState:
    """The state before the first step; its structure depends on no setting."""
    return _transformation(OptimizerConfig()).init(params)


@jax.named_scope("optimizer")
def optimizer_step(
    config: OptimizerConfig,
    grads: Any,
    state: optax.OptState,
    params: Any,
    step: jax.Array,
    loss: jax.Array | float = 0.0,
) -> tuple[Any, optax.OptState, Metrics]:
    """(params, state, metrics) after one step; `step` i32[] counts the steps done before, `loss` f32[] is this one's.

    Adam as in PyTorch: m / (sqrt(v) + epsilon) with both moments corrected for bias; weight decay is
    decoupled and spares vectors and scalars (biases, norms, LoRA scales). Where the loss or the gradient's norm is not
    finite, nothing changes, and the metric `skipped` is 1. Raises ValueError without a learning rate (`with_rate`).

    Each array takes a few kernels; `params`, `grads` and `state` may be trees of few arrays (`flat.joined`).
    """
    rate = learning_rate(config, step)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    updates, after = _transformation(config).update(grads, state, params)
    params = jax.tree.map(lambda p, u: jnp.where(finite, p - (rate * u).astype(p.dtype), p), params, updates)
    state = jax.tree.map(lambda old, new: jnp.where(finite, new, old), state, after)
    return params, state, {"grad_norm": share(norm), "learning_rate": share(rate), "skipped": count(1.0 - finite)}


def learning_rate(config: OptimizerConfig, step: jax.Array) -> jax.Array:
    """Rate f32[] of the step after `step` steps: linear warm-up, then constant or decay to 0 at total_steps."""
    if config.learning_rate is None:
        raise ValueError("learning_rate is None; with_rate chooses one by role")
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.where(config.warmup_steps > 0, (step + 1) / jnp.maximum(config.warmup_steps, 1), 1.0)
    if config.schedule == "constant":
        decay = 1.0
    else:
        if config.total_steps is None:
            raise ValueError(f"schedule {config.schedule} needs total_steps")
        span = jnp.maximum(config.total_steps - config.warmup_steps, 1)
        done = jnp.clip((step - config.warmup_steps) / span, 0.0, 1.0)
        decay = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    return config.learning_rate * jnp.minimum(warm, 1.0) * decay


def _transformation(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    )
