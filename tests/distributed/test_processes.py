"""Several processes of this machine play several hosts: they find each other, share what they must, end together.

What they run here compiles next to nothing; whole runs are in tests/stages/test_hosts_run.py.
"""

import functools
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from jaxrlhf.cli import train
from jaxrlhf.distributed import processes
from jaxrlhf.distributed.processes import ProcessSpec, find_process_spec
from jaxrlhf.errors import UserError

ROOT = Path(__file__).parent.parent.parent
BOUND = 60  # seconds in which all processes end when one fails

# A process of a run as a command makes it. What the last argument says is done within the block.
PROCESS = """
import os, sys, time
from jaxrlhf.cli.exits import main_of
from jaxrlhf.distributed import processes
from jaxrlhf.distributed.stopping import Stopped
from jaxrlhf.errors import UserError

own = processes.find_process_spec(sys.argv[1] or None, *(int(n) if n else None for n in sys.argv[2:4]))
processes.HEARTBEAT = 10

def command(stop):
    global first
    globals()["stop"] = stop
    with processes.joined(own, float(sys.argv[4])):
        stop.share()
        first = processes.is_first()
        print("joined", flush=True)
        exec(sys.argv[5], globals())

status = main_of(command)
if sys.argv[3] != "0":
    time.sleep(float(os.environ.get("LATE", 0)))
sys.exit(processes.exit_status(status))
"""

MESH = """
import jax, numpy as np
from jaxrlhf.config import MeshConfig
from jaxrlhf.checkpoint.checkpoints import Checkpoints
from jaxrlhf.distributed.mesh import fetch, make_mesh, shard_batch
from jaxrlhf.models.sharding import shard

mesh = make_mesh(MeshConfig(data=-1, fsdp=2))
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 1}
up = {"kernel": np.arange(64, dtype=np.float32).reshape(8, 8), "bias": np.arange(8, dtype=np.float32)}
placed = shard(mesh, {"layers.0.mlp.up_proj": up})
rows = shard_batch(mesh, np.arange(16, dtype=np.float32).reshape(8, 2))
assert [shard.data.shape for shard in rows.addressable_shards] == [(2, 2), (2, 2)]
assert float(jax.jit(lambda x: x.sum())(rows)) == 120
np.testing.assert_array_equal(fetch(rows), np.arange(16).reshape(8, 2))
with Checkpoints(os.environ["FOLDER"]) as checkpoints:
    assert checkpoints.latest_step() is None
    for step in (1, 2):
        checkpoints.save(step, {"up": placed, "position": step})
    assert checkpoints.latest_step() == 2
    found = checkpoints.restore(2, {"up": placed, "position": 0})
    assert found["position"] == 2
    for leaf, whole in zip(jax.tree.leaves(found["up"]), (up["bias"], up["kernel"])):
        assert not leaf.is_fully_addressable
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
"""


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Hosts:
    """`count` processes of one run; those in `absent` are never started."""

    def __init__(self, start, code, count, absent=(), timeout=60.0, counts=None, tasks=None, **environment):
        """`counts` tells some of them another count; with `tasks`, variables of each, they get no flags."""
        address = f"localhost:{free_port()}"

        def flags(i):
            return ["", "", ""] if tasks else [address, (counts or {}).get(i, count), i]

        variables = {"JAX_PLATFORMS": "cpu"} | environment
        self.running = {
            i: start("-c", PROCESS, *flags(i), timeout, code, environment=variables | (tasks or {}).get(i, {}))
            for i in range(count)
            if i not in absent
        }

    def wait_until_said(self, line):
        for process in self.running.values():
            process.wait_until(lambda process=process: f"{line}\n" in process.output)

    def ends(self, seconds=BOUND):
        """(status, stdout, stderr) by process, all of them within so many seconds."""
        deadline = time.monotonic() + seconds
        ends = {i: process.wait(max(deadline - time.monotonic(), 0.1)) for i, process in self.running.items()}
        return {i: (status, self.running[i].output, self.running[i].errors) for i, status in ends.items()}


@pytest.fixture
def hosts(processes):
    """Starts the processes of one run: see `Hosts`."""
    return functools.partial(Hosts, processes.start)


def last_line(text):
    return text.rstrip("\n").rpartition("\n")[2]


