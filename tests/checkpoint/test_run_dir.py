"""A run's directory opens once, continues with the same settings only, and never holds half a file."""

import datetime
import os

import pytest

from jaxrlhf.checkpoint import files as module
from jaxrlhf.checkpoint.files import atomic_directory, atomic_write
from jaxrlhf.checkpoint.run_dir import open_run, record_start, started_at
from jaxrlhf.config.differences import differences
from jaxrlhf.errors import UserError

CONFIG = "seed: 1\nppo:\n  kl:\n    coef: 0.1\n    target: null\n  stages: [a, b]\n"


def _error(folder, config: str) -> str:
    with pytest.raises(UserError) as error:
        open_run(folder, config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_open_creates_and_continues(tmp_path):
    folder = open_run(tmp_path / "runs" / "a", CONFIG)
    assert (folder / "config.yaml").read_text() == CONFIG
    assert open_run(folder, "ppo: {stages: [a, b], kl: {target: null, coef: 0.1}}\nseed: 1\n") == folder
    assert (folder / "config.yaml").read_text() == CONFIG
    assert [p.name for p in folder.iterdir()] == ["config.yaml"]


def test_a_host_that_does_not_write_compares_all_the_same(tmp_path):
    open_run(tmp_path, CONFIG, writes=False)
    assert not (tmp_path / "config.yaml").exists()
    open_run(tmp_path, CONFIG)
    with pytest.raises(UserError, match="seed was 1, is now 3"):
        open_run(tmp_path, CONFIG.replace("seed: 1", "seed: 3"), writes=False)


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (CONFIG.replace("0.1", "0.2"), "ppo.kl.coef was 0.1, is now 0.2;"),
        (CONFIG.replace("null", "6.0"), "ppo.kl.target was null, is now 6.0;"),
        (CONFIG.replace("seed: 1", "seed: true"), "seed was 1, is now true;"),
        (CONFIG.replace("[a, b]", "[a]"), "ppo.stages was [a, b], is now [a];"),
        ("seed: 1\nppo: null\n", "ppo was a section, is now null;"),
        (CONFIG + "new: 3\n", "new was absent, is now 3;"),
        (CONFIG.replace("seed: 1\n", ""), "seed was 1, is now absent;"),
        (CONFIG.replace("1", "2"), "seed was 1, is now 2 (and 1 more);"),
    ],
)
def test_other_settings_name_the_first_difference(tmp_path, new, words):
    open_run(tmp_path, CONFIG)
    error = _error(tmp_path, new)
    assert words in error and str(tmp_path) in error and "give another run_dir, or give the same settings" in error
    assert (tmp_path / "config.yaml").read_text() == CONFIG


def test_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in _error(tmp_path / "file", CONFIG)
    assert "cannot be written" in _error(tmp_path / "file" / "run", CONFIG)
    (tmp_path / "config.yaml").write_text("- a list")
    assert "the file must hold the settings of a run" in _error(tmp_path, CONFIG)
    (tmp_path / "config.yaml").write_text("a: [")
    assert "the file must hold the settings of a run" in _error(tmp_path, CONFIG)


def test_differences_of_equal_trees_is_empty():
    assert differences({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}) == []
    assert differences({"a": 1}, {"a": 1.0}) == [("a", 1, 1.0)]


def test_atomic_write_replaces_or_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "file.txt"
    atomic_write(file, "old")
    (tmp_path / ".file.txt.tmp").write_text("left behind by a kill, and longer than what follows")
    atomic_write(file, "new é")
    assert file.read_text(encoding="utf-8") == "new é"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(file, "newer")
    assert file.read_text(encoding="utf-8") == "new é"


def test_atomic_directory_appears_when_complete(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic_directory(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "1"
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_atomic_directory_leaves_nothing_where_the_block_raises(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_atomic_directory_replaces_only_where_it_may(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with atomic_directory(target) as folder:  # empty: nothing is lost
        (folder / "a").write_text("1")
    with pytest.raises(UserError, match="is not empty"), atomic_directory(target):
        pass
    with pytest.raises(ZeroDivisionError), atomic_directory(target, replace=True):
        1 / 0  # noqa: B018
    assert (target / "a").read_text() == "1"
    with atomic_directory(target, replace=True) as folder:
        assert (target / "a").read_text() == "1"
        (folder / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_atomic_directory_recovers_from_a_kill(tmp_path):
    target = tmp_path / "out"
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "half").write_text("")
    (tmp_path / ".out.old").mkdir()  # killed between retiring the old folder and naming the new one
    (tmp_path / ".out.old" / "whole").write_text("")
    with pytest.raises(ZeroDivisionError), atomic_directory(target, replace=True) as folder:
        assert list(folder.iterdir()) == []
        1 / 0  # noqa: B018
    assert [p.name for p in target.iterdir()] == ["whole"] and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_atomic_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "out"):
        for replace in (False, True):
            with pytest.raises(UserError) as error, atomic_directory(target, replace=replace):
                pass
            assert "\n" not in str(error.value) and str(target) in str(error.value)
    assert (tmp_path / "file").read_text() == "x"


def test_everything_is_synced_before_it_is_named(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(module, "sync", lambda path: order.append(path.name))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert order == ["a", ".out.tmp", "rename", tmp_path.name]


def test_when_a_run_began_is_written_once(tmp_path):
    first, later = datetime.datetime(2026, 9, 1, 8, 5), datetime.datetime(2026, 9, 2)
    assert started_at(tmp_path) is None and started_at(tmp_path / "absent") is None
    record_start(tmp_path, first)
    record_start(tmp_path, later)
    assert started_at(tmp_path) == first
    (tmp_path / "begun.txt").write_text("yesterday\n")
    with pytest.raises(UserError, match=r"begun.txt: the file must hold the start time .*\(.*yesterday.*\); restore"):
        started_at(tmp_path)
