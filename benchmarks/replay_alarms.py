"""Replays the metrics of finished runs through the shipped alarms, and says which alarms would have begun.

    python benchmarks/replay_alarms.py RUN_DIR_OR_FILE [...]

Reads `metrics.jsonl` of each run directory, or a file of the same lines, plain or compressed with gzip.
"""

import argparse
import gzip
import json
from pathlib import Path

from jaxrlhf.config.alarms import SETS, alarms_of
from jaxrlhf.tracking.alarms import Alarms


def replay(lines: list[dict]) -> list[str]:
    """The messages of the shipped alarms on the lines of a metrics.jsonl."""
    said: list[str] = []
    stages: dict[str, Alarms] = {}
    for line in lines:
        stage, step = line["stage"], line["step"]
        if stage not in stages:
            stages[stage] = Alarms(stage, alarms_of(tuple(SETS), stage), {}, said.append)
        values = {name: value for name, value in line.items() if isinstance(value, int | float)}
        if "kl/k1" in values and "length/mean" in values:  # runs of before this metric was logged
            values.setdefault("kl/per_token", values["kl/k1"] / max(values["length/mean"], 1.0))
        stages[stage].observe(step, values)
    return said


def read(path: Path) -> list[dict]:
    """The lines of a run directory or of a file."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, or file of metrics")
    for path in parser.parse_args().runs:
        lines = read(path)
        said = replay(lines)
        steps = sum(line["stage"] == "ppo" for line in lines)
        print(f"{path}: {len(lines)} lines, {steps} of ppo: {len(said)} alarms")
        for message in said:
            print(f"    {message}")


if __name__ == "__main__":
    main()
