"""Decides which settings may change when a run is resumed: those that do not change the remaining steps.

Each setting's field declares its rule (`config.base`: FREE, ROUNDING, CHOICE, EVALUATED, LONGER). A change of any other
setting is refused (`checkpoint.run_dir.check_run`): `config.yaml` must describe how the weights were made.
"""

from collections.abc import Callable
from pathlib import Path

from jaxrlhf.checkpoint.checkpoints import stored_steps
from jaxrlhf.config import RunConfig
from jaxrlhf.config.base import CHOICE, EVALUATED, FREE, LONGER, ROUNDING
from jaxrlhf.config.differences import Change, describe_change
from jaxrlhf.config.table import find_setting
from jaxrlhf.errors import UserError
from jaxrlhf.stages.metric_names import PREFIX, watched_metrics
from jaxrlhf.stages.roles import finished_stages


def may_change(config: RunConfig) -> Callable[[Change], bool]:
    """Returns a function that decides whether a run may be resumed with `config` despite a changed setting.

    The function raises `UserError` if ppo.iterations is lowered to a number that is not the last saved step.
    """

    def allowed(change: Change) -> bool:
        key, before, after = change
        if _has_rule(key, CHOICE):
            return config.checkpoints.result == "last"
        if _has_rule(key, EVALUATED):
            return config.checkpoints.result == "last" and not _waits_for_evaluations(config, key.split(".")[0])
        if _has_rule(key, LONGER):
            if not isinstance(before, int):
                return False
            return _same_steps_in_longer_runs(config) if after > before else _ends_where_it_stands(config, change)
        return _has_rule(key, FREE) or _has_rule(key, ROUNDING)

    return allowed


def change_text(change: Change) -> str:
    """Returns a line for the user that describes an allowed change of a setting."""
    if _has_rule(change[0], LONGER) and not makes_longer(change):
        return f"{describe_change(change)}: the stage ends at its last checkpoint"
    if _has_rule(change[0], ROUNDING):
        return f"{describe_change(change)}: sums may round differently, so the run may not continue bit for bit"
    return describe_change(change)


def makes_longer(change: Change) -> bool:
    """Whether a change adds steps to a stage, even to a finished stage."""
    return _has_rule(change[0], LONGER) and change[2] > change[1]


def _has_rule(key: str, rule: dict[str, str]) -> bool:
    """Whether a setting has the rule `rule`. An entry of a mapping has the rule of the mapping's field."""
    setting = find_setting(key.split("."))
    return setting is not None and rule.items() <= setting.metadata.items()


def _ends_where_it_stands(config: RunConfig, change: Change) -> bool:
    """Whether a change lowers ppo.iterations to the last saved step of an unfinished ppo stage.

    Raises `UserError` if it lowers ppo.iterations to another number. The error names the last saved step.
    """
    steps = stored_steps(Path(config.run_dir) / "checkpoints" / "ppo")
    if not steps or "ppo" in finished_stages(config.run_dir):
        return False
    if change[2] == steps[-1]:
        return True
    raise UserError(
        f"run_dir {config.run_dir}: {describe_change(change)}; the last checkpoint is of step {steps[-1]}; give "
        f"ppo.iterations={steps[-1]} to end the run there, or ppo.iterations={change[1]} to continue the run"
    )


def _waits_for_evaluations(config: RunConfig, stage: str) -> bool:
    """Whether early stopping or a learning rate of a stage depends on its evaluations."""
    return any(watched.metric.startswith(PREFIX) for _, watched in watched_metrics(config, stage))


def _same_steps_in_longer_runs(config: RunConfig) -> bool:
    """Whether the steps of PPO stay the same if iterations are added: no learning rate decays towards the last step."""
    update, checkpoints = config.ppo.update, config.checkpoints
    rates = [rate for rate in (update.optimizer, update.value_optimizer) if rate.total_steps is None]
    return checkpoints.result == "last" and all(rate.schedule in ("constant", "plateau") for rate in rates)


def mesh_note(before: dict[str, int] | None, now: dict[str, int]) -> str:
    """Returns a note for the user if the mesh of a checkpoint is not the mesh of now, else "". None is unknown."""
    if before in (None, now):
        return ""
    then, here = (" x ".join(f"{axis}={size}" for axis, size in mesh.items()) for mesh in (before, now))
    return (
        f"the checkpoint was made on the mesh {then}, but the mesh is now {here}; sums may round differently, so the "
        "run may not continue bit for bit"
    )
