"""Steps from which nothing could be learnt: counted, and after too many in a row the end of the run.

A step counts where an optimizer skipped its update because loss or gradient were not finite (`optimizer/skipped` and
its like), or where the stage left the update out itself (`health/paused`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import save_file

from jaxrlhf.checkpoint.files import atomic_directory
from jaxrlhf.distributed.mesh import fetch
from jaxrlhf.errors import Fault

SKIPPED, PAUSED = "skipped", "health/paused"


class Health:
    """Counts steps without learning; `in_a_row` is part of what a checkpoint notes."""

    def __init__(self, patience: int, in_a_row: int = 0):
        self.patience, self.in_a_row = patience, in_a_row

    def observe(self, metrics: Mapping[str, float]) -> str | None:
        """Takes a step's metrics; where patience is at an end, why."""
        skipped = sum(value for name, value in metrics.items() if name.endswith(SKIPPED))
        paused = metrics.get(PAUSED, 0.0)
        self.in_a_row = self.in_a_row + 1 if skipped or paused else 0
        if self.in_a_row < self.patience:
            return None
        return "loss or gradient were not finite" if skipped else "KL or length was above its limit"


def stop_with_batch(folder: Path, stage: str, step: int, batch: Any, reason: str, in_a_row: int) -> None:
    """Writes the batch of the last step to `folder`/STAGE-STEP/batch.safetensors and raises `Fault` that names it.

    On several processes all call it, and the first one writes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(fetch(batch))
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    target = folder / f"{stage}-{step}"
    if jax.process_index() == 0:
        with atomic_directory(target, replace=True) as temporary:
            save_file({name: array for name, array in arrays.items() if array.ndim}, temporary / "batch.safetensors")
    times = f"{in_a_row} steps in a row were" if in_a_row > 1 else "a step was"
    raise Fault(
        f"{stage}: {times} not learnt from, because {reason}; the batch of step {step} is {target}/batch.safetensors "
        "(health.patience says how many may be; where a setting is the cause, begin anew with another in a new run_dir)"
    )
