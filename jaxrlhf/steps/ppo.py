"""The PPO update: epochs x minibatches of clipped policy and value steps, in one compiled program.

B rows, R response tokens.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.kl import kl_loss
from jaxrlhf.algorithms.losses import value_loss
from jaxrlhf.algorithms.masked import aggregate, masked_sum
from jaxrlhf.algorithms.policy_losses import POLICY_LOSSES, importance_weights
from jaxrlhf.algorithms.running import ema
from jaxrlhf.config import PPOConfig
from jaxrlhf.distributed.mesh import BATCH_AXES, constrain, split_rows
from jaxrlhf.models.adapters import SCORE, bind
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.scoring import response_logprobs, response_logprobs_and_values, response_values
from jaxrlhf.records import Adapter, Experience, PPOState, SFTBatch
from jaxrlhf.steps.flat import by_leaf, joined
from jaxrlhf.steps.metrics import Metrics, count, largest, of_first_step, over_steps, share
from jaxrlhf.steps.microbatches import accumulate, shortest_first
from jaxrlhf.steps.optimizer import init_optimizer, optimizer_step, with_rate
from jaxrlhf.steps.sft import learnt_tokens, sft_loss

MINIBATCHES = 4  # where the settings give no number


def init_ppo(policy: Adapter, value: Adapter | None, config: PPOConfig) -> PPOState:
    """The state before the first update, without a value model where `value` is None.

    With `value_trunk` "policy", `value` is a head alone (`adapters.value_head`). The trees are copied: the caller's
    stay valid when the state is donated.
    """
    value = {} if value is None else value
    if value and (config.value_trunk == "policy") != (set(value) == {SCORE}):
        raise ValueError("value_trunk policy wants a value of a head alone (value_head), value_trunk own an adapter")
    policy, value = jax.tree.map(lambda x: jnp.array(x, copy=True), (policy, value))
    average = {} if config.ema_decay is None else jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), policy)
    return PPOState(policy, value, average, init_optimizer(policy), init_optimizer(value), jnp.int32(0))


def complete(config: PPOConfig, rows: int) -> PPOConfig:
    """The settings with a number of minibatches for `rows` answers, where they have none: at most `MINIBATCHES`.

    The answers divide into them, and they into microbatches; where nothing does, it is 1.
    """
    if config.minibatches is not None:
        return config
    size = config.microbatch_size or 1
    fitting = [n for n in range(1, MINIBATCHES + 1) if rows % n == 0 and rows // n % size == 0]
    return config.model_copy(update={"minibatches": max(fitting, default=1)})


def single_step(config: PPOConfig) -> bool:
    """Whether an iteration takes one optimizer step: then the old policy is the new one, exactly."""
    return config.epochs * (config.minibatches or MINIBATCHES) == 1


def computed_steps(metrics: Mapping[str, float], config: PPOConfig) -> float:
    """How many optimizer steps an update computed: those it took, and the one whose KL was too much (`kl_stop`).

    `config` is `complete`.
    """
    steps = config.epochs * config.minibatches
    return min(float(metrics.get("policy/steps", steps)) + 1, steps)


def ppo_update(
    state: PPOState,
    base: Decoder,
    experience: Experience,
    key: jax.Array,
    config: PPOConfig,
    mix: SFTBatch | None = None,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """(state, metrics) after `epochs` passes over the experience in `minibatches` steps each.

    Learning rates and a number of minibatches that are not set are chosen (`with_rate`, `complete`).

    Each epoch uses every row once, in an order drawn from `key`. `mix` holds rows for the language-model loss of
    PPO-ptx, an equal part of them for each step. With `kl_stop` the steps from the first minibatch on whose
    approximate KL is above it are left out. Metrics are means over the steps, in the names of the metrics contract.
    Raises ValueError where rows and minibatches do not divide.
    """
    rows = experience.tokens.shape[0]
    config = complete(config, rows)
    optimizers = {
        "optimizer": with_rate(config.optimizer, "policy", state.policy),
        "value_optimizer": with_rate(config.value_optimizer, "value", state.value),
    }
    config = config.model_copy(update=optimizers)
    if rows % config.minibatches:
        raise ValueError(f"{rows} rows cannot be split into {config.minibatches} minibatches")
    steps = config.epochs * config.minibatches
    epochs = [jax.random.permutation(jax.random.fold_in(key, epoch), rows) for epoch in range(config.epochs)]
    order = jnp.stack(epochs).reshape(steps, -1)

    def step(state: PPOState, given: tuple[jax.Array, SFTBatch | None]):
        rows_of_step, mix_of_step = given
        minibatch = jax.tree.map(lambda x: constrain(x[rows_of_step], BATCH_AXES), experience)
        state, metrics = _minibatch_step(state, base, minibatch, config, mix_of_step)
        return state, (metrics, jnp.float32(1.0))

    state = joined(state)
    if config.kl_stop is not None:
        step = _stopping(step, config.kl_stop)
        state = (state, jnp.bool_(False))
    state, (metrics, seen) = jax.lax.scan(step, state, (order, None if mix is None else split_rows(mix, steps)))
    if config.kl_stop is not None:
        state, _ = state
    return by_leaf(state), over_steps(metrics, seen)


def _stopping(step: Callable, kl_stop: jax.Array | float) -> Callable:
    """The step, until a minibatch's approximate KL is above `kl_stop`: that step and those after it change nothing."""

    def taken(state: PPOState, given):
        after, (metrics, seen) = step(state, given)
        stops = metrics["policy/approx_kl"].value > kl_stop
        kept = jax.tree.map(lambda old, new: jnp.where(stops, old, new), state, after)
        return (kept, stops), (metrics | {"policy/steps": count(1.0 - stops)}, seen)

    def left_out(state: PPOState, given):
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(taken, state, given)[1])
        return (state, jnp.bool_(True)), nothing

    def guarded(carry: tuple[PPOState, jax.Array], given):
        state, stopped = carry
        return jax.lax.cond(stopped, left_out, taken, state, given)

    return guarded