def said(out):
    return [line for line in out.partition("joined\n")[2].splitlines() if "[Gloo]" not in line]


def test_two_hosts_share_a_batch_and_a_checkpoint(hosts, tmp_path):
    ends = hosts(MESH, 2, FOLDER=str(tmp_path), JAX_NUM_CPU_DEVICES="2").ends(120)
    for status, _, err in ends.values():
            assert status == 0, err


AGREE = """
made = []
def make():
    made.append(1)
    return os.urandom(100_000)
def attempt(call):
    try:
        print(call())
    except Exception as error:
        print(type(error).__name__, error, "|", getattr(error, "elsewhere", ""))
def fail(when):
    def make():
        if when:
            raise UserError(f"a.yaml:{sys.argv[3]}: no such key")
    return make
def alike(own):
    return lambda: processes.check_alike("settings", own, "start all alike")

for _ in range(3):
    print(processes.from_first(make).hex()[-40:])
processes.barrier()
attempt(lambda: processes.from_first(lambda: [][1], IndexError))
print("called", len(made), "first", processes.is_first(), "alone", processes.alone())
attempt(lambda: processes.agreed(lambda: int(sys.argv[3])))
attempt(lambda: processes.agreed(fail(True)))
attempt(lambda: processes.agreed(fail(sys.argv[3] == "2")))
attempt(alike({"seed": 0}))
print(processes.largest(7 * int(sys.argv[3])))
attempt(alike({"ppo": {"epochs": 1 if sys.argv[3] != "1" else 2}, "seed": 0}))
"""


def test_what_processes_agree_on(hosts):
    ends = hosts(AGREE, 3).ends()
    assert [status for status, _, _ in ends.values()] == [0, 0, 0], ends
    lines = [said(out) for _, out, _ in ends.values()]
    assert lines[0][:3] == lines[1][:3] == lines[2][:3] and len({*lines[0][:3]}) == 3
    error, *others = [line[3].split(" | ") for line in lines]
    assert error == ["IndexError list index out of range", ""] and {line[0] for line in others} == {error[0]}
    for line in others:
        assert re.fullmatch(r"process 0 of 3 \(host \S+, pid \d+\) failed: its output has the error", line[1])
    assert [line[4] for line in lines] == ["called 3 first True alone False", *["called 0 first False alone False"] * 2]
    assert [line[5] for line in lines] == ["0", "1", "2"]
    # What all find wrong is process 0's to say; what one finds is said by that one, and told to process 0.
    assert lines[0][6] == "UserError a.yaml:0: no such key | "
    for line in lines[1:]:
        assert re.search(r"\| process 0 of 3 \(host \S+, pid \d+\) failed: its output has the error$", line[6])
    assert lines[2][7] == "UserError a.yaml:2: no such key | "
    assert re.search(r"\| process 2 of 3 \(host \S+, pid \d+\) failed: a\.yaml:2: no such key$", lines[0][7])
    assert re.search(r"\| process 2 of 3 .* failed: its output has the error$", lines[1][7])
    assert [line[8:10] for line in lines] == [["None", "14"]] * 3
    complaint = r"process 1 \(host .*\) and process 0 differ in settings: ppo.epochs is 2, but 1 on process 0; start"
    assert re.fullmatch(rf"UserError {complaint} all alike \| ", lines[1][10]) and re.search(complaint, lines[0][10])


