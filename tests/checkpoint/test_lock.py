"""Two runs never share a directory; a killed one leaves no lock behind, not even with a child that lives on."""

import errno
import fcntl
import os
import signal

import pytest

from jaxrlhf.checkpoint.lock import RunLock
from jaxrlhf.errors import UserError

HOLDER = """
import os, sys, time
from jaxrlhf.checkpoint.lock import RunLock
lock = RunLock(sys.argv[1])
lock.take()
if sys.argv[2:] == ["fork"] and os.fork() == 0:
    os.write(1, f"{os.getpid()}\\n".encode())  # at once, where print would write the line and its end
    time.sleep(600)
else:
    os.write(1, b"held\\n")
    time.sleep(600)
"""


def test_another_process_is_refused_by_name_and_let_in_after_a_kill(processes, tmp_path):
    holder = processes.start("-c", HOLDER, tmp_path)
    holder.wait_until(lambda: holder.output == "held\n")
    with pytest.raises(UserError, match=rf"process {holder.pid} on \S+, since .* is running there") as error:
        RunLock(tmp_path).take()
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    holder.kill()
    with RunLock(tmp_path) as lock:
        lock.take()
        assert lock.held


def test_a_child_that_outlives_the_run_holds_nothing(processes, tmp_path):
    holder = processes.start("-c", HOLDER, tmp_path, "fork")
    holder.wait_until(lambda: holder.output.count("\n") == 2)
    child = int(next(line for line in holder.output.splitlines() if line != "held"))
    with pytest.raises(UserError, match="is running there"):
        RunLock(tmp_path).take()
    holder.send(signal.SIGKILL)
    holder.wait()
    os.kill(child, 0)  # still there
    with RunLock(tmp_path) as lock:
        lock.take()
        assert lock.held


def test_one_process_holds_it_once(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with RunLock(tmp_path) as lock:
        lock.take()
        lock.take()  # its own
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* is running there"):
            RunLock(tmp_path / "link").take()
    with RunLock(tmp_path) as lock:
        lock.take()
    assert (tmp_path / "lock").read_text() == "", "nobody holds it now"


def test_a_process_that_does_not_take_it_writes_nothing(tmp_path):
    with RunLock(tmp_path, takes=False) as lock:
        lock.take()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    said = []
    with RunLock(tmp_path, say=said.append) as lock:
        lock.take()
        assert lock.held
    assert len(said) == 1 and "this file system has no locks" in said[0] and str(tmp_path) in said[0]


def test_a_lock_that_cannot_be_written(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match="lock: the lock file cannot be written: Is a directory"):
        RunLock(tmp_path).take()
