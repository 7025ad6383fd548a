"""Compares all algorithms on the quickstart's task, and a noisy reward model with and without a KL penalty.

    python benchmarks/algorithms.py [--seeds 0,1,2] [--to runs/algorithms] [--only NAME,...] [--iterations N]

The quickstart's SFT model and reward model are trained once per seed. Each row of `ALGORITHMS` starts from them, with
the same total number of completions. If interrupted, the same command resumes and skips finished runs.

    DIR/seed-N/                 SFT model and reward model; DIR/NAME/seed-N/ are the runs that start from it
    DIR/algorithms.md, .json    the table, and its figures by seed
    DIR/overoptimisation.svg    gold and proxy by iteration (2210.10760), with and without a KL penalty
    DIR/overoptimisation.json   the figure's numbers

The figure needs matplotlib (`pip install -e '.[dev]'`) and is skipped without it.
"""

import argparse
import dataclasses
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from overoptimisation import CURVES, draw, spread, summary

from jaxrlhf.checkpoint.files import atomic_write
from jaxrlhf.checkpoint.run_dir import check_run
from jaxrlhf.config.reading import dump_config, load_config
from jaxrlhf.errors import UserError

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
COMPLETIONS = 64  # per iteration
EVALUATED = 512  # completions of held-out prompts, before and after training
ITERATIONS = 70  # as in the quickstart
COMPILING = 2  # first iterations, which compile and do not count in the seconds per iteration


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A row: changes to the quickstart's settings, with `group` completions of COMPLETIONS / group prompts."""

    paper: str
    settings: str = ""  # overrides below `ppo`, separated by spaces
    group: int = 1
    learning_rate: float = 1e-3  # of the policy

    @property
    def overrides(self) -> list[str]:
        settings = [
            f"batch_size={COMPLETIONS // self.group}",
            f"sampling.samples_per_prompt={self.group}",
            f"evaluation.prompts={EVALUATED // self.group}",
            f"update.optimizer.learning_rate={self.learning_rate}",
            *self.settings.split(),
        ]
        return [f"ppo.{setting}" for setting in settings]


GROUP = {"group": 4, "learning_rate": 2e-3}
WHOLE = "update.aggregation=sequence"
GRPO = "advantage.estimator=grpo"  # its KL is part of the loss; estimator and coefficient are tuned per row
ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm("1707.06347"),
    "ppo-shared-trunk": Algorithm("1707.06347", "update.value_trunk=policy value_adapter=null"),
    "ppo-dual-clip": Algorithm("1912.09729", "update.dual_clip=3.0"),
    "reinforce": Algorithm("Williams 1992", "advantage.estimator=reinforce"),
    "rloo": Algorithm("2402.14740", "advantage.estimator=rloo", **GROUP),
    "grpo": Algorithm("2402.03300", f"{GRPO} update.kl_loss=k3 kl.coef=0.02 {WHOLE}", group=4),
    "dr-grpo": Algorithm("2503.20783", "advantage.estimator=dr_grpo update.aggregation=constant", **GROUP),
    "reinforce++": Algorithm("2501.03262", "advantage.estimator=reinforce_plus_plus"),
    "reinforce++-baseline": Algorithm("2501.03262", "advantage.estimator=reinforce_plus_plus_baseline", **GROUP),
    # The greedy completion's return has no KL penalty, so the sampled one's must not have one either.
    "remax": Algorithm("2310.10505", "advantage.estimator=remax update.kl_loss=k3", learning_rate=2e-3),
    "gspo": Algorithm(
        "2507.18071",
        f"{GRPO} update.kl_loss=k3 kl.coef=0.01 update.loss=gspo update.clip_low=3e-4 update.clip_high=4e-4 {WHOLE}",
        **GROUP,
    ),
    "cispo": Algorithm(
        "2506.13585",
        f"{GRPO} update.kl_loss=k2 kl.coef=0.02 update.loss=cispo update.clip_low=1.0 update.clip_high=1.0",
        group=4,
    ),
    # One step per iteration, because this loss has no ratio to correct later, off-policy ones.
    "pg": Algorithm(
        "Williams 1992",
        "advantage.estimator=rloo update.loss=pg update.epochs=1 update.minibatches=1",
        group=4,
        learning_rate=3e-3,
    ),
}

