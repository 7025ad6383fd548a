"""python launch/local.py --processes N -- --config FILE [key.path=value ...]: one run as N processes of this machine.

Each process is `python -m jaxrlhf.train` with the arguments after `--`. Process 0 writes to the terminal, the others to
log files. When one fails, the launcher stops the others within seconds, names the failed one in its last line, and
exits with its status. SIGTERM, SIGHUP and Ctrl-C are passed on to all processes; a second signal kills them.

Uses Python's standard library only.
"""

import argparse
import collections
import ctypes
import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICK = 0.05  # seconds between polls of the processes
TOGETHER = 5.0  # seconds for the others to end by themselves after a failure
LAST_WORD = 5.0  # seconds between the first SIGINT and SIGKILL
BLAMES = re.compile(r"^stopped: process (\d+) of \d+ ", re.MULTILINE)


@dataclasses.dataclass
class Child:
    """One of the processes; `log` is None for process 0, which has the terminal."""

    number: int
    process: subprocess.Popen
    log: Path | None
    hurried: bool = False  # it got SIGINT because others had failed
    stuck: bool = False  # it got SIGKILL because SIGINT did not end it


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python launch/local.py", description="One run as several processes of this machine."
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="number of processes")
    parser.add_argument(
        "--devices-per-process",
        type=int,
        metavar="K",
        help="accelerators per process: process I gets numbers I x K to I x K + K - 1 (default: all; right on CPUs)",
    )
    parser.add_argument(
        "--logs", metavar="DIR", help="folder for the output of processes 1 and up (default: a temporary folder)"
    )
    parser.add_argument(
        "--patience", type=float, default=120.0, metavar="SECONDS", help="time to save after a signal (default: 120)"
    )
    parser.add_argument("train", nargs="+", metavar="ARGUMENT", help="after --: arguments of jaxrlhf.train")
    parsed = parser.parse_args(arguments)
    if parsed.processes < 1:
        parser.error(f"--processes: must be at least 1, given {parsed.processes}")
    if not 0 <= parsed.patience < float("inf"):
        parser.error(f"--patience: must be a number of seconds, given {parsed.patience}")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logs = Path(options.logs) if options.logs else Path(tempfile.mkdtemp(prefix="jaxrlhf-launch-"))
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _say(f"--logs {logs}: cannot be written: {error.strerror}; give another folder")
        return 2
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: received.append(number))
    address = f"localhost:{_free_port()}"
    children = [_start(options, number, address, logs) for number in range(options.processes)]
    ends = _watch(children, received, options.patience)
    failed = [(child, status) for child, status in ends if status != 0]
    if not failed:
        if not options.logs:
            shutil.rmtree(logs, ignore_errors=True)
        return 0
    child, status = _first_to_fail(failed)
    where = "above" if child.log is None else child.log
    who = f"process {child.number} of {options.processes} (pid {child.process.pid})"
    _say(f"{who} {_how(child, status)}; its output: {where}")
    return 128 - status if status < 0 else status


def _start(options: argparse.Namespace, number: int, address: str, logs: Path) -> Child:
    environment = os.environ | {
        "JAXRLHF_COORDINATOR": address,
        "JAXRLHF_PROCESSES": str(options.processes),
        "JAXRLHF_PROCESS": str(number),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    }
    if options.devices_per_process:
        first = number * options.devices_per_process
        environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(first, first + options.devices_per_process)))
    log = logs / f"process-{number}.log" if number else None
    with open(log, "ab") if log else open(os.devnull) as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxrlhf.train", *options.train],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file if log else None,
            stderr=subprocess.STDOUT if log else None,
            start_new_session=True,  # so that Ctrl-C reaches the launcher alone, which passes it on
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    return Child(number, process, log)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphans when the launcher is killed


def _watch(children: list[Child], received: list[int], patience: float) -> list[tuple[Child, int]]:
    """Waits for all children; returns each with its status (negative: the signal that killed it), in order of ending.

    After a failure the others have `TOGETHER` seconds to end, after a signal `patience`. Then they get SIGINT
    repeatedly for `LAST_WORD` seconds, then SIGKILL.
    """
    ends: list[tuple[Child, int]] = []
    running, passed_on, deadline, hurried = list(children), 0, float("inf"), False
    while running:
        ended = [child for child in running if child.process.poll() is not None]
        # Among children that end together, a killed one is the cause; one that aborts only reacts.
        ended.sort(key=lambda child: _cause(child.process.returncode))
        ends += [(child, child.process.returncode) for child in ended]
        running = [child for child in running if child not in ended]
        if any(child.process.returncode for child in ended):
            deadline = min(deadline, time.monotonic() + TOGETHER)
        for number in received[passed_on:]:
            _say(f"passing on {signal.Signals(number).name}" if not passed_on else "killing all processes")
            _signal(running, number if not passed_on else signal.SIGKILL)
            passed_on += 1
            deadline = min(deadline, time.monotonic() + patience)
        if time.monotonic() > deadline:
            for child in running:
                child.stuck |= hurried and not passed_on
                child.hurried = True
            if hurried:
                _signal(running, signal.SIGKILL)
            hurried, deadline = True, time.monotonic() + LAST_WORD
        if hurried:
            _signal(running, signal.SIGINT)
        time.sleep(4 * TICK if hurried else TICK)
    return ends


def _signal(children: list[Child], number: int) -> None:
    for child in children:
        child.process.send_signal(number)  # no effect on a child that has ended


def _cause(status: int) -> int:
    """Rank of a status as the cause of the failure: 0 killed by a signal, 1 failed, 2 aborted by jax or gloo."""
    return 2 if status == -signal.SIGABRT else 0 if status < 0 else 1


def _first_to_fail(failed: list[tuple[Child, int]]) -> tuple[Child, int]:
    """The child that caused the failure: one that others name, else a stuck one if all others aborted, or the first."""
    named = collections.Counter(number for child, _ in failed for number in _named_by(child))
    for number, _ in named.most_common():
        for child, status in failed:
            if child.number == number:
                return child, status
    own = [(child, status) for child, status in failed if not child.hurried] or failed
    if all(_cause(status) == 2 for _, status in own):
        own = [(child, status) for child, status in failed if child.stuck] or own
    return next(((child, status) for child, status in own if _cause(status) < 2), own[0])


def _named_by(child: Child) -> list[int]:
    if child.log is None:
        return []
    with open(child.log, "rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
        return [int(number) for number in BLAMES.findall(file.read().decode(errors="replace"))][-1:]


def _how(child: Child, status: int) -> str:
    if child.stuck:
        return "was stuck: it had to be killed after the others had ended"
    if status in (129, 130, 143):
        return f"was stopped by a signal, saved its state and ended with status {status}"
    if status < 0:
        return f"was killed by signal {-status} ({signal.Signals(-status).name})"
    return f"failed with status {status}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
