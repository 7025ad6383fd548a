"""The names of the metrics that each stage logs. Settings that name a metric are checked before any compilation."""

import difflib

from jaxrlhf.config import ImprovementConfig, RunConfig, SumRewardConfig
from jaxrlhf.errors import UserError

_SHARED = (
    "compiles/update", "optimizer/grad_norm", "optimizer/learning_rate", "optimizer/skipped", "seconds",
    "stream/dropped", "stream/pass", "stream/rows", "time/evaluation",
)  # fmt: skip
PREFIX = "evaluation/"  # prefix of the metrics of evaluations while training
METRICS = {
    "sft": {*_SHARED, "sft/loss", "sft/tokens"},
    "reward_model": {*_SHARED, "reward_model/accuracy", "reward_model/loss", "reward_model/score"},
    "ppo": {
        *_SHARED, "optimizer/value_grad_norm", "optimizer/value_learning_rate", "optimizer/value_skipped",
        "advantage/mean", "advantage/std", "gap/logprob_max", "gap/logprob_mean", "kl/coef", "kl/k1", "kl/k2", "kl/k3",
        "kl/per_token",
        "length/eos_share", "length/mean", "length/masked_share", "policy/approx_kl", "policy/clip_high",
        "policy/clip_low", "policy/entropy", "policy/first_ratio_error", "policy/importance_weight",
        "policy/kl_loss", "policy/loss", "policy/pretraining_loss", "policy/ratio_max", "policy/ratio_mean",
        "policy/steps", "value/clip", "value/explained_variance", "value/loss", "value/mean", "reward/score",
        "reward/score_std", "reward/step", "length/steps", "reward/abstained", "reward/adjusted", "reward/shaped",
        "reward/drawn", "curriculum/seen", "curriculum/success", "curriculum/partly_solved",
        "groups/informative", "groups/draws", "groups/informative_drawn", "health/paused", "memory/peak_bytes",
        "time/rollout", "time/environment", "time/reward",
        "time/annotate", "time/update", "time/samples", "tokens_per_second/rollout", "tokens_per_second/update",
        "compiles/rollout", "compiles/greedy", "compiles/merge", "compiles/annotate", "compiles/experience",
    },
}  # fmt: skip


_EVALUATED = {
    "sft": {"sft/loss", "sft/perplexity"},
    "reward_model": {f"reward_model/{name}" for name in ("accuracy", "loss", "margin", "calibration_error")},
    "ppo": {
        "kl/k1", "length/mean", "length/eos_share", "length/steps", "reward/score", "reward/step", "reward/abstained",
    },
}  # fmt: skip


ENVIRONMENT = ("return", "success", "turns", "tokens", "truncated", "failed")


def metrics_of(config: RunConfig, stage: str | None = None) -> set[str]:
    """Returns the names of the metrics that a stage may log.

    If `stage` is None, returns those of all stages, even of stages that `config.stages` leaves out. Metrics of
    evaluations are included if the stage evaluates while it trains.
    """
    if stage is None:
        return set().union(*(metrics_of(config, name) for name in METRICS))
    names, section = METRICS[stage], getattr(config, stage)
    if stage == "ppo":
        names = names | _rewards(config)
    if section is not None and section.evaluation.every is not None:
        names = names | {PREFIX + name for name in _evaluated_metrics(config, stage)}
    return names


def _evaluated_metrics(config: RunConfig, stage: str) -> set[str]:
    """Returns the names of the metrics of a stage's evaluation, without the prefix evaluation/."""
    return _EVALUATED[stage] | (_rewards(config) if stage == "ppo" else set())


def _rewards(config: RunConfig) -> set[str]:
    """Returns the names of the metrics of the gold reward, of the parts of a sum, and of an environment."""
    if config.ppo is None:
        return set()
    if config.ppo.environment is not None:
        return {f"environment/{name}" for name in ENVIRONMENT}
    parts = ["gold"] if config.ppo.gold is not None else []
    parts += config.ppo.reward.parts if isinstance(config.ppo.reward, SumRewardConfig) else []
    return {f"reward/{name}{ending}" for name in parts for ending in ("", "_abstained")}


def watched_metrics(config: RunConfig, stage: str) -> list[tuple[str, ImprovementConfig]]:
    """Returns the settings that end a stage early or lower its learning rates, as (key path, settings)."""
    section = getattr(config, stage)
    if section is None:
        return []
    watched = {"early_stopping": section.early_stopping}
    if stage == "ppo":
        update = section.update
        watched |= {"update.optimizer.plateau": update.optimizer.plateau}
        watched |= {"update.value_optimizer.plateau": update.value_optimizer.plateau}
    else:
        watched |= {"optimizer.plateau": section.optimizer.plateau}
    return [(f"{stage}.{path}", settings) for path, settings in watched.items() if settings is not None]


def check_metrics(config: RunConfig) -> None:
    """Raises `UserError` if a setting names a metric that its stage does not log.

    `checkpoints.best` may name a metric of any stage.
    """
    for stage in METRICS:
        for path, watched in watched_metrics(config, stage):
            check_metric(config, f"{path}.metric", watched.metric, stage)
    if config.checkpoints.best is not None:
        check_metric(config, "checkpoints.best", config.checkpoints.best, None)


def check_metric(config: RunConfig, path: str, metric: str, stage: str | None) -> None:
    """Raises `UserError` if a setting names a metric that the stage does not log.

    If `stage` is None, any stage may log it.
    """
    known = metrics_of(config, stage)
    if metric in known:
        return
    near = difflib.get_close_matches(metric, sorted(known), n=1)
    hint = f"did you mean {near[0]}?" if near else "give one of the names in metrics.jsonl"
    name = metric.removeprefix(PREFIX)
    sections = {s: getattr(config, s) for s in METRICS if stage in (None, s) and getattr(config, s) is not None}
    silent = [s for s in sections if sections[s].evaluation.every is None and name in _evaluated_metrics(config, s)]
    if name == "reward/gold" and (config.ppo is None or config.ppo.gold is None):
        hint = "it is logged only if ppo.gold names a function"
    elif name != metric and silent:
        hint = f"give {silent[0]}.evaluation.every, such as 10, to evaluate while training"
    logger = "no stage logs" if stage is None else f"the stage {stage} does not log"
    raise UserError(f"{path}: {logger} {metric!r}; {hint}")
