"""Counts steps in a row without an update, and ends the run after too many. A step makes no update in two cases.

In the first case the loss or gradient is not finite, and the optimizer skips the update; metrics whose names end in
`skipped` count these steps. In the second case KL or length is above a limit, and the stage skips the update (metric
`health/paused`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import save_file

from jaxrlhf.checkpoint.files import atomic_directory
from jaxrlhf.distributed.mesh import fetch, finite_leaves
from jaxrlhf.errors import Diverged

SKIPPED, PAUSED = "skipped", "health/paused"


class Health:
    """Counts steps in a row without an update. Checkpoints save this number, `in_a_row`."""

    def __init__(self, patience: int, in_a_row: int = 0):
        self.patience, self.in_a_row = patience, in_a_row

    def observe(self, metrics: Mapping[str, float]) -> str | None:
        """Takes the metrics of one step.

        Returns the reason if the last `patience` steps made no update, else None.
        """
        skipped = any(value for name, value in metrics.items() if name.endswith(SKIPPED))
        self.in_a_row = self.in_a_row + 1 if skipped or metrics.get(PAUSED) else 0
        if self.in_a_row < self.patience:
            return None
        return "the loss or gradient was not finite" if skipped else "KL or length was above its limit"


def stop_with_batch(folder: Path, stage: str, step: int, batch: Any, reason: str, in_a_row: int) -> None:
    """Writes the batch of the last step to `folder`/STAGE-STEP/batch.safetensors.

    Always raises `Diverged`, with this path. All processes must call this function. Process 0 writes the file.
    """
    leaves = jax.tree_util.tree_leaves_with_path(fetch(batch))
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves if leaf.ndim}
    target = folder / f"{stage}-{step}"
    if jax.process_index() == 0:
        with atomic_directory(target, replace=True) as temporary:
            save_file(arrays, temporary / "batch.safetensors")
    steps = f"{in_a_row} steps in a row" if in_a_row > 1 else "a step"
    raise Diverged(
        f"{stage}: {steps} made no update, because {reason}; the batch of step {step} is in {target}/batch.safetensors "
        "(health.patience limits the number of these steps; to change another setting, start a new run in another "
        "run_dir)"
    )


def check_finite(state: Any, stage: str, step: int, saved: int | None) -> None:
    """Raises `Diverged` if a state has NaN or infinite values. `saved` is the step of the last checkpoint."""
    bad = [path for path, finite in jax.tree_util.tree_leaves_with_path(finite_leaves(state)) if not finite]
    if bad:
        name = jax.tree_util.keystr(bad[0], simple=True, separator="/")
        kept = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint before it"
        raise Diverged(
            f"{stage}: {name} is not finite after step {step}; {kept}; start a new run in another run_dir, with a "
            "lower learning rate or max_grad_norm"
        )


def never_updated(stage: str, steps: int, run_dir: Path) -> Diverged:
    """Returns the error of a stage in which no step made an update."""
    return Diverged(
        f"{stage}: all {steps} steps skipped their updates, because a loss or gradient was not finite, or KL or length "
        f"was above its limit (see {run_dir / 'metrics.jsonl'}); correct data or settings, and start a new run in "
        "another run_dir"
    )
