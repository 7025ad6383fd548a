"""Trains control tasks with `jaxrlhf.PPO` and Stable-Baselines3, alternately, and prints samples, time and returns.

    python benchmarks/control.py --python peers/bin/python [--tasks CartPole-v1,Pendulum-v1] [--seeds 0,1,2,3,4]

Both sides have the same settings: those of RL Baselines3 Zoo, without its state-dependent exploration on Pendulum. Both
need Gymnasium; the peer's interpreter has stable-baselines3. Without --python only our side runs. Per run:

  samples   timesteps until the mean return of the last 20 training episodes reaches the threshold
  seconds   from the construction of the model to the end of `learn`, compilation included, evaluation not
  cpu       seconds of all cores in that time, which other work on the machine changes less
  return    mean return of 100 evaluation episodes after the training, with the likeliest actions
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WINDOW, EPISODES = 20, 100


@dataclasses.dataclass(frozen=True)
class Task:
    envs: int
    timesteps: int
    threshold: float
    settings: dict[str, Any]


TASKS = {
    "CartPole-v1": Task(8, 100_000, 475.0, {
        "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "ent_coef": 0.0,
        "learning_rate": "lin_0.001", "clip_range": "lin_0.2",
    }),
    "Pendulum-v1": Task(4, 100_000, -250.0, {
        "n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10, "ent_coef": 0.0, "learning_rate": 1e-3,
        "clip_range": 0.2,
    }),
    # one environment and the defaults of both sides
    "CartPole-v1 defaults": Task(1, 100_000, 475.0, {}),
}  # fmt: skip


def _ours() -> tuple[Any, Any, Any, Any]:
    import jaxrlhf

    return jaxrlhf.PPO, jaxrlhf.make_vec_env, jaxrlhf.evaluate_policy, jaxrlhf.BaseCallback


def _line(top: float) -> Any:
    return lambda left: top * left


def _theirs() -> tuple[Any, Any, Any, Any]:
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    torch.set_num_threads(1)  # faster than more threads at networks of this size

    def ppo(*arguments: Any, **settings: Any) -> Any:
        for name, value in settings.items():
            if isinstance(value, str) and value.startswith("lin_"):
                settings[name] = _line(float(value.removeprefix("lin_")))
        return PPO(*arguments, **settings, device="cpu")

    return ppo, make_vec_env, evaluate_policy, BaseCallback


SIDES = {"jaxrlhf": _ours, "stable-baselines3": _theirs}


def train(side: str, name: str, seed: int) -> dict[str, float]:
    """Trains one model, and returns its samples, seconds and return."""
    make, make_envs, evaluate, base = SIDES[side]()
    task, env_id = TASKS[name], name.split()[0]

    class Reached(base):
        def __init__(self) -> None:
            super().__init__()
            self.returns, self.samples = deque(maxlen=WINDOW), float("inf")

        def _on_step(self) -> bool:
            for info in self.locals["infos"]:
                if "episode" in info:
                    self.returns.append(info["episode"]["r"])
                    full = len(self.returns) == WINDOW and statistics.mean(self.returns) >= task.threshold
                    self.samples = min(self.samples, self.num_timesteps if full else float("inf"))
            return True

    reached = Reached()
    envs = make_envs(env_id, task.envs)
    began, cpu = time.perf_counter(), time.process_time()
    model = make("MlpPolicy", envs, seed=seed, **task.settings)
    model.learn(task.timesteps, callback=reached)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    mean, _ = evaluate(model, make_envs(env_id, 10, seed=1000 + seed), EPISODES)
    return {"samples": reached.samples, "seconds": seconds, "cpu": cpu, "return": float(mean)}


def _run(python: str, side: str, name: str, seed: int) -> dict[str, float]:
    command = [python, __file__, "--side", side, "--tasks", name, "--seeds", str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("JSON ")]
    if done.returncode or not lines:
        last = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
        raise SystemExit(f"error: {side} on {name} ended with {done.returncode}: {last}")
    return json.loads(lines[-1].removeprefix("JSON "))


def table(results: dict[tuple[str, str], list[dict[str, float]]]) -> str:
    """One row per task and side: the median over seeds (least to greatest)."""
    lines = ["| task | side | samples to threshold | seconds | cpu | return |", "| --- | --- | --- | --- | --- | --- |"]
    for (name, side), runs in results.items():
        cells = [_spread([run[part] for run in runs]) for part in ("samples", "seconds", "cpu", "return")]
        lines.append(f"| {name} | {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    low, middle, high = (f"{f(values):,.{0 if max(values) >= 1000 else 1}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})".replace("inf", "not reached")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="interpreter of the peer's own environment")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated; default: all")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--side", choices=SIDES, help="run one side in this process and print JSON; used by the script")
    given = parser.parse_args()
    names, seeds = given.tasks.split(","), [int(seed) for seed in given.seeds.split(",")]
    if unknown := [name for name in names if name not in TASKS]:
        parser.error(f"--tasks: unknown task {unknown[0]}; the tasks are {', '.join(TASKS)}")
    if given.side:
        for seed in seeds:
            print("JSON", json.dumps(train(given.side, names[0], seed)), flush=True)
        return 0
    pythons = {"jaxrlhf": sys.executable, **({"stable-baselines3": given.python} if given.python else {})}
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    for name in names:
        for seed in seeds:
            for side, python in pythons.items():
                found = _run(python, side, name, seed)
                results.setdefault((name, side), []).append(found)
                print(f"{name}, seed {seed}, {side}: {found}", file=sys.stderr, flush=True)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
