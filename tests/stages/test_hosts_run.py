"""Whole runs of PPO on one process, on two and on four, through the local launcher; one is killed and continued.

Runs of the same number of processes share their compiled programs on disk, as a restarted run on a cluster may.
"""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from jaxrlhf.config import RunConfig
from jaxrlhf.stages.run import run_stages
from jaxrlhf.toy.world import BUILTIN

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
BOUND = 60  # seconds in which all processes end when one is lost
CONFIG = {
    "model": {
        "new": {"hidden_size": 32, "layers": 1, "heads": 1, "kv_heads": 1, "intermediate_size": 32, "max_positions": 32}
    },
    "stages": ["ppo"],
    "ppo": {
        "data": {"path": "builtin:assistant-prompts", "limit": 20}, "iterations": 5, "batch_size": 4,
        "max_prompt_tokens": 16, "sampling": {"max_new_tokens": 4}, "evaluation": {"prompts": 4}, "save_every": 2,
        "adapter": {"rank": 2, "target_modules": ["q_proj", "down_proj"]}, "sample_every": 1,
        "update": {"epochs": 1, "minibatches": 2, "optimizer": {"learning_rate": 0.01}},
    },
}  # fmt: skip
# Differs between answers, notes who calls it, and is down or slow where a file says so.
REWARD = """
import os
import time
from pathlib import Path

here = Path(__file__).parent

def score(prompts, completions):
    (here / "calls").open("a").write(os.environ.get("JAXRLHF_PROCESS", "alone") + " ")
    if (here / "down").exists():
        raise ConnectionError("no answer")
    if (here / "slow").exists():
        time.sleep(1)
    return [len(text) / 20 + text.count("e") / 3 for text in completions]
"""


def settings(folder, name):
    reward = {"kind": "function", "function": f"{folder / 'letters.py'}:score"}
    behind = {}
    if name.startswith("behind"):
        behind = {"async": 1, "data": {"path": str(folder / "rows.jsonl"), "streaming": True, "shuffle_buffer": 7}}
    return CONFIG | {"run_dir": str(folder / name), "ppo": CONFIG["ppo"] | {"reward": reward} | behind}


class Launched:
    """A run under the local launcher."""

    def __init__(self, start, folder, name, count):
        self.run_dir, self.logs = folder / name, folder / f"logs-{name}"
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings(folder, name)))
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / f"cache-{count}")}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        command = [ROOT / "launch" / "local.py", "--processes", count, "--logs", self.logs, "--", "--config", config]
        self.process = start(*command, cwd=folder, environment=cache | {"JAX_PLATFORMS": "cpu"})

    def end(self, seconds=600):
        """(status, what was said)."""
        status = self.process.wait(seconds)
        self.process.kill()  # and with it its children
        return status, self.process.output + self.process.errors

    def log(self, number):
        return (self.logs / f"process-{number}.log").read_text()

    def pid(self, number):
        """Of the process with that number."""
        listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        for line in listed.splitlines():
            pid, parent = map(int, line.split())
            if parent == self.process.pid:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if f"JAXRLHF_PROCESS={number}".encode() in variables:
                    return pid
        raise AssertionError(f"no process {number}")

    def wait_for_step(self, step, saved):
        """Until a step is logged, and the checkpoint of another on disk."""
        while not (len(lines(self.run_dir, "metrics.jsonl")) >= step and (self.checkpoint(saved)).exists()):
            assert self.process.status is None, self.end()
            time.sleep(0.02)

    def checkpoint(self, step):
        return self.run_dir / "checkpoints" / "ppo" / str(step)


def lines(run_dir, name):
    file = run_dir / name
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def answers(run_dir):
    """Every sample, in order."""
    found = lines(run_dir, "samples.jsonl")
    return [sample for line in found for kind in ("samples", "before", "after") for sample in line.get(kind, [])]


def texts(run_dir):
    return [(sample["completion"], sample["score"]) for sample in answers(run_dir)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "letters.py").write_text(REWARD)
    rows = BUILTIN["assistant-prompts"]("train", 15)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def launched(processes):
    """Starts a run under the local launcher: see `Launched`."""
    return functools.partial(Launched, processes.start)


