"""A run that was interrupted goes on to the same weights, or says in one line why it does not."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from processes import Process
from safetensors.numpy import load_file

from jaxrlhf.cli import train
from jaxrlhf.tracking.metrics import MetricsLog

pytestmark = pytest.mark.slow

FEW = {"rank": 2, "target_modules": ["q_proj", "down_proj"]}
MODEL = {
    "new": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32, "max_positions": 64}
}
CONFIG = {
    "model": MODEL, "stages": ["sft"], "adapter": FEW,
    "sft": {
        "data": {"path": "builtin:assistant-demonstrations", "limit": 250}, "batch_size": 8, "max_length": 64,
        "evaluation": {"heldout": 4}, "epochs": 1, "save_every": 2, "optimizer": {"learning_rate": 0.01},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with a run that nothing interrupted, and one that ended after step 7, checkpoints 4 and 6 on disk."""
    folder = tmp_path_factory.mktemp("continuing")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert command(folder, "straight") == 0
    write = MetricsLog.write

    def interrupt(self, stage, step, values):
        write(self, stage, step, values)
        if step == 7:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", interrupt)
        assert command(folder, "interrupted") == 130
    assert steps(folder / "interrupted") == list(range(1, 8))
    assert saved(folder / "interrupted") == [4, 6]
    return folder


@pytest.fixture
def run(workshop, tmp_path):
    """A copy of the interrupted run, as if it had always been there."""
    folder = tmp_path / "run"
    shutil.copytree(workshop / "interrupted", folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace(str(workshop / "interrupted"), str(folder)))
    return folder


def arguments(folder: Path, run_dir: str | Path, *overrides: str) -> list[str]:
    return ["--config", str(folder / "config.json"), f"run_dir={folder / run_dir}", *overrides]


def command(folder: Path, run_dir: str | Path, *overrides: str) -> int:
    """The command in this process; its exit status."""
    return train.main(arguments(folder, run_dir, *overrides))


@pytest.fixture
def process(processes):
    """`process(folder, run_dir, *overrides, devices=None)`: the command in a process of its own, under way."""

    def start(folder: Path, run_dir: str | Path, *overrides: str, devices: int | None = None) -> Process:
        return processes.start("-m", "jaxrlhf.train", *arguments(folder, run_dir, *overrides), devices=devices)

    return start


def lines(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []
    passing = ("seconds", "time", "memory/", "compiles/")
    return [{name: x for name, x in record.items() if not name.startswith(passing)} for record in records]


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder)]


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints" / "sft").iterdir() if path.name.isdecimal())


def role(folder: Path, name: str = "sft") -> bytes:
    return (folder / "roles" / name / "adapter.safetensors").read_bytes()


def same(workshop: Path, folder: Path) -> bool:
    """Whether a run became what the uninterrupted one is."""
    return role(folder) == role(workshop / "straight") and lines(folder) == lines(workshop / "straight")


def after(started: Process, folder: Path, count: int) -> None:
    """Returns when the run has logged `count` steps."""
    started.wait_until(lambda: len(lines(folder)) >= count)


