"""AdamW with gradient clipping and a schedule. Its numeric settings are traced, so changing one recompiles nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.config import OptimizerConfig
from jaxrlhf.config.steps import LEARNING_RATES, RATED_WIDTH
from jaxrlhf.models.adapters import is_full
from jaxrlhf.steps.metrics import Metrics, count, share


def with_rate(config: OptimizerConfig, role: str, params: Any) -> OptimizerConfig:
    """Fills in a missing learning rate from `LEARNING_RATES`, by role and by whether `params` are a full fine-tune.

    The rate of a full fine-tune is larger for models narrower than `RATED_WIDTH`, in proportion to 1 / width.
    """
    if config.learning_rate is not None:
        return config
    rate = LEARNING_RATES[role].lora
    if is_full(params):
        embedding = params.get("embed_tokens", {}).get("embedding")
        scale = 1.0 if embedding is None else max(1.0, RATED_WIDTH / embedding.shape[-1])
        rate = LEARNING_RATES[role].full * scale
    return config.model_copy(update={"learning_rate": rate})


def init_optimizer(params: Any) -> optax.OptState:
    """The optimizer state before the first step. Its structure is the same for all settings."""
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
    """(params, state, metrics) after one optimizer step.

    `step` i32[] is the number of previous steps; `loss` f32[] is the loss of this step. The update of Adam is m /
    (sqrt(v) + epsilon) with bias-corrected moments, as in PyTorch. Weight decay is decoupled and skips vectors and
    scalars (biases, norms, LoRA scales). If the loss or the gradient's norm is not finite, params and state keep their
    values and the metric `skipped` is 1. Raises ValueError if the settings have no learning rate (see `with_rate`).
    """
    rate = learning_rate(config, step)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    updates, after = _transformation(config).update(grads, state, params)
    params = jax.tree.map(lambda p, u: jnp.where(finite, p - (rate * u).astype(p.dtype), p), params, updates)
    state = jax.tree.map(lambda old, new: jnp.where(finite, new, old), state, after)
    return params, state, {"grad_norm": share(norm), "learning_rate": share(rate), "skipped": count(1.0 - finite)}


def learning_rate(config: OptimizerConfig, step: jax.Array) -> jax.Array:
    """Learning rate f32[] after `step` steps: linear warm-up, then constant or decay to 0 at total_steps."""
    if config.learning_rate is None:
        raise ValueError("learning_rate is None; with_rate fills it in by role")
    step = jnp.asarray(step, jnp.float32)
    warmup = jnp.where(config.warmup_steps > 0, (step + 1) / jnp.maximum(config.warmup_steps, 1), 1.0)
    if config.schedule == "constant":
        decay = 1.0
    else:
        if config.total_steps is None:
            raise ValueError(f"schedule {config.schedule} needs total_steps")
        span = jnp.maximum(config.total_steps - config.warmup_steps, 1)
        progress = jnp.clip((step - config.warmup_steps) / span, 0.0, 1.0)
        decay = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return config.learning_rate * jnp.minimum(warmup, 1.0) * decay


def _transformation(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    )