# The over-optimisation runs: a reward model trained on an eighth of the quickstart's pairs, and longer PPO.
OVER = "over-optimisation"
NOISY = ["reward_model.data.limit=3000"]
PENALTIES = {"no KL penalty": "ppo.kl.coef=0.0", "KL penalty": "ppo.kl.coef=0.05"}
LONGER = 100 / 70  # of the other runs' iterations


# ---------------------------------------------------------------- runs


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """One call of jaxrlhf.train."""

    folder: Path
    overrides: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        return [f"run_dir={self.folder}", *self.overrides]

    def check(self) -> None:
        """Raises UserError if a setting is wrong or the folder holds a run with other settings."""
        check_run(self.folder, dump_config(load_config(str(CONFIG), self.arguments)))

    def finished(self, stage: str = "ppo") -> dict | None:
        """The stage's results; None if it has not finished or the run has other settings."""
        path = self.folder / "roles" / "finished.json"
        if not path.exists():
            return None
        try:
            self.check()
        except UserError:
            return None
        return json.loads(path.read_text(encoding="utf-8")).get(stage)

    def steps(self) -> list[dict]:
        """The ppo stage's lines of metrics.jsonl."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [line for line in map(json.loads, lines) if line["stage"] == "ppo"]

    def run(self, what: str) -> None:
        """Starts or resumes the run; exits if it fails."""
        command = [sys.executable, "-m", "jaxrlhf.train", "--config", os.path.relpath(CONFIG), *self.arguments]
        print(f"{what}: python", shlex.join(command[1:]), flush=True)
        # The final table on stdout is also in roles/finished.json; errors and progress go to stderr.
        status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        if status:
            sys.exit(f"{what}: jaxrlhf.train ended with status {status}; the same command resumes here")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs of each seed."""

    to: Path
    seeds: list[int]
    iterations: int

    def start(self, seed: int) -> TrainingRun:
        return TrainingRun(self.to / f"seed-{seed}", (f"seed={seed}", "stages=[sft,reward_model]"))

    def algorithm(self, name: str, seed: int) -> TrainingRun:
        settings = (*ALGORITHMS[name].overrides, f"ppo.iterations={self.iterations}")
        return self.from_run(self.start(seed), name, seed, "ppo", settings)

    def noisy_reward(self, seed: int) -> TrainingRun:
        return self.from_run(self.start(seed), "noisy-reward", seed, "reward_model", NOISY)

    def over(self, penalty: str, seed: int) -> TrainingRun:
        settings = (PENALTIES[penalty], f"ppo.iterations={round(self.iterations * LONGER)}")
        return self.from_run(self.noisy_reward(seed), f"noisy-{penalty.replace(' ', '-')}", seed, "ppo", settings)

    def from_run(self, origin: TrainingRun, name: str, seed: int, stage: str, settings) -> TrainingRun:
        shared = (f"seed={seed}", f"stages=[{stage}]", "model.new=null", f"model.run={origin.folder}")
        return TrainingRun(self.to / name / f"seed-{seed}", (*shared, *settings))

    def todo(self, names: list[str]) -> list[tuple[str, str, TrainingRun]]:
        """(description, last stage, run) of every run that the names need, in order, one seed after the other."""
        runs = []
        for seed in self.seeds:
            runs.append((f"start, seed {seed}", "reward_model", self.start(seed)))
            for name in names:
                if name != OVER:
                    runs.append((f"{name}, seed {seed}", "ppo", self.algorithm(name, seed)))
                    continue
                runs.append((f"noisy reward model, seed {seed}", "reward_model", self.noisy_reward(seed)))
                runs += [(f"{p}, seed {seed}", "ppo", self.over(p, seed)) for p in PENALTIES]
        return runs


# ---------------------------------------------------------------- the table


def measured(run: TrainingRun) -> dict[str, float] | None:
    """The figures of a run; None if it has not finished."""
    reached = run.finished()
    if reached is None:
        return None
    before, after, steps = reached["before"], reached["after"], run.steps()
    return {
        "gold before": before["reward/gold"],
        "gold after": after["reward/gold"],
        "proxy before": before["reward/score"],
        "proxy after": after["reward/score"],
        "KL": after["kl/k1"],
        "seconds per iteration": statistics.median(step["seconds"] for step in steps[COMPILING:] or steps),
        "seconds": sum(step["seconds"] for step in steps),  # includes compilation, once per start
    }


def results(plan: Plan) -> dict[str, dict]:
    """Algorithm -> its settings and figures by seed, if any seed has finished."""
    found = {}
    for name, algorithm in ALGORITHMS.items():
        rows = {seed: row for seed in plan.seeds if (row := measured(plan.algorithm(name, seed))) is not None}
        if rows:
            found[name] = dataclasses.asdict(algorithm) | {"seeds": rows}
    return found


