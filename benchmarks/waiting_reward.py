"""Measures how much of a reward function's waiting time is hidden behind work on the device.

    python benchmarks/waiting_reward.py [--wait 0.3] [--rounds 2] [key.path=value ...]
    python benchmarks/waiting_reward.py --overlap [--devices 8] [--rounds 2] [key.path=value ...]

Runs PPO in fresh processes, alternately with a reward function that returns at once and one that first waits, as for a
network, with 32 prompts, 64 sampled tokens each and 4 epochs on a random Llama of four layers. Prints the median
seconds per iteration and its parts for each run, and the share of the wait that lengthens an iteration. It should be
below 1, because logprobs and values are computed during the wait.

With --overlap it compares ppo.async 0 and 1, and 1 with half of the devices in `mesh.rollout` and half in
`mesh.update`. The reward waits for 0, a half and one times the seconds of an iteration of ppo.async 0 whose reward does
not wait. Prints the median seconds of an iteration.
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


def run(folder: Path, wait: float, overrides: list[str], devices: int = 1) -> dict[str, float]:
    """Part of an iteration -> median seconds, of one run in a fresh process."""
    folder.mkdir(parents=True)
    (folder / "reward.py").write_text(REWARD.format(wait=wait), encoding="utf-8")
    own = {"run_dir": str(folder / "run"), "compilation_cache": str(folder.parent / "cache")}
    reward = {"kind": "function", "function": f"{folder / 'reward.py'}:score"}
    config = CONFIG | own | {"ppo": CONFIG["ppo"] | {"reward": reward}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "jaxrlhf.train", "--config", str(folder / "config.yaml"), *overrides]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} if devices > 1 else dict(os.environ)
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1] if done.returncode == 2 else done.stderr[-2000:], file=sys.stderr)
        raise SystemExit(done.returncode)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if len(lines) <= WARM_UP:
        raise SystemExit(f"error: ppo.iterations: must be above {WARM_UP}, the warm-up iterations; given {len(lines)}")
    return {part: statistics.median(line[part] for line in lines[WARM_UP:]) for part in PARTS}


def compare(folder: Path, rounds: int, devices: int, overrides: list[str]) -> None:
    """Prints the seconds of an iteration for each way and each wait, and how many times faster than ppo.async 0."""
    ways = {"ppo.async=0": [], "ppo.async=1": ["ppo.async=1"]}
    if devices > 1:
        halves = [f"mesh.{part}.data={devices // 2}" for part in ("rollout", "update")]
        ways["ppo.async=1, two meshes"] = ["ppo.async=1", *halves]
    iteration = None  # seconds of ppo.async 0 without a wait
    for share in (0.0, 0.5, 1.0):
        wait = share * (iteration or 0)
        found: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds):
            for name, own in ways.items():
                place = folder / f"{share}-{number}-{name.replace(' ', '_')}"
                found[name].append(run(place, wait, [*overrides, *own], devices)["seconds"])
        plain = statistics.median(found["ppo.async=0"])
        iteration = iteration or plain
        for name, seconds in found.items():
            middle, each = statistics.median(seconds), ", ".join(f"{x:.3f}" for x in seconds)
            faster = f"{middle:.3f} s ({each}), {plain / middle:.2f} times as fast"
            print(f"waits {wait:.3f} s, {name}: {faster}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wait", type=float, default=0.3, help="seconds that the reward function waits; default 0.3")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each reward; default 2")
    parser.add_argument("--overlap", action="store_true", help="compares ppo.async 0 and 1")
    parser.add_argument("--devices", type=int, default=8, help="virtual CPU devices for --overlap; default 8")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings of all runs")
    given = parser.parse_intermixed_args()
    if given.rounds < 1:
        parser.error(f"--rounds: must be at least 1, not {given.rounds}")
    for override in given.overrides:
        if override.startswith(("run_dir", "ppo.reward", "compilation_cache", "stages")):
            parser.error(f"{override}: set by this script and cannot be overridden")
    if not 0 < given.wait < 3600:
        parser.error(f"--wait: must be above 0 and below 3600 seconds, not {given.wait}")
    if given.overlap:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), given.rounds, given.devices, given.overrides)
        return
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