@pytest.fixture(scope="module")
def runs(folder, launched):
    """The same run on one process, on two and on four: what was said by each, and who was asked for scores."""
    said, calls = {}, {}
    for name, count in (("two", 2), ("four", 4)):
        (folder / "calls").write_text("")
        status, said[name] = launched(folder, name, count).end()
        assert status == 0, said[name]
        calls[name] = (folder / "calls").read_text().split()
    (folder / "calls").write_text("")
    run_stages(RunConfig.model_validate(settings(folder, "one")))
    calls["one"] = (folder / "calls").read_text().split()
    return SimpleNamespace(folder=folder, said=said, calls=calls)


@pytest.mark.parametrize("name", ["two", "four"])
def test_several_processes_learn_what_one_does(runs, name):
    one, other = runs.folder / "one", runs.folder / name
    assert texts(one) == texts(other), "the same tokens, and scores to the fourth digit"
    for role in ("policy", "value"):
        alone, together = (load_file(run / "roles" / role / "adapter.safetensors") for run in (one, other))
        for leaf, values in alone.items():
            np.testing.assert_allclose(together[leaf], values, atol=1e-5, rtol=0, err_msg=f"{role} {leaf}")
    fresh = load_file(runs.folder / "one" / "roles" / "policy" / "adapter.safetensors")
    assert max(np.abs(values).max() for leaf, values in fresh.items() if leaf.endswith("lora_b")) > 0.01, "it learnt"
    metrics = [lines(run, "metrics.jsonl") for run in (one, other)]
    assert len(metrics[0]) == len(metrics[1]) == 5
    for alone, together in zip(*metrics):
        for metric in ("kl/k1", "policy/entropy", "gap/logprob_max"):  # logprobs, in sums over an answer
            assert together[metric] == pytest.approx(alone[metric], abs=1e-5), metric
        assert {together[f"compiles/{program}"] for program in ("rollout", "annotate", "experience", "update")} == {1}


def test_two_processes_that_sample_from_a_stream_while_they_learn_do_what_one_does(folder, launched):
    status, said = launched(folder, "behind-two", 2).end()
    assert status == 0, said
    run_stages(RunConfig.model_validate(settings(folder, "behind-one")))
    one, two = folder / "behind-one", folder / "behind-two"
    assert texts(one) == texts(two)
    alone, together = (load_file(run / "roles" / "policy" / "adapter.safetensors") for run in (one, two))
    for leaf, values in alone.items():
        np.testing.assert_allclose(together[leaf], values, atol=1e-5, rtol=0, err_msg=leaf)


def test_rewards_are_asked_once_and_tables_are_printed_once(runs):
    assert {*runs.calls["one"]} == {"alone"} and {*runs.calls["two"], *runs.calls["four"]} == {"0"}
    assert len(runs.calls["one"]) == len(runs.calls["two"]) == len(runs.calls["four"])
    for name, processes in (("two", 2), ("four", 4)):
        assert len(re.findall(r"before PPO +after PPO", runs.said[name])) == 1
        for number in range(1, processes):
            text = (runs.folder / f"logs-{name}" / f"process-{number}.log").read_text()
            assert not [line for line in text.splitlines() if "[Gloo]" not in line], text


def test_a_run_of_four_that_loses_one_ends_at_once_and_goes_on_to_the_same_bits(runs, launched):
    killed = launched(runs.folder, "killed", 4)
    killed.wait_for_step(3, saved=2)
    victim = killed.pid(2)
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    status, said = killed.end(BOUND)
    took = time.monotonic() - began
    assert status == 128 + signal.SIGKILL and took < BOUND
    last = said.rstrip("\n").splitlines()[-1]
    assert re.fullmatch(rf"launch: process 2 of 4 \(pid {victim}\) was killed by signal 9 .*process-2\.log", last), said
    assert not (killed.run_dir / "roles" / "finished.json").exists()

    status, said = launched(runs.folder, "killed", 4).end()
    assert status == 0 and "resumes after step" in said, said
    for role in ("policy", "value"):
        file = Path("roles", role, "adapter.safetensors")
        assert (killed.run_dir / file).read_bytes() == (runs.folder / "four" / file).read_bytes(), role
    assert answers(killed.run_dir) == answers(runs.folder / "four")


