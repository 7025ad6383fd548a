"""Measures how much of a reward function's waiting time is hidden behind work on the device.

    python benchmarks/waiting_reward.py [--wait 0.3] [--rounds 2] [key.path=value ...]

Runs PPO in fresh processes, alternately with a reward function that returns at once and one that first waits, as for a
network, with 32 prompts, 64 sampled tokens each and 4 epochs on a random Llama of four layers. Prints the median
seconds per iteration and its parts for each run, and the share of the wait that lengthens an iteration. It should be
below 1, because logprobs and values are computed during the wait.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
WARM_UP = 2  # iterations left out: the first compiles, and the second may compile the rest
REWARD = """
import time

def score(prompts, completions):
    time.sleep({wait})
    return [text.count("e") / 10 for text in completions]
"""
CONFIG = {
    "model": {"new": {"hidden_size": 256, "layers": 4, "heads": 8, "kv_heads": 4, "intermediate_size": 688}},
    "stages": ["ppo"],
    "adapter": {"rank": 8, "alpha": 16.0},
    "ppo": {
        "data": {"path": "builtin:assistant-prompts"}, "iterations": 10, "batch_size": 32, "evaluation": {"prompts": 4},
        "max_prompt_tokens": 32, "sampling": {"max_new_tokens": 64}, "save_every": 1000,
        "update": {
            "epochs": 4, "minibatches": 1, "microbatch_size": 16, "remat": "none",
            "optimizer": {"learning_rate": 1e-4}, "value_optimizer": {"learning_rate": 1e-4},
        },
    },
}  # fmt: skip
PARTS = ("seconds", "time/rollout", "time/reward", "time/annotate", "time/update")


def run(folder: Path, wait: float, overrides: list[str]) -> dict[str, float]:
    """Part of an iteration -> median seconds, of one run in a fresh process."""
    folder.mkdir()
    (folder / "reward.py").write_text(REWARD.format(wait=wait), encoding="utf-8")
    own = {"run_dir": str(folder / "run"), "compilation_cache": str(folder.parent / "cache")}
    reward = {"kind": "function", "function": f"{folder / 'reward.py'}:score"}
    config = CONFIG | own | {"ppo": CONFIG["ppo"] | {"reward": reward}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "jaxrlhf.train", "--config", str(folder / "config.yaml"), *overrides]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1] if done.returncode == 2 else done.stderr[-2000:], file=sys.stderr)
        raise SystemExit(done.returncode)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if len(lines) <= WARM_UP:
        raise SystemExit(f"error: ppo.iterations: must be above {WARM_UP}, the warm-up iterations; given {len(lines)}")
    return {part: statistics.median(line[part] for line in lines[WARM_UP:]) for part in PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wait", type=float, default=0.3, help="seconds that the reward function waits; default 0.3")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each reward; default 2")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings of all runs")
    given = parser.parse_intermixed_args()
    if given.rounds < 1:
        parser.error(f"--rounds: must be at least 1, not {given.rounds}")
    for override in given.overrides:
        if override.startswith(("run_dir", "ppo.reward", "compilation_cache", "stages")):
            parser.error(f"{override}: set by this script and cannot be overridden")
    if not 0 < given.wait < 3600:
        parser.error(f"--wait: must be above 0 and below 3600 seconds, not {given.wait}")
    found: dict[float, list[dict[str, float]]] = {0.0: [], given.wait: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            for wait, runs in found.items():
                runs.append(run(Path(folder, f"{number}-{wait}"), wait, given.overrides))
                parts = ", ".join(f"{part.removeprefix('time/')} {runs[-1][part]:.3f}" for part in PARTS)
                print(f"round {number + 1}, waits {wait:g} s: {parts}", flush=True)
    at_once, waiting = (statistics.median(one["seconds"] for one in runs) for runs in found.values())
    longer = waiting - at_once
    print(
        f"an iteration takes {at_once:.3f} s if the reward returns at once and {waiting:.3f} s if it waits "
        f"{given.wait:g} s: {longer / given.wait:.2f} of the wait is visible"
    )


if __name__ == "__main__":
    main()
