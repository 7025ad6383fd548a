"""A tracker that fails or hangs says so once and is dropped; the others and the run go on."""

import threading
import time

import pytest

from jaxrlhf.tracking.metrics import MetricsLog
from jaxrlhf.tracking.trackers.__main__ import Follower, State
from jaxrlhf.tracking.trackers.protocol import RunInfo


class Fake:
    """Remembers the numbers of lines, and calls `trouble` in the method `where_`."""

    ids, where = {"id": "x"}, "here"

    def __init__(self, method="", trouble=None):
        self.method, self.trouble, self.numbers, self.closed = method, trouble, [], None

    def _do(self, method):
        if method == self.method:
            self.trouble()

    def open(self, run, ids):
        self._do("open")
        self.ids_given = ids
        return 0

    def log(self, line):
        self._do("log")
        self.numbers.append(line.number)

    def close(self, finished):
        self._do("close")
        self.closed = finished


@pytest.fixture
def run(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(3):
        log.write("sft", step + 1, {"loss": step})
    log.close()
    return RunInfo(tmp_path, {}, "", 1)


def _follow(run, tracker, said, name="name", state=None):
    return Follower(name, tracker, run, state or State(run.folder / "trackers.json"), said.append)


@pytest.mark.parametrize("finished", [True, False])
def test_a_tracker_gets_all_lines_and_is_closed(run, finished):
    tracker, said = Fake(), []
    follower = _follow(run, tracker, said)
    follower.close(finished)
    follower.thread.join(10)
    assert tracker.numbers == [1, 2, 3] and tracker.closed is finished and said == ["name: here"]
    again = Fake()
    follower = _follow(run, again, said)
    follower.close(finished)
    follower.thread.join(10)
    assert again.ids_given == {"id": "x"}


@pytest.mark.parametrize("method", ["open", "log", "close"])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (FileExistsError(17, "File exists", "/run/tensorboard"), "/run/tensorboard: File exists"),
        (SystemExit(3), "SystemExit: 3"),
        (ValueError("a\nb"), "ValueError: a b"),
    ],
    ids=["disk", "file", "exit", "value"],
)
def test_an_exception_is_one_line(run, method, error, words):
    def trouble():
        raise error

    tracker, said = Fake(method, trouble), []
    follower = _follow(run, tracker, said)
    follower.close(True)
    follower.thread.join(10)
    (line,) = [line for line in said if line != "name: here"]
    assert line.startswith(f"name: {words}; the run") and "\n" not in line
    assert "the run continues without it" in line
    follower.drop("again")
    assert len(said) <= 2


@pytest.mark.parametrize("method", ["open", "log"])
def test_a_tracker_that_hangs_is_dropped_once(run, method):
    hangs, said = threading.Event(), []
    tracker = Fake(method, hangs.wait)
    state = State(run.folder / "trackers.json")
    follower = _follow(run, tracker, said, "name", state)
    other = _follow(run, fine := Fake(), others := [], "other", state)
    while follower._called is None:
        time.sleep(0.001)
    while method == "log" and not said:
        time.sleep(0.001)
    follower.drop_if_hanging(60)
    assert said == ["name: here"] * (method == "log")
    time.sleep(0.05)
    for _ in range(2):
        follower.drop_if_hanging(0.01)
    assert [line for line in said if line != "name: here"] == [said[-1]] and "has not answered for 0.01 s" in said[-1]
    other.close(True)
    other.thread.join(10)
    assert fine.numbers == [1, 2, 3] and fine.closed and others == ["other: here"]
    hangs.set()  # answers after all: nothing more is sent
    follower.thread.join(10)
    assert not follower.thread.is_alive() and tracker.closed is None and len(tracker.numbers) <= 1
