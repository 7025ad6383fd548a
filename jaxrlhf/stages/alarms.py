"""The alarms of a stage: makes them, checks their metrics, and waits for the user when an alarm pauses a run."""

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxrlhf.config import RunConfig
from jaxrlhf.config.alarms import SHIPPED, alarms_of
from jaxrlhf.distributed import processes
from jaxrlhf.errors import UserError
from jaxrlhf.stages.metric_names import check_metric
from jaxrlhf.tracking.alarms import Alarms

CONTINUE = "continue"  # name of the file in the run directory that ends a pause
GAP_IF_BEHIND = 0.2  # nats per token; one update of the quickstart, with its high learning rate, makes up to 0.06
_OF_HEALTH = {"kl_runs_away": "max_kl", "length_explodes": "max_length"}  # alarm -> key of `health` that replaces it


def stage_alarms(config: RunConfig, stage: str, saved: Mapping[str, Any], say: Callable[[str], None]) -> Alarms:
    """Returns the alarms of a stage. `saved` holds their notes from the checkpoint at which the stage resumes.

    A shipped alarm is left out if `health` has a limit for the same fault. With `ppo.async` the policy that samples is
    meant to differ from the policy that is trained, so the shipped alarm `sampling_gap` has a higher limit.
    """
    alarms = alarms_of(config.alarms, stage)
    if stage == "ppo" and config.ppo.async_ and alarms.get("sampling_gap") == SHIPPED["sampling_gap"]:
        alarms["sampling_gap"] = SHIPPED["sampling_gap"].model_copy(update={"above": GAP_IF_BEHIND})
    for name, setting in _OF_HEALTH.items():
        if getattr(config.health, setting) is not None and alarms.get(name) == SHIPPED[name]:
            del alarms[name]
    return Alarms(stage, alarms, saved, say, config.run_dir)


def check_alarms(config: RunConfig) -> None:
    """Raises `UserError` if an alarm names a metric that its stage does not log.

    An alarm without a stage may name a metric of any stage.
    """
    for number, entry in enumerate(config.alarms):
        if isinstance(entry, str):
            continue
        alarm = entry.whole
        if processes.is_first() and alarm.command is not None and shutil.which(alarm.command[0]) is None:
            program = alarm.command[0]
            raise UserError(f"alarms[{number}].command: there is no program {program!r}; give one that can be run")
        for key in ("metric", "against"):
            name = getattr(alarm, key)
            # Metrics of shipped alarms are not checked, because some runs do not log these metrics.
            if name is not None and (alarm is entry or getattr(entry, key) is not None):
                check_metric(config, f"alarms[{number}].{key}", name, alarm.stage)


def wait_for_user(folder: Path, signal: Callable[[], int]) -> int:
    """Waits on all processes until the run directory has the file `continue`, and then removes the file.

    An older file is removed first. Returns 0 once the file exists, or the number of a signal if one comes first.
    """
    path, first = folder / CONTINUE, processes.is_first()
    if first:
        _remove(path)
    while not (number := signal()):
        there = first and path.exists()
        if processes.largest(there) if not processes.alone() else there:
            break
        time.sleep(0.5)
    if first:
        _remove(path)
    return number


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
