"""The metrics that each stage logs, so that settings which name one are checked before anything is compiled."""

import difflib

from jaxrlhf.config import RunConfig, SumRewardConfig
from jaxrlhf.errors import UserError

_OPTIMIZER = ("compiles/update", "optimizer/grad_norm", "optimizer/learning_rate", "optimizer/skipped", "seconds")
METRICS = {
    "sft": {*_OPTIMIZER, "sft/loss", "sft/tokens"},
    "reward_model": {*_OPTIMIZER, "reward_model/accuracy", "reward_model/loss", "reward_model/score"},
    "ppo": {
        *_OPTIMIZER, "optimizer/value_grad_norm", "optimizer/value_learning_rate", "optimizer/value_skipped",
        "advantage/mean", "advantage/std", "gap/logprob_max", "gap/logprob_mean", "kl/coef", "kl/k1", "kl/k2", "kl/k3",
        "length/eos_share", "length/mean", "length/masked_share", "policy/approx_kl", "policy/clip_high",
        "policy/clip_low", "policy/entropy", "policy/first_ratio_error", "policy/importance_weight",
        "policy/kl_loss", "policy/loss", "policy/pretraining_loss", "policy/ratio_max", "policy/ratio_mean",
        "policy/steps", "value/clip", "value/explained_variance", "value/loss", "value/mean", "reward/score",
        "reward/score_std", "reward/abstained", "reward/adjusted", "reward/shaped", "reward/drawn",
        "groups/informative", "groups/draws", "groups/informative_drawn", "health/paused", "memory/peak_bytes",
        "time/rollout", "time/reward",
        "time/annotate", "time/update", "time/samples", "tokens_per_second/rollout", "tokens_per_second/update",
        "compiles/rollout", "compiles/greedy", "compiles/merge", "compiles/annotate", "compiles/experience",
    },
}  # fmt: skip


def metrics_of(config: RunConfig) -> set[str]:
    """Names of the metrics that the stages of a config may log, including stages that `stages` leaves out."""
    names = set().union(*METRICS.values())
    if config.ppo is not None:
        rewards = ["gold"] if config.ppo.gold is not None else []
        rewards += config.ppo.reward.parts if isinstance(config.ppo.reward, SumRewardConfig) else []
        names |= {f"reward/{name}{ending}" for name in rewards for ending in ("", "_abstained")}
    return names


def check_best(config: RunConfig) -> None:
    """Raises `UserError` if `checkpoints.best` names a metric that no stage logs."""
    best = config.checkpoints.best
    known = metrics_of(config)
    if best is None or best in known:
        return
    near = difflib.get_close_matches(best, sorted(known), n=1)
    hint = f"did you mean {near[0]}?" if near else "give one of the names in metrics.jsonl"
    hint = "it is logged where ppo.gold names a function" if best == "reward/gold" else hint
    raise UserError(f"checkpoints.best: no stage logs {best!r}; {hint}")
