"""Sends a run to trackio: to its local database, or to a Space or a server.

TRACKIO_DIR is the folder of the database. TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names the Space or the server.
TRACKIO_PROJECT names the project.
"""

import os
import shlex
import uuid
from typing import Any

from jaxrlhf.tracking.trackers.protocol import PROJECT, Line, RunInfo


class Trackio:
    """Sends one log entry for each line."""

    def open(self, run: RunInfo, ids: dict[str, Any]) -> int:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        import trackio

        # trackio finds a run by its name, so the name must differ from that of an earlier run in the same folder.
        self.ids = {
            "name": ids.get("name") or f"{run.name}-{uuid.uuid4().hex[:6]}",
            "project": ids.get("project") or os.environ.get("TRACKIO_PROJECT", PROJECT),
        }
        self._run = trackio.init(
            self.ids["project"],
            self.ids["name"],
            config=run.settings,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.where = f"run {self.ids['name']}; to see it: trackio show --project {shlex.quote(self.ids['project'])}"
        self._last = max(self._run._next_step - 1, 0)
        return self._last

    def log(self, line: Line) -> None:
        import trackio

        tables = {
            name: trackio.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
            for name, rows in line.tables.items()
        }
        self._run.log({**line.metrics, **tables}, step=line.number)
        self._last = line.number

    def close(self, finished: bool) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        self._run.finish()
        if self._run._is_local:  # trackio only warns about lines that it cannot write, and drops them
            stored = SQLiteStorage.get_max_step_for_run(self.ids["project"], self.ids["name"], run_id=self._run.id)
            if (stored or 0) < self._last:
                raise OSError(f"trackio has not stored the lines after line {stored or 0}")
