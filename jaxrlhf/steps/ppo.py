"""The PPO update: epochs x minibatches of clipped policy and value steps, in one compiled program.

B rows, R response tokens.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.losses import ppo_policy_loss, value_loss
from jaxrlhf.algorithms.masked import aggregate, masked_sum
from jaxrlhf.config import PPOConfig
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.scoring import response_logprobs, response_values
from jaxrlhf.records import Adapter, Experience, PPOState
from jaxrlhf.steps.microbatches import accumulate
from jaxrlhf.steps.optimizer import init_optimizer, optimizer_step


def init_ppo(policy: Adapter, value: Adapter, config: PPOConfig) -> PPOState:
    """The state before the first update. The trees are copied: the caller's stay valid when it is donated."""
    del config  # part of the stable API; the optimizer's state depends on no setting today
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
    value, value_optimizer, value_noted = optimizer_step(
        config.value_optimizer, grads[1], state.value_optimizer, state.value, state.step
    )
    metrics |= {f"optimizer/{k}": v for k, v in noted.items()}
    metrics |= {f"optimizer/value_{k}": v for k, v in value_noted.items()}
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

    `total_tokens` and `total_rows` are the whole minibatch's, so that shares of microbatches add up to it.
    """
    mask = experience.response_mask
    given = (experience.tokens, experience.mask, mask)
    logprobs, entropy = response_logprobs(bind(base, policy), *given, experience.temperature, config.remat)
    values = response_values(bind(base, value), *given, config.remat)
    old = jax.lax.stop_gradient(logprobs) if single_step(config) else experience.logprobs
    per_token, noted = ppo_policy_loss(
        logprobs, old, experience.advantages, mask, config.clip_low, config.clip_high
    )
    policy_loss = aggregate(per_token, mask, config.aggregation, total_tokens, total_rows)
    value_per_token, value_clipped = value_loss(
        values, experience.values, experience.returns, mask, config.value_clip
    )

    def share(x: jax.Array) -> jax.Array:
        return masked_sum(x.astype(jnp.float32), mask) / total_tokens

    value_share, entropy_share = share(value_per_token), share(entropy)
    loss = policy_loss + config.value_coef * value_share - config.entropy_coef * entropy_share
    metrics = {
        "policy/loss": policy_loss,
        "policy/entropy": entropy_share,
        "policy/approx_kl": share(noted["approx_kl"]),
        "policy/clip_low": share(noted["clipped_low"]),
        "policy/clip_high": share(noted["clipped_high"]),
        "policy/ratio_mean": share(noted["ratio"]),
        "policy/ratio_max": jnp.max(jnp.where(mask, noted["ratio"], 0.0)),
        "policy/ratio_error_max": jnp.max(jnp.where(mask, jnp.abs(noted["ratio"] - 1.0), 0.0)),
        "value/loss": value_share,
        "value/clip": share(value_clipped),
    }
    if single_step(config):  # elsewhere the gap is measured when the old logprobs are made
        gap = jnp.where(mask, jnp.abs(logprobs - experience.sample_logprobs), 0.0)
        metrics |= {"gap/logprob_max": jnp.max(gap), "gap/logprob_mean": share(gap)}
    return loss, metrics
