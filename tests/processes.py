"""Processes that tests start: one place for the interpreter, the environment, the output and the end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Process:
    """A Python process. What it prints goes into two files, so that it never waits for a reader."""

    def __init__(self, command, environment, folder, cwd):
        self._files = [folder / "output", folder / "errors"]
        with open(self._files[0], "wb") as output, open(self._files[1], "wb") as errors:
            self._process = subprocess.Popen(
                command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
                start_new_session=True,  # so that a kill reaches its children too
            )  # fmt: skip
        self.pid = self._process.pid
        self._killed = False

    @property
    def output(self):
        """What it has written to stdout so far."""
        return self._files[0].read_text(errors="replace")

    @property
    def errors(self):
        """What it has written to stderr so far."""
        return self._files[1].read_text(errors="replace")

    @property
    def status(self):
        """The exit status, the negative number of the signal that killed it, or None while it runs."""
        return self._process.poll()

    def wait(self, seconds=600):
        """The exit status. A process that runs longer is killed and fails the test with what it wrote."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still ran after {seconds} s\n{self.output}\n{self.errors}") from None

    def wait_until(self, reached, seconds=240):
        """Returns when `reached()` is true. Fails the test when the process ends before that, or time is over."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert self.status is None or reached(), f"ended with status {self.status}\n{self.errors}"
            assert time.monotonic() < deadline, f"{seconds} s were not enough\n{self.errors}"
            time.sleep(0.01)

    def send(self, number):
        """Sends a signal to it alone."""
        os.kill(self.pid, number)

    def kill(self):
        """Kills it and its children, those too that outlive it; once, since another may get its number."""
        if not self._killed:
            self._killed = True
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()


class Processes:
    """Starts processes, each with a folder for its output, and ends those that a test leaves."""

    def __init__(self, make_folder):
        self._make_folder = make_folder
        self._left = []

    def start(self, *command, devices=None, cwd=None, environment=None):
        """Starts `python *command`, with this package on its path and, if given, `devices` virtual CPU devices.

        `environment` changes the tests' own; None removes a variable."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        variables = os.environ | {"PYTHONPATH": path}
        if devices:
            variables |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        variables = {name: text for name, text in (variables | (environment or {})).items() if text is not None}
        process = Process([sys.executable, *map(str, command)], variables, self._make_folder(), cwd)
        self._left.append(process)
        return process

    def run(self, *command, status=0, seconds=600, **more):
        """Starts a process as `start` does and waits until it ends, with `status` as it must."""
        process = self.start(*command, **more)
        found = process.wait(seconds)
        process.kill()  # what it has started may still run
        assert found == status, f"status {found}, not {status}\n{process.output}\n{process.errors}"
        return process

    def count(self):
        """How many were started and not yet ended by `end`."""
        return len(self._left)

    def end(self, beyond=0):
        """Kills all but the first `beyond`."""
        while len(self._left) > beyond:
            self._left.pop().kill()