def _minibatch_step(
    state: PPOState, base: Decoder, minibatch: Experience, config: PPOConfig, mix: SFTBatch | None
) -> tuple[PPOState, Metrics]:
    rows = minibatch.tokens.shape[0]
    size = config.microbatch_size or rows
    if rows % size:
        raise ValueError(f"a minibatch of {rows} rows cannot be split into microbatches of {size}")
    tokens, length = jnp.maximum(jnp.sum(minibatch.response_mask), 1), minibatch.response_mask.shape[1]
    if config.buckets > 1 and size < rows:
        order = shortest_first(minibatch)
        minibatch = jax.tree.map(lambda x: constrain(x[order], BATCH_AXES), minibatch)

    def loss(trees: tuple[Adapter, Adapter], part: Experience):
        return ppo_loss(*by_leaf(trees), base, part, config, tokens, rows, length)

    total, metrics, (policy_grads, value_grads) = accumulate(
        loss, (state.policy, state.value), minibatch, rows // size, config.buckets
    )
    if mix is not None:
        policy_grads, mix_loss = _with_pretraining(policy_grads, state, base, mix, config)
        metrics["policy/pretraining_loss"] = share(mix_loss)
    # The policy's schedule begins with its own first step.
    waiting = config.value_warmup * config.epochs * config.minibatches
    policy, policy_optimizer, noted = optimizer_step(
        config.optimizer,
        policy_grads,
        state.policy_optimizer,
        state.policy,
        jnp.maximum(state.step - waiting, 0),
        total,
    )
    if waiting:
        waits = state.step < waiting
        before, after = (state.policy, state.policy_optimizer), (policy, policy_optimizer)
        policy, policy_optimizer = jax.tree.map(lambda old, new: jnp.where(waits, old, new), before, after)
        noted["learning_rate"] = share(jnp.where(waits, 0.0, noted["learning_rate"].value))
    metrics |= {f"optimizer/{k}": v for k, v in noted.items()}
    value, value_optimizer = state.value, state.value_optimizer
    if value:
        value, value_optimizer, noted = optimizer_step(
            config.value_optimizer, value_grads, value_optimizer, value, state.step, total
        )
        metrics |= {f"optimizer/value_{k}": v for k, v in noted.items()}
    average = state.average if config.ema_decay is None else ema(state.average, policy, config.ema_decay)
    return PPOState(policy, value, average, policy_optimizer, value_optimizer, state.step + 1), metrics


