"""The progress of a stage: what it says, what it leaves out, and where it is shown."""

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxrlhf.tracking import progress as module
from jaxrlhf.tracking.display import sparkline
from jaxrlhf.tracking.progress import MOST_KEPT, Progress, duration

ROOT = Path(__file__).parent.parent.parent


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_compiling_counts_neither_for_the_time_left_nor_for_speed(clock, capsys):
    progress = Progress("ppo", total=10)
    progress.open()
    for step in range(4):
        if step == 0:
            progress.compiling("update")
            clock.now += 60
            progress.compiling(None)
        clock.now += 2
        progress.update({"reward": 1.0}, tokens=100)
    assert progress.speed() == (6 * 2.0, 50.0)
    progress.leave_out(100.0)  # a pause
    clock.now += 102
    progress.update({"reward": 1.0}, tokens=100)
    assert progress.speed() == (5 * 2.0, 50.0)
    assert "ppo: compiled update in 1:00\n" in capsys.readouterr().err


def test_where_there_is_no_terminal_a_line_comes_at_the_first_step_every_so_often_and_at_the_end(clock, capsys):
    progress = Progress("ppo", total=100, done=10)
    progress.open()
    for _ in range(90):
        clock.now += 1
        progress.update({"reward": 1.23456, "KL": 0.5}, tokens=1000)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [int(re.search(r"step (\d+) of 100", line)[1]) for line in lines] == [11, 41, 71, 100]
    assert lines[0] == "ppo: step 11 of 100; reward 1.23, KL 0.5; 1,000 tokens/s; 1:29 left"
    assert lines[-1] == "ppo: step 100 of 100; reward 1.23, KL 0.5; 1,000 tokens/s; took 1:30"


def test_other_processes_and_no_stderr_show_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr(module.processes, "is_first", lambda: False)
    progress = Progress("sft", total=2)
    progress.open()
    progress.update({"loss": 1.0}, 5)
    progress.close()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module.processes, "is_first", lambda: True)
    monkeypatch.setattr(sys, "stderr", None)
    progress.open()
    progress.update({"loss": 1.0}, 5)
    progress.close()


def drawn(progress, width, unicode=True):
    return [line.plain for line in progress._drawn(width, unicode)]


@pytest.mark.parametrize("width", [24, 40, 80, 120])
@pytest.mark.parametrize("unicode", [True, False])
def test_the_display_fits_and_says_everything_that_has_room(clock, width, unicode):
    progress = Progress("reward_model", total=70_000, done=60_000)
    for i in range(40):
        clock.now += 1
        progress.update({"reward": float(i), "KL": -1e-5 * i, "length": 1e6}, tokens=123_456, alarms=("kl_runs_away",))
    lines = drawn(progress, width, unicode)
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert unicode or text.isascii()
    for part in ("reward_model", "60,040/70,000", "2:46:00 left", "123,456 tokens/s", "39", "alarm: kl_runs"):
        assert part in text
    assert ("━" in text or "#" in text.replace("\n", "")) == (width >= 80) or not unicode
    progress.compiling("update")
    clock.now += 5
    assert "compiling update 0:05" in "\n".join(drawn(progress, width, unicode))
    assert " left" not in "\n".join(drawn(progress, width, unicode))


def test_a_sparkline_is_the_history_in_few_characters():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8, True) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2, False) == "_#"
    assert sparkline([1.0, 1.0], 5, True) == "▁▁"
    assert sparkline([1.0], 5, True) == sparkline([], 5, True) == sparkline([float("nan"), 1.0], 5, True) == ""


def test_a_long_history_stays_small_and_keeps_its_shape(clock):
    progress = Progress("sft", total=100_000)
    for i in range(20_000):
        clock.now += 0.01
        progress.update({"loss": float(i)}, 1)
    history = progress._history["loss"]
    assert len(history) <= MOST_KEPT and history == sorted(history)
    assert history[0] < 200 and history[-1] > 19_500


def test_durations():
    assert [duration(s) for s in (0.4, 59.6, 61, 3723, 172_799, 183_600)] == [
        "0:00", "1:00", "1:01", "1:02:03", "47:59:59", "2 d 3 h",
    ]  # fmt: skip


def test_a_step_costs_microseconds(capsys):
    progress = Progress("sft", total=10**9)
    progress.open()
    began = time.perf_counter()
    for _ in range(5000):
        progress.update({"loss": 1.0, "KL": 2.0}, 10)
    assert (time.perf_counter() - began) / 5000 < 2e-4, "steps of 1 ms may take at most a few percent more"


# A stage on a terminal, with lines printed meanwhile, and one by another thread that must not wait.
STAGE = """
import sys, time
from jaxrlhf.cli.streams import open_streams
from jaxrlhf.tracking.progress import Progress
open_streams()
progress = Progress("ppo", total=5)
progress.open()
progress.compiling("update")
time.sleep(0.4)
progress.compiling(None)
for i in range(5):
    print("note:", "long " * 40, i, file=sys.stderr, flush=True)
    time.sleep(0.1)
    progress.update({"reward": i / 2}, tokens=10)
progress.say("SIGTERM: the current step ends")
progress.close()
print("table")
"""


def on_terminal(code, **environment):
    """What a process writes to a terminal of 60 columns."""
    master, slave = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "60", "TERM": "xterm-256color"} | environment
    process = subprocess.Popen([sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    data = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux: all writers have ended
            break
        if not chunk:
            break
        data += chunk
    os.close(master)
    assert process.wait(30) == 0, data.decode()
    return data.decode()


def test_on_a_terminal_printed_lines_stay_whole_above_the_display():
    text = on_terminal(STAGE)
    assert "compiling update" in text and "5/5" in text and text.rstrip().endswith("table")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    for i in range(5):
        assert plain.count("long " * 40 + f" {i}") == 1
    assert plain.count("SIGTERM: the current step ends") == 1
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l") if "\x1b[?25l" in text else True
    assert "\x1b[32m" in text and "\x1b[32m" not in on_terminal(STAGE, NO_COLOR="1")


def test_a_dumb_terminal_gets_plain_lines():
    text = on_terminal(STAGE, TERM="dumb")
    assert "\x1b" not in text and "ppo: step 1 of 5; reward 0; " in text and "ppo: step 5 of 5; reward 2; " in text
