"""A run that fails before its first step leaves nothing in its directory; later it leaves everything."""

import contextlib
import json
import signal

import pytest

from jaxrlhf.checkpoint.files import atomic_directory
from jaxrlhf.checkpoint.run_dir import check_run, make_folder
from jaxrlhf.cli import train
from jaxrlhf.distributed.stopping import Stopped
from jaxrlhf.errors import Fault, UserError
from jaxrlhf.stages.ppo import stage as ppo
from jaxrlhf.stages.unstarted import given_back

CONFIG = {
    "model": {"new": {"hidden_size": 8, "layers": 1, "heads": 2, "intermediate_size": 8, "max_positions": 64}},
    "stages": ["ppo"],
    "ppo": {"data": {"path": "builtin:assistant-prompts", "limit": 8}, "batch_size": 4, "iterations": 1,
            "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 4},
            "reward": {"kind": "function", "function": "reward.py:score"}},
}  # fmt: skip


def write_start(folder):
    for name in ("config.yaml", "begun.txt", "fingerprints.json", "metrics.jsonl", "lock"):
        (folder / name).write_text("" if name.endswith("jsonl") else "x")
    for name in ("checkpoints/ppo", "roles/base"):
        (folder / name).mkdir(parents=True)
    (folder / "roles" / "base" / "config.json").write_text("{}")


def fail(folder, error, then=lambda folder: None, writes=True):
    """A start that fails after it has written what every run writes, and what `then` adds; files before and after."""
    made = make_folder(folder)
    with pytest.raises(type(error)), given_back(folder, made, writes):
        write_start(folder)
        then(folder)
        before = sorted(path.name for path in folder.iterdir())
        raise error
    return before, sorted(path.name for path in folder.iterdir()) if folder.exists() else None


@pytest.mark.parametrize("error", [UserError("a"), Fault("b"), MemoryError()], ids=repr)
def test_nothing_is_left_of_a_start_without_a_step(tmp_path, error):
    assert fail(tmp_path / "runs" / "run", error)[1] is None and not (tmp_path / "runs").exists()


def test_what_somebody_else_put_there_stays(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert fail(tmp_path / "run", Fault("b"))[1] == ["notes.txt"]
    assert fail(tmp_path / "made", Fault("b"), lambda folder: (folder / "mine").write_text("x"))[1] == ["mine"]


@pytest.mark.parametrize(
    "then",
    [
        lambda folder: (folder / "metrics.jsonl").write_text("{}\n"),
        lambda folder: (folder / "checkpoints" / "ppo" / "1").mkdir(),
        lambda folder: (folder / "roles" / "sft").mkdir(),
        lambda folder: (folder / "roles" / "finished.json").write_text("{}"),
    ],
    ids=["step", "checkpoint", "role", "stage"],
)
def test_all_is_left_of_a_run_that_has_trained(tmp_path, then):
    before, after = fail(tmp_path / "run", Fault("b"), then)
    assert before == after


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stopped(signal.SIGTERM, "ppo")], ids=["SIGINT", "SIGTERM"])
def test_a_signal_removes_nothing(tmp_path, error):
    before, after = fail(tmp_path / "run", error)
    assert before == after


def test_another_process_removes_nothing(tmp_path):
    before, after = fail(tmp_path / "run", Fault("b"), writes=False)
    assert before == after


def test_corrected_settings_are_accepted_after_a_failure(tmp_path, monkeypatch, capsys):
    def train_nothing(*arguments):
        assert (tmp_path / "runs" / "x" / "config.yaml").is_file()
        raise Fault("the disk is full")

    monkeypatch.setattr(ppo, "train", train_nothing)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "reward.py").write_text("def score(prompts, completions):\n    return [1.0 for text in completions]\n")
    monkeypatch.chdir(tmp_path)
    for more in ("seed=1", "seed=2"):
        arguments = ["--config", str(tmp_path / "config.json"), f"run_dir={tmp_path / 'runs' / 'x'}", more]
        assert train.main(arguments) == 1
        assert "error: the disk is full" in capsys.readouterr().err
        assert not (tmp_path / "runs").exists()
    assert check_run(tmp_path / "runs" / "x", "seed: 3\n") == []


@pytest.mark.parametrize("written", ["file/role", "role/file"])
def test_a_disk_that_refuses_after_the_start_is_a_fault_of_the_run(written, tmp_path, monkeypatch, capsys):
    def train_nothing(*arguments):
        (tmp_path / "file").write_text("")
        with atomic_directory(tmp_path / "file" / "role") if written == "file/role" else contextlib.nullcontext():
            (tmp_path / "role" / "file").write_text("no such folder")

    monkeypatch.setattr(ppo, "train", train_nothing)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "reward.py").write_text("def score(prompts, completions):\n    return [1.0 for text in completions]\n")
    monkeypatch.chdir(tmp_path)
    assert train.main(["--config", "config.json", "run_dir=run"]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {tmp_path / written.split('/')[0]}")
    assert error.endswith("from the last checkpoint, if any")
