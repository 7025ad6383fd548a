"""A disk that is full, read-only or over quota: one line, what was whole stays whole, and the next try goes on."""

import errno
import json
import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.checkpoint import checkpoints as module
from jaxrlhf.checkpoint import checksums, files
from jaxrlhf.checkpoint.checkpoints import Checkpoints
from jaxrlhf.checkpoint.files import atomic_directory, atomic_write, reason
from jaxrlhf.errors import Fault
from jaxrlhf.tracking.metrics import MetricsLog

REFUSALS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO]


def _raise(number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse


def _names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
@pytest.mark.parametrize("where", ["sync", "fsync", "replace", "atomic_write", "save_async"])
def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch, number, where):
    tree = {"x": jnp.arange(4.0)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree)
    checkpoints.wait()
    with monkeypatch.context() as refused:
        holder = {"sync": checksums, "fsync": os, "replace": os, "atomic_write": module, "save_async": module.ocp}
        refused.setattr(holder[where], where, _raise(number))
        checkpoints.save(2, tree)  # does not raise: it is under way
        with pytest.raises(Fault, match=f"step 2 cannot .*: {os.strerror(number)}; the .* of step 1 is complete$"):
            checkpoints.save(3, tree)
        with pytest.raises(Fault, match=str(tmp_path)):
            checkpoints.save(3, tree)
            checkpoints.close()
    assert not set(_names(tmp_path)) - {"1", "2", "3", "latest.json"}, "what was half-written takes no room"
    with Checkpoints(tmp_path) as again:
        found = again.restore_latest(tree, print)
        # Where only the note of the latest cannot be written, the checkpoint is complete by then.
        assert found.step == (3 if where == "atomic_write" else 1)
        np.testing.assert_array_equal(found.tree["x"], tree["x"])
        again.save(5, tree)
        assert again.latest_step() == 5


def test_the_only_checkpoint_stays_where_the_next_cannot_be_written(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"x": jnp.ones(2)})
    checkpoints.wait()
    with monkeypatch.context() as refused:
        refused.setattr(checksums, "sync", _raise(errno.ENOSPC))
        checkpoints.save(2, {"x": jnp.zeros(2)})
        with pytest.raises(Fault, match="the checkpoint of step 1 is complete"):
            checkpoints.wait()
    with Checkpoints(tmp_path, keep=1) as again:
        assert again.restore_latest({"x": jnp.zeros(2)}, print).step == 1
        again.save(2, {"x": jnp.zeros(2)})
    assert _names(tmp_path) == ["2", "latest.json"]


def test_a_failed_save_is_seen_without_waiting(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.zeros(2)})
    assert checkpoints.latest_step() == 1 and not checkpoints.failed and checkpoints.on_disk == 1
    monkeypatch.setattr(checksums, "sync", _raise(errno.ENOSPC))
    checkpoints.save(2, {"x": jnp.zeros(2)})
    checkpoints._saving.written.exception()
    assert checkpoints.failed and checkpoints.on_disk == 1


LIMITED = """
import resource, sys, pathlib, jax.numpy as jnp
from jaxrlhf.errors import Fault
from jaxrlhf.checkpoint.checkpoints import Checkpoints
from jaxrlhf.tracking.metrics import MetricsLog
folder, limit = pathlib.Path(sys.argv[1]), int(sys.argv[2])
with Checkpoints(folder / "c") as checkpoints:
    checkpoints.save(1, {"x": jnp.zeros(10)})
log = MetricsLog(folder / "metrics.jsonl")
log.write("sft", 1, {"loss": 1.0})
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with Checkpoints(folder / "c") as checkpoints:
        checkpoints.restore_latest({"x": jnp.zeros(10)}, print)
        checkpoints.save(2, {"x": jnp.arange(1e6), "y": jnp.arange(1e6) ** 0.5})
except Fault as fault:
    print(fault)
try:
    for step in range(2, 9999):
        log.write("sft", step, {"loss": 1.0, "text": "x" * 1000})
except Fault as fault:
    print(fault)
try:
    log.write("sft", 9999, {"text": "x" * 5000})
except Fault as fault:
    print(fault)
log.close()
"""


