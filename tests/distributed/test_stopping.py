"""A signal is answered at once, whatever the main thread does, and ends the process within the bound."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

START = """
import sys, time, threading
import numpy as np
from jaxrlhf.distributed.stopping import Stopped, StopSignals
with StopSignals(grace={grace}) as stop:
    {work}
"""
# Steps of 0.1 s that look for the signal in between.
STEPS = """
    stop.at_work = lambda: "step 3 is lost"
    print("ready", flush=True)
    try:
        while True:
            time.sleep(0.1)
            if number := stop.due():
                raise Stopped(number, "all is saved")
    except Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(stopped.status)
"""
# One call into C that takes long, gives Python no chance to run a handler, and does not look at signals.
STUCK = """
    stop.at_work = lambda: "step 3 is lost"
    numbers = np.random.default_rng(0).standard_normal(({size}, {size}))
    print("ready", flush=True)
    np.linalg.svd(numbers)
    print("the call ended", flush=True)
    time.sleep(60)
"""
IDLE = """
    print("ready", flush=True)
    time.sleep(60)
"""


def _run(work: str, grace: float, *signals: signal.Signals, pause: float = 0.0, size: int = 0):
    """(exit status, stdout, stderr, seconds from the first signal to the end)."""
    source = START.format(grace=grace, work=work.strip().format(size=size))
    process = subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        began = time.monotonic()
        for number in signals:
            process.send_signal(number)
            time.sleep(pause)
        stdout, stderr = process.communicate(timeout=50)
        return process.returncode, stdout, stderr, time.monotonic() - began
    finally:
        process.kill()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_work_ends_in_good_order(number, status):
    returned, stdout, stderr, _ = _run(STEPS, 30, number)
    assert returned == status
    assert stdout == f"stopped by {number.name}: all is saved\n"
    assert stderr == f"{number.name}: the current step ends and is saved, within 30 s\n"


def test_several_sigterms_are_one():
    returned, stdout, stderr, _ = _run(STEPS, 30, *[signal.SIGTERM] * 5)
    assert returned == 143 and "all is saved" in stdout and stderr.count("\n") == 1


def test_where_nothing_is_to_be_saved_it_ends_at_once():
    for number, status, line in ((signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")):
        returned, _, stderr, seconds = _run(IDLE, 30, number)
        assert returned == status and seconds < 10
        assert stderr == f"{line}\n"


def test_the_bound_holds_while_python_cannot_run():
    returned, stdout, stderr, seconds = _run(STUCK, 0.5, signal.SIGTERM, size=4000)
    assert returned == 143 and stdout == "" and seconds < 15
    first, last = stderr.splitlines()
    assert first == "SIGTERM: the current step ends and is saved, within 0.5 s"
    assert last == "stopped by SIGTERM: the step did not end within 0.5 s; step 3 is lost; the same command continues"


def test_a_second_interrupt_ends_at_once():
    returned, _, stderr, seconds = _run(STUCK, 40, signal.SIGINT, signal.SIGINT, pause=0.3, size=4000)
    assert returned == 130 and seconds < 15
    assert stderr.splitlines()[-1] == "interrupted twice; step 3 is lost; the same command continues"


CHILDREN = """
    stop.at_work = lambda: "step 3 is lost"
    for start in (forked, executed):
        for number in (signal.SIGTERM, signal.SIGALRM):
            child = start()
            for ignored in (signal.SIGINT, signal.SIGHUP):
                os.kill(child, ignored)
            os.kill(child, number)
            print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
            time.sleep(0.2)
    print("stopped", stop.due())
"""


def test_children_do_not_inherit_it():
    """As the workers of a reward function: a signal to one of them ends it, and does not stop the run. What a terminal
    sends to a whole group does not reach them."""
    helpers = """
import os, signal, subprocess
def forked():
    mine, theirs = os.pipe()
    if (child := os.fork()) == 0:
        os.write(theirs, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(mine, 1)
    return child
def executed():
    code = "import time; print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
    return child.pid
"""
    source = helpers + START.format(grace=30, work=CHILDREN.strip())
    source = source.replace("import os, signal, subprocess", "import os, signal, subprocess, sys, time", 1)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", source]  # Python 3.12: fork beside threads
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["15", "14", "15", "14", "stopped 0"], done.stderr
    assert done.stderr == ""


WORKERS = """
    stop.at_work = lambda: "step 3 is lost"
    with multiprocessing.get_context("fork").Pool(2) as pool, ProcessPoolExecutor(2) as executor:
        print("ready", flush=True)
        for _ in range(3):
            grades = pool.map(grade, range(6)), list(executor.map(grade, range(6)))
            codes = [subprocess.run(["sleep", "0.2"]).returncode]
            assert grades == ([*range(6)], [*range(6)]) and codes == [0], (grades, codes)
    print("every worker ended its work", stop.due(), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_to_the_whole_group_lets_workers_end_the_step(number):
    """As one Ctrl-C at a terminal, or its end, where a reward function has workers."""
    source = START.replace("import numpy as np", "import multiprocessing, subprocess").format(grace=30, work=WORKERS)
    grade = "def grade(x):\n    time.sleep(0.1)\n    return x\n"
    source = f"from concurrent.futures import ProcessPoolExecutor\n{grade}{source}"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", source],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(0.3)
        os.killpg(process.pid, number)
        stdout, stderr = process.communicate(timeout=50)
        assert stdout == f"every worker ended its work {int(number)}\n", stderr
        assert stderr == f"{number.name}: the current step ends and is saved, within 30 s\n"
    finally:
        process.kill()


def test_an_exit_in_the_middle_of_a_step_ends_the_children():
    work = """
    stop.at_work = lambda: "step 3 is lost"
    child = os.fork()
    if child == 0:
        while True:
            time.sleep(1)
    subprocess.Popen(["sleep", "60"])
    print("ready", flush=True)
    time.sleep(60)
"""
    source = START.replace("import numpy as np", "import os, subprocess").format(grace=0.2, work=work)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", source],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)  # ends when no process has the streams any more
        assert process.returncode == 143
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_terminal_that_is_closed_stops_in_good_order(tmp_path):
    """SIGHUP comes, and what is then printed for nobody raises nothing."""
    saves = f"""print("bye", flush=True); open({str(tmp_path / "saved")!r}, "w")"""
    source = START.format(grace=30, work=STEPS.strip()).replace("print(stopped, flush=True)", saves)
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", source])
    said = b""
    while not said.endswith(b"\n"):  # the terminal passes a line on in pieces
        said += os.read(terminal, 100)
    assert said.strip() == b"ready"
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    assert (tmp_path / "saved").exists()


def test_handlers_are_put_back():
    from jaxrlhf.distributed.stopping import StopSignals

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as stop:
        assert signal.getsignal(signal.SIGTERM) not in before and not stop.due()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1
