"""Settings of PPO that are odd beside the others, or do nothing: said in a line each before the run, not refused."""

from collections.abc import Iterator
from typing import Any

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.config import PPOStageConfig, Settings

# Estimators that take a whole answer for one action: nothing is discounted within it.
WHOLE_ANSWERS = ("rloo", "grpo", "dr_grpo", "reinforce_plus_plus_baseline", "remax")
WIDE_FOR_GSPO = 0.05  # the paper's bounds are 3e-4 and 4e-4, and ratios of long answers lie within about 1e-3


def remarks(config: PPOStageConfig) -> list[str]:
    """What a person should know of these settings before the run, a line each; none of defaults."""
    said = [text for odd, text in _odd(config) if odd]
    idle = [f"ppo.{name} ({why})" for name, why in _idle(config)]
    return said + ([f"settings that do nothing here: {', '.join(idle)}"] if idle else [])


def _odd(config: PPOStageConfig) -> tuple[tuple[bool, str], ...]:
    """(whether to say it, what) of settings that can be meant, and seldom are."""
    update, kl, advantage = config.update, config.kl, config.advantage
    in_reward, estimator = update.kl_loss is None and kl.coef > 0, advantage.estimator
    needs = ADVANTAGES[estimator]
    own_value = needs.needs_value and update.value_trunk == "own"
    return (
        (update.loss == "gspo" and max(update.clip_low, update.clip_high) > WIDE_FOR_GSPO,
         f"gspo clips one ratio per answer, a mean over its tokens: bounds of {update.clip_low:g} and "
         f"{update.clip_high:g} clip next to nothing; its paper has 3e-4 and 4e-4"),
        (update.loss == "cispo" and update.clip_low < 1,
         f"cispo has no lower bound in its paper (ppo.update.clip_low=1); with {update.clip_low:g} tokens that have "
         "become less likely keep too large a weight"),
        (in_reward and kl.estimator != "k1",
         f"ppo.kl.estimator={kl.estimator} in the reward: in expectation its gradient is not the KL's, as k1's is"),
        (in_reward and estimator == "remax",
         "remax measures from the greedy answer's score, which has no KL in it, and the KL is in the reward; "
         "ppo.update.kl_loss=k3 has it in the loss"),
        (bool(advantage.whiten_advantages) and needs.needs_group,
         f"ppo.advantage.whiten_advantages divides what {estimator} has compared within groups by the deviation of the "
         "batch"),
        (bool(config.resample) and not needs.needs_group,
         f"ppo.resample replaces groups with equal scores, which teach {estimator} something: only estimators that "
         "compare the answers of a group learn nothing from them"),
        (own_value and _changed(update, "value_coef") and update.value_coef > 0,
         "ppo.update.value_coef: Adam takes the scale off the gradient of a value model with a trunk of its own, so it "
         "acts on the gradient's clip alone; ppo.update.value_optimizer.learning_rate is how fast the value learns"),
    )  # fmt: skip


def _idle(config: PPOStageConfig) -> Iterator[tuple[str, str]]:
    """(setting, why it does nothing) of those that are not at their defaults."""
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
    if estimator in WHOLE_ANSWERS and _changed(advantage, "gamma"):
        yield "advantage.gamma", f"{estimator} takes an answer for one action"
    for name in ("clip_low", "clip_high") if update.loss == "pg" else ():
        if _changed(update, name):
            yield f"update.{name}", "pg has no ratio"
    if score.normalise != "initial" and _changed(score, "initial_completions"):
        yield "score.initial_completions", f"ppo.score.normalise is {score.normalise}"
    if config.kl.target is None and _changed(config.kl, "horizon"):
        yield "kl.horizon", "there is no ppo.kl.target"
    compares = needs.needs_group or estimator.startswith("reinforce")
    if update.mask_truncated and score.missing_eos_penalty and not compares:
        yield "score.missing_eos_penalty", "ppo.update.mask_truncated leaves out answers that did not end"


def _changed(section: Settings, name: str) -> bool:
    """Whether a setting is not at its default."""
    default: Any = type(section).model_fields[name].default
    return getattr(section, name) != default
