"""What trackers, report, alarms and samples cost in a run, beside the same run without them.

    python benchmarks/observing_cost.py [--config configs/quickstart.yaml] [--rounds 1] [key.path=value ...]

Runs the config in fresh directories, alternately without and with all that looks at a run: the four trackers (wandb
offline), report.html, alarms, samples every 10 iterations, and an evaluation every 10 iterations whose own time
(`time/evaluation`) is left out. Prints wall-clock time and processor time of all processes. The weights must be equal.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WITHOUT = ["trackers=[]", "report=false", "alarms=[]", "ppo.sample_every=1000000"]
WITH = [
    "trackers=[tensorboard,wandb,mlflow,trackio]", "ppo.sample_every=10", "ppo.evaluation.every=10",
]  # fmt: skip


def measure(config: str, folder: Path, settings: list[str]) -> tuple[float, float, float]:
    """Runs a config: (wall-clock seconds, processor seconds, seconds of evaluations during training)."""
    command = [sys.executable, "-m", "jaxrlhf.train", "--config", config, f"run_dir={folder}", "compilation_cache=null"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([*command, *settings], check=True, env=os.environ | {"WANDB_MODE": "offline"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall, processor = time.perf_counter() - start, sum(after[:2]) - sum(before[:2])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return wall, processor, sum(line.get("time/evaluation", 0.0) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("settings", nargs="*", metavar="key.path=value")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for i in range(given.rounds):
            folders = [Path(temporary, f"{name}-{i}") for name in ("without", "with")]
            found = [
                measure(given.config, folder, [*given.settings, *more])
                for folder, more in zip(folders, (WITHOUT, WITH))
            ]
            policies = [(folder / "roles/policy/adapter.safetensors").read_bytes() for folder in folders]
            assert policies[0] == policies[1], "the runs must have the same weights"
            for name, (wall, processor, evaluations) in zip(("without", "with"), found):
                print(f"{name:8} wall {wall:.1f} s, processor {processor:.1f} s, evaluations {evaluations:.1f} s")
            (wall, processor, _), (wall_with, processor_with, evaluations) = found
            cost = (wall_with - evaluations) / wall - 1
            more = processor_with / processor - 1
            print(f"cost     wall {cost:+.1%}, processor time {more:+.1%} (evaluations included)")


if __name__ == "__main__":
    main()
