"""Measures the seconds until the first PPO iteration ends, with an empty and with a filled compilation cache.

    python benchmarks/warm_start.py [--rounds 3] [key.path=value ...]

Runs the quickstart on a few rows, twice per round, each time in a fresh process and run_dir: first with an empty
compilation cache, then with the cache of the first run. Prints each round, the best of both, their ratio, and whether
the metrics of the two runs are equal, as they must be.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMALL = (
    "sft.data.limit=64", "sft.evaluation.heldout=4", "reward_model.data.limit=64",
    "reward_model.evaluation.data={path: 'builtin:assistant-preferences', split: test, limit: 32}",
    "ppo.iterations=2", "ppo.evaluation.prompts=64",
)  # fmt: skip
PASSING = ("seconds", "time", "tokens_per_second/", "memory/")


def launch(folder: Path, cache: Path, settings: list[str]) -> tuple[float, list[dict]]:
    """(seconds until metrics.jsonl has its first line of the ppo stage, all lines without clocks)."""
    metrics = folder / "metrics.jsonl"
    given = [f"run_dir={folder}", f"compilation_cache={cache}", *SMALL, *settings]
    command = [sys.executable, "-m", "jaxrlhf.train", "--config", "configs/quickstart.yaml", *given]
    # Lets Python write its bytecode files, as it does by default.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    with open(folder.with_suffix(".err"), "w+", encoding="utf-8") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        seconds = None
        while process.poll() is None:
            if seconds is None and metrics.is_file() and b'"stage": "ppo"' in metrics.read_bytes():
                seconds = time.perf_counter() - began
            time.sleep(0.01)
        errors.seek(0)
        if process.returncode or seconds is None:
            raise SystemExit(f"error: the run ended with {process.returncode}: {errors.read()[-2000:]}")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return seconds, [{k: v for k, v in line.items() if not k.startswith(PASSING)} for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="number of cold and of warm starts; default 3")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings of all runs")
    given = parser.parse_intermixed_args()
    if given.rounds < 1:
        parser.error(f"--rounds: must be at least 1, not {given.rounds}")
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            cache, seen = Path(folder, f"cache{number}"), []
            for kind in found:
                seconds, lines = launch(Path(folder, f"{kind}{number}"), cache, given.overrides)
                found[kind].append(seconds)
                seen.append(lines)
            files = [file.stat().st_size for file in cache.rglob("*-cache")]
            same = "same metrics" if seen[0] == seen[1] else "METRICS DIFFER"
            print(
                f"round {number + 1}: cold {found['cold'][-1]:.1f} s, warm {found['warm'][-1]:.1f} s, {same}; "
                f"{len(files)} programs in {sum(files) / 2**20:.1f} MiB",
                flush=True,
            )
    cold, warm = min(found["cold"]), min(found["warm"])
    print(f"best: cold {cold:.1f} s, warm {warm:.1f} s, warm / cold {warm / cold:.2f}")


if __name__ == "__main__":
    main()