def _with_pretraining(
    grads: Adapter, state: PPOState, base: Decoder, mix: SFTBatch, config: PPOConfig
) -> tuple[Adapter, jax.Array]:
    """The policy's gradient with that of the mean language-model loss, weighted; and that loss, f32[]."""
    tokens = jnp.maximum(jnp.sum(learnt_tokens(mix)), 1)
    rows = mix.tokens.shape[0]

    def loss(policy: Adapter, part: SFTBatch):
        return sft_loss(base, by_leaf(policy), part, config.remat) / tokens, {}

    parts = -(-rows // (config.microbatch_size or rows))
    value, _, own = accumulate(loss, state.policy, mix, parts)
    return jax.tree.map(lambda g, h: g + (config.pretraining_coef * h).astype(g.dtype), grads, own), value


def ppo_loss(
    policy: Adapter,
    value: Adapter,
    base: Decoder,
    experience: Experience,
    config: PPOConfig,
    total_tokens: jax.Array | int,
    total_rows: int,
    length: int | None = None,
) -> tuple[jax.Array, Metrics]:
    """These rows' share of a minibatch's loss, and their shares of its metrics.

    `total_tokens`, `total_rows` and `length` (response tokens of a row; None: these rows') are the whole minibatch's,
    so that shares of microbatches add up to it. An empty `value` stands for no value model; a shared one is a head on
    the policy's trunk, and its loss reaches the policy.
    """
    mask = experience.response_mask
    given = (experience.tokens, experience.mask, mask)
    if value and config.value_trunk == "policy":
        both = bind(base, {**policy, **value})
        logprobs, entropy, values = response_logprobs_and_values(both, *given, experience.temperature, config.remat)
    else:
        logprobs, entropy = response_logprobs(bind(base, policy), *given, experience.temperature, config.remat)
        values = response_values(bind(base, value), *given, config.remat) if value else None
    old = jax.lax.stop_gradient(logprobs) if single_step(config) else experience.logprobs
    bounds = (config.clip_low, config.clip_high, config.dual_clip, config.log_ratio_bound)
    per_token, noted = POLICY_LOSSES[config.loss](logprobs, old, experience.advantages, mask, *bounds)

    def mean(x: jax.Array) -> jax.Array:
        return masked_sum(x.astype(jnp.float32), mask) / total_tokens

    def aggregated(x: jax.Array) -> jax.Array:
        return aggregate(x, mask, config.aggregation, total_tokens, total_rows, length)

    metrics = {}
    if config.importance_cap is not None:
        capped = (config.importance_cap, config.importance_level, config.log_ratio_bound)
        weights = importance_weights(old, experience.sample_logprobs, mask, *capped)
        per_token = per_token * weights
        metrics["policy/importance_weight"] = share(mean(weights))
    loss = policy_share = aggregated(per_token)
    entropy_share = mean(entropy)
    loss -= config.entropy_coef * entropy_share
    if config.kl_loss is not None:
        kl = kl_loss(logprobs, experience.ref_logprobs, mask, config.kl_loss, config.kl_bound)
        kl_share = aggregated(kl * experience.kl_coef[:, None])
        metrics["policy/kl_loss"] = share(kl_share)
        loss += kl_share
    if values is not None:
        value_per_token, value_clipped = value_loss(
            values, experience.values, experience.returns, mask, config.value_clip
        )
        value_share = mean(value_per_token)
        metrics |= {"value/loss": share(value_share), "value/clip": share(mean(value_clipped))}
        loss += config.value_coef * value_share
    metrics |= {
        "policy/loss": share(policy_share),
        "policy/entropy": share(entropy_share),
        "policy/approx_kl": share(mean(noted["approx_kl"])),
        "policy/clip_low": share(mean(noted["clipped_low"])),
        "policy/clip_high": share(mean(noted["clipped_high"])),
        "policy/ratio_mean": share(mean(noted["ratio"])),
        "policy/ratio_max": largest(jnp.max(jnp.where(mask, noted["ratio"], 0.0))),
        "policy/first_ratio_error": of_first_step(jnp.max(jnp.where(mask, jnp.abs(noted["ratio"] - 1.0), 0.0))),
    }
    if single_step(config):  # elsewhere the gap is measured when the old logprobs are made
        gap = jnp.where(mask, jnp.abs(logprobs - experience.sample_logprobs), 0.0)
        metrics |= {"gap/logprob_max": largest(jnp.max(gap)), "gap/logprob_mean": share(mean(gap))}
    return loss, metrics
