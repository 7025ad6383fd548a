"""The report that a run keeps up to date: when it is written, and what happens if it cannot be."""

import os

import pytest

from jaxrlhf.cli import report as command
from jaxrlhf.report import refresh
from jaxrlhf.report.refresh import ReportFile


@pytest.fixture
def clock(monkeypatch):
    """Seconds that `refresh` sees; a report takes `took` of them."""
    now = {"at": 0.0, "took": 0.0, "written": 0}

    def write(folders, path):
        now["at"] += now["took"]
        now["written"] += 1
        path.write_text("report")

    monkeypatch.setattr(refresh.time, "monotonic", lambda: now["at"])
    monkeypatch.setattr(refresh, "write_report", write)
    return now


def test_a_report_that_shows_everything_is_not_written_again(write_run):
    folder = write_run(ppo=[{"a": 1}])
    ReportFile(folder).write()
    written = (folder / "report.html").stat().st_mtime_ns
    ReportFile(folder).write()
    assert (folder / "report.html").stat().st_mtime_ns == written
    os.utime(folder / "samples.jsonl", ns=(written + 1, written + 1))
    ReportFile(folder).write()
    assert (folder / "report.html").stat().st_mtime_ns != written


def test_reports_are_rare_enough_for_their_cost(clock, write_run):
    report = ReportFile(write_run(ppo=[{"a": 1}]))
    report.refresh()
    assert clock["written"] == 0, "not before a minute"
    for took in (0.1, 5.0):
        clock.update(at=0.0, took=took, written=0)
        report = ReportFile(write_run(f"took {took}", ppo=[{"a": 1}]))
        for _ in range(36_000):
            clock["at"] += 1
            (report._folder / "report.html").unlink(missing_ok=True)
            report.refresh()
        assert 5 < clock["written"] <= 36_000 / 60
        assert clock["written"] * took <= 0.011 * clock["at"]


def test_a_failure_is_said_once_and_ends_nothing(write_run, monkeypatch, capsys):
    def fails(folders, path):
        raise RuntimeError("no\nspace \x1b[2J left")

    monkeypatch.setattr(refresh, "write_report", fails)
    report = ReportFile(write_run(ppo=[{"a": 1}]))
    for _ in range(3):
        report.write()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "report.html was not written: no space" in said and "\x1b" not in said


def test_a_run_without_a_step_has_no_report(write_run):
    folder = write_run()
    ReportFile(folder).write()
    ReportFile(None).write()
    assert not (folder / "report.html").exists()


def test_the_command(write_run, tmp_path, monkeypatch, capsys):
    one, two = (write_run(name, [{"kl/k1": 1.0}]) for name in ("one", "two"))
    assert command.main(["--run", str(one)]) == 0
    assert capsys.readouterr().out.strip() == str(one / "report.html") and (one / "report.html").stat().st_size > 1e6
    monkeypatch.chdir(tmp_path)
    assert command.main(["--run", str(one), str(two)]) == 0 and (tmp_path / "report.html").exists()
    assert command.main(["--run", str(one), "--to", "here.html"]) == 0 and (tmp_path / "here.html").exists()
    assert command.main(["--run", str(tmp_path / "none")]) == 2
    assert "give the directory of a run" in capsys.readouterr().err
