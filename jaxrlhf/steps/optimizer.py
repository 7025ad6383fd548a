"""AdamW with gradient clipping and a schedule. Numeric settings are traced, so a new value needs no compilation."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.config import OptimizerConfig
from jaxrlhf.config.steps import LEARNING_RATES, RATED_WIDTH
from jaxrlhf.models.adapters import is_full
from jaxrlhf.steps.metrics import Metrics, count, share


def with_rate(config: OptimizerConfig, role: str, params: Any) -> OptimizerConfig:
    """Returns the config with a learning rate. If the config has no rate, the rate comes from `LEARNING_RATES`.

    This rate depends on `role`, and on whether `params` are LoRA pairs or full weights. For full weights of a model
    narrower than `RATED_WIDTH`, the rate is multiplied by RATED_WIDTH / width.
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
    """Returns the optimizer state before the first step. The structure of the state is the same for all settings."""
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
    """Runs one optimizer step, and returns (params, state, metrics).

    `step` i32[] is the number of previous steps. `loss` f32[] is the loss of this step. The update of Adam is
    m / (sqrt(v) + epsilon) with bias-corrected moments, as in PyTorch. Weight decay is decoupled. Weight decay skips
    vectors and scalars (biases, norms, LoRA scales). If the loss or the norm of the gradient is not finite, params and
    state do not change, and the metric `skipped` is 1. Raises `ValueError` if the settings have no learning rate (see
    `with_rate`).
    """
    rate = learning_rate(config, step)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    updates, after = _transformation(config).update(grads, state, params)
    params = jax.tree.map(lambda p, u: jnp.where(finite, p - (rate * u).astype(p.dtype), p), params, updates)
    state = jax.tree.map(lambda old, new: jnp.where(finite, new, old), state, after)
    return params, state, {"grad_norm": share(norm), "learning_rate": share(rate), "skipped": count(1.0 - finite)}


def learning_rate(config: OptimizerConfig, step: jax.Array) -> jax.Array:
    """Returns the learning rate f32[] after `step` steps.

    The rate rises linearly during the warm-up. After the warm-up the rate is constant, or decays to 0 at `total_steps`.
    """
    if config.learning_rate is None:
        raise ValueError("learning_rate must be a number, not None; call with_rate first")
    step = jnp.asarray(step, jnp.float32)
    warmup = jnp.where(config.warmup_steps > 0, (step + 1) / jnp.maximum(config.warmup_steps, 1), 1.0)
    if config.schedule in ("constant", "plateau"):  # with plateau the host lowers `learning_rate` between steps
        decay = 1.0
    else:
        if config.total_steps is None:
            raise ValueError(f"total_steps must be a number for schedule {config.schedule}, not None")
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
