"""Warnings about PPO settings that are unusual or have no effect, because of the values of other settings."""

from collections.abc import Iterator
from typing import Any

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.config import PPOStageConfig, Settings
from jaxrlhf.rewards.load import gives_steps

# Estimators that treat a completion as one action, without discounting between its tokens.
ONE_ACTION = ("rloo", "grpo", "dr_grpo", "reinforce_plus_plus_baseline", "remax")
WIDE_FOR_GSPO = 0.05  # bounds above this clip almost nothing; the paper uses 3e-4 and 4e-4


def remarks(config: PPOStageConfig) -> list[str]:
    """Returns warnings about the settings, one line each. Default settings have no warnings."""
    lines = [text for unusual, text in _unusual(config) if unusual]
    unused = [f"ppo.{name} ({why})" for name, why in _unused(config)]
    return lines + ([f"these settings have no effect: {', '.join(unused)}"] if unused else [])


def _unusual(config: PPOStageConfig) -> tuple[tuple[bool, str], ...]:
    """Returns (condition, warning) for combinations that are valid but rarely intended."""
    update, kl, advantage = config.update, config.kl, config.advantage
    in_reward, estimator = update.kl_loss is None and kl.coef > 0, advantage.estimator
    needs = ADVANTAGES[estimator]
    own_value = needs.needs_value and update.value_trunk == "own"
    return (
        (update.loss == "gspo" and max(update.clip_low, update.clip_high) > WIDE_FOR_GSPO,
         f"gspo clips one ratio per completion, which is a mean over its tokens; bounds of {update.clip_low:g} and "
         f"{update.clip_high:g} clip almost nothing; the GSPO paper uses 3e-4 and 4e-4"),
        (update.loss == "cispo" and update.clip_low < 1,
         f"the CISPO paper has no lower bound (ppo.update.clip_low=1); with {update.clip_low:g}, tokens that became "
         "less likely keep weights that are too large"),
        (in_reward and kl.estimator != "k1",
         f"ppo.kl.estimator={kl.estimator} is used in the reward, but there only k1 has the gradient of the KL in "
         "expectation"),
        (in_reward and estimator == "remax",
         "remax subtracts the score of the greedy completion. This score includes no KL, but the KL is in the reward; "
         "ppo.update.kl_loss=k3 puts the KL in the loss"),
        (bool(advantage.whiten_advantages) and needs.needs_group,
         f"ppo.advantage.whiten_advantages divides the group-relative advantages of {estimator} by the standard "
         "deviation of the batch"),
        (estimator in ONE_ACTION and needs.by_step is None and gives_steps(config.reward),
         f"{estimator} treats a completion as one action, so it sums the rewards inside a completion; gae, reinforce, "
         "reinforce_plus_plus and grpo give each step its own credit"),
        (bool(config.resample) and not needs.needs_group,
         f"ppo.resample replaces groups with equal scores, but {estimator} can learn from such groups; only estimators "
         "that compare the completions of a group cannot learn from them"),
        (own_value and _changed(update, "value_coef") and update.value_coef > 0,
         "ppo.update.value_coef: Adam removes the scale of the gradient of a separate value model, so this "
         "setting affects only gradient clipping; ppo.update.value_optimizer.learning_rate sets how fast it learns"),
    )  # fmt: skip


def _unused(config: PPOStageConfig) -> Iterator[tuple[str, str]]:
    """Yields (setting, why it has no effect) for settings that differ from their defaults."""
    update, advantage, score = config.update, config.advantage, config.score
    estimator = advantage.estimator
    needs = ADVANTAGES[estimator]
    no_value, shared = f"{estimator} has no value model", "ppo.update.value_trunk is policy"
    of_value = (
        (advantage, "advantage.lam"), (update, "update.value_clip"), (update, "update.value_coef"),
        (update, "update.value_optimizer"), (config, "value_adapter"), (config, "value_from"),
    )  # fmt: skip
    for section, name in of_value if not needs.needs_value else ():
        if _changed(section, name.split(".")[-1]):
            yield name, no_value
    if needs.needs_value and update.value_trunk == "policy" and _changed(config, "value_from"):
        yield "value_from", shared
    if estimator in ONE_ACTION and _changed(advantage, "gamma"):
        yield "advantage.gamma", f"{estimator} treats a completion as one action"
    if advantage.gamma_per == "turn" and (config.environment is None or estimator in ONE_ACTION):
        why = "there is no ppo.environment" if config.environment is None else f"{estimator} has no discount"
        yield "advantage.gamma_per", why
    for name in ("clip_low", "clip_high") if update.loss == "pg" else ():
        if _changed(update, name):
            yield f"update.{name}", "pg has no ratio"
    if score.normalise != "initial" and _changed(score, "initial_completions"):
        yield "score.initial_completions", f"ppo.score.normalise is {score.normalise}"
    if config.kl.target is None and _changed(config.kl, "horizon"):
        yield "kl.horizon", "there is no ppo.kl.target"
    compares = needs.needs_group or estimator.startswith("reinforce")
    if update.mask_truncated and score.missing_eos_penalty and not compares:
        yield "score.missing_eos_penalty", "ppo.update.mask_truncated masks completions that did not end"


def _changed(section: Settings, name: str) -> bool:
    """Whether a setting differs from its default."""
    default: Any = type(section).model_fields[name].default
    return getattr(section, name) != default
