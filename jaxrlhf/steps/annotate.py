"""Between sampling and learning: logprobs, values, shaped rewards, advantages.

B rows, R response tokens.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.algorithms.kl import BOUND, adapt_kl_coef, kl_estimate, shape_rewards
from jaxrlhf.algorithms.masked import explained_variance, masked_mean, masked_sum, masked_variance, whiten
from jaxrlhf.algorithms.running import RunningMoments, init_moments
from jaxrlhf.config import AdvantageConfig, KLConfig, PPOConfig, ScoreConfig
from jaxrlhf.distributed.mesh import BATCH_AXES, constrain, split_rows
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.scoring import response_logprobs, response_logprobs_and_values, response_values
from jaxrlhf.records import Adapter, Annotated, Experience, Rollout
from jaxrlhf.steps.microbatches import by_longest, shortest_first
from jaxrlhf.steps.ppo import complete, single_step
from jaxrlhf.steps.scores import adjust_scores, score_moments

WHITENED = ("gae", "reinforce")  # estimators whose advantages are whitened where settings do not say


@struct.dataclass
class Control:
    """What one iteration hands to the next beside policy and value."""

    kl_coef: jax.Array  # f32[]
    moments: RunningMoments  # of the scores, as `score.normalise` has it

    @classmethod
    def start(cls, kl_coef: float) -> "Control":
        """Before the first iteration."""
        return cls(jnp.float32(kl_coef), init_moments())


@struct.dataclass
class ExperienceSettings:
    """The settings of `annotate_experience`."""

    kl: KLConfig
    advantage: AdvantageConfig
    score: ScoreConfig
    update: PPOConfig
    group: int = struct.field(pytree_node=False, default=1)  # answers to each prompt


def annotate(
    base: Decoder,
    policy: Adapter | None,
    value: Adapter | None,
    reference: Adapter | None,
    rollout: Rollout,
    temperature: float | jax.Array | None = None,
    microbatches: int = 1,
    recompute_policy: bool = True,
    value_trunk: Literal["own", "policy"] = "own",
    buckets: int = 1,
) -> Annotated:
    """What policy, reference and value say of the answers; see `records.Annotated`.

    `value` None or empty gives values of 0; with `value_trunk` "policy" it is a head on the policy's trunk.
    `temperature` None takes the rollout's own. With `microbatches` the rows go through in equal parts, one after
    another, at the shapes of the update's own forward pass. `recompute_policy=False` takes the sampling logprobs for
    the policy's, where the update makes no use of old ones (one step an iteration). `buckets` as in `PPOConfig`: each
    part is cut to the length of its longest answer, rows of like length together.
    """
    if temperature is not None:
        rollout = rollout.replace(temperature=jnp.full(rollout.temperature.shape, temperature, jnp.float32))

    R = rollout.response_mask.shape[1]

    def passes(rows: Rollout) -> Annotated:
        given = (rows.tokens, rows.mask, rows.response_mask)
        ref_logprobs, _ = response_logprobs(bind(base, reference), *given, rows.temperature)
        logprobs, values = rows.sample_logprobs, jnp.zeros(rows.response_mask.shape, jnp.float32)
        if value and value_trunk == "policy":
            both = bind(base, {**(policy or {}), **value})
            logprobs, _, values = response_logprobs_and_values(both, *given, rows.temperature)
        else:
            if recompute_policy:
                logprobs, _ = response_logprobs(bind(base, policy), *given, rows.temperature)
            if value:
                values = response_values(bind(base, value), *given)
        annotated = Annotated(logprobs, ref_logprobs, values)
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, R - x.shape[1]))), annotated)

    if microbatches == 1:
        return by_longest(passes, rollout, buckets)
    order = None
    if buckets > 1:
        order = shortest_first(rollout)
        rollout = jax.tree.map(lambda x: constrain(x[order], BATCH_AXES), rollout)
    parts = jax.lax.map(lambda rows: by_longest(passes, rows, buckets), split_rows(rollout, microbatches))
    annotated = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)
    if order is None:
        return annotated
    back = jnp.argsort(order)
    return jax.tree.map(lambda x: constrain(x[back], BATCH_AXES), annotated)


def build_experience(
    rollout: Rollout,
    annotated: Annotated,
    scores: jax.Array,
    kl_coef: jax.Array | float,
    *,
    gamma: jax.Array | float = 1.0,
    lam: jax.Array | float = 1.0,
    estimator: Literal["k1", "k2", "k3"] = "k1",
    whiten_rewards: bool = False,
    whiten_advantages: bool | None = None,
    advantage: str = "gae",
    group: int = 1,
    greedy: jax.Array | None = None,
    kl_in_loss: bool = False,
    kl_bound: jax.Array | float | None = BOUND,
    mask_truncated: bool = False,
) -> tuple[Experience, dict[str, jax.Array]]:
    """Rewards shaped by KL, advantages and whitening over the whole batch; (experience, metrics).

    `scores` is f32[B], see `steps.scores` for what may come before. `advantage` is a name of
    `algorithms.advantages.ADVANTAGES`, with `group` answers to each prompt and the `greedy` answers' scores f32[B]
    where it wants them. `whiten_advantages` None: those that are not compared within the batch already. `kl_bound` is
    for k2 and k3, in rewards and metrics: see `algorithms.kl.kl_estimate`. With `mask_truncated` an answer that did not
    end has no token in the experience's `response_mask`: the update does not know of it, nor does whitening; estimators
    that compare answers see its score as before.
    """
    mask = rollout.response_mask
    learnt = mask & rollout.ended[:, None] if mask_truncated else mask
    scores = scores.astype(jnp.float32)
    in_reward, in_loss = (0.0, kl_coef) if kl_in_loss else (kl_coef, 0.0)
    rewards = shape_rewards(scores, annotated.logprobs, annotated.ref_logprobs, mask, in_reward, estimator, kl_bound)
    if whiten_rewards:
        rewards = whiten(rewards, learnt, shift_mean=False)
    greedy = jnp.zeros(scores.shape, jnp.float32) if greedy is None else greedy
    compute = ADVANTAGES[advantage].compute
    advantages, returns = compute(rewards, mask, annotated.values, group, greedy, gamma, lam)
    if whiten_advantages is None:
        whiten_advantages = advantage in WHITENED
    metrics = _experience_metrics(rollout, annotated, scores, rewards, advantages, returns, kl_bound)
    if mask_truncated:
        metrics["length/masked_share"] = jnp.mean(~rollout.ended, dtype=jnp.float32)
    experience = Experience(
        tokens=rollout.tokens,
        mask=rollout.mask,
        response_mask=learnt,
        temperature=rollout.temperature,
        sample_logprobs=rollout.sample_logprobs,
        logprobs=annotated.logprobs,
        ref_logprobs=annotated.ref_logprobs,
        values=annotated.values,
        advantages=whiten(advantages, learnt) if whiten_advantages else advantages,
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
    greedy: tuple[Rollout, jax.Array] | None,
    control: Control,
    settings: ExperienceSettings,
) -> tuple[Experience, Control, dict[str, jax.Array]]:
    """`annotate_for_update` and `score_experience` in one program; (experience, next control, metrics)."""
    annotated = annotate_for_update(base, policy, value, reference, rollout, settings.update)
    return score_experience(rollout, annotated, scores, greedy, control, settings)


def annotate_for_update(
    base: Decoder,
    policy: Adapter | None,
    value: Adapter | None,
    reference: Adapter | None,
    rollout: Rollout,
    update: PPOConfig,
) -> Annotated:
    """`annotate` as an update with these settings wants it. Needs no scores: it may run while they are come by."""
    rows = rollout.tokens.shape[0]
    update = complete(update, rows)
    return annotate(
        base,
        policy,
        value,
        reference,
        rollout,
        # The old logprobs come at the shapes of the update's own.
        microbatches=rows // (update.microbatch_size or rows // update.minibatches),
        recompute_policy=not single_step(update),
        value_trunk=update.value_trunk,
        buckets=update.buckets,
    )


def score_experience(
    rollout: Rollout,
    annotated: Annotated,
    scores: jax.Array,
    greedy: tuple[Rollout, jax.Array] | None,
    control: Control,
    settings: ExperienceSettings,
) -> tuple[Experience, Control, dict[str, jax.Array]]:
    """`adjust_scores` and `build_experience`: all that waits for the scores; (experience, next control, metrics).

    `scores` f32[B] are those of the reward; `greedy` holds one greedy answer to each prompt with its score, where
    the advantages are measured from them.
    """
    kl, advantage, update, group = settings.kl, settings.advantage, settings.update, settings.group
    moments = score_moments(control.moments, scores, settings.score)
    adjusted = adjust_scores(scores, rollout, moments, settings.score)
    baseline = None
    if greedy is not None:
        baseline = jnp.repeat(adjust_scores(greedy[1], greedy[0], moments, settings.score), group)
    experience, metrics = build_experience(
        rollout,
        annotated,
        adjusted,
        control.kl_coef,
        gamma=advantage.gamma,
        lam=advantage.lam,
        estimator=kl.estimator,
        whiten_rewards=advantage.whiten_rewards,
        whiten_advantages=advantage.whiten_advantages,
        advantage=advantage.estimator,
        group=group,
        greedy=baseline,
        kl_in_loss=update.kl_loss is not None,
        kl_bound=update.kl_bound,
        mask_truncated=update.mask_truncated,
    )
    kl_coef = control.kl_coef
    if kl.target is not None:
        kl_coef = adapt_kl_coef(kl_coef, metrics["kl/k1"], kl.target, scores.shape[0], kl.horizon)
    metrics |= {
        "kl/coef": control.kl_coef,
        "reward/adjusted": metrics["reward/score"],
        "reward/score": jnp.mean(scores),
        "reward/score_std": jnp.std(scores),
    }
    return experience, Control(kl_coef, moments), metrics


def _experience_metrics(rollout, annotated, scores, rewards, advantages, returns, kl_bound) -> dict[str, jax.Array]:
    mask = rollout.response_mask
    kl = {k: kl_estimate(annotated.logprobs, annotated.ref_logprobs, k, kl_bound) for k in ("k1", "k2", "k3")}
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
