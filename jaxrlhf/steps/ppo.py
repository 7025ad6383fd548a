"""The PPO update: epochs x minibatches of clipped policy and value steps, in one compiled program.

B rows, R response tokens.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.kl import kl_loss
from jaxrlhf.algorithms.losses import value_loss
from jaxrlhf.algorithms.masked import aggregate, masked_sum
from jaxrlhf.algorithms.policy_losses import POLICY_LOSSES, importance_weights
from jaxrlhf.config import PPOConfig
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.scoring import response_logprobs, response_values
from jaxrlhf.records import Adapter, Experience, PPOState
from jaxrlhf.steps.microbatches import accumulate
from jaxrlhf.steps.optimizer import init_optimizer, optimizer_step


def init_ppo(policy: Adapter, value: Adapter | None, config: PPOConfig) -> PPOState:
    """The state before the first update, without a value model where `value` is None.

    The trees are copied: the caller's stay valid when it is donated.
    """
    del config  # part of the stable API; the optimizer's state depends on no setting today
    value = {} if value is None else value
    policy, value = jax.tree.map(lambda x: jnp.array(x, copy=True), (policy, value))
    return PPOState(policy, value, init_optimizer(policy), init_optimizer(value), jnp.int32(0))


def single_step(config: PPOConfig) -> bool:
    """Whether an iteration takes one optimizer step: then the old policy is the new one, exactly."""
    return config.epochs * config.minibatches == 1


def ppo_update(
    state: PPOState, base: Decoder, experience: Experience, key: jax.Array, config: PPOConfig
) -> tuple[PPOState, dict[str, jax.Array]]:
    """(state, metrics) after `epochs` passes over the experience in `minibatches` steps each.

    Each epoch uses every row once, in an order drawn from `key`. Metrics are means over the steps, in the
    names of the metrics contract. Raises ValueError where rows and minibatches do not divide.
    """
    rows = experience.tokens.shape[0]
    if rows % config.minibatches:
        raise ValueError(f"{rows} rows cannot be split into {config.minibatches} minibatches")
    epochs = [jax.random.permutation(jax.random.fold_in(key, epoch), rows) for epoch in range(config.epochs)]
    order = jnp.stack(epochs).reshape(config.epochs * config.minibatches, -1)

    def step(state: PPOState, rows_of_step: jax.Array):
        minibatch = jax.tree.map(lambda x: x[rows_of_step], experience)
        return _minibatch_step(state, base, minibatch, config)

    state, metrics = jax.lax.scan(step, state, order)
    first = metrics["policy/ratio_error_max"][0]
    noted = {name: jnp.max(x) if name.endswith("max") else jnp.mean(x) for name, x in metrics.items()}
    del noted["policy/ratio_error_max"]
    return state, noted | {"policy/first_ratio_error": first}


def _minibatch_step(state: PPOState, base: Decoder, minibatch: Experience, config: PPOConfig):
    rows = minibatch.tokens.shape[0]
    size = config.microbatch_size or rows
    if rows % size:
        raise ValueError(f"a minibatch of {rows} rows cannot be split into microbatches of {size}")
    tokens = jnp.maximum(jnp.sum(minibatch.response_mask), 1)

    def loss(trees: tuple[Adapter, Adapter], part: Experience):
        return ppo_loss(*trees, base, part, config, tokens, rows)

    _, metrics, grads = accumulate(loss, (state.policy, state.value), minibatch, rows // size)
    policy, policy_optimizer, noted = optimizer_step(
        config.optimizer, grads[0], state.policy_optimizer, state.policy, state.step
    )
    metrics |= {f"optimizer/{k}": v for k, v in noted.items()}
    value, value_optimizer = state.value, state.value_optimizer
    if value:
        value, value_optimizer, noted = optimizer_step(
            config.value_optimizer, grads[1], value_optimizer, value, state.step
        )
        metrics |= {f"optimizer/value_{k}": v for k, v in noted.items()}
    return PPOState(policy, value, policy_optimizer, value_optimizer, state.step + 1), metrics


def ppo_loss(
    policy: Adapter,
    value: Adapter,
    base: Decoder,
    experience: Experience,
    config: PPOConfig,
    total_tokens: jax.Array | int,
    total_rows: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """These rows' share of a minibatch's loss, and their shares of its metrics.

    `total_tokens` and `total_rows` are the whole minibatch's, so that shares of microbatches add up to it. An empty
    `value` stands for no value model.
    """
    mask = experience.response_mask
    given = (experience.tokens, experience.mask, mask)
    logprobs, entropy = response_logprobs(bind(base, policy), *given, experience.temperature, config.remat)
    old = jax.lax.stop_gradient(logprobs) if single_step(config) else experience.logprobs
    policy_loss = POLICY_LOSSES[config.loss]
    per_token, noted = policy_loss(
        logprobs, old, experience.advantages, mask, config.clip_low, config.clip_high, config.dual_clip
    )

    def share(x: jax.Array) -> jax.Array:
        return masked_sum(x.astype(jnp.float32), mask) / total_tokens

    def aggregated(x: jax.Array) -> jax.Array:
        return aggregate(x, mask, config.aggregation, total_tokens, total_rows)

    metrics = {}
    if config.importance_cap is not None:
        weights = importance_weights(
            old, experience.sample_logprobs, mask, config.importance_cap, config.importance_level
        )
        per_token = per_token * weights
        metrics["policy/importance_weight"] = share(weights)
    loss = policy_share = aggregated(per_token)
    entropy_share = share(entropy)
    loss -= config.entropy_coef * entropy_share
    if config.kl_loss is not None:
        kl = kl_loss(logprobs, experience.ref_logprobs, mask, config.kl_loss) * experience.kl_coef[:, None]
        metrics["policy/kl_loss"] = aggregated(kl)
        loss += metrics["policy/kl_loss"]
    if value:
        values = response_values(bind(base, value), *given, config.remat)
        value_per_token, value_clipped = value_loss(
            values, experience.values, experience.returns, mask, config.value_clip
        )
        metrics |= {"value/loss": share(value_per_token), "value/clip": share(value_clipped)}
        loss += config.value_coef * metrics["value/loss"]
    metrics |= {
        "policy/loss": policy_share,
        "policy/entropy": entropy_share,
        "policy/approx_kl": share(noted["approx_kl"]),
        "policy/clip_low": share(noted["clipped_low"]),
        "policy/clip_high": share(noted["clipped_high"]),
        "policy/ratio_mean": share(noted["ratio"]),
        "policy/ratio_max": jnp.max(jnp.where(mask, noted["ratio"], 0.0)),
        "policy/ratio_error_max": jnp.max(jnp.where(mask, jnp.abs(noted["ratio"] - 1.0), 0.0)),
    }
    if single_step(config):  # elsewhere the gap is measured when the old logprobs are made
        gap = jnp.where(mask, jnp.abs(logprobs - experience.sample_logprobs), 0.0)
        metrics |= {"gap/logprob_max": jnp.max(gap), "gap/logprob_mean": share(gap)}
    return loss, metrics
