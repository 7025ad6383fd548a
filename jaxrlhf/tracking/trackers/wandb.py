"""Sends a run to Weights & Biases, online or offline (WANDB_MODE).

WANDB_PROJECT and WANDB_NAME name project and run.
"""

import os
import shlex
import uuid
from pathlib import Path
from typing import Any

from jaxrlhf.tracking.trackers.protocol import PROJECT, Line, RunInfo
from jaxrlhf.tracking.trackers.wandb_files import last_step


class WeightsAndBiases:
    """Sends one row of history for each line. wandb holds the last row back until the next row, or until the end."""

    def open(self, run: RunInfo, ids: dict[str, Any]) -> int:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.name),
            id=ids.get("id") or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8],
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            resume="allow",
            config=run.settings,
            settings=wandb.Settings(
                console="off", silent=True, save_code=False, disable_code=True, x_stats_pid=run.process
            ),
        )
        self.ids = {"id": self._run.id}
        if self._run.offline:  # offline wandb does not read its older files, so each start begins a new file
            folder = Path(self._run.dir).parents[1]
            self.where = f"offline; to upload it: wandb sync {shlex.quote(str(folder))}/offline-run-*-{self._run.id}"
            return last_step(folder, self._run.id)
        self.where = str(self._run.url)
        return max(self._run.starting_step - 1, 0)

    def log(self, line: Line) -> None:
        import wandb

        tables = {
            name: wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows], allow_mixed_types=True)
            for name, rows in line.tables.items()
        }
        self._run.log({**line.metrics, **tables}, step=line.number)

    def close(self, finished: bool) -> None:
        self._run.finish()