def pages(folder: Path) -> int:
    """What the files of a folder take of a disk in memory, in pages of 4 KiB."""
    return sum(-(-path.stat().st_size // 4096) for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------- damage


def test_a_damaged_checkpoint_falls_back_to_the_same_weights(workshop, run, capfd):
    data = max((run / "checkpoints/sft/6").rglob("d/*"), key=lambda path: path.stat().st_size)
    flipped = bytearray(data.read_bytes())
    flipped[len(flipped) // 2] ^= 4
    data.write_bytes(flipped)
    assert command(workshop, run) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if " is damaged: " in line]
    assert len(said) == 1 and data.name in said[0] and "the run resumes from step 4" in said[0]
    assert same(workshop, run)


def test_where_all_checkpoints_are_damaged_nothing_is_trained(workshop, run, capfd):
    for record in run.glob("checkpoints/sft/*/record.json"):
        record.unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert command(workshop, run) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "every checkpoint is damaged" in errors[0] and "from a backup" in errors[0]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_checkpoints_that_somebody_removed_are_missed(workshop, run, capfd):
    for step in saved(run):
        shutil.rmtree(run / "checkpoints/sft" / str(step))
    assert command(workshop, run) == 2
    assert "a checkpoint of step 6 was saved here, but no checkpoint is left" in capfd.readouterr().err
    shutil.rmtree(run / "checkpoints/sft")
    assert command(workshop, run) == 2
    assert "is missing, but metrics.jsonl has steps of the stage sft" in capfd.readouterr().err


# ---------------------------------------------------------------- settings


def test_settings_that_change_no_step_may_change(workshop, run, capfd):
    changes = ["sft.save_every=3", "checkpoints.keep=1", "checkpoints.best=sft/loss", "checkpoints.grace=5.0"]
    assert command(workshop, run, *changes) == 0
    said = capfd.readouterr().err
    assert "sft.save_every was 2, is now 3" in said and "checkpoints.keep was 2, is now 1" in said
    assert same(workshop, run)
    assert "save_every: 3" in (run / "config.yaml").read_text()
    assert command(workshop, run, *changes) == 0, "the same command goes on without another word"
    assert "is now" not in capfd.readouterr().err
    run.rename(run.with_name("moved"))
    assert command(workshop, run.with_name("moved"), *changes) == 0
    assert f"run_dir was {run}, is now" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["seed=1"], "seed was 0, is now 1"),
        (["sft.optimizer.learning_rate=0.02", "checkpoints.keep=3"], "sft.optimizer.learning_rate was 0.01"),
        (["sft.epochs=2"], "sft.epochs was 1, is now 2"),
        (["checkpoints.best=sft/loss", "checkpoints.result=best"], "checkpoints.best was null"),
    ],
)
def test_other_settings_are_refused_by_name(workshop, run, capfd, changes, named):
    before = (run / "config.yaml").read_text()
    assert command(workshop, run, *changes) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and named in error and error.count("\n") == 1
    assert (run / "config.yaml").read_text() == before and steps(run) == list(range(1, 8))


def test_the_best_checkpoint_is_handed_on(workshop, tmp_path, capfd):
    # The highest loss, which is that of the first checkpoint: here it matters only that the best is not the last.
    settings = ["checkpoints.best=sft/loss", "checkpoints.result=best", "checkpoints.keep=1"]
    assert command(workshop, tmp_path / "run", *settings) == 0
    records = lines(tmp_path / "run")
    due = [record for record in records if record["step"] % 2 == 0 or record is records[-1]]
    best = max(due, key=lambda record: record["sft/loss"])
    assert best is not records[-1], "the test wants a best one before the end"
    assert saved(tmp_path / "run") == [best["step"], records[-1]["step"]]
    assert f"sft: the result is the checkpoint of step {best['step']}, with the best sft/loss" in capfd.readouterr().err
    assert role(tmp_path / "run") != role(workshop / "straight")
    shutil.rmtree(tmp_path / "run/roles/sft")
    (tmp_path / "run/roles/finished.json").write_text("{}")
    (tmp_path / "run/checkpoints/sft" / str(best["step"]) / "record.json").unlink()
    assert command(workshop, tmp_path / "run", *settings) == 2
    assert f"{best['step']}: this checkpoint is damaged: record.json is missing; restore the" in capfd.readouterr().err
    assert not (tmp_path / "run/roles/sft").exists()


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_the_step_and_the_same_command_continues(workshop, process, tmp_path, number):
    started = process(workshop, tmp_path / "run", "sft.save_every=100")
    after(started, tmp_path / "run", 2)
    started.send(number)
    assert started.wait(120) == {signal.SIGTERM: 143, signal.SIGINT: 130}[number], started.errors
    done = steps(tmp_path / "run")
    assert saved(tmp_path / "run") == [done[-1]], "the last step, which was not due"
    last = started.errors.splitlines()[-1]
    assert last.startswith(f"stopped by {number.name}: sft: step {done[-1]} of ") and last.endswith("command continues")
    assert "Traceback" not in started.errors
    assert command(workshop, tmp_path / "run", "sft.save_every=100") == 0
    assert same(workshop, tmp_path / "run")


SLOW = """
import time
def score(completions):
    time.sleep({seconds} * (len(completions) > 2))  # the trial before training has two rows
    return [float(len(text)) for text in completions]
"""
PPO = {
    "model": MODEL, "adapter": FEW, "stages": ["ppo"],
    "ppo": {
        "data": {"path": "builtin:assistant-prompts", "limit": 20}, "iterations": 2, "batch_size": 4,
        "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 6}, "evaluation": {"prompts": 4}, "save_every": 1,
        "advantage": {"estimator": "reinforce"},
        "update": {"epochs": 1, "minibatches": 1}, "reward": {"kind": "function"},
    },
}  # fmt: skip


