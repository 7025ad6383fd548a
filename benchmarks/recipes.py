"""Trains recipes and prints the scores of their SFT model and their policy on the test split, for several seeds.

    python benchmarks/recipes.py NAME ... [--seeds 0,1,2] [--to runs/recipes] [--metric reward/score] [--best 1.0]
        [--same-rows]

NAME is a file of configs/recipes. Completions are sampled with the sampling settings of the run. `way` is the share of
the way from the score of the SFT model to the best possible score. With --same-rows, `supervised` is the score of SFT
on all rows that PPO sees, with their responses, in a run of its own (NAME-SEED-sft). If interrupted, the same command
resumes and skips finished runs.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from algorithms import integers

from jaxrlhf.config.reading import load_config

RECIPES = Path(__file__).parents[1] / "configs" / "recipes"


def command(*arguments: object) -> None:
    """Runs a jaxrlhf command and shows its output only if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxrlhf", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise SystemExit(done.stdout.decode()[-4000:])


def figures(recipe: Path, seed: int, to: Path, metric: str, best: float, same_rows: bool) -> dict[str, float]:
    """Trains a recipe with a seed, evaluates its test split, and returns start, end, way, minutes and supervised.

    There are no minutes if an earlier call began the run.
    """
    run_dir = to / f"{recipe.stem}-{seed}"
    begun, begin = run_dir.exists(), time.monotonic()
    command("train", "--config", recipe, f"seed={seed}", f"run_dir={run_dir}")
    minutes = (time.monotonic() - begin) / 60
    report, chosen = run_dir / "test.json", ["sft", "policy"]
    if same_rows:
        supervised = f"{run_dir}-sft"
        all_rows = ("stages=[sft]", "sft.data.limit=null")
        command("train", "--config", recipe, f"seed={seed}", f"run_dir={supervised}", *all_rows)
        chosen.append(f"{supervised}:sft")
    data = load_config(recipe).ppo.data
    source = ["--data", data.path, "--split", "test"]
    command("evaluate", "--run", run_dir, "--roles", ",".join(chosen), *source, "--json", report)
    roles = json.loads(report.read_text())["roles"]
    start, end, *others = (roles[role][metric]["value"] for role in chosen)
    found = {"start": start, "end": end, "way": (end - start) / (best - start)}
    found |= {} if begun else {"minutes": minutes}
    return found | dict(zip(["supervised"], others))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--seeds", type=integers, default=[0, 1, 2], metavar="N,...", help="default: 0,1,2")
    parser.add_argument("--to", type=Path, default=Path("runs/recipes"), metavar="DIR", help="output folder")
    parser.add_argument("--metric", default="reward/score", help="metric of jaxrlhf evaluate (default: reward/score)")
    parser.add_argument("--best", type=float, default=1.0, help="best possible score (default: 1)")
    parser.add_argument("--same-rows", action="store_true", help="also trains SFT on all rows that PPO sees")
    given = parser.parse_args()
    for name in given.names:
        for seed in given.seeds:
            found = figures(RECIPES / f"{name}.yaml", seed, given.to, given.metric, given.best, given.same_rows)
            numbers = "  ".join(f"{key} {value:.3f}" for key, value in found.items())
            print(f"{name:22} seed {seed}  {numbers}", flush=True)


if __name__ == "__main__":
    main()
