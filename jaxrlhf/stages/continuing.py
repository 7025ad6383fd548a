"""Which settings may change when a run is continued: those that change no step that is still to come.

Everything else is refused by name (`checkpoint.run_dir.check_run`): a run's weights are what its `config.yaml` says.
"""

from collections.abc import Callable

from jaxrlhf.config import RunConfig
from jaxrlhf.config.base import remat_policy
from jaxrlhf.config.differences import ABSENT, Change, described

# Where the run lies (it may be moved), where compiled programs are kept, when something is saved or shown, how long a
# stop may take, what is borne.
_FREE = (
    "run_dir", "compilation_cache", "checkpoints.keep", "checkpoints.grace", "health.patience", "ppo.sample_every",
)  # fmt: skip
# How rows go through the processor, and not what is computed of them.
_ROUNDING = ("ppo.sampling.halvings", "ppo.update.buckets")
# What is kept of a forward pass, and what is computed again: the same numbers, but for rounding.
_REMAT = ("sft.remat", "reward_model.remat", "ppo.update.remat")
# What computes attention and how exact products are; and what XLA makes of the same operations (a section by program).
_ATTENTION, _PRECISION, _OPTIONS = "model.attention", "model.matmul_precision", "compiler_options"
# How runs went that were begun before there was a choice.
_DEFAULTS = {_ATTENTION: "xla", _PRECISION: "highest", _OPTIONS: {}, "ppo.update.buckets": 1}
# Which checkpoints there are to choose from: free as long as nothing is chosen.
_CHOICE = ("checkpoints.best", "checkpoints.best_is", "sft.save_every", "reward_model.save_every", "ppo.save_every")
_SAID = "sums may round otherwise, so what follows need not be bit for bit what it would have been"
# Devices come and go. Numbers then differ by rounding, which the stage says where it goes on.
_MESH = ("mesh.data", "mesh.fsdp", "mesh.tensor")
MORE_ITERATIONS = "ppo.iterations"


def may_change(config: RunConfig) -> Callable[[Change], bool]:
    """Whether a run may be continued with `config` where one of its settings was another; to be asked for each."""

    def free(change: Change) -> bool:
        key, before, after = change
        if key in _CHOICE:
            return config.checkpoints.result == "last"
        if key == MORE_ITERATIONS:
            return isinstance(before, int) and after > before and _same_steps_in_longer_runs(config)
        return key in (*_FREE, *_ROUNDING, *_REMAT, _ATTENTION, _PRECISION, *_MESH) or key.split(".")[0] == _OPTIONS

    return free


def told(change: Change) -> str | None:
    """What a person is told of a change that is allowed; None where only its spelling is another."""
    key, before, after = change
    if key not in (*_ROUNDING, *_REMAT, _ATTENTION, _PRECISION) and key.split(".")[0] != _OPTIONS:
        return described(change)
    if after == (_DEFAULTS.get(key) if before == ABSENT else remat_policy(before)):
        return None
    return f"{described(change)}: {_SAID}"


def _same_steps_in_longer_runs(config: RunConfig) -> bool:
    """Whether a PPO step is the same however many follow: no learning rate falls towards the end."""
    update, checkpoints = config.ppo.update, config.checkpoints
    rates = (update.optimizer, update.value_optimizer)
    return checkpoints.result == "last" and all(r.schedule == "constant" or r.total_steps is not None for r in rates)