@pytest.fixture
def limited(processes):
    """`limited(folder, limit)`: what a process says whose checkpoints and logs meet a real limit."""

    def run(folder: Path, limit: int) -> list[str]:
        done = processes.run("-c", LIMITED, folder, limit)
        assert done.errors == "", done.errors  # no traceback of orbax's either
        return done.output.splitlines()

    return run


def _is_whole(folder: Path) -> None:
    """The first checkpoint can be read, and the log holds whole lines without a gap."""
    with Checkpoints(folder / "c") as checkpoints:
        assert checkpoints.restore_latest({"x": jnp.ones(10)}, print).step == 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert (folder / "metrics.jsonl").read_bytes().endswith(b"\n")


def test_files_that_may_not_grow_any_more(limited, tmp_path):
    said = limited(tmp_path, 100_000)
    assert len(said) == 3, said
    assert said[0].endswith("step 2 cannot be written: File too large; the checkpoint of step 1 is complete")
    assert "metrics.jsonl: cannot be written: File too large" in said[1] and said[1] == said[2]
    _is_whole(tmp_path)


def test_a_disk_that_is_full(limited, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        said = limited(disk, 0)
        assert len(said) == 3, said
        assert said[0].endswith(" cannot be written: No space left on device; the checkpoint of step 1 is complete")
        assert "metrics.jsonl: cannot be written: No space left on device" in said[1]
        _is_whole(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
def test_a_log_that_cannot_be_written_keeps_whole_lines(tmp_path, monkeypatch, number):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("sft", 1, {"loss": 1.0})
    with monkeypatch.context() as refused:
        refused.setattr(os, "fsync", _raise(number))
        with pytest.raises(Fault, match=rf"metrics\.jsonl: cannot be written: {os.strerror(number)}"):
            log.sync()
        with pytest.raises(Fault, match=os.strerror(number)):
            log.truncate("sft", 0)
    assert _names(tmp_path) == ["metrics.jsonl"]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]


def test_a_file_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    atomic_write(tmp_path / "a", "old")
    monkeypatch.setattr(files.os, "fsync", _raise(errno.ENOSPC))
    with pytest.raises(OSError):
        atomic_write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and _names(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_written_stays(tmp_path):
    (tmp_path / "role").mkdir()
    (tmp_path / "role" / "a").write_text("old")
    rust = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    for error in (rust, OSError(errno.EDQUOT, "Disk quota exceeded")):
        with (
            pytest.raises(Fault, match=r"role: the folder cannot be written: (No space|Disk quota).*unchanged"),
            atomic_directory(tmp_path / "role", replace=True) as folder,
        ):
            (folder / "a").write_text("new")
            raise error
        assert (tmp_path / "role" / "a").read_text() == "old" and _names(tmp_path) == ["role"]
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "role", replace=True):
        Path(tmp_path / "source").read_text()  # no fault of the disk's


def test_reasons_are_short():
    tensorstore = 'RESOURCE_EXHAUSTED: Failed writing: "/a/b": Failed to write 9 bytes [os_error_code=\'28\']'
    outer = RuntimeError("outer")
    outer.__cause__ = ValueError(tensorstore)
    assert reason(outer) == reason(OSError(errno.ENOSPC, "x")) == os.strerror(errno.ENOSPC)
    assert reason(ValueError("one\ntwo")) == "one two" and len(reason(ValueError("x" * 999))) == 200


def test_a_device_or_pipe_is_written_into_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    atomic_write(pipe, "text")
    assert os.read(reading, 10) == b"text" and pipe.is_fifo()
    os.close(reading)
    with pytest.raises(OSError, match="No space left"):
        atomic_write("/dev/full", "text")
    assert Path("/dev/full").is_char_device()
