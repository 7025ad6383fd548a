"""The update of PPO on control tasks: advantages, and all epochs and minibatches in one `lax.scan`.

T steps of N environments, I inputs of the network, K numbers of an action, M minibatches of b transitions.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from jaxrlhf.algorithms.advantages import truncated_gae
from jaxrlhf.algorithms.losses import value_loss
from jaxrlhf.algorithms.masked import explained_variance, masked_mean, whiten
from jaxrlhf.algorithms.policy_losses import policy_loss
from jaxrlhf.config import OptimizerConfig
from jaxrlhf.models.mlp import Actions, logprobs_and_entropies, mlp
from jaxrlhf.steps.optimizer import init_optimizer, optimizer_step

ADAM_EPSILON = 1e-5  # Stable-Baselines3's


@struct.dataclass
class Transitions:
    """What one iteration has sampled. A failed transition has no result, and is left out of the losses."""

    observations: Array  # f32[T,N,I]; as the network reads them
    next_observations: Array  # f32[T,N,I]; at the end of an episode its last observation
    actions: Array  # [T,N,K]; not clipped
    rewards: Array  # f32[T,N]
    terminated: Array  # bool[T,N]
    truncated: Array  # bool[T,N]; cut off, so that the value of the next observation counts
    failed: Array  # bool[T,N]


@struct.dataclass
class Numbers:
    """Traced settings, f32[] each. A new value needs no compilation."""

    learning_rate: Array | float
    clip_range: Array | float
    clip_range_vf: Array | float  # infinity: no clipping
    ent_coef: Array | float
    vf_coef: Array | float
    max_grad_norm: Array | float
    gamma: Array | float
    gae_lambda: Array | float
    target_kl: Array | float  # infinity: no limit


@struct.dataclass
class ControlState:
    """What the next update depends on."""

    params: Any
    optimizer: optax.OptState
    step: Array  # i32[]; optimizer steps so far


def init_control(params: Any) -> ControlState:
    """Returns the state before the first update."""
    return ControlState(params, init_optimizer(params), jnp.zeros((), jnp.int32))


def advantages_of(params: Any, samples: Transitions, numbers: Numbers, activation: str) -> tuple[Array, Array]:
    """Returns (advantages, values), f32[T,N] each.

    GAE as in Stable-Baselines3. A truncated episode is bootstrapped: gamma times the value of its last observation is
    added to its last reward. The episode of a failed transition is bootstrapped with the value of the observation
    before it.
    """

    def value(observations: Array) -> Array:
        return mlp(params["value"], observations, activation)[..., 0]

    values, next_values = value(samples.observations), value(samples.next_observations)
    cut = samples.truncated & ~samples.terminated
    rewards = samples.rewards + jnp.where(cut, numbers.gamma * next_values, 0.0)
    rewards = jnp.where(samples.failed, values, rewards)  # a TD error of 0
    ends = samples.terminated | samples.truncated | samples.failed
    discounts = jnp.where(ends, 0.0, numbers.gamma)
    along = jnp.concatenate([values, next_values[-1:]])
    by_environment = jax.vmap(truncated_gae, in_axes=(1, 1, 1, None), out_axes=1)
    return by_environment(rewards, along, discounts, numbers.gae_lambda), values


def control_update(
    state: ControlState,
    samples: Transitions,
    order: Array,
    numbers: Numbers,
    actions: Actions,
    activation: str,
    normalize_advantage: bool,
) -> tuple[ControlState, dict[str, Array]]:
    """Runs all epochs and minibatches of one iteration, and returns (state, metrics).

    Old logprobs and values are computed here, with the functions that the loss uses. If the approximate KL of a
    minibatch is above 1.5 * target_kl, its step and all later steps are skipped, as in Stable-Baselines3.

    Args:
      state, samples, numbers: see their classes.
      order: i32[M,b]; the transitions of each minibatch, as indices into T*N; -1 is padding.
      actions, activation, normalize_advantage: static.
    """
    advantages, values = advantages_of(state.params, samples, numbers, activation)

    def rows(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])

    outputs = mlp(state.params["policy"], rows(samples.observations), activation)
    log_std = state.params.get("log_std")
    old_logprobs, _ = logprobs_and_entropies(actions, outputs, log_std, rows(samples.actions))
    data = {
        "observations": rows(samples.observations), "actions": rows(samples.actions), "logprobs": old_logprobs,
        "values": rows(values), "advantages": rows(advantages), "returns": rows(advantages + values),
        "real": ~rows(samples.failed),
    }  # fmt: skip

    def minibatch(carry: tuple[ControlState, Array], indices: Array) -> tuple[tuple[ControlState, Array], Any]:
        batch = jax.tree.map(lambda x: x[indices], data)
        batch["real"] &= indices >= 0
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, carry[0], batch)[2])
        return jax.lax.cond(
            carry[1],
            lambda: (carry, nothing),
            lambda: (lambda state, stop, metrics: ((state, stop), metrics))(*step(carry[0], batch)),
        )

    def step(state: ControlState, batch: dict[str, Array]) -> tuple[ControlState, Array, dict[str, Array]]:
        loss = lambda params: _loss(params, batch, numbers, actions, activation, normalize_advantage)  # noqa: E731
        (total, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        stop = metrics["approx_kl"] > 1.5 * numbers.target_kl
        config = OptimizerConfig(epsilon=ADAM_EPSILON).model_copy(
            update={"learning_rate": numbers.learning_rate, "max_grad_norm": numbers.max_grad_norm}
        )
        params, optimizer, _ = optimizer_step(config, grads, state.optimizer, state.params, state.step, total)
        after = ControlState(params, optimizer, state.step + 1)
        state = jax.tree.map(lambda old, new: jnp.where(stop, old, new), state, after)
        return state, stop, {**metrics, "loss": total, "seen": jnp.ones(())}

    (after, _), series = jax.lax.scan(minibatch, (state, jnp.zeros((), bool)), order)
    seen = series.pop("seen")
    metrics = {name: jnp.sum(x * seen) / jnp.sum(seen) for name, x in series.items()}
    metrics["explained_variance"] = explained_variance(data["values"], data["returns"], data["real"])
    metrics["n_updates"] = after.step
    if "log_std" in after.params:
        metrics["std"] = jnp.mean(jnp.exp(after.params["log_std"]))
    return after, metrics


def _loss(
    params: Any, batch: dict[str, Array], numbers: Numbers, actions: Actions, activation: str, normalize: bool
) -> tuple[Array, dict[str, Array]]:
    """The loss of a minibatch as Stable-Baselines3 has it: the squared error of the value is not halved."""
    outputs = mlp(params["policy"], batch["observations"], activation)
    logprobs, entropies = logprobs_and_entropies(actions, outputs, params.get("log_std"), batch["actions"])
    values = mlp(params["value"], batch["observations"], activation)[:, 0]
    real = batch["real"]
    advantages = whiten(batch["advantages"], real) if normalize else batch["advantages"]
    clip = numbers.clip_range
    losses, diagnostics = policy_loss(
        *(x[None] for x in (logprobs, batch["logprobs"], advantages, real)), clip_low=clip, clip_high=clip
    )
    policy = masked_mean(losses, real[None])
    errors, _ = value_loss(
        *(x[None] for x in (values, batch["values"], batch["returns"], real)), clip=numbers.clip_range_vf
    )
    value, entropy = 2.0 * masked_mean(errors, real[None]), masked_mean(entropies, real)
    clipped = jnp.abs(diagnostics["ratio"] - 1.0) > clip
    return policy + numbers.vf_coef * value - numbers.ent_coef * entropy, {
        "policy_gradient_loss": policy,
        "value_loss": value,
        "entropy_loss": -entropy,
        "approx_kl": masked_mean(diagnostics["approx_kl"], real[None]),
        "clip_fraction": masked_mean(clipped, real[None]),
    }
