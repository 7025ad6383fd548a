"""What stands in launch/: the SLURM script under bash with stand-ins for SLURM, the JobSet, and the page."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jaxrlhf.cli import train
from jaxrlhf.distributed.processes import find_process_spec

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"

# Stands in for srun: passes SIGTERM on, as srun does, and ends with the status in `ends`.
SRUN = """#!/bin/bash
echo "$@" > "$HERE/srun"
trap 'echo TERM >> "$HERE/signals"; [ -f "$HERE/saves" ] && { sleep 0.3; exit 143; }' TERM
while [ ! -f "$HERE/ends" ]; do sleep 0.05; done
exit "$(cat "$HERE/ends")"
"""


@pytest.fixture
def job(tmp_path):
    """The batch script of a job, under way: its process; files in `tmp_path` say what it did."""
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/bash\necho "$@" >> "$HERE/scontrol"\n')):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "HERE": str(tmp_path), "SLURM_JOB_ID": "4711"}
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "--config", "a b.yaml", "seed=1"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    _wait_for(tmp_path / "srun")
    time.sleep(0.3)  # until both have set their traps
    yield process
    (tmp_path / "ends").write_text("9")
    process.wait(20)
    process.stdout.close()


def _wait_for(path):
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)


def test_the_job_runs_the_command_once_per_task(job, tmp_path):
    (tmp_path / "ends").write_text("0")
    assert job.wait(20) == 0
    given = (tmp_path / "srun").read_text().split("-m jaxrlhf.train ")[1]
    assert train.parse(given.replace("a b.yaml", "a.yaml").split()).overrides == ["seed=1"]
    assert not (tmp_path / "scontrol").exists()


def test_near_the_time_limit_the_run_saves_and_the_job_is_requeued(job, tmp_path):
    (tmp_path / "saves").touch()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 143
    assert (tmp_path / "signals").read_text() == "TERM\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"


def test_a_run_that_ends_well_in_its_last_minutes_is_not_requeued(job, tmp_path):
    job.send_signal(signal.SIGUSR1)
    _wait_for(tmp_path / "signals")
    time.sleep(0.2)
    (tmp_path / "ends").write_text("0")
    assert job.wait(20) == 0 and not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize("cause", ["scancel", "a fault of its own"])
def test_a_job_that_is_cancelled_or_fails_is_not_requeued(job, tmp_path, cause):
    if cause == "scancel":
        (tmp_path / "saves").touch()
        job.send_signal(signal.SIGTERM)
    else:
        (tmp_path / "ends").write_text("1")
    assert job.wait(20) == (143 if cause == "scancel" else 1)
    assert (tmp_path / "signals").exists() == (cause == "scancel")
    assert not (tmp_path / "scontrol").exists()


def test_the_job_asks_for_what_jax_detects():
    """A task for each GPU, all GPUs of a node seen by each of its tasks, and a warning before the limit."""
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"] and "gpus-per-task" not in options
    assert re.fullmatch(r"B:USR1@\d+", options["signal"]) and "requeue" in options
    assert subprocess.run(["bash", "-n", LAUNCH / "slurm.sbatch"]).returncode == 0


def test_the_jobset_agrees_with_itself():
    document = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    name, (workers,) = document["metadata"]["name"], document["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    index = next(entry["valueFrom"]["fieldRef"]["fieldPath"] for entry in container["env"] if "valueFrom" in entry)
    assert "job-completion-index" in index and job["completionMode"] == "Indexed"
    for process in range(job["completions"]):
        place = find_process_spec(variables["JAXRLHF_COORDINATOR"], int(variables["JAXRLHF_PROCESSES"]), process, {})
        assert (place.processes, place.process) == (job["parallelism"], process)
        # JobSet's names: <jobset>-<replicated job>-<job>-<pod>.<jobset>
        assert place.coordinator.partition(":")[0] == f"{name}-{workers['name']}-0-0.{name}"
    assert container["command"][-2:] == ["-m", "jaxrlhf.train"]
    assert train.parse(container["args"]).overrides[0].startswith("run_dir=")
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert train.parse(container["args"]).overrides[0].startswith(f"run_dir={mounts['runs']}/")
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")


def test_the_page_names_what_is_there():
    page = (LAUNCH / "README.md").read_text()
    for name in re.findall(r"`((?:launch|tests|configs)/[\w./-]+)`", page):
        assert (ROOT / name).exists(), name
    commands = [[sys.executable, *command, "--help"] for command in (["-m", "jaxrlhf.train"], ["launch/local.py"])]
    shown = [subprocess.run(c, capture_output=True, text=True, check=True, cwd=ROOT).stdout for c in commands]
    own = {*re.findall(r"(?<![\w-])--(?:coordinator|process\w*|start-[\w-]+|logs|patience|devices[\w-]+)", page)}
    assert "--coordinator" in own and not [flag for flag in own if flag not in "".join(shown)]
