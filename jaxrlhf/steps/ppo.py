"""The PPO update: epochs x minibatches of policy and value steps, in one compiled program.

Sizes: B rows and R response tokens.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.kl import kl_loss
from jaxrlhf.algorithms.losses import value_loss
from jaxrlhf.algorithms.masked import aggregate, masked_sum
from jaxrlhf.algorithms.policy_losses import importance_weights, policy_loss
from jaxrlhf.algorithms.running import ema
from jaxrlhf.config import PPOConfig
from jaxrlhf.distributed.mesh import split_rows
from jaxrlhf.models.adapters import SCORE
from jaxrlhf.models.choices import Choices
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.layer_scan import stacked_adapter, unstacked_adapter, with_stacked_layers
from jaxrlhf.models.packing import PackedRows, pack_rows, take_pass
from jaxrlhf.models.policy_value import response_outputs
from jaxrlhf.records import Adapter, Experience, PPOState, SFTBatch
from jaxrlhf.steps.flat import by_leaf, joined
from jaxrlhf.steps.metrics import Metrics, count, largest, of_first_step, over_steps, share
from jaxrlhf.steps.microbatches import accumulate, accumulate_parts, take_rows
from jaxrlhf.steps.optimizer import init_optimizer, optimizer_step, with_rate
from jaxrlhf.steps.sft import learned_tokens, sft_loss

MINIBATCHES = 4  # default number of minibatches


def init_ppo(policy: Adapter, value: Adapter | None, config: PPOConfig) -> PPOState:
    """Returns the state before the first update. `value` is None if there is no value model.

    If `value_trunk` is "policy", `value` must be only a head (`adapters.value_head`). All arrays are copied. So if a
    program donates the state, the caller's arrays stay valid.
    """
    value = {} if value is None else value
    if value and (config.value_trunk == "policy") != (set(value) == {SCORE}):
        raise ValueError(
            "`value` must be only a head (value_head) if value_trunk is policy, and an adapter if value_trunk is own"
        )
    policy, value = jax.tree.map(lambda x: jnp.array(x, copy=True), (policy, value))
    average = {} if config.ema_decay is None else jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), policy)
    return PPOState(policy, value, average, init_optimizer(policy), init_optimizer(value), jnp.int32(0))


def complete(config: PPOConfig, rows: int) -> PPOConfig:
    """Returns the config with a number of minibatches. `rows` is the number of completions.

    If the config has no number, the result has the largest valid number up to `MINIBATCHES`. A number n is valid if the
    rows can be split into n equal minibatches, and each minibatch into microbatches. If no number is valid, n is 1.
    """
    if config.minibatches is not None:
        return config
    size = config.microbatch_size or 1
    valid = [n for n in range(1, MINIBATCHES + 1) if rows % n == 0 and rows // n % size == 0]
    return config.model_copy(update={"minibatches": max(valid, default=1)})


def single_step(config: PPOConfig) -> bool:
    """Returns True if an iteration has one optimizer step. The policy in training is then exactly the old policy."""
    return config.epochs * (config.minibatches or MINIBATCHES) == 1


def computed_steps(metrics: Mapping[str, float], config: PPOConfig) -> float:
    """Returns the number of optimizer steps that an update computed. A step that `kl_stop` discarded counts too.

    `config` must be a result of `complete`.
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
    choices: Choices | None = None,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """Runs a PPO update, and returns (state, metrics).

    The update makes `epochs` passes over the experience, with `minibatches` optimizer steps in each pass. Each pass
    uses every row once, in a random order from `key`. `mix` holds rows for the language-model loss of PPO-ptx. Every
    step uses an equal part of `mix`. If the approximate KL of a minibatch exceeds `kl_stop`, the step of this minibatch
    is discarded and all later minibatches are skipped. If the config has no learning rate, `with_rate` sets it; if the
    config has no number of minibatches, `complete` sets it. `choices` are those of the rollout. Raises `ValueError` if
    `minibatches` does not divide the rows.
    """
    rows = experience.tokens.shape[0]
    config = complete(config, rows)
    base, *_ = with_stacked_layers(base, state.policy, state.value)
    rates = {
        "optimizer": with_rate(config.optimizer, "policy", state.policy),
        "value_optimizer": with_rate(config.value_optimizer, "value", state.value),
    }
    config = config.model_copy(update=rates)
    if rows % config.minibatches:
        raise ValueError(f"{rows} rows cannot be split into {config.minibatches} minibatches")
    steps = config.epochs * config.minibatches
    epochs = [jax.random.permutation(jax.random.fold_in(key, epoch), rows) for epoch in range(config.epochs)]
    order = jnp.stack(epochs).reshape(steps, -1)

    def step(state: PPOState, inputs: tuple[jax.Array, SFTBatch | None]):
        rows_of_step, mix_of_step = inputs
        minibatch = take_rows(experience, rows_of_step)
        state, metrics = _minibatch_step(state, base, minibatch, config, mix_of_step, choices)
        return state, (metrics, jnp.float32(1.0))

    given = state
    state = joined(_each_adapter(lambda tree: stacked_adapter(base, tree), state))
    if config.kl_stop is not None:
        step = _stopping(step, config.kl_stop)
        state = (state, jnp.bool_(False))
    state, (metrics, seen) = jax.lax.scan(step, state, (order, None if mix is None else split_rows(mix, steps)))
    if config.kl_stop is not None:
        state, _ = state
    state = _each_adapter(lambda tree, like: unstacked_adapter(base, tree, like), by_leaf(state), given)
    return state, over_steps(metrics, seen)


