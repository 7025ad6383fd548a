"""Kills a run with all trackers on, resumes it, and reads back what each tracker has with its own reader.

    python benchmarks/tracked_run.py [--kills 2] [--seed 0] [--folder DIR] [--read RUN]

The run is that of `kill_trial.py`: tiny SFT, reward model and PPO. It is killed (SIGKILL) at random moments and started
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
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from kill_trial import PASSING, Trial

from jaxrlhf.tracking.trackers import CLIENTS
from jaxrlhf.tracking.trackers.feed import metrics_of

Rows = list[tuple[int, dict[str, float], bool]]  # (step, metrics, whether there are samples) in the tracker's order


def tensorboard_rows(run: Path) -> Rows:
    """With TensorBoard's EventAccumulator."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    samples = {e.step for tag in tags["tensors"] if tag != "settings" for e in events.Tensors(tag)}
    return _by_step(((e.step, tag, e.value) for tag in tags["scalars"] for e in events.Scalars(tag)), samples)


def wandb_rows(run: Path) -> Rows:
    """From wandb's offline files, with its own record type."""
    from jaxrlhf.tracking.trackers.wandb_files import history

    rows = []
    for row in history(run / "wandb", _ids(run, "wandb")["id"]):
        metrics = {name: float(v) for name, v in row.items() if name[0] != "_" and not isinstance(v, dict)}
        rows.append((row["_step"], metrics, any(isinstance(v, dict) for v in row.values())))
    return rows


def mlflow_rows(run: Path) -> Rows:
    """With MLflow's client, from its file store."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow import MlflowClient

    client, run_id = MlflowClient((run / "mlflow").as_uri()), _ids(run, "mlflow")["run"]

    def files(path: str) -> list[str]:
        found = []
        for entry in client.list_artifacts(run_id, path):
            found += files(entry.path) if entry.is_dir else [entry.path]
        return found

    samples = {int(Path(path).stem) for path in files("samples")}
    names = client.get_run(run_id).data.metrics
    return _by_step(
        ((m.step, name, m.value) for name in names for m in client.get_metric_history(run_id, name)), samples
    )


def trackio_rows(run: Path) -> Rows:
    """From trackio's own storage, in TRACKIO_DIR."""
    from trackio.sqlite_storage import SQLiteStorage

    rows = []
    for log in SQLiteStorage.get_logs(*(_ids(run, "trackio")[name] for name in ("project", "name"))):
        metrics = {name: v for name, v in log.items() if isinstance(v, float)}
        rows.append((log["step"], metrics, any(isinstance(v, dict) for v in log.values())))
    return rows


def _ids(run: Path, name: str) -> dict:
    return json.loads((run / "trackers.json").read_text())[name]["ids"]


READERS: dict[str, Callable[[Path], Rows]] = {
    "tensorboard": tensorboard_rows,
    "wandb": wandb_rows,
    "mlflow": mlflow_rows,
    "trackio": trackio_rows,
}


def _by_step(values: Iterable[tuple[int, str, float]], samples: set[int]) -> Rows:
    """Rows from (step, name, value) of all metrics. A step that a metric has twice, or not in order, is an error."""
    rows, last = {}, {}
    for step, name, value in values:
        if step <= last.get(name, 0):
            sys.exit(f"{name}: step {step} comes after {last[name]}")
        last[name] = step
        rows.setdefault(step, {})[name] = value
    return [(step, metrics, step in samples) for step, metrics in sorted(rows.items())]


def faults(lines: list[dict], rows: Rows) -> list[str]:
    """What is wrong with the rows of a tracker, given the lines of metrics.jsonl."""
    rows = [row for row in rows if row[1]]  # without entries of samples alone
    steps = [step for step, *_ in rows]
    if steps != list(range(1, len(lines) + 1)):
        return [f"steps {steps} for {len(lines)} lines"]
    found = []
    for number, (line, (_, row, _)) in enumerate(zip(lines, rows), start=1):
        expected = metrics_of(line)
        if expected.keys() != row.keys():
            found.append(f"line {number}: {sorted(expected.keys() ^ row.keys())} on one side only")
        passing = [name for name in expected if any(part in name for part in PASSING)]
        for name in expected.keys() & row.keys() - {*passing}:
            one, other = expected[name], row[name]
            if not (one == other or np.float32(one) == other or (math.isnan(one) and math.isnan(other))):
                found.append(f"line {number}: {name} is {other}, not {one}")
    return found


def read(run: Path) -> int:
    """Prints what each tracker has of a run; returns 1 if it is not the run's logs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]]
    found = []
    for name in CLIENTS:
        rows = READERS[name](run)
        found += [f"{name}: {fault}" for fault in faults(lines, rows)]
        count = sum(bool(metrics) for _, metrics, _ in rows)
        samples = ", ".join(str(step) for step, _, there in rows if there)
        print(f"{name}: {count} lines of {len(lines)}, samples of the lines {samples}")
    print("\n".join(found) or "every line once, in order, with its values, in each tracker")
    return int(bool(found))


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
    parser.add_argument("--read", type=Path, default=None, help="only read what the trackers have of this run")
    arguments = parser.parse_args()
    if arguments.read is not None:
        return read(arguments.read)
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
        return read(trial.run)


if __name__ == "__main__":
    sys.exit(main())
