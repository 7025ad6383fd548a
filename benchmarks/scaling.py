"""Measures how cost scales with twice the rows, tokens, layers or vocabulary of the standard workload.

    python benchmarks/scaling.py [--rounds 3] [key.path=value ...]

Runs `jaxrlhf bench` on each workload in each round, with completions of full length. Prints the factor of each
program's time (of its fastest call over all rounds) relative to the standard workload, and the factor of its
arithmetic. Twice the tokens have four times the attention.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "configs" / "bench" / "config.json"
# Changes to the model's config.json and to the settings of the run.
WORKS: dict[str, tuple[dict[str, int], list[str]]] = {
    "standard": ({}, []),
    "rows": ({}, ["ppo.batch_size=64"]),
    "tokens": ({}, ["ppo.max_prompt_tokens=64", "ppo.sampling.max_new_tokens=128"]),
    "layers": ({"num_hidden_layers": 8}, []),
    "vocabulary": ({"vocab_size": 8192}, []),
}


def measure(model: dict[str, int], overrides: list[str]) -> dict[str, tuple[float, float]]:
    """Program -> (seconds of its fastest call, floating-point operations), for programs with any."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "bench.json"
        changed = json.loads(MODEL.read_text(encoding="utf-8")) | model
        (Path(folder) / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        command = [sys.executable, "-m", "jaxrlhf", "bench", "--config", "configs/bench.yaml", "--json", str(target)]
        command += ["--iterations", "0", "--repeats", "5", f"model.path={folder}", *overrides]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    programs = found["stages"][0]["programs"]
    return {p["name"]: (p["best_seconds"], p["flops"]) for p in programs if p["flops"]}


def table(rounds: dict[str, list[dict[str, tuple[float, float]]]]) -> str:
    """A row per program: for each workload the factor of time and of arithmetic."""
    best = {
        work: {name: (min(r[name][0] for r in runs), runs[0][name][1]) for name in runs[0]}
        for work, runs in rounds.items()
    }
    standard = best.pop("standard")
    lines = [
        "| program | standard, s | " + " | ".join(f"2 x {work}: time (arithmetic)" for work in best) + " |",
        "| --- | " + "--- | " * (len(best) + 1),
    ]
    for name, (seconds, flops) in standard.items():
        cells = [f"{found[name][0] / seconds:.2f} ({found[name][1] / flops:.2f})" for found in best.values()]
        lines.append(f"| {name} | {seconds:.3f} | {' | '.join(cells)} |")
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs per workload; default 3")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings of all workloads")
    given = parser.parse_intermixed_args()
    if given.rounds < 1:
        parser.error(f"--rounds: must be at least 1, not {given.rounds}")
    own = {"model.path", *(text.split("=")[0] for _, settings in WORKS.values() for text in settings)}
    for text in given.overrides:
        if text.split("=")[0] in own:
            parser.error(f"{text}: {', '.join(sorted(own))} are set by this script and cannot be overridden")
    rounds: dict[str, list] = {work: [] for work in WORKS}
    for number in range(given.rounds):
        for work, (model, overrides) in WORKS.items():
            rounds[work].append(measure(model, [*given.overrides, *overrides]))
            shown = {name: round(seconds, 4) for name, (seconds, _) in rounds[work][-1].items()}
            print(f"round {number + 1}, {work}: {shown}", file=sys.stderr, flush=True)
    print(table(rounds))


if __name__ == "__main__":
    main()