def _each_adapter(change: Callable, state: PPOState, *others: PPOState) -> PPOState:
    """Applies `change` to each adapter of the state, and to each tree of optimizer moments (same structure)."""

    def changed(part, *others):
        return change(part, *others) if isinstance(part, dict) and part else part

    return jax.tree.map(changed, state, *others, is_leaf=lambda part: isinstance(part, dict))


def _stopping(step: Callable, kl_stop: jax.Array | float) -> Callable:
    """Wraps `step`. If the approximate KL of a call exceeds `kl_stop`, this call and all later calls change nothing."""

    def run(state: PPOState, inputs):
        after, (metrics, seen) = step(state, inputs)
        stops = metrics["policy/approx_kl"].value > kl_stop
        kept = jax.tree.map(lambda old, new: jnp.where(stops, old, new), state, after)
        return (kept, stops), (metrics | {"policy/steps": count(1.0 - stops)}, seen)

    def skip(state: PPOState, inputs):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, state, inputs)[1])
        return (state, jnp.bool_(True)), zeros

    def run_or_skip(carry: tuple[PPOState, jax.Array], inputs):
        state, stopped = carry
        return jax.lax.cond(stopped, skip, run, state, inputs)

    return run_or_skip


def _minibatch_step(
    state: PPOState,
    base: Decoder,
    minibatch: Experience,
    config: PPOConfig,
    mix: SFTBatch | None,
    choices: Choices | None,
) -> tuple[PPOState, Metrics]:
    rows = minibatch.tokens.shape[0]
    size = config.microbatch_size or rows
    if rows % size:
        raise ValueError(f"a minibatch of {rows} rows cannot be split into microbatches of {size}")
    tokens, length = jnp.maximum(jnp.sum(minibatch.response_mask), 1), minibatch.response_mask.shape[1]
    trees = (state.policy, state.value)

    def loss(trees: tuple[Adapter, Adapter], part: Experience, packed: PackedRows | None = None):
        return ppo_loss(*by_leaf(trees), base, part, config, tokens, rows, length, packed, choices)

    if config.packed:
        packed = pack_rows(minibatch, size)
        of_pass = (lambda trees, part: loss(trees, minibatch, part)), trees, (lambda i: take_pass(packed, i))
        summed = accumulate_parts(*of_pass, packed.passes)
    else:
        summed = accumulate(loss, trees, minibatch, rows // size)
    total, metrics, (policy_grads, value_grads) = summed
    if mix is not None:
        policy_grads, mix_loss = _with_pretraining(policy_grads, state, base, mix, config)
        metrics["policy/pretraining_loss"] = share(mix_loss)
    # The policy's learning-rate schedule starts after the value warm-up.
    warmup = config.value_warmup * config.epochs * config.minibatches
    policy_step = jnp.maximum(state.step - warmup, 0)
    policy, policy_optimizer, of_step = optimizer_step(
        config.optimizer, policy_grads, state.policy_optimizer, state.policy, policy_step, total
    )
    if warmup:
        warming = state.step < warmup
        before, after = (state.policy, state.policy_optimizer), (policy, policy_optimizer)
        policy, policy_optimizer = jax.tree.map(lambda old, new: jnp.where(warming, old, new), before, after)
        of_step["learning_rate"] = share(jnp.where(warming, 0.0, of_step["learning_rate"].value))
    metrics |= {f"optimizer/{name}": metric for name, metric in of_step.items()}
    value, value_optimizer = state.value, state.value_optimizer
    if value:
        value, value_optimizer, of_step = optimizer_step(
            config.value_optimizer, value_grads, value_optimizer, value, state.step, total
        )
        metrics |= {f"optimizer/value_{name}": metric for name, metric in of_step.items()}
    average = state.average if config.ema_decay is None else ema(state.average, policy, config.ema_decay)
    return PPOState(policy, value, average, policy_optimizer, value_optimizer, state.step + 1), metrics


def _with_pretraining(
    grads: Adapter, state: PPOState, base: Decoder, mix: SFTBatch, config: PPOConfig
) -> tuple[Adapter, jax.Array]:
    """Adds the gradient of the weighted language-model loss to `grads`. Returns (gradient, mean loss f32[])."""
    tokens = jnp.maximum(jnp.sum(learned_tokens(mix)), 1)
    rows = mix.tokens.shape[0]

    def loss(policy: Adapter, part: SFTBatch):
        return sft_loss(base, by_leaf(policy), part, config.remat) / tokens, {}

    parts = -(-rows // (config.microbatch_size or rows))
    value, _, mix_grads = accumulate(loss, state.policy, mix, parts)
    return jax.tree.map(lambda g, h: g + (config.pretraining_coef * h).astype(g.dtype), grads, mix_grads), value


def ppo_loss(
    policy: Adapter,
    value: Adapter,
    base: Decoder,
    experience: Experience,
    config: PPOConfig,
    total_tokens: jax.Array | int,
    total_rows: int,
    length: int | None = None,
    packed: PackedRows | None = None,
    choices: Choices | None = None,
) -> tuple[jax.Array, Metrics]:
    """Returns the parts that a microbatch adds to the loss and to the metrics of its minibatch.

    `total_tokens`, `total_rows` and `length` describe the minibatch, so that the parts of its microbatches sum to its
    loss. `length` is the number of response tokens per row; None means the number in this microbatch. `value` is empty
    if there is no value model. If `value_trunk` is "policy", the value loss also trains the policy's trunk.
    `packed` selects the rows of `experience` for this pass. None selects all rows. `choices` are those of the rollout.
    """
    mask = experience.response_mask if packed is None else packed.mask
    inputs = (experience.tokens, experience.mask, mask)
    logprobs, entropy, values = response_outputs(
        base, policy, value, *inputs, experience.temperature, config.value_trunk, config.remat, packed, choices
    )
    old = jax.lax.stop_gradient(logprobs) if single_step(config) else experience.logprobs
    bounds = (config.clip_low, config.clip_high, config.dual_clip, config.log_ratio_bound)
    per_token, tokens = policy_loss(logprobs, old, experience.advantages, mask, *bounds, config.loss)

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
        "policy/approx_kl": share(mean(tokens["approx_kl"])),
        "policy/clip_low": share(mean(tokens["clipped_low"])),
        "policy/clip_high": share(mean(tokens["clipped_high"])),
        "policy/ratio_mean": share(mean(tokens["ratio"])),
        "policy/ratio_max": largest(jnp.max(jnp.where(mask, tokens["ratio"], 0.0))),
        "policy/first_ratio_error": of_first_step(jnp.max(jnp.where(mask, jnp.abs(tokens["ratio"] - 1.0), 0.0))),
    }
    if single_step(config):  # if there are more steps, `build_experience` logs the gap
        gap = jnp.where(mask, jnp.abs(logprobs - experience.sample_logprobs), 0.0)
        metrics |= {"gap/logprob_max": largest(jnp.max(gap)), "gap/logprob_mean": share(mean(gap))}
    return loss, metrics
