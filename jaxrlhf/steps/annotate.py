"""Turns a rollout into experience: computes logprobs, values, shaped rewards and advantages.

Sizes: B rows and R response tokens.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from jaxrlhf.algorithms.advantages import ADVANTAGES, turn_discounts
from jaxrlhf.algorithms.kl import BOUND, adapt_kl_coef, kl_estimate, shape_rewards
from jaxrlhf.algorithms.masked import explained_variance, masked_mean, masked_sum, masked_variance, whiten
from jaxrlhf.algorithms.running import RunningMoments, init_moments
from jaxrlhf.config import AdvantageConfig, KLConfig, PPOConfig, ScoreConfig
from jaxrlhf.distributed.mesh import split_rows
from jaxrlhf.models.adapters import bind
from jaxrlhf.models.choices import Choices
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.models.layer_scan import with_stacked_layers
from jaxrlhf.models.packing import PackedRows, pack_rows, take_pass
from jaxrlhf.models.policy_value import response_outputs
from jaxrlhf.models.scoring import response_logprobs, response_values
from jaxrlhf.records import Adapter, Annotated, Experience, Rollout
from jaxrlhf.steps.ppo import complete, single_step
from jaxrlhf.steps.scores import adjust_scores, completion_scores, score_moments

WHITENED = ("gae", "reinforce")  # estimators whose advantages are whitened by default


@struct.dataclass
class Control:
    """The state that PPO keeps between iterations, in addition to policy and value."""

    kl_coef: jax.Array  # f32[]
    moments: RunningMoments  # moments of the scores that `score.normalise` selects

    @classmethod
    def start(cls, kl_coef: float) -> "Control":
        """Returns the state before the first iteration."""
        return cls(jnp.float32(kl_coef), init_moments())


@struct.dataclass
class ExperienceSettings:
    """The settings of `annotate_experience`."""

    kl: KLConfig
    advantage: AdvantageConfig
    score: ScoreConfig
    update: PPOConfig
    group: int = struct.field(pytree_node=False, default=1)  # completions per prompt


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
    packed: bool = False,
    choices: Choices | None = None,
) -> Annotated:
    """Computes logprobs, reference logprobs and values of the completions.

    Args:
      value: adapter of the value model. If it is None or empty, all values are 0.
      temperature: f32[]; divides the logits. None means the temperature of the rollout.
      microbatches: number of equal parts. The parts are computed one after another. The shape of a part is that of a
        microbatch of the update.
      recompute_policy: if False, the sampling logprobs are returned as the policy's logprobs. Use False only for
        updates that do not use old logprobs.
      value_trunk: "policy" means that `value` is a head on the policy's trunk.
      packed: see `PPOConfig`. If True, each forward pass has the size of a part.
      choices: the choices of the rollout. Policy and reference are masked to them.
    """
    if temperature is not None:
        rollout = rollout.replace(temperature=jnp.full(rollout.temperature.shape, temperature, jnp.float32))

    base, policy, value, reference = with_stacked_layers(base, policy, value, reference)

    def forward(rows: Rollout, of_pass: PackedRows | None = None) -> Annotated:
        mask = rows.response_mask if of_pass is None else of_pass.mask
        inputs, more = (rows.tokens, rows.mask, mask), {"packed": of_pass}
        of_policy = more | {"choices": choices}
        ref_logprobs, _ = response_logprobs(bind(base, reference), *inputs, rows.temperature, **of_policy)
        if recompute_policy or (value and value_trunk == "policy"):
            trees = base, policy, value
            logprobs, _, values = response_outputs(*trees, *inputs, rows.temperature, value_trunk, **of_policy)
        else:
            logprobs = jnp.where(mask, rows.sample_logprobs, 0.0)
            values = response_values(bind(base, value), *inputs, **more) if value else None
        if values is None:
            values = jnp.zeros(rows.response_mask.shape, jnp.float32)
        return Annotated(logprobs, ref_logprobs, values)

    if packed:
        sequences = pack_rows(rollout, rollout.tokens.shape[0] // microbatches)
        zeros = Annotated(*(jnp.zeros(rollout.response_mask.shape, jnp.float32) for _ in range(3)))

        def add(i: jax.Array, total: Annotated) -> Annotated:
            return jax.tree.map(jnp.add, total, forward(rollout, take_pass(sequences, i)))

        return jax.lax.fori_loop(0, sequences.passes, add, zeros)
    if microbatches == 1:
        return forward(rollout)
    parts = jax.lax.map(forward, split_rows(rollout, microbatches))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)


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
    steps: jax.Array | None = None,
    gamma_per: Literal["token", "turn"] = "token",
) -> tuple[Experience, dict[str, jax.Array]]:
    """Returns (experience, metrics). Adds the KL penalty to the rewards, and computes the advantages.

    Advantages are whitened over the global batch if `whiten_advantages` is True. None means True for the estimators in
    `WHITENED` and False for the others.

    Args:
      scores: f32[B]; the scores after normalisation and penalties (see `steps.scores`). Or f32[B,R]; rewards inside
        the completions, at their tokens. Rewards after the end of a completion are ignored.
      kl_coef: f32[]; weight of the KL in the loss if `kl_in_loss` is True, else in the reward.
      gamma, lam, whiten_rewards, gamma_per: see `AdvantageConfig`.
      estimator: see `KLConfig`.
      advantage: a name in `algorithms.advantages.ADVANTAGES`.
      group: number of completions per prompt.
      greedy: f32[B]; scores of the greedy completions. None if the estimator does not need them.
      kl_bound: bound of k2 and k3 in rewards and metrics (see `algorithms.kl.kl_estimate`).
      mask_truncated: if True, completions without a stop token are removed from the experience's `response_mask` and
        from whitening. Estimators that compare completions still use the scores of these completions.
      steps: bool[B,R]; with scores f32[B,R] and "grpo", True at the last token of each step. None means that every
        token is a step.
    """
    mask = rollout.response_mask
    gamma = turn_discounts(gamma, mask) if gamma_per == "turn" else gamma
    learned = mask & rollout.ended[:, None] if mask_truncated else mask
    scores = scores.astype(jnp.float32)
    in_reward, in_loss = (0.0, kl_coef) if kl_in_loss else (kl_coef, 0.0)
    rewards = shape_rewards(scores, annotated.logprobs, annotated.ref_logprobs, mask, in_reward, estimator, kl_bound)
    if whiten_rewards:
        rewards = whiten(rewards, learned, shift_mean=False)
    inside, scores = scores.ndim == 2, completion_scores(scores, rollout)
    greedy = jnp.zeros(scores.shape, jnp.float32) if greedy is None else greedy
    compute, by_step = ADVANTAGES[advantage].compute, ADVANTAGES[advantage].by_step
    if inside and by_step is not None:
        advantages, returns = by_step(rewards, mask, mask if steps is None else steps, group)
    else:
        advantages, returns = compute(rewards, mask, annotated.values, group, greedy, gamma, lam)
    if whiten_advantages is None:
        whiten_advantages = advantage in WHITENED
    metrics = _experience_metrics(rollout, annotated, scores, rewards, advantages, returns, kl_bound)
    if mask_truncated:
        metrics["length/masked_share"] = jnp.mean(~rollout.ended, dtype=jnp.float32)
    experience = Experience(
        tokens=rollout.tokens,
        mask=rollout.mask,
        response_mask=learned,
        temperature=rollout.temperature,
        sample_logprobs=rollout.sample_logprobs,
        logprobs=annotated.logprobs,
        ref_logprobs=annotated.ref_logprobs,
        values=annotated.values,
        advantages=whiten(advantages, learned) if whiten_advantages else advantages,
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
    choices: Choices | None = None,
    steps: jax.Array | None = None,
) -> tuple[Experience, Control, dict[str, jax.Array]]:
    """Runs `annotate_for_update` and `score_experience` in one program. Returns (experience, next control, metrics)."""
    annotated = annotate_for_update(base, policy, value, reference, rollout, settings.update, choices=choices)
    return score_experience(rollout, annotated, scores, greedy, control, settings, steps)


def annotate_for_update(
    base: Decoder,
    policy: Adapter | None,
    value: Adapter | None,
    reference: Adapter | None,
    rollout: Rollout,
    update: PPOConfig,
    behind: bool = False,
    choices: Choices | None = None,
) -> Annotated:
    """Runs `annotate` with the arguments that follow from the settings `update`.

    This function needs no scores. So it may run while the reward computes the scores. `behind` says whether an earlier
    policy sampled the rollout; then the sampling logprobs are never used as the policy's logprobs.
    """
    rows = rollout.tokens.shape[0]
    update = complete(update, rows)
    return annotate(
        base,
        policy,
        value,
        reference,
        rollout,
        # The shapes are those of the update, so that the ratios of the first minibatch are exactly 1.
        microbatches=rows // (update.microbatch_size or rows // update.minibatches),
        recompute_policy=behind or not single_step(update),
        value_trunk=update.value_trunk,
        packed=update.packed,
        choices=choices,
    )


def score_experience(
    rollout: Rollout,
    annotated: Annotated,
    scores: jax.Array,
    greedy: tuple[Rollout, jax.Array] | None,
    control: Control,
    settings: ExperienceSettings,
    steps: jax.Array | None = None,
) -> tuple[Experience, Control, dict[str, jax.Array]]:
    """Runs `adjust_scores` and `build_experience`. Returns (experience, next control, metrics).

    Args:
      scores: f32[B]; the scores of the reward, before normalisation and penalties. Or rewards f32[B,R].
      greedy: one greedy completion per prompt, and the scores of these completions. None if the estimator does not need
        them.
      steps: see `build_experience`.
    """
    kl, advantage, update, group = settings.kl, settings.advantage, settings.update, settings.group
    sums = completion_scores(scores, rollout)
    moments = score_moments(control.moments, sums, settings.score)
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
        steps=steps,
        gamma_per=advantage.gamma_per,
    )
    kl_coef = control.kl_coef
    if kl.target is not None:
        kl_coef = adapt_kl_coef(kl_coef, metrics["kl/k1"], kl.target, scores.shape[0], kl.horizon)
    metrics |= {
        "kl/coef": control.kl_coef,
        "reward/adjusted": metrics["reward/score"],
        "reward/score": jnp.mean(sums),
        "reward/score_std": jnp.std(sums),
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
