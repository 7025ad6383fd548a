"""The process of the trackers: what each tracker's own reader finds after kills, faults, and Prometheus."""

import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from jaxrlhf.errors import UserError
from jaxrlhf.tracking.metrics import MetricsLog
from jaxrlhf.tracking.trackers import CLIENTS
from jaxrlhf.tracking.trackers.process import FILES, TrackerProcess, check_clients, listen

ROOT = Path(__file__).parents[3]
SETTINGS = "seed: 0\nppo:\n  kl: {coef: 0.05}\nstages: [sft, ppo]\nname: null\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run directory. Clients are offline and keep their data below it."""
    offline = {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "TRACKIO_DIR": str(tmp_path / "trackio")}
    for name, value in offline.items():
        monkeypatch.setenv(name, value)
    for name in ("MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "my run"
    run.mkdir()
    (run / "config.yaml").write_text(SETTINGS)
    return run


def _write(folder, lines, stage="ppo"):
    metrics, samples = (MetricsLog(folder / f"{name}.jsonl") for name in ("metrics", "samples"))
    for step in lines:
        if step % 3 == 0:
            samples.write(stage, step, {"samples": [{"prompt": "a | <b>\n", "score": step / 3, "tokens": ["a"]}]})
        time = f"2026-01-01T00:00:{step:02}+00:00"
        metrics.write(stage, step, {"time": time, "reward/score": 1 / step, "kl/k1": None if step == 2 else step})
    metrics.close()
    samples.close()


def _wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_each_tracker_has_every_line_once_after_kills(folder, processes):
    for client in CLIENTS:
        pytest.importorskip(client)
    said = []
    _write(folder, range(1, 5))
    with pytest.raises(KeyboardInterrupt), TrackerProcess(folder, CLIENTS, None, said.append):
        raise KeyboardInterrupt  # the run stops
    assert sorted(line.split(":")[0] for line in said) == sorted(CLIENTS)
    for log in ("metrics", "samples"):
        MetricsLog(folder / f"{log}.jsonl").truncate("ppo", 2)
    _write(folder, range(3, 8))  # repeats lines 3 and 4
    with TrackerProcess(folder, CLIENTS, None, said.append) as killed:
        _wait(lambda: len(said) == 8)
        killed._process.kill()
        _wait(lambda: len(said) == 9)
    assert "the tracker process ended with status -9" in said[-1]
    _write(folder, range(8, 10))
    with TrackerProcess(folder, CLIENTS, None, said.append):
        pass
    assert len(said) == 13 and len({line for line in said if "ended" not in line}) == 4  # each names the same run
    read = processes.run(ROOT / "benchmarks" / "tracked_run.py", "--read", folder)
    assert "every line once, in order, with its values, in each tracker" in read.output
    for client in CLIENTS:
        assert f"{client}: 9 lines of 9, samples of the lines 3, 6, 9" in read.output


@pytest.mark.parametrize(("client", "other"), [("tensorboard", "mlflow"), ("mlflow", "tensorboard")])
def test_a_tracker_that_cannot_write_is_one_line_and_the_others_go_on(folder, client, other):
    for name in (client, other):
        pytest.importorskip(name)
    (folder / client).write_text("a file where the client wants a folder")
    said = []
    _write(folder, range(1, 3))
    with TrackerProcess(folder, [client, other], None, said.append):
        pass
    lines = {line.split(":")[0]: line for line in said}
    assert set(lines) == {client, other} and len(said) == 2
    assert "the run continues without it" in lines[client] and "to see it" in lines[other]


def test_a_client_that_is_not_installed_is_named_before_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    check_clients(["mlflow"])
    with pytest.raises(UserError, match=r"wandb is not installed; run pip install 'jaxrlhf\[wandb\]'"):
        check_clients(["mlflow", "wandb"])


def test_prometheus_serves_the_latest_line_of_each_stage(folder):
    listener = listen(_free_port())
    port = listener.getsockname()[1]
    with pytest.raises(UserError, match=f"prometheus_port: {port} cannot be opened: Address already in use"):
        listen(port)
    _write(folder, [1, 2], "sft")
    with TrackerProcess(folder, [], listener, print) as process:
        url = f"http://127.0.0.1:{port}/metrics"
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            before = answer.read().decode()
        _write(folder, [1])
        after = urllib.request.urlopen(url, timeout=60).read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60)
    assert process._process.returncode == 0
    parser = pytest.importorskip("prometheus_client.parser")
    found = [_samples(parser.text_string_to_metric_families(text)) for text in (before, after)]
    assert found[0] == {("reward_score", "sft"): "0.5", ("kl_k1", "sft"): "nan", ("step", "sft"): "2.0"}
    assert found[1] == {**found[0], ("reward_score", "ppo"): "1.0", ("kl_k1", "ppo"): "1.0", ("step", "ppo"): "1.0"}


def _samples(families):
    values = [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]
    return {(name.removeprefix("jaxrlhf_"), labels["stage"]): str(value) for name, labels, value in values}


def _free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def test_the_process_ends_with_a_run_that_is_killed(folder, processes):
    """Also if a process that the run has forked lives on and has the pipe open."""
    script = folder / "run.py"
    script.write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        "from jaxrlhf.tracking.trackers.process import TrackerProcess, listen\n"
        f"process = TrackerProcess(Path({str(folder)!r}), [], listen({_free_port()}), print).__enter__()\n"
        "print(process._process.pid, flush=True)\n"
        "os.fork()\ntime.sleep(60)\n"
    )
    run = processes.start(script)
    run.wait_until(lambda: "\n" in run.output)
    process = int(run.output)
    os.kill(run.pid, 9)
    _wait(lambda: _ended(process), 20)


def _ended(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[-1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_files_of_the_trackers_are_those_that_a_failed_run_removes(folder):
    pytest.importorskip("tensorboard")
    _write(folder, [1])
    with TrackerProcess(folder, ["tensorboard"], None, print):
        pass
    new = {path.name for path in folder.iterdir()} - {"config.yaml", "metrics.jsonl"}
    assert new == {*FILES, "tensorboard"}
    assert json.loads((folder / FILES[1]).read_text()) == {"tensorboard": {"ids": {}, "samples": 0}}
