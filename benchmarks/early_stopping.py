"""Early stopping by the gold score of held-out prompts, on the over-optimising run of `algorithms.py`.

    python benchmarks/early_stopping.py [--seeds 0] [--to runs/algorithms] [--iterations 100]

PPO maximises a noisy reward model without a KL penalty, and evaluates every EVERY iterations. One run goes to its end,
the other stops early and keeps its best checkpoint. Both start from the runs of `algorithms.py` in the same folder,
which are trained if they are missing. If interrupted, the same command resumes and skips finished runs.
"""

import argparse
from pathlib import Path

from algorithms import PENALTIES, Plan, TrainingRun, integers

EVERY, PATIENCE = 5, 4
GOLD = "evaluation/reward/gold"
SHARED = (
    PENALTIES["no KL penalty"], f"ppo.evaluation.every={EVERY}", f"checkpoints.best={GOLD}", "checkpoints.result=best",
)  # fmt: skip
RUNS = {
    "to the end": (),
    "stopped early": (f"ppo.early_stopping={{metric: {GOLD}, mode: highest, patience: {PATIENCE}}}",),
}


def runs_of(plan: Plan, seed: int) -> dict[str, TrainingRun]:
    """The two PPO runs of a seed, by name."""
    settings = (*SHARED, f"ppo.iterations={plan.iterations}")
    return {
        name: plan.from_run(plan.noisy_reward(seed), f"noisy-{name.replace(' ', '-')}", seed, "ppo", (*settings, *more))
        for name, more in RUNS.items()
    }


def figures(run: TrainingRun) -> dict[str, float]:
    """Gold score by evaluation: its peak, its last value, and that of the policy that the run saved."""
    steps = run.steps()
    gold = {step["step"]: step[GOLD] for step in steps if GOLD in step}
    best = max(gold, key=lambda step: gold[step])
    return {
        "iterations": len(steps),
        "peak at": best,
        "gold at the peak": gold[best],
        "gold at the last evaluation": gold[max(gold)],
        "gold of the saved policy": run.finished()["after"]["reward/gold"],
        "seconds of evaluations": sum(step.get("time/evaluation", 0.0) for step in steps),
        "seconds of steps": sum(step["seconds"] for step in steps),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=integers, default=[0], metavar="N,...", help="default: 0")
    parser.add_argument("--to", type=Path, default=Path("runs/algorithms"), metavar="DIR", help="output folder")
    parser.add_argument("--iterations", type=int, default=100)
    given = parser.parse_args(arguments)
    plan = Plan(given.to, given.seeds, given.iterations)
    for seed in given.seeds:
        for what, stage, run in (
            ("start", "reward_model", plan.start(seed)),
            ("noisy reward model", "reward_model", plan.noisy_reward(seed)),
            *((name, "ppo", run) for name, run in runs_of(plan, seed).items()),
        ):
            if run.finished(stage) is None:
                run.run(f"{what}, seed {seed}")
        for name, run in runs_of(plan, seed).items():
            print(f"seed {seed}, {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in figures(run).items()))


if __name__ == "__main__":
    main()
