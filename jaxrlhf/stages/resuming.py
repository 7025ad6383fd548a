"""Which settings may change when a run is continued: those that change no step that is still to come.

Each setting's field says so (`config.base`: FREE, ROUNDING, CHOICE, LONGER). Everything else is refused by name
(`checkpoint.run_dir.check_run`): a run's weights are what its `config.yaml` says.
"""

from collections.abc import Callable

from jaxrlhf.config import RunConfig
from jaxrlhf.config.base import CHOICE, FREE, LONGER, ROUNDING
from jaxrlhf.config.differences import Change, described
from jaxrlhf.config.table import find_setting

_SAID = "sums may round otherwise, so what follows need not be bit for bit what it would have been"


def may_change(config: RunConfig) -> Callable[[Change], bool]:
    """Whether a run may be continued with `config` where one of its settings was another; to be asked for each."""

    def free(change: Change) -> bool:
        key, before, after = change
        if _noted(key, CHOICE):
            return config.checkpoints.result == "last"
        if _noted(key, LONGER):
            return isinstance(before, int) and after > before and _same_steps_in_longer_runs(config)
        return _noted(key, FREE) or _noted(key, ROUNDING)

    return free


def told(change: Change) -> str:
    """The line that a run prints on a changed setting that may change."""
    return f"{described(change)}: {_SAID}" if _noted(change[0], ROUNDING) else described(change)


def makes_longer(change: Change) -> bool:
    """Whether a change makes a stage longer, also one that has ended."""
    return _noted(change[0], LONGER)


def _noted(key: str, rule: dict[str, str]) -> bool:
    """Whether the field of a setting, or for an entry of a mapping the mapping's, has this rule."""
    setting = find_setting(key.split("."))
    return setting is not None and rule.items() <= setting.notes.items()


def _same_steps_in_longer_runs(config: RunConfig) -> bool:
    """Whether a PPO step is the same however many follow: no learning rate falls towards the end."""
    update, checkpoints = config.ppo.update, config.checkpoints
    rates = (update.optimizer, update.value_optimizer)
    return checkpoints.result == "last" and all(r.schedule == "constant" or r.total_steps is not None for r in rates)
