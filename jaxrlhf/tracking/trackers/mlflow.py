"""Sends a run to MLflow: to the server or store in MLFLOW_TRACKING_URI, else to a file store in the run directory.

MLFLOW_EXPERIMENT_NAME names the experiment.
"""

import os
import shlex
from typing import Any

from jaxrlhf.tracking.trackers.protocol import PROJECT, Line, RunInfo, flat

_METRICS, _PARAMS = 1000, 100  # largest numbers in one call
_LENGTH = 6000  # longest value of a parameter, in characters


class MLflow:
    """Sends one batch of metrics for each line.

    A file store writes the metrics of a batch in order. The stage's step comes last: it marks a line as complete.
    """

    def open(self, run: RunInfo, ids: dict[str, Any]) -> int:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        store, look = os.environ.get("MLFLOW_TRACKING_URI"), ""
        if not store:
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
            store = (run.folder / "mlflow").as_uri()
            folder = shlex.quote(str(run.folder / "mlflow"))
            look = f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {folder}"
        from mlflow import MlflowClient

        self._client = MlflowClient(store)
        if "run" in ids:
            self._run = ids["run"]
            self._client.update_run(self._run, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
            self._run = self._client.create_run(number, run_name=run.name).info.run_id
        self.ids = {"run": self._run}
        self.where = f"to see it: {look} (pip install mlflow)" if look else f"run {self._run} at {store}"
        self._log_settings(run)
        return self._last_line()

    def _log_settings(self, run: RunInfo) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(self._run).data.params  # MLflow refuses to change them
        new = [(key, str(value)[:_LENGTH]) for key, value in flat(run.settings).items() if key not in known]
        for start in range(0, len(new), _PARAMS):
            self._client.log_batch(self._run, params=[Param(*pair) for pair in new[start : start + _PARAMS]])
        self._client.log_text(self._run, run.settings_text, "config.yaml")

    def _last_line(self) -> int:
        """Returns the number of the last complete line in MLflow.

        Remembers which metrics of the next line MLflow already has.
        """
        names = self._client.get_run(self._run).data.metrics
        steps = {name: max(m.step for m in self._client.get_metric_history(self._run, name)) for name in names}
        last = max((step for name, step in steps.items() if name.endswith("/step")), default=0)
        self._partly = (last + 1, {name for name, step in steps.items() if step > last})
        return last

    def log(self, line: Line) -> None:
        from mlflow.entities import Metric

        for name, rows in line.tables.items():
            columns = list(rows[0])
            table = {"columns": columns, "data": [[row[column] for column in columns] for row in rows]}
            self._client.log_dict(self._run, table, f"samples/{name}/{line.number:06}.json")
        number, there = self._partly
        names = [name for name in line.metrics if not (line.number == number and name in there)]
        names.sort(key=lambda name: name.endswith("/step"))
        milliseconds = int(line.time * 1000)
        metrics = [Metric(name, line.metrics[name], milliseconds, line.number) for name in names]
        for start in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._run, metrics=metrics[start : start + _METRICS])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run, status="FINISHED" if finished else "KILLED")
