"""Kills a run with all trackers on, resumes it, and reads back what each tracker has with its own reader.

    python benchmarks/tracked_run.py [--kills 2] [--seed 0] [--folder DIR]

The run is that of `kill_trial.py`: SFT, reward model and PPO, tiny. It is killed (SIGKILL) at random moments and started
again with the same command. Every second kill hits the trackers' process too. Then each tracker must have every line of
metrics.jsonl once, in order, with its values. Clocks, memory and compilation counts differ between a step and its
repetition, so their values are not compared. Exit status 1 if anything differs.
"""

import argparse
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from kill_trial import PASSING, Trial

from jaxrlhf.tracking.trackers import CLIENTS
from jaxrlhf.tracking.trackers.feed import metrics_of

Rows = list[tuple[int, dict[str, float]]]  # (step, metrics) in the order of the tracker


def tensorboard_rows(run: Path) -> Rows:
    """With TensorBoard's EventAccumulator."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    return _by_step((e.step, tag, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag))


def wandb_rows(run: Path) -> Rows:
    """From wandb's offline files, with its own record type."""
    from jaxrlhf.tracking.trackers.wandb_files import history

    run_id = json.loads((run / "trackers.json").read_text())["wandb"]["ids"]["id"]
    rows = []
    for row in history(run / "wandb", run_id):
        numbers = {name: float(v) for name, v in row.items() if name[0] != "_" and not isinstance(v, dict)}
        rows.append((row["_step"], numbers))
    return [(step, metrics) for step, metrics in rows if metrics]  # without rows of samples alone


def mlflow_rows(run: Path) -> Rows:
    """With MLflow's client, from its file store."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow import MlflowClient

    client = MlflowClient((run / "mlflow").as_uri())
    run_id = json.loads((run / "trackers.json").read_text())["mlflow"]["ids"]["run"]
    names = client.get_run(run_id).data.metrics
    return _by_step((m.step, name, m.value) for name in names for m in client.get_metric_history(run_id, name))


def trackio_rows(run: Path) -> Rows:
    """With trackio's API, from its database in TRACKIO_DIR."""
    from trackio.sqlite_storage import SQLiteStorage

    ids = json.loads((run / "trackers.json").read_text())["trackio"]["ids"]
    logs = SQLiteStorage.get_logs(ids["project"], ids["name"])
    rows = [(log["step"], {k: v for k, v in log.items() if isinstance(v, float)}) for log in logs]
    return [(step, metrics) for step, metrics in rows if metrics]  # without entries of samples alone


READERS: dict[str, Callable[[Path], Rows]] = {
    "tensorboard": tensorboard_rows,
    "wandb": wandb_rows,
    "mlflow": mlflow_rows,
    "trackio": trackio_rows,
}


def _by_step(values) -> Rows:
    """Rows from (step, name, value) of all metrics. A step that a metric has twice, or not in order, is an error."""
    rows, last = {}, {}
    for step, name, value in values:
        if step <= last.get(name, 0):
            sys.exit(f"{name}: step {step} comes after {last[name]}")
        last[name] = step
        rows.setdefault(step, {})[name] = value
    return sorted(rows.items())


def faults(lines: list[dict], rows: Rows) -> list[str]:
    """What is wrong with the rows of a tracker, given the lines of metrics.jsonl."""
    steps = [step for step, _ in rows]
    if steps != list(range(1, len(lines) + 1)):
        return [f"steps {steps} for {len(lines)} lines"]
    found = []
    for number, (line, (_, row)) in enumerate(zip(lines, rows), start=1):
        expected = metrics_of(line)
        if expected.keys() != row.keys():
            found.append(f"line {number}: {sorted(expected.keys() ^ row.keys())} on one side only")
        passing = [name for name in expected if any(part in name for part in PASSING)]
        for name in expected.keys() & row.keys() - {*passing}:
            one, other = expected[name], row[name]
            if not (one == other or np.float32(one) == other or (math.isnan(one) and math.isnan(other))):
                found.append(f"line {number}: {name} is {other}, not {one}")
    return found


def kill(trial: Trial, steps: int, wait: float, whole_group: bool) -> int:
    """Starts the run and kills it `wait` seconds after step `steps`; returns the number of steps it had logged."""
    process = trial.start()
    while trial.steps() < steps and process.poll() is None:
        time.sleep(0.002)
    time.sleep(wait)
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    return trial.steps()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=2, help="number of kills (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, default=None, help="working folder (default: a temporary one)")
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ |= {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}
        trial = Trial(folder, "tracked", short=True, trackers=CLIENTS)
        for number in range(arguments.kills):
            at = trial.steps() + generator.randint(1, 7)
            reached = kill(trial, at, generator.uniform(0, 2), whole_group=bool(number % 2))
            print(f"killed {'with its trackers ' * (number % 2)}after line {reached} of metrics.jsonl", flush=True)
        trial.finish()
        lines, found = trial.lines(), []
        for name in CLIENTS:
            rows = READERS[name](trial.run)
            found += [f"{name}: {fault}" for fault in faults(lines, rows)]
            print(f"{name}: {len(rows)} steps, {sum(len(row) for _, row in rows)} values for {len(lines)} lines")
        print("\n".join(found) or "every line once, in order, with its values, in each tracker")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
