"""Checks whether a program has become slower, by its share of this machine's limit against the stored share.

    python benchmarks/regress.py [--store] [--rounds 2]

Runs `jaxrlhf bench` on the standard workload, with completions of full length. A program's share of its limit is the
least possible time at the machine's rates, measured in the same process, divided by the time of its fastest call. The
stored shares are in benchmarks/ratios.json, one entry per kind of machine; `--store` writes this machine's. Programs
that take more than 1.2 times as long as stored are listed, and the exit status is 1. Each workload is measured in
`--rounds` processes, of which the fastest call and the best rates count, because other jobs may slow any of them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RATIOS = Path(__file__).parent / "ratios.json"
SLOWER = 1.2
WORKS = {"ppo": [], "ppo, value head on the policy's trunk": ["ppo.update.value_trunk=policy"]}


def kind_of(found: dict[str, Any]) -> str:
    """The kind of machine: shares are comparable within one kind only."""
    machine = found["machine"]
    cores = f", {machine['cores']} cores" if machine["backend"] == "cpu" else ""
    return f"{machine['devices']} x {machine['device']}{cores}"


def shares(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Workload -> program -> share of its limit, from the fastest call and the best rates of all rounds.

    Programs without matrix products are skipped: they take too little time to compare.
    """
    machines = [found["machine"] for one in rounds for found in one.values()]
    binding = {"arithmetic": "flops_per_second", "memory": "bytes_per_second"}
    limits = {rate: max(machine[rate] for machine in machines) for rate in binding.values()}
    best: dict[str, dict[str, float]] = {}
    for one in rounds:
        for work, found in one.items():
            for program in (p for stage in found["stages"] for p in stage["programs"] if p["flops"]):
                rate = binding[program["bound_by"]]
                share = round(program["best_share"] * found["machine"][rate] / limits[rate], 4)
                programs = best.setdefault(work, {})
                programs[program["name"]] = max(share, programs.get(program["name"], 0.0))
    return best


def slower(now: dict[str, dict[str, float]], stored: dict[str, dict[str, float]]) -> list[str]:
    """One line per program that takes more than SLOWER times as long as stored, or that is no longer measured."""
    lines = []
    for work, programs in stored.items():
        for name, share in programs.items():
            if name not in now.get(work, {}):
                lines.append(f"{work}: {name} is no longer measured; use --store if that is intended")
            elif share > SLOWER * now[work][name]:
                times = share / now[work][name]
                limit = f"{now[work][name]:.1%} of its limit, stored {share:.1%}"
                lines.append(f"{work}: {name} takes {times:.2f} times as long: {limit}")
    return lines


def measure(overrides: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "jaxrlhf", "bench", "--config", "configs/bench.yaml", "--json", str(target)]
        command += ["--iterations", "0", "--repeats", "10", *overrides]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        return json.loads(target.read_text(encoding="utf-8"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="write this machine's shares instead of comparing")
    parser.add_argument("--rounds", type=int, default=2, help="processes per workload; default 2")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error(f"--rounds: must be at least 1, not {given.rounds}")
    try:
        stored = json.loads(RATIOS.read_text(encoding="utf-8")) if RATIOS.is_file() else {}
    except ValueError as error:
        print(f"error: {RATIOS}: {error}; restore it from the repository", file=sys.stderr)
        return 2
    found = [{work: measure(overrides) for work, overrides in WORKS.items()} for _ in range(given.rounds)]
    kind = kind_of(next(iter(found[0].values())))
    now = shares(found)
    if given.store:
        RATIOS.write_text(json.dumps(stored | {kind: now}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{RATIOS.name}: stored for {kind}")
        return 0
    if kind not in stored:
        known = ", ".join(stored) or "none"
        print(f"error: {RATIOS.name} has no shares for {kind}, only for {known}; --store writes them", file=sys.stderr)
        return 2
    for work, programs in now.items():
        for name, share in programs.items():
            before = stored[kind].get(work, {}).get(name)
            known = "not stored: --store does" if before is None else f"stored {before:.1%}"
            print(f"{work}: {name} {share:.1%} of its limit, {known}")
    lines = slower(now, stored[kind])
    print("\n".join(lines) or f"no program takes more than {SLOWER} times as long")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