def table(found: dict[str, dict]) -> str:
    """The results as a Markdown table: mean (min to max) over seeds."""
    lines = [
        "| algorithm | prompts x answers | gold before | gold after | KL, nats per completion | proxy after "
        "| s per iteration, least | s in all, least | learning rate | other settings under `ppo` |",
        "|" + " --- |" * 10,
    ]
    for name, row in found.items():
        seeds = list(row["seeds"].values())
        columns = {key: [figures[key] for figures in seeds] for key in seeds[0]}
        cells = [
            f"{name} ({row['paper']})",
            f"{COMPLETIONS // row['group']} x {row['group']}",
            f"{statistics.mean(columns['gold before']):.3f}",
            spread(columns["gold after"], 3),
            spread(columns["KL"], 1),
            spread(columns["proxy after"], 2),
            # The minimum, because other jobs on the machine only add time.
            f"{min(columns['seconds per iteration']):.2f}",
            f"{min(columns['seconds']):.0f}",
            f"{row['learning_rate']:g}",
            f"`{row['settings']}`" if row["settings"] else "none",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, str | int]:
    return {"cores": os.cpu_count() or 0, "python": platform.python_version(), "jax": metadata.version("jax")}


def write_table(plan: Plan) -> str:
    found = results(plan)
    document = {
        "machine": machine(), "iterations": plan.iterations, "answers per iteration": COMPLETIONS,
        "answers evaluated": EVALUATED, "algorithms": found,
    }  # fmt: skip
    atomic_write(plan.to / "algorithms.json", json.dumps(document, indent=1) + "\n")
    atomic_write(plan.to / "algorithms.md", table(found))
    return table(found)


# ---------------------------------------------------------------- the figure


def curves(plan: Plan) -> dict[str, dict[int, dict[str, list[float]]]]:
    """Penalty -> seed -> name in CURVES -> values by iteration, of the finished runs."""
    found: dict[str, dict] = {}
    for penalty in PENALTIES:
        for seed in plan.seeds:
            run = plan.over(penalty, seed)
            if run.finished() is not None:
                steps = run.steps()
                by_name = {name: [round(step[key], 4) for step in steps] for name, key in CURVES.items()}
                found.setdefault(penalty, {})[seed] = by_name
    return found


def write_figure(plan: Plan) -> str:
    found = curves(plan)
    if not found:
        return ""
    document = {"machine": machine(), "reward model": NOISY, "penalties": PENALTIES, "curves": found}
    atomic_write(plan.to / "overoptimisation.json", json.dumps(document) + "\n")
    try:
        draw(found, plan.to / "overoptimisation.svg")
    except ModuleNotFoundError as missing:
        print(f"figure skipped: {missing}; pip install -e '.[dev]'")
    return summary(found)


# ---------------------------------------------------------------- the command


def integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def names(text: str) -> list[str]:
    chosen, known = text.split(","), [OVER, *ALGORITHMS]
    if unknown := [name for name in chosen if name not in known]:
        raise argparse.ArgumentTypeError(f"unknown name {unknown[0]!r}; names are {', '.join(known)}")
    return chosen


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=integers, default=[0, 1, 2], metavar="N,...", help="default: 0,1,2")
    parser.add_argument("--to", type=Path, default=Path("runs/algorithms"), metavar="DIR", help="output folder")
    parser.add_argument("--only", type=names, default=[OVER, *ALGORITHMS], metavar="NAME,...", help="rows to run")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="per algorithm; the figure takes 10/7 of it")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    plan = Plan(given.to, given.seeds, given.iterations)
    runs = plan.todo(given.only)
    try:
        for _, _, run in runs:
            run.check()
    except UserError as error:
        sys.exit(f"error: {error}")
    plan.to.mkdir(parents=True, exist_ok=True)
    for number, (what, stage, run) in enumerate(runs, start=1):
        if run.finished(stage) is None:
            run.run(f"{number}/{len(runs)} {what}")
        if (row := measured(run)) is not None:
            figures = ", ".join(f"{key} {value:.3f}" for key, value in row.items())
            print(f"{number}/{len(runs)} {what}: {figures}", flush=True)
    print("\n" + write_table(plan) + "\n" + write_figure(plan), end="")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; the same command resumes here", file=sys.stderr)
        sys.exit(130)