def test_a_step_that_takes_too_long_is_given_up(process, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW.format(seconds=600))
    (tmp_path / "config.json").write_text(json.dumps(PPO))
    reward = f"ppo.reward.function={tmp_path / 'slow.py'}:score"
    started = process(tmp_path, "run", reward, "checkpoints.grace=1.0")
    started.wait_until((tmp_path / "run/checkpoints/ppo").exists)
    time.sleep(1)  # it compiles, or waits for the reward
    began = time.monotonic()
    started.send(signal.SIGTERM)
    assert started.wait(60) == 143 and time.monotonic() - began < 30
    last = started.errors.splitlines()[-1]
    assert "the step did not end within 1 s; ppo: step 0 is saved; later steps are lost" in last, started.errors


def test_more_iterations_are_those_of_a_longer_run(tmp_path, capfd):
    (tmp_path / "quick.py").write_text(SLOW.format(seconds=0))
    (tmp_path / "config.json").write_text(json.dumps(PPO))
    reward = f"ppo.reward.function={tmp_path / 'quick.py'}:score"
    assert command(tmp_path, "run", reward) == 0
    assert command(tmp_path, "run", reward, "ppo.iterations=1") == 2
    assert "ppo.iterations was 2, is now 1" in capfd.readouterr().err
    assert command(tmp_path, "run", reward, "ppo.iterations=4") == 0
    assert "ppo: resumes after step 2 of 4" in capfd.readouterr().err
    assert command(tmp_path, "long", reward, "ppo.iterations=4") == 0
    assert role(tmp_path / "run", "policy") == role(tmp_path / "long", "policy")
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]
    finished = [(tmp_path / name / "roles/finished.json").read_text() for name in ("run", "long")]
    assert finished[0] == finished[1]


# ---------------------------------------------------------------- devices, disks, other runs


def test_a_run_goes_on_with_other_devices(workshop, process, tmp_path, capfd):
    started = process(workshop, tmp_path / "run", "mesh.data=2", "mesh.fsdp=2", devices=4)
    after(started, tmp_path / "run", 3)
    started.send(signal.SIGTERM)
    assert started.wait(120) == 143, started.errors
    done = len(steps(tmp_path / "run"))
    assert command(workshop, tmp_path / "run") == 0
    said = capfd.readouterr().err
    assert "mesh.data was 2, is now -1" in said and f"sft: resumes after step {done}" in said
    before, now = (f"data={n} x fsdp={n} x context=1 x tensor=1" for n in (2, 1))
    assert f"was made on the mesh {before}, but the mesh is now {now}" in said
    assert steps(tmp_path / "run") == steps(workshop / "straight")
    found, wanted = (load_file(f / "roles/sft/adapter.safetensors") for f in (tmp_path / "run", workshop / "straight"))
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, atol=2e-4, err_msg=name)


def test_two_runs_do_not_share_a_directory(workshop, process, tmp_path, capfd):
    started = process(workshop, tmp_path / "run")
    after(started, tmp_path / "run", 1)
    started.send(signal.SIGSTOP)
    assert command(workshop, tmp_path / "run") == 2
    assert f"process {started.pid} on " in capfd.readouterr().err
    started.kill()
    assert command(workshop, tmp_path / "run") == 0, "a killed one holds nothing"
    assert same(workshop, tmp_path / "run")


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(workshop, process, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room for base, logs and two checkpoints, and not for three.
    base, one = (pages(workshop / "straight" / part) for part in ("roles/base", "checkpoints/sft/10"))
    room = f"size={4 * (base + 2 * one + one // 2 + 4)}k"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", room, "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        started = process(workshop, disk / "run", "checkpoints.keep=9")
        assert started.wait(300) == 1, started.errors
        last = started.errors.splitlines()[-1]
        assert last.startswith("error: ") and "No space left on device" in last and str(disk / "run") in last
        assert "the same command continues" in last and "Traceback" not in started.errors
        assert steps(disk / "run") == list(range(1, len(steps(disk / "run")) + 1))
        assert saved(disk / "run") == [2, 4] and len(steps(disk / "run")) < 10
        subprocess.run(["mount", "-o", "remount,size=60m", str(disk)], check=True)
        assert command(workshop, disk / "run", "checkpoints.keep=9") == 0
        assert same(workshop, disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_goes_on_with_other_compiler_options_and_says_so(workshop, run, tmp_path, capsys):
    dump = tmp_path / "dump"
    options = [f"compiler_options.sft_update.xla_dump_to={dump}", "compilation_cache=null"]
    assert command(workshop, run, *options) == 0
    assert "compiler_options.sft_update was absent, is now a section: sums may round" in capsys.readouterr().err
    assert {file.name.split(".")[1] for file in dump.glob("*jit_*")} == {"jit_neg", "jit_sft_update"}
