"""Times this package and a peer alternately on the same work, and prints the ratios.

    python benchmarks/compare.py --peer trl --python peers/bin/python --script trl_ppo.py [--rounds 3]
        [--script-args "--minibatches 1 --updates 5"] [key.path=value ...]

Key paths override configs/bench.yaml on our side. The peer's script must print a last line `JSON {...}` with seconds
per iteration, under the keys in README.md here. A ratio above 1 means that the peer takes that many times as long.
"""

import argparse
import dataclasses
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PARTS = ("whole", "sampling", "scoring", "update", "peak MiB")
_SCORING = ("reward", "annotate", "experience")


def _plain(text: str) -> dict[str, float]:
    """Reads a script that uses our names for the parts."""
    found = _last_json(text)
    return {part: float(found[part]) for part in PARTS if part in found}


def _trl(text: str) -> dict[str, float]:
    found = _last_json(text)
    split = found["split_median_sec"]
    return {
        "whole": found["sec_per_iteration_median"],
        "sampling": split["generation"],
        "scoring": split["scoring"],
        "update": split["update_fwd_bwd_opt"],
        "peak MiB": found["peak_rss_mib"],
    }


def _generate(text: str) -> dict[str, float]:
    found = _last_json(text)
    return {"sampling": found["sec_median"], "peak MiB": found["peak_rss_mib"]}


def _tunix(text: str) -> dict[str, float]:
    """Reads `median s/iter 1.41 | generate 0.31 | old logp 0.1 | ...`, which it prints instead of JSON."""
    line = next((line for line in text.splitlines() if line.startswith("median s/iter")), None)
    peak = re.search(r"peak RSS ([\d.]+) GiB", text)
    if line is None or peak is None:
        raise ValueError("no line that begins with 'median s/iter', or none with 'peak RSS'")
    part = {name.strip(): float(value) for name, value in re.findall(r"([a-z /]+?) ([\d.]+)(?= \||$)", line)}
    return {
        "whole": part["median s/iter"],
        "sampling": part["generate"],
        "scoring": part["old logp"] + part["ref logp"] + part["values"],
        "update": part["actor update"] + part["critic update"],
        "peak MiB": float(peak[1]) * 1024,
    }


@dataclasses.dataclass(frozen=True)
class Peer:
    read: Callable[[str], dict[str, float]]  # parses the output of its script
    overrides: tuple[str, ...] = ()  # for our side, so that both do the same work
    arguments: str = ""


PEERS = {
    "trl": Peer(_trl, arguments="--minibatches 1 --updates 5"),
    "generate": Peer(_generate),
    "tunix": Peer(_tunix, ("ppo.update.epochs=1", "ppo.reward={kind: function, function: 'none:none'}")),
    "other": Peer(_plain),
}


class Unusable(Exception):
    """A comparison that is not possible, with a one-line message."""


def _last_json(text: str) -> dict[str, Any]:
    lines = [line for line in text.splitlines() if line.startswith("JSON ")]
    if not lines:
        raise ValueError("no line that begins with 'JSON '")
    found = json.loads(lines[-1].removeprefix("JSON "))
    if not isinstance(found, dict):
        raise ValueError("after 'JSON ' there is no {...}")
    return found


def ours(found: dict[str, Any]) -> dict[str, float]:
    """The parts from the output of `jaxrlhf bench --json`; the whole is a PPO iteration with its host work."""
    (stage,) = (s for s in found["stages"] if s["stage"] == "ppo")
    seconds = stage["loop"]["by_program"]
    return {
        "whole": stage["loop"]["seconds"],
        "sampling": seconds["rollout"],
        "scoring": sum(value for name, value in seconds.items() if name.split()[0] in _SCORING),
        "update": seconds["update"],
        "peak MiB": found["peak_bytes"] / 2**20,
    }


def run_ours(overrides: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "jaxrlhf", "bench", "--config", "configs/bench.yaml", "--json", str(target)]
        _output([*command, *overrides])
        found = json.loads(target.read_text(encoding="utf-8"))
        if [stage["stage"] for stage in found["stages"]] != ["ppo"]:
            raise Unusable("stages: only ppo can be compared; do not override stages")
        return ours(found)


def run_peer(peer: Peer, python: str, script: Path, arguments: str) -> dict[str, float]:
    text = _output([python, script.name, *shlex.split(arguments)], script.parent)
    try:
        found = peer.read(text)
    except (ValueError, KeyError, TypeError) as error:
        raise Unusable(f"{script}: its output cannot be read: {error}") from None
    if not found or not all(_is_measured(value) for value in found.values()):
        raise Unusable(f"{script}: it printed {found or 'none of ' + ', '.join(PARTS)}; each must be a number above 0")
    return found


def _is_measured(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _output(command: list[str], folder: Path = ROOT) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unusable(f"{command[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
        raise Unusable(f"{shlex.join(command)} ended with {done.returncode}: {last}")
    return done.stdout


def table(peer: str, mine: list[dict[str, float]], theirs: list[dict[str, float]]) -> str:
    """Median (min to max) over rounds per part; the ratio is that of the medians, with its range over rounds."""
    lines = ["| part | ours | " + peer + " | ratio |", "| --- | --- | --- | --- |"]
    for part in PARTS:
        a, b = ([side[part] for side in sides if part in side] for sides in (mine, theirs))
        if not a or not b:
            continue
        ratios = [y / x for x, y in zip(a, b)]
        ratio = statistics.median(b) / statistics.median(a)
        lines.append(f"| {part} | {_spread(a)} | {_spread(b)} | {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    digits = 0 if max(values) >= 100 else 3
    low, middle, high = (f"{f(values):,.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, choices=sorted(PEERS))
    parser.add_argument("--python", required=True, help="interpreter of the peer's own environment")
    parser.add_argument("--script", required=True, type=Path, help="the peer's script; it runs in its own folder")
    parser.add_argument("--script-args", help="its arguments; default: those of the standard workload")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side; default 3")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings of our side")
    given = parser.parse_intermixed_args(arguments)
    if given.rounds < 1:
        parser.error(f"--rounds: must be at least 1, not {given.rounds}")
    if not given.script.is_file():
        parser.error(f"--script: no such file: {given.script}")
    if shutil.which(given.python) is None:
        parser.error(f"--python: {given.python} is not an executable program")
    try:
        shlex.split(given.script_args or "")
    except ValueError as error:
        parser.error(f"--script-args: {error}")
    return given


def main() -> int:
    given = parse()
    peer, mine, theirs = PEERS[given.peer], [], []
    arguments = peer.arguments if given.script_args is None else given.script_args
    python = str(Path(given.python).absolute()) if "/" in given.python else given.python
    for number in range(given.rounds):
        try:
            mine.append(run_ours([*peer.overrides, *given.overrides]))
            theirs.append(run_peer(peer, python, given.script.absolute(), arguments))
        except Unusable as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"round {number + 1}: ours {mine[-1]}, {given.peer} {theirs[-1]}", file=sys.stderr, flush=True)
    print(table(given.peer, mine, theirs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