@pytest.fixture
def slow(runs):
    """A run under way has some seconds left."""
    (runs.folder / "slow").touch()
    yield
    (runs.folder / "slow").unlink()


def test_a_frozen_process_is_noticed_and_named(runs, launched, slow):
    frozen = launched(runs.folder, "frozen", 2)
    frozen.wait_for_step(1, saved=2)
    victim = frozen.pid(1)
    began = time.monotonic()
    os.kill(victim, signal.SIGSTOP)
    status, said = frozen.end(BOUND)
    assert status == 128 + signal.SIGKILL and time.monotonic() - began < BOUND
    last = said.rstrip("\n").splitlines()[-1]
    assert re.fullmatch(rf"launch: process 1 of 2 \(pid {victim}\) was stuck: .*process-1\.log", last), said


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(runs, launched, slow, number, status):
    name = f"signal-{status}"
    stopped = launched(runs.folder, name, 2)
    stopped.wait_for_step(1, saved=2)
    os.kill(stopped.process.pid, number)
    found, said = stopped.end(120)
    assert found == status and "is saved; the same command continues" in said, said
    assert re.fullmatch(r"launch: process \d of 2 .* was stopped by a signal, .*", said.rstrip("\n").splitlines()[-1])
    done = len(lines(stopped.run_dir, "metrics.jsonl"))
    assert stopped.checkpoint(done).exists()

    found, said = launched(runs.folder, name, 2).end()
    assert found == 0 and f"resumes after step {done}" in said, said
    for role in ("policy", "value"):
        file = Path("roles", role, "adapter.safetensors")
        assert (stopped.run_dir / file).read_bytes() == (runs.folder / "two" / file).read_bytes(), role


def test_a_reward_that_fails_ends_all_and_loses_no_step(runs, launched):
    failing = launched(runs.folder, "failing", 2)
    failing.wait_for_step(1, saved=2)
    (runs.folder / "down").touch()
    try:
        status, said = failing.end(BOUND)
    finally:
        (runs.folder / "down").unlink()
    assert status == 1
    assert "Traceback" not in said and said.count("ConnectionError: no answer") == 1, "one line"
    assert re.search(r"line \d+, in score$", said, re.MULTILINE), "and the frames of the function"
    done = len(lines(failing.run_dir, "metrics.jsonl"))
    assert failing.checkpoint(done).exists(), "what was learnt until then"
    assert re.search(r"^stopped: process 0 of 2 .* failed: its output has the error$", failing.log(1), re.MULTILINE)
    assert "Traceback" not in failing.log(1)


def test_hosts_that_read_other_data_are_refused(processes, tmp_path):
    """One path, on the disks of two hosts that hold different rows."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    rows = (["red", "blue", "green"], ["red", "green", "blue"])
    config = settings(tmp_path, "unlike")
    config["ppo"] |= {"data": {"path": "/proc/self/cwd/prompts.jsonl"}}
    (tmp_path / "letters.py").write_text(REWARD)
    (tmp_path / "unlike.yaml").write_text(yaml.safe_dump(config))
    running = []
    for number, words in enumerate(rows):
        (tmp_path / str(number)).mkdir()
        lines = [json.dumps({"prompt": f"the {word} sky"}) + "\n" for word in words]
        (tmp_path / str(number) / "prompts.jsonl").write_text("".join(lines))
        command = ["-m", "jaxrlhf.train", "--config", tmp_path / "unlike.yaml"]
        command += ["--coordinator", address, "--processes", "2", "--process", number]
        environment = {"JAX_PLATFORMS": "cpu"}
        running.append(processes.start(*command, cwd=tmp_path / str(number), environment=environment))
    assert [process.wait(120) for process in running] == [2, 2], [process.errors for process in running]
    said = [process.errors for process in running]
    checksum = r"'?[0-9a-f]{16}'?"
    complaint = rf"and process 0 differ in data: ppo\.prompts is {checksum}, but {checksum} on process 0; give all"
    assert re.search(rf"error: process 1 \(host .*\) {complaint}", said[1]) and re.search(complaint, said[0]), said
    assert not (tmp_path / "unlike").exists()
