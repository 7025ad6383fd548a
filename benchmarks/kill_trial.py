"""Kills a run repeatedly at random moments, and compares its result with that of an uninterrupted run.

    python benchmarks/kill_trial.py [--kills 100] [--signals KILL] [--seed 0] [--short] [--folder DIR]

The run is tiny: a full fine-tune in SFT, a reward model, and PPO with groups, a sum of rewards and all state that PPO
can carry between iterations. It is started with the same command until it finishes, and killed (SIGKILL, or SIGTERM if
--signals names TERM) each time at a random moment. The n-th kill comes at the latest after its share of the steps. At
the end the weights of all roles, the stages' results, metrics.jsonl (without clocks, memory and compilation counts) and
samples.jsonl must be bit-identical. Prints where the kills hit; exit status 1 if anything differs.

The folder keeps compiled programs between starts (JAX's persistent cache), which makes a start cheap.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FEW = {"rank": 2, "target_modules": ["q_proj", "down_proj"]}
FALLS = {"metric": "evaluation/reward/score", "mode": "highest", "patience": 2, "factor": 0.9}
CONFIG = {
    "model": {
        "new": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32, "max_positions": 64}
    },
    "checkpoints": {"keep": 2, "best": "reward/gold"},
    "sft": {
        "data": {"path": "builtin:assistant-demonstrations", "limit": 400}, "adapter": {"kind": "full"},
        "batch_size": 8, "max_length": 64, "evaluation": {"heldout": 4, "every": 4}, "epochs": 2, "save_every": 3,
        "optimizer": {"learning_rate": 1e-4},
    },
    "reward_model": {
        "data": {"path": "builtin:assistant-preferences", "limit": 200}, "adapter": FEW, "batch_size": 8,
        "max_length": 48, "buckets": 1, "evaluation": {"heldout": 4, "every": 5}, "epochs": 2, "save_every": 3,
        "optimizer": {"learning_rate": 1e-4},
    },
    "ppo": {
        "data": {"path": "builtin:assistant-prompts", "limit": 40}, "iterations": 60, "batch_size": 4,
        "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 6, "samples_per_prompt": 2}, "adapter": FEW,
        "value_adapter": FEW, "resample": 1, "refresh_reference": 7, "kl": {"target": 0.01, "horizon": 100},
        "score": {"normalise": "running", "clip": 3.0},
        "reward": {"kind": "sum", "parts": {
            "liked": {"weight": 1.0, "kind": "model"},
            "short": {"weight": 0.5, "kind": "function", "function": "jaxrlhf.rewards.library:length",
                      "options": {"target": 4}},
        }},
        "update": {
            "epochs": 2, "minibatches": 2, "ema_decay": 0.9,
            "optimizer": {"learning_rate": 0.01, "schedule": "plateau", "plateau": FALLS},
            "value_optimizer": {"learning_rate": 1e-4},
        },
        "gold": "jaxrlhf.toy.world:gold_score", "save_every": 3, "sample_every": 2,
        "evaluation": {"prompts": 8, "every": 4},
    },
}  # fmt: skip
PASSING = ("seconds", "time", "tokens_per_second/", "memory/", "compiles/")  # metrics of the process, not of the run
STOPPED = {signal.SIGKILL: -9, signal.SIGTERM: 143}


# ---------------------------------------------------------------- the killed run


def child(arguments: list[str], phases: Path) -> int:
    """Runs the unchanged train command, and records in the file `phases` what it is doing."""
    file = os.open(phases, os.O_WRONLY | os.O_CREAT)

    def note(text: str, place: int = 0) -> None:
        os.pwrite(file, text.ljust(80).encode(), 80 * place)

    note("imports")
    note("", 1)
    from jaxrlhf import train
    from jaxrlhf.checkpoint.checkpoints import Checkpoints
    from jaxrlhf.distributed.jit import Program
    from jaxrlhf.stages import loop, run

    stage = ["start"]

    def watched(owner, name, text, place=0):
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            note(text(args) if callable(text) else text, place)
            try:
                return function(*args, **kwargs)
            finally:
                note("" if place else f"{stage[0]}: on the host", place)

        setattr(owner, name, wrapped)

    def begin(args):
        stage[0] = args[2]
        return f"{stage[0]}: opens its checkpoints"

    def program(args):
        return f"{stage[0]}: {'runs' if args[0].compiles else 'compiles'} {args[0].name}"

    watched(run, "load_roles", "start: loads the model")
    watched(run, "_load_inputs", "start: reads rows")
    watched(loop.Loop, "__init__", begin)
    watched(Checkpoints, "restore_latest", lambda args: f"{stage[0]}: restores")
    watched(Checkpoints, "save", lambda args: f"{stage[0]}: begins to save")
    watched(Checkpoints, "close", lambda args: f"{stage[0]}: ends, waits for the last save")
    watched(Checkpoints, "_complete", "saving", place=1)
    watched(Program, "__call__", program)
    for module in (run.sft, run.reward_model, run.ppo):
        for name in ("save_role", "save_base", "mark_finished"):
            if hasattr(module, name):
                watched(module, name, lambda args: f"{stage[0]}: writes roles")
    return train.main(arguments)


def phase_of(file: Path) -> tuple[str, bool]:
    """(what the process was doing, whether a save was running)."""
    try:
        text = file.read_text()
    except FileNotFoundError:
        return "Python starts", False
    return text[:80].strip() or "Python starts", text[80:].strip() == "saving"


# ---------------------------------------------------------------- starting and killing


def shortened(config: dict) -> dict:
    """The config with a seventh of the steps."""
    short = json.loads(json.dumps(config))
    short["ppo"]["iterations"] = 8
    for stage in ("sft", "reward_model"):
        short[stage] |= {"epochs": 1}
        short[stage]["data"]["limit"] //= 4
    return short


class Trial:
    """A run in its folder, and the command that starts or resumes it."""

    def __init__(self, folder: Path, name: str, short: bool = False, **more: object):
        self.run, self.phases = folder / name, folder / f"{name}.phases"
        config = folder / f"{name}.json"  # JSON is YAML
        settings = (shortened(CONFIG) if short else CONFIG) | {"run_dir": str(self.run)} | more
        config.write_text(json.dumps(settings))
        self.command = [sys.executable, __file__, "--child", str(self.phases), "--config", str(config)]
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        self.output = folder / f"{name}.log"

    def start(self) -> subprocess.Popen:
        self.phases.unlink(missing_ok=True)
        with open(self.output, "ab") as output:
            return subprocess.Popen(
                self.command, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )

    def finish(self) -> float:
        """Runs to the end; returns the seconds."""
        began = time.monotonic()
        status = self.start().wait()
        if status:
            sys.exit(f"the run ended with status {status}:\n{self.output.read_text()[-3000:]}")
        return time.monotonic() - began

    def lines(self, name: str = "metrics.jsonl") -> list[dict]:
        path = self.run / name
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_once(trial: Trial, number: signal.Signals, wait: float, limit: int, linger: float) -> tuple[str, bool] | None:
    """Kills the run after `wait` seconds, or `linger` seconds after step `limit`; returns its phase, or None if it
    finished first."""
    process, began = trial.start(), time.monotonic()
    while time.monotonic() - began < wait and trial.steps() < limit:
        if process.poll() is not None:
            break
        time.sleep(0.002)
    if time.monotonic() - began < wait:
        time.sleep(linger)
    process.send_signal(number)
    phase = phase_of(trial.phases)  # read after the signal: SIGKILL freezes it, SIGTERM lets it change a little
    status = process.wait()
    if status == 0:
        return None
    early = number == signal.SIGTERM and status == -signal.SIGTERM  # before the command installed its handler
    if status != STOPPED[number] and not early:
        sys.exit(f"the run ended with status {status}:\n{trial.output.read_text()[-3000:]}")
    return phase


def kill_many(trial: Trial, signals: list[signal.Signals], kills: int, total: int, chance: random.Random):
    """Kills the run `kills` times; returns the phase of each. Steps are rationed so that the run outlasts the kills.

    Half of the kills fall into the start of the process (until its first step, as measured so far), half after it.
    """
    phases, starting = [], 10.0
    for number in range(kills):
        before, began = trial.steps(), time.monotonic()
        limit = max(before + 2, int(total * 0.97 * (number + 1) / kills))
        in_start = chance.random() < 0.5
        wait = chance.uniform(0, starting) if in_start else starting + chance.uniform(-0.3, 1) * starting
        phase = kill_once(trial, chance.choice(signals), wait, limit, chance.uniform(0, 0.15))
        if phase is None:
            print(f"the run ended after {number} kills")
            break
        phases.append(phase)
        took = time.monotonic() - began
        if trial.steps() != before:  # it reached a step, so the start took at most this long
            starting = 0.7 * starting + 0.3 * min(took, 2 * starting)
        elif not in_start:
            starting = max(starting, 0.9 * took)
        place = f"step {trial.steps()} of {total}: {phase[0]}{', saving' * phase[1]}"
        print(f"{number + 1}: {took:.1f} s, {place}", flush=True)
    return phases


# ---------------------------------------------------------------- comparing


def lasting(record: dict) -> dict:
    return {name: value for name, value in record.items() if not name.startswith(PASSING)}


def differences(one: Trial, other: Trial, saved_when_due: bool = True) -> list[str]:
    """The differences between two finished runs, in words.

    Compares the steps of checkpoints too if all were `saved_when_due`, so none because of a signal.
    """
    found = []
    files = {
        str(path.relative_to(trial.run))
        for trial in (one, other)
        for path in (trial.run / "roles").rglob("*")
        if path.is_file()
    }
    if not any(name.endswith(".safetensors") for name in files):
        found.append("there are no weights")
    for name in sorted(files):
        contents = [path.read_bytes() if path.exists() else None for path in (one.run / name, other.run / name)]
        if contents[0] != contents[1]:
            found.append(f"{name} differs")
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = [[lasting(record) for record in trial.lines(name)] for trial in (one, other)]
        if not lines[0]:
            found.append(f"{name} is empty")
        places = [[(line["stage"], line["step"]) for line in part] for part in lines]
        for word, part in (("missing", set(places[0]) - set(places[1])), ("extra", set(places[1]) - set(places[0]))):
            found += [f"{name}: {word}: {place}" for place in sorted(part)]
        if len(places[0]) != len(places[1]):
            found.append(f"{name}: {len(places[0])} lines, {len(places[1])} after the kills")
        different = [place for place, a, b in zip(places[0], *lines) if a != b]
        found += [f"{name}: {place} differs" for place in different[:3]]
    steps = [sorted(p.name for p in (t.run / "checkpoints").rglob("*") if p.name.isdecimal()) for t in (one, other)]
    if saved_when_due and steps[0] != steps[1]:
        found.append(f"checkpoints: {steps[0]}, {steps[1]} after the kills")
    return found


def summary(phases: list[tuple[str, bool]]) -> str:
    counts = collections.Counter(phase for phase, _ in phases)
    lines = [f"  {count:4}  {phase}" for phase, count in counts.most_common()]
    return "\n".join([*lines, f"  {sum(saving for _, saving in phases):4}  of these while a checkpoint was written"])


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[3:], Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="default: 100")
    parser.add_argument("--signals", default="KILL", help="KILL, TERM or KILL,TERM (default: KILL)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--short", action="store_true", help="a run with a seventh of the steps, for few kills")
    parser.add_argument("--folder", type=Path, default=None, help="working folder (default: a temporary one)")
    arguments = parser.parse_args()
    signals = [signal.Signals[f"SIG{name}"] for name in arguments.signals.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        straight, killed = (Trial(folder, name, arguments.short) for name in ("straight", "killed"))
        seconds = straight.finish()
        total = straight.steps()
        print(f"uninterrupted: {total} steps in {seconds:.0f} s", flush=True)
        began = time.monotonic()
        phases = kill_many(killed, signals, arguments.kills, total, random.Random(arguments.seed))
        killed.finish()
        print(f"{len(phases)} kills in {time.monotonic() - began:.0f} s, by phase:\n{summary(phases)}")
        found = differences(straight, killed, signals == [signal.SIGKILL])
        if len(phases) < arguments.kills:
            found.append(f"only {len(phases)} of {arguments.kills} kills")
        for line in found:
            print(f"DIFFERENT: {line}")
        names = sorted(str(path.parent.name) for path in (killed.run / "roles").rglob("*.safetensors"))
        if not found:
            print(f"bit-identical: {', '.join(names)}, {total} metrics, {len(killed.lines('samples.jsonl'))} samples")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
