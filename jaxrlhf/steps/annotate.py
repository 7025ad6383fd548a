"""Between sampling and learning: logprobs, values, shaped rewards, advantages.

B rows, R response tokens.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.algorithms.kl import adapt_kl_coef, kl_estimate, shape_rewards
from jaxrlhf.algorithms.masked import explained_variance, masked_mean, masked_sum, masked_variance, whiten
from jaxrlhf.config import AdvantageConfig, KLConfig
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.scoring import response_logprobs, response_values
from jaxrlhf.records import Adapter, Annotated, Experience, Rollout
from jaxrlhf.steps.microbatches import split_rows

WHITENED = ("gae", "reinforce")  # estimators whose advantages are whitened where settings do not say


def annotate(
    base: Decoder,
    policy: Adapter | None,
    value: Adapter | None,
    reference: Adapter | None,
    rollout: Rollout,
    temperature: float | jax.Array | None = None,
    microbatches: int = 1,
    recompute_policy: bool = True,
) -> Annotated:
    """What policy, reference and value say of the answers; see `records.Annotated`.

    `value` None or empty gives values of 0. `temperature` None takes the rollout's own. With `microbatches` the rows
    go through in equal parts, one after another, at the shapes of the update's own forward pass.
    `recompute_policy=False` takes the sampling logprobs for the policy's, where the update makes no use of old ones
    (one step an iteration).
    """
    if temperature is not None:
        rollout = rollout.replace(temperature=jnp.full(rollout.temperature.shape, temperature, jnp.float32))

    def part(rows: Rollout) -> Annotated:
        given = (rows.tokens, rows.mask, rows.response_mask)
        ref_logprobs, _ = response_logprobs(bind(base, reference), *given, rows.temperature)
        logprobs = rows.sample_logprobs
        if recompute_policy:
            logprobs, _ = response_logprobs(bind(base, policy), *given, rows.temperature)
        values = response_values(bind(base, value), *given) if value else jnp.zeros(logprobs.shape, jnp.float32)
        return Annotated(logprobs, ref_logprobs, values)

    if microbatches == 1:
        return part(rollout)
    parts = jax.lax.map(part, split_rows(rollout, microbatches))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)


def build_experience(
    rollout: Rollout,
    annotated: Annotated,
    scores: jax.Array,
    kl_coef: jax.Array | float,
    gamma: jax.Array | float = 1.0,
    lam: jax.Array | float = 0.95,
    missing_eos_penalty: jax.Array | float = 0.0,
    estimator: Literal["k1", "k2", "k3"] = "k1",
    whiten_rewards: bool = False,
    whiten_advantages: bool | None = None,
    advantage: str = "gae",
    group: int = 1,
    greedy: jax.Array | None = None,
    kl_in_loss: bool = False,
) -> tuple[Experience, dict[str, jax.Array]]:
    """Rewards shaped by KL, advantages and whitening over the whole batch; (experience, metrics).

    `scores` is f32[B]. `missing_eos_penalty` is taken off the scores of answers that did not end. `advantage` is a
    name of `algorithms.advantages.ADVANTAGES`, with `group` answers to each prompt and the `greedy` answers' scores
    f32[B] where it wants them. `whiten_advantages` None: those that are not compared within the batch already.
    """
    mask = rollout.response_mask
    scores = scores.astype(jnp.float32) - missing_eos_penalty * (~rollout.ended)
    in_reward, in_loss = (0.0, kl_coef) if kl_in_loss else (kl_coef, 0.0)
    rewards = shape_rewards(scores, annotated.logprobs, annotated.ref_logprobs, mask, in_reward, estimator)
    if whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    greedy = jnp.zeros(scores.shape, jnp.float32) if greedy is None else greedy
    compute = ADVANTAGES[advantage].compute
    advantages, returns = compute(rewards, mask, annotated.values, group, greedy, gamma, lam)
    if whiten_advantages is None:
        whiten_advantages = advantage in WHITENED
    metrics = _experience_metrics(rollout, annotated, scores, rewards, advantages, returns)
    experience = Experience(
        tokens=rollout.tokens,
        mask=rollout.mask,
        response_mask=mask,
        temperature=rollout.temperature,
        sample_logprobs=rollout.sample_logprobs,
        logprobs=annotated.logprobs,
        ref_logprobs=annotated.ref_logprobs,
        values=annotated.values,
        advantages=whiten(advantages, mask) if whiten_advantages else advantages,
        returns=returns,
        kl_coef=jnp.full(scores.shape, in_loss, jnp.float32),
    )
    return experience, metrics


def annotate_experience(
    base: Decoder,
    policy: Adapter | None,
    value: Adapter | None,
    reference: Adapter | None,
    rollout: Rollout,
    scores: jax.Array,
    kl_coef: jax.Array,
    kl: KLConfig,
    advantage: AdvantageConfig,
    missing_eos_penalty: float,
    greedy: jax.Array | None = None,
    group: int = 1,
    kl_in_loss: bool = False,
    microbatches: int = 1,
    recompute_policy: bool = True,
) -> tuple[Experience, jax.Array, dict[str, jax.Array]]:
    """`annotate` and `build_experience` in one program; (experience, next KL coefficient, metrics)."""
    annotated = annotate(
        base, policy, value, reference, rollout, microbatches=microbatches, recompute_policy=recompute_policy
    )
    experience, metrics = build_experience(
        rollout,
        annotated,
        scores,
        kl_coef,
        advantage.gamma,
        advantage.lam,
        missing_eos_penalty,
        kl.estimator,
        advantage.whiten_rewards,
        advantage.whiten_advantages,
        advantage.estimator,
        group,
        greedy,
        kl_in_loss,
    )
    next_coef = kl_coef
    if kl.target is not None:
        next_coef = adapt_kl_coef(kl_coef, metrics["kl/k1"], kl.target, scores.shape[0], kl.horizon)
    return experience, next_coef, metrics | {"kl/coef": kl_coef}


def _experience_metrics(rollout, annotated, scores, rewards, advantages, returns) -> dict[str, jax.Array]:
    mask = rollout.response_mask
    kl = {k: kl_estimate(annotated.logprobs, annotated.ref_logprobs, k) for k in ("k1", "k2", "k3")}
    gap = jnp.where(mask, jnp.abs(annotated.logprobs - rollout.sample_logprobs), 0.0)
    return {
        "reward/score": jnp.mean(scores),
        "reward/score_std": jnp.std(scores),
        "reward/shaped": jnp.mean(masked_sum(rewards, mask, axis=1)),
        **{f"kl/{k}": jnp.mean(masked_sum(x, mask, axis=1)) for k, x in kl.items()},
        "value/mean": masked_mean(annotated.values, mask),
        "value/explained_variance": explained_variance(annotated.values, returns, mask),
        "advantage/mean": masked_mean(advantages, mask),
        "advantage/std": jnp.sqrt(masked_variance(advantages, mask)),
        "length/mean": jnp.mean(jnp.sum(mask, axis=1, dtype=jnp.float32)),
        "length/eos_share": jnp.mean(rollout.ended, dtype=jnp.float32),
        "gap/logprob_max": jnp.max(gap),
        "gap/logprob_mean": masked_mean(gap, mask),
    }
