"""Whether a program has become slower: its share of what this machine can do, against the share stored.

    python benchmarks/regress.py [--store] [--rounds 2]

Runs `jaxrlhf bench` on the standard work, with answers of full length, and compares each program's share of its limit
(least possible time at the machine's own rates, measured beside it, by the time of its fastest call) with
benchmarks/ratios.json. What takes more than 1.2 times as long as stored is named, and the exit status is 1. Each work
is measured in `--rounds` processes; of all of them the fastest call and the best rates count, since other jobs on a
machine can take that much from a single one. Shares depend on the kind of machine: each kind has its own entry.
`--store` writes this machine's.
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
    """What shares of one machine may be compared with those of another by."""
    machine = found["machine"]
    cores = f", {machine['cores']} cores" if machine["backend"] == "cpu" else ""
    return f"{machine['devices']} x {machine['device']}{cores}"


def shares(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Work -> program -> share of its limit, in the fastest call of all rounds, at the best rates of all rounds.

    Other jobs on the machine disturb those least. What has no products takes no time that is worth a comparison.
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
    """One line for each program that takes more than SLOWER times what it took, or that is not measured any more."""
    lines = []
    for work, programs in stored.items():
        for name, share in programs.items():
            if name not in now.get(work, {}):
                lines.append(f"{work}: {name} is not there any more; --store if that is meant")
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
    parser.add_argument("--store", action="store_true", help="writes this machine's shares instead of comparing")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each work; default 2")
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error(f"--rounds: must be at least 1, not {given.rounds}")
    try:
        stored = json.loads(RATIOS.read_text(encoding="utf-8")) if RATIOS.is_file() else {}
    except ValueError as error:
        print(f"error: {RATIOS}: {error}; take it from the repository again", file=sys.stderr)
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
        print(f"error: {RATIOS.name} has no shares for {kind}; known are {known}; --store writes them", file=sys.stderr)
        return 2
    for work, programs in now.items():
        for name, share in programs.items():
            before = stored[kind].get(work, {}).get(name)
            known = "not stored: --store does" if before is None else f"stored {before:.1%}"
            print(f"{work}: {name} {share:.1%} of its limit, {known}")
    lines = slower(now, stored[kind])
    print("\n".join(lines) or f"nothing takes more than {SLOWER} times as long")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
