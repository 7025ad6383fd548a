"""Errors for PPO settings that contradict each other. Warnings for unusual settings are in `remarks`."""

from jaxrlhf.algorithms.advantages import ADVANTAGES
from jaxrlhf.config import PPOStageConfig
from jaxrlhf.errors import UserError
from jaxrlhf.steps.ppo import single_step


def check_algorithm(config: PPOStageConfig) -> None:
    """Raises `UserError` if settings of sampling, advantages and update contradict each other."""
    estimator, group, update = config.advantage.estimator, config.sampling.samples_per_prompt, config.update
    if ADVANTAGES[estimator].needs_group and group == 1:
        raise UserError(
            f"ppo.advantage.estimator: {estimator} compares the completions of one prompt; set "
            "ppo.sampling.samples_per_prompt to at least 2, such as 8"
        )
    if config.resample and group == 1:
        raise UserError(
            "ppo.resample: replaces groups of completions, so it needs groups; set ppo.sampling.samples_per_prompt to "
            "2 or more"
        )
    if config.sampling.temperature == 0:
        raise UserError(
            "ppo.sampling.temperature: 0 means greedy decoding, but PPO must sample; give a number above 0, such as 1"
        )
    if not ADVANTAGES[estimator].needs_value:
        for name, is_set in (("value_trunk", update.value_trunk != "own"), ("value_warmup", update.value_warmup)):
            if is_set:
                raise UserError(
                    f"ppo.update.{name}: ppo.advantage.estimator={estimator} has no value model; leave this setting "
                    "out, or use gae"
                )
    if update.value_warmup >= config.iterations:
        raise UserError(
            f"ppo.update.value_warmup: {update.value_warmup} of {config.iterations} iterations train only the value "
            "model, so none trains the policy; give fewer"
        )
    _check_combinations(config)
    if config.environment is not None:
        _check_environment(config)
    if update.kl_stop is not None and single_step(update):
        raise UserError(
            "ppo.update.kl_stop: skips later optimizer steps, but an iteration has only one step; set epochs or "
            "minibatches above 1"
        )


def _check_environment(config: PPOStageConfig) -> None:
    """Raises `UserError` if a setting does not work with an environment."""
    sources = [source for source in (config.data, config.evaluation.data) if source is not None]
    faults = (
        ("async", config.async_, "an episode needs the environment between its turns; leave async out"),
        ("resample", config.resample, "episodes are not resampled; leave resample out"),
        ("sampling.choices", config.sampling.choices is not None,
         "choices limit one completion, not the turns of an episode; leave choices out"),
        ("gold", config.gold is not None,
         "a gold function scores completions of prompts; leave it out: environment/success is logged if the "
         "environment's info has success"),
        ("advantage.estimator", ADVANTAGES[config.advantage.estimator].needs_greedy,
         f"{config.advantage.estimator} needs a greedy completion of each prompt, which episodes do not have; give "
         "another estimator, such as gae or rloo"),
        ("score.overlong_penalty", config.score.overlong_penalty,
         "counts the tokens of one completion; with an environment give score.length_penalty"),
        ("data.streaming", any(source.streaming for source in sources),
         "rows for an environment are read as a whole; leave streaming out"),
        ("data.curriculum", any(part.curriculum is not None for s in sources for part in (s, *s.mix_with)),
         "orders prompts, but an environment makes its own; leave it out"),
        ("overflow", config.overflow == "drop",
         "an environment's first observation cannot be dropped; give cut, or stop, which loses the episode"),
    )  # fmt: skip
    for name, wrong, reason in faults:
        if wrong:
            raise UserError(f"ppo.{name}: with ppo.environment {reason}")


def _check_combinations(config: PPOStageConfig) -> None:
    """Raises `UserError` if a setting has no effect, or does harm, because of the values of other settings."""
    update, kl, score, estimator = config.update, config.kl, config.score, config.advantage.estimator
    rows = config.batch_size * config.sampling.samples_per_prompt
    shared = update.value_trunk == "policy"
    faults = (
        ("update.dual_clip", update.dual_clip is not None and update.loss not in ("clip", "gspo"),
         f"has no effect with ppo.update.loss={update.loss}, only with clip and gspo; leave it out"),
        ("update.dual_clip", update.dual_clip is not None and update.dual_clip <= 1 + update.clip_high,
         f"must be above the clip of 1 + {update.clip_high:g}, not {update.dual_clip}; the paper 1912.09729 uses 3"),
        ("update.loss", update.loss == "pg" and update.epochs * (update.minibatches or 1) > 1,
         "pg has no ratio, so only the first step of an iteration would be on-policy; give "
         "ppo.update.epochs=1 ppo.update.minibatches=1, or the loss clip"),
        ("update.kl_loss", update.kl_loss == "k1" and kl.coef > 0,
         "the gradient of k1 in the loss is 0 in expectation for any reference; give k2 or k3"),
        ("update.kl_loss", estimator == "grpo" and update.kl_loss is None and kl.coef > 0,
         "grpo divides by the standard deviation of a group's rewards. If the KL is in the reward, groups with equal "
         "scores learn only from KL noise; give k3 or k2, which put the KL in the loss, or ppo.kl.coef=0"),
        ("kl.estimator", update.kl_loss is not None and kl.estimator != "k1",
         f"applies to KL in the reward, but ppo.update.kl_loss={update.kl_loss} puts the KL in the loss; leave "
         "kl.estimator out"),
        ("update.importance_level", update.importance_level != "token" and update.importance_cap is None,
         "has no effect without ppo.update.importance_cap; give a cap, such as 2.0"),
        ("update.pretraining_coef", update.pretraining_coef != 1 and config.pretraining is None,
         "has no effect without pretraining rows; give ppo.pretraining.data.path"),
        ("kl.target", kl.target is not None and kl.coef == 0,
         "cannot adapt a ppo.kl.coef of 0, because the coefficient is multiplied; give ppo.kl.coef above 0, such as "
         "0.05"),
        ("kl.horizon", kl.target is not None and rows >= 5 * kl.horizon,
         f"is {kl.horizon:g} completions, but an iteration has {rows}, so the coefficient could fall to 0 or below; "
         f"give more than {rows / 5:g}"),
        ("score.overlong_buffer", score.overlong_buffer > config.sampling.max_new_tokens,
         f"is {score.overlong_buffer:g} tokens, but completions have at most {config.sampling.max_new_tokens}; give "
         "less"),
        ("advantage.whiten_rewards", config.advantage.whiten_rewards and config.advantage.estimator != "gae",
         "would reward length, because the estimator sums the rewards of a completion; leave it out, or give "
         "ppo.score.normalise=batch"),
        ("update.mask_truncated", update.mask_truncated and config.sampling.choices is not None,
         "has no effect with ppo.sampling.choices, because every choice ends; leave it out"),
        ("score.missing_eos_penalty", score.missing_eos_penalty and config.sampling.choices is not None,
         "has no effect with ppo.sampling.choices, because every choice ends; leave it out"),
        ("value_adapter", shared and config.value_adapter is not None,
         "with ppo.update.value_trunk=policy the value model is only a head; leave one of these settings out"),
    )  # fmt: skip
    for name, wrong, reason in faults:
        if wrong:
            raise UserError(f"ppo.{name}: {reason}")