@pytest.mark.parametrize(("victim", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_the_others_end_by_themselves_when_one_is_gone(hosts, victim, how):
    """Where no launcher ends them: by jax's heartbeats, in its words."""
    group = hosts("time.sleep(300)", 3)
    group.wait_until_said("joined")
    group.running.pop(victim).send(how)
    ends = group.ends()
    for status, _, err in ends.values():
        assert status == -signal.SIGABRT, err
        assert victim == 0 or f"stopped sending heartbeats):\n{victim}\n" in err


def test_a_process_that_fails_says_why_once_and_ends_the_others(hosts):
    ends = hosts("if not first: raise OSError('the disk is full')\nprocesses.barrier()", 2).ends()
    assert ends[1][0] == 1 and ends[1][2].count("Traceback") == 1
    assert last_line(ends[1][2]) == "error: OSError: the disk is full"
    assert ends[0][0] in (1, -signal.SIGABRT) and "disk" not in ends[0][2]


STEPS = """
stop.at_work = lambda: "step 3 is lost"
processes.barrier()
print("ready", flush=True)
for step in range(1000):
    if number := stop.due():
        raise Stopped(number, f"step {step} is saved")
    time.sleep(0.05 if first else 0.02)
    processes.barrier()
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=lambda x: str(int(x))
)
def test_a_signal_to_one_process_stops_all_before_the_same_step(hosts, number, status):
    group = hosts(STEPS, 2)
    group.wait_until_said("ready")
    group.running[1].send(number)
    ends = group.ends()
    assert [ends[0][0], ends[1][0]] == [143, status], ends
    assert f"{number.name}: the current step ends and is saved, within 60 s" in ends[1][2]
    steps = [re.search(r"^stopped by SIG\w+: step (\d+) is saved; the same", ends[i][2], re.MULTILINE) for i in (0, 1)]
    assert steps[0][1] == steps[1][1]


def test_processes_that_were_started_unalike_are_refused(hosts):
    """As one of two and one of three. Process 0 does not end before the others have said what they have to."""
    ends = hosts("pass", 2, counts={1: 3}, LATE="0.5").ends()
    assert [status for status, _, _ in ends.values()] == [2, 2], ends
    assert "differ in start: number of processes is 3, but 2 on process 0; start all processes" in ends[1][2]


def test_processes_that_do_not_come_are_not_waited_for_forever(hosts):
    ends = hosts("pass", 3, absent=(1,), timeout=5.0).ends()
    for i, (status, out, err) in ends.items():
        assert status == 2 and not out
        # Process 0 may be the last to listen.
        came = rf"error: process {i} of 3: not all processes connected at localhost:\d+ within 5 s( \(.*\))?; start"
        assert re.match(came, err) and err.count("\n") == 1, err


def test_a_coordinator_that_does_not_answer_is_told(hosts):
    ((status, _, err),) = hosts("pass", 2, absent=(0,), timeout=2.0).ends().values()
    assert status == 2 and "within 2 s (no connection: Connection refused; process 0 has not started, or" in err


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"coordinator localhost:{port}: .*(use|permitted)"):
            processes._check_free("localhost", port)


SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1",
}  # fmt: skip


def test_jax_finds_the_places_of_a_cluster(hosts):
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    tasks = {i: SLURM | port | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in (0, 1)}
    ends = hosts("import jax; print(jax.process_index(), jax.process_count())", 2, tasks=tasks).ends()
    assert [(status, said(out)) for status, out, _ in ends.values()] == [(0, ["0 2"]), (0, ["1 2"])], ends


TASK = SLURM | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
CLUSTERS = {
    "SLURM": (TASK, True),
    "a batch script of SLURM": ({"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, False),
    "a single task of SLURM": (TASK | {"SLURM_NTASKS": "1"}, False),
    "Open MPI": ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, True),
    "a Kubernetes pod that is no indexed job": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    "TPU hosts": ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    "one TPU host": ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    "nothing": ({}, False),
}


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_jax_is_asked_where_a_cluster_started_several(cluster):
    environment, asked = CLUSTERS[cluster]
    assert find_process_spec(None, None, None, environment) == (ProcessSpec(None, None, None) if asked else None)
    assert find_process_spec(None, 1, None, environment) is None, "a flag that says so goes before the cluster"
    if asked:
        assert find_process_spec("here:1", None, None, environment) == ProcessSpec("here:1", None, None)


def test_flags_go_before_the_environment(monkeypatch):
    def shard(*flags):
        given = train.parse(["--config", "FILE", *flags])
        return find_process_spec(given.coordinator, given.processes, given.process, {})

    for name, value in (("COORDINATOR", "node:1234"), ("PROCESSES", "4"), ("PROCESS", "3")):
        monkeypatch.setenv(f"JAXRLHF_{name}", value)
    assert shard() == ProcessSpec("node:1234", 4, 3)
    assert shard("--coordinator", "[::1]:99", "--processes", "5", "--process", "0") == ProcessSpec("[::1]:99", 5, 0)
    assert shard("--processes", "1", "--process", "0") is None
    for name in ("COORDINATOR", "PROCESSES", "PROCESS"):
        monkeypatch.setenv(f"JAXRLHF_{name}", "")
    assert shard() is None


UNUSABLE = {
    "part of it": (("node:1", None, None), "--coordinator: --processes .* and --process .* must be given too"),
    "no port": (("node", 2, 0), "--coordinator: must be HOST:PORT"),
    "no such process": (("node:1", 2, 2), "--process: must be between 0 and 1, not 2; processes"),
    "a negative process": (("node:1", 2, -1), "--process: must be between 0 and 1, not -1; processes"),
    "no process": (("node:1", 0, 0), "--processes: must be at least 1, not 0"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_makes_no_whole_is_refused(case):
    given, message = UNUSABLE[case]
    with pytest.raises(UserError, match=message):
        find_process_spec(*given, {})


def test_a_process_alone_does_everything_itself():
    with processes.joined(None):
        assert processes.from_first(lambda: b"word") == b"word"
        processes.barrier()
        processes.check_alike("settings", {"a": 1}, "")
        assert processes.alone() and processes.is_first()
        assert processes.agreed(lambda: 3) == 3
    assert processes.exit_status(1) == 1
    with pytest.raises(IndexError):
        processes.from_first(lambda: [][1], IndexError)


CACHE = """
from jaxrlhf.checkpoint.compilation_cache import cached_programs
import jax, numpy as np
from jaxrlhf.config import MeshConfig
from jaxrlhf.distributed.mesh import make_mesh, shard_batch
rows = shard_batch(make_mesh(MeshConfig()), np.arange(4, dtype=np.float32))
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
setting = os.environ["FOLDERS"].split(":")[0 if first else -1]
with cached_programs(setting, lambda text: print("said", text)) as folder:
    print("folder", folder)
    del found[:]
    jax.jit(lambda x: (x * 11.5).sum())(rows)
print("hits", "/jax/compilation_cache/cache_hits" in found)
"""


@pytest.mark.parametrize("shared", [True, False], ids=["one", "two"])
def test_programs_are_kept_in_a_folder_of_all_hosts_or_nowhere(hosts, tmp_path, shared):
    folders = [str(tmp_path / "a")] if shared else [str(tmp_path / "a"), str(tmp_path / "b")]
    for start in ("cold", "warm"):
        ends = hosts(CACHE, 2, FOLDERS=":".join(folders)).ends()
        assert [status for status, _, _ in ends.values()] == [0, 0], ends
        said = [out.partition("joined\n")[2].splitlines() for _, out, _ in ends.values()]
        assert f"folder {folders[0] if shared else 'None'}" in said[0][-2]
        assert said[0][-2] == said[1][-2], "one folder, or none"
        complaints = [line for lines in said for line in lines if line.startswith("said")]
        assert len(complaints) == (0 if shared else 2) and all("not all processes see" in line for line in complaints)
        if start == "warm":
            # On CPUs jax has other keys on each process, and only the first one writes: only that one is warm.
            assert said[0][-1] == f"hits {shared}" and (shared or said[1][-1] == "hits False")
    assert not list(tmp_path.rglob(".seen-*"))


NO_STEP = """
from pathlib import Path
from jaxrlhf.config.reading import load_config
from jaxrlhf.errors import Fault
from jaxrlhf.stages import sft
from jaxrlhf.stages.run import run_stages

def train_nothing(run, *_):
    assert (run.folder / "config.yaml").is_file()
    processes.barrier()
    raise Fault("no memory")

sft.train = train_nothing
run_stages(load_config(os.environ["CONFIG"], ["run_dir=" + os.environ["RUN"]]), stop)
"""


def test_a_run_of_two_hosts_that_fails_before_its_first_step_gives_its_directory_back(hosts, tmp_path):
    (tmp_path / "config.yaml").write_text(
        "run_dir: x\nstages: [sft]\nmodel: {new: {hidden_size: 8, layers: 1, heads: 2, intermediate_size: 8}}\n"
        "sft: {data: {path: 'builtin:assistant-demonstrations', limit: 16}, batch_size: 4, evaluation: {heldout: 0}}\n"
    )
    run = tmp_path / "runs" / "run"
    ends = hosts(NO_STEP, 2, CONFIG=str(tmp_path / "config.yaml"), RUN=str(run)).ends(120)
    for status, _, errors in ends.values():
        assert status == 1 and "error: no memory" in errors, errors
    assert not run.parent.exists()
