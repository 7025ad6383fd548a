"""The local launcher: who it starts, how it ends, and whom it blames."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LAUNCHER = ROOT / "launch" / "local.py"


@pytest.fixture
def local(monkeypatch):
    """The launcher as a module, with little patience."""
    spec = importlib.util.spec_from_file_location("launch_local", LAUNCHER)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "launch_local", module)  # where dataclasses look
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TOGETHER", 0.5)
    monkeypatch.setattr(module, "LAST_WORD", 1.5)
    return module


@pytest.fixture
def children(local, tmp_path):
    """`children(*codes)`: a child for each piece of Python, ready when it has printed a line; killed in the end."""
    started = []

    def start(*codes):
        for number, code in enumerate(codes):
            log = tmp_path / f"process-{number}.log" if number else None
            with open(tmp_path / f"process-{number}.log", "wb") as file:
                command = [sys.executable, "-uc", f"import os, signal, time; print('ready')\n{code}"]
                process = subprocess.Popen(command, stdout=file, stderr=file)
            started.append(local.Child(number, process, log))
        for child in started:
            while child.process.poll() is None and not (tmp_path / f"process-{child.number}.log").read_bytes():
                time.sleep(0.01)
        return started

    yield start
    for child in started:
        child.process.kill()
        child.process.wait()


DEAF = "[signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; print('deaf'); time.sleep(100)"
BLAMES = "print('stopped: process {} of 3 (host here, pid 1) died: so'); os._exit(1)"


def test_all_end_well(local, children):
    ends = local._watch(children("", "time.sleep(0.3)"), [], 1.0)
    assert [(child.number, status) for child, status in ends] == [(0, 0), (1, 0)]


def test_others_are_stopped_within_a_bound_when_one_fails(local, children):
    began = time.monotonic()
    ends = local._watch(children("time.sleep(100)", "os._exit(3)", f"{DEAF}"), [], 100.0)
    assert time.monotonic() - began < 10
    assert (ends[0][0].number, ends[0][1]) == (1, 3)
    assert dict((child.number, status) for child, status in ends) == {1: 3, 0: -2, 2: -9}


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_process_that_the_others_name_is_blamed(local, children, culprit):
    codes = [BLAMES.format(culprit)] * 3
    codes[culprit] = "time.sleep(0.3); os._exit(5)"  # ends last, and is to blame all the same
    child, status = local._first_to_fail(local._watch(children(*codes), [], 100.0))
    assert (child.number, status) == (culprit, 5)


def test_a_process_that_does_not_end_is_blamed(local, children):
    """As one that is frozen: jax aborts the others, and it takes no notice."""
    ends = local._watch(children("os.abort()", DEAF), [], 100.0)
    child, status = local._first_to_fail(ends)
    assert (child.number, status) == (1, -9) and "stuck" in local._how(child, status)


ENDS = {"os.abort()": -6, "os._exit(3)": 3, "os.kill(os.getpid(), 9)": -9}


@pytest.mark.parametrize(("own", "status"), ENDS.items(), ids=["abort", "exit", "kill"])
def test_a_process_that_had_to_be_interrupted_is_not_blamed(local, children, own, status):
    ends = local._watch(children("time.sleep(100)", own), [], 100.0)
    child, found = local._first_to_fail(ends)
    assert (child.number, found) == (1, status)


def test_an_abort_beside_a_killed_process_is_an_echo(local, children):
    started = children("os.abort()", "os.kill(os.getpid(), 9)", "os._exit(1)")
    for child in started:
        child.process.wait()  # all have ended when the launcher looks
    child, status = local._first_to_fail(local._watch(started, [], 100.0))
    assert (child.number, status) == (1, -9)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_all_and_they_get_the_time_to_save(local, children, number):
    saves = f"signal.signal({int(number)}, lambda *_: (time.sleep(1.2), os._exit(7))); print('set'); time.sleep(100)"
    started = children(saves, saves)
    time.sleep(0.3)
    began = time.monotonic()
    ends = local._watch(started, [number], 30.0)
    assert [status for _, status in ends] == [7, 7] and time.monotonic() - began > 1.0


def test_a_second_signal_kills(local, children):
    started = children(DEAF, DEAF)
    time.sleep(0.3)
    began = time.monotonic()
    ends = local._watch(started, [signal.SIGINT, signal.SIGINT], 30.0)
    assert {status for _, status in ends} <= {-9, -2} and time.monotonic() - began < 5


@pytest.fixture
def launch(tmp_path):
    """`launch(*arguments)`: the launcher as a person calls it, from another directory; the finished process."""

    def run(*arguments):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, str(LAUNCHER), *arguments]
        environment |= {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return run


def test_a_bad_setting_is_said_once_and_nothing_is_written(launch, tmp_path):
    config = str(ROOT / "configs" / "quickstart.yaml")
    done = launch("--processes", "2", "--logs", "logs", "--", "--config", config, "run_dir=run", "ppo.itertions=3")
    assert done.returncode == 2
    error, last = done.stderr.splitlines()
    assert re.fullmatch(r"error: .*ppo\.itertions.*", error)
    assert re.fullmatch(r"launch: process 0 of 2 \(pid \d+\) failed with status 2; its output: above", last)
    assert "itertions" not in (tmp_path / "logs" / "process-1.log").read_text(), "one process speaks"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [(["--processes", "0", "--", "--config", "x"], "at least 1"), (["--processes", "2"], "ARGUMENT")],
)
def test_what_it_cannot_start_is_refused(launch, arguments, message):
    done = launch(*arguments)
    assert done.returncode == 2 and message in done.stderr
