"""Several processes of this machine play several hosts: they find each other, share what they must, end together.

What they run here compiles next to nothing; whole runs are in tests/stages/test_hosts_run.py.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxrlhf.distributed import processes, roll_call
from jaxrlhf.distributed.processes import Place, find_place
from jaxrlhf.errors import UserError

ROOT = Path(__file__).parent.parent.parent
BOUND = 60  # seconds in which all processes end when one fails

# A process of a run as a command makes it. What the last argument says is done within the block.
PROCESS = """
import os, sys, time
from jaxrlhf.command import main_of
from jaxrlhf.errors import UserError
from jaxrlhf.distributed import processes, roll_call

place = processes.find_place(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
first = sys.argv[3] == "0"

def command():
    with processes.joined(place, float(sys.argv[4])):
        print("joined", flush=True)
        exec(sys.argv[5], globals())

sys.exit(processes.ended(main_of(command)))
"""

MESH = """
import jax, numpy as np
from jaxrlhf.config import MeshConfig
from jaxrlhf.checkpoint.checkpoints import Checkpoints
from jaxrlhf.distributed.mesh import fetch, make_mesh, place, place_batch

mesh = make_mesh(MeshConfig(data=-1, fsdp=2))
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}
up = {"kernel": np.arange(64, dtype=np.float32).reshape(8, 8), "bias": np.arange(8, dtype=np.float32)}
placed = place(mesh, {"layers.0.mlp.up_proj": up})
rows = place_batch(mesh, np.arange(16, dtype=np.float32).reshape(8, 2))
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


class Processes:
    """`count` processes of one run; those in `absent` are never started."""

    def __init__(self, code, count, absent=(), timeout=30.0, **environment):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        own = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self.running = {
            i: subprocess.Popen(
                [sys.executable, "-c", PROCESS, address, str(count), str(i), str(timeout), code],
                env=os.environ | own | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for i in range(count)
            if i not in absent
        }  # fmt: skip

    def wait_until_joined(self):
        for process in self.running.values():
            assert process.stdout.readline() == "joined\n"

    def ends(self, seconds=BOUND):
        """(status, stdout, stderr) by process, all of them within so many seconds."""
        deadline, found = time.monotonic() + seconds, {}
        for i, process in self.running.items():
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
            found[i] = (process.returncode, out, err)
        return found

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.running.values():
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()


def last_line(text):
    return text.rstrip("\n").rpartition("\n")[2]


def test_two_hosts_share_a_batch_and_a_checkpoint(tmp_path):
    with Processes(MESH, 2, FOLDER=str(tmp_path), JAX_NUM_CPU_DEVICES="2") as processes:
        for status, _, err in processes.ends(120).values():
            assert status == 0, err


def test_what_process_0_makes_is_given_to_all():
    code = """
made = []
def make():
    made.append(1)
    return os.urandom(100_000)
for _ in range(3):
    print(processes.from_first(make).hex()[-40:])
processes.barrier()
try:
    processes.from_first(lambda: [][1], (KeyError, IndexError))
except IndexError as error:
    print("all see", error)
print("called", len(made), "first", processes.is_first(), "alone", processes.alone())
"""
    with Processes(code, 3) as processes:
        ends = processes.ends()
    assert [status for status, _, _ in ends.values()] == [0, 0, 0], ends
    said = [out.partition("joined\n")[2].splitlines() for _, out, _ in ends.values()]
    assert said[0][:3] == said[1][:3] == said[2][:3] and len({*said[0][:3]}) == 3
    assert [lines[3] for lines in said] == ["all see list index out of range"] * 3
    others = ["called 0 first False alone False"] * 2
    assert [lines[4] for lines in said] == ["called 3 first True alone False", *others]


WAITS = {
    "on the host": "processes.barrier()",
    "in its own work": "time.sleep(100)",
    "on the devices": "from jax.experimental import multihost_utils as m; m.sync_global_devices('never')",
}


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("wait", WAITS)
def test_a_killed_process_ends_the_others_who_name_it(wait, victim):
    code = f"if {victim} == int(sys.argv[3]): time.sleep(100)\n{WAITS[wait]}\ntime.sleep(100)"
    with Processes(code, 3) as processes:
        processes.wait_until_joined()
        time.sleep(0.5)
        processes.running[victim].send_signal(signal.SIGKILL)
        ends = processes.ends()
    pid = processes.running[victim].pid
    for i, (status, _, err) in ends.items():
        if i != victim:
            assert status == 1, err
            named = rf"stopped: process {victim} of 3 \(host \S+, pid {pid}\) died: .*killed.*"
            assert re.search(f"^{named}$", err, re.MULTILINE), err  # jax may have its say in the same moment


BREAKS_OFF = {
    "an exception": "raise RuntimeError('Gloo: connection closed by peer')",
    "an abort of native code": "threading.Thread(target=ctypes.CDLL(None).abort).start()\ntime.sleep(100)",
}


@pytest.mark.parametrize("how", BREAKS_OFF)
def test_who_was_killed_is_said_where_the_work_breaks_off_in_the_same_moment(how):
    """The thread that was told of the death is slow to say so; the process must not end before it has."""
    code = f"""
from jaxrlhf.distributed import lifeline
import ctypes, threading
flush = lifeline.flush
def slow():
    if threading.current_thread() is not threading.main_thread():
        time.sleep(1)
    flush()
lifeline.flush = slow
while processes._lifeline.verdict is None:
    time.sleep(0.01)
time.sleep(0.3)
{BREAKS_OFF[how]}
"""
    with Processes(code, 3) as processes:
        processes.wait_until_joined()
        time.sleep(0.5)
        processes.running[2].send_signal(signal.SIGKILL)
        ends = processes.ends()
    for i in (0, 1):
        status, _, err = ends[i]
        assert status == 1 and re.fullmatch(r"stopped: process 2 of 3 \(.*\) died: .*\n", err), err


def test_nobody_who_reads_does_not_keep_a_process_that_ends():
    """As a stopped terminal, or a pipe to a program that hangs."""
    with Processes("os.write(2, b'x' * 65536)\ntime.sleep(100)", 3) as processes:
        processes.wait_until_joined()
        time.sleep(0.5)
        processes.running[2].send_signal(signal.SIGKILL)
        assert [processes.running[i].wait(BOUND) for i in (0, 1)] == [1, 1]


def test_an_abort_ends_its_process_and_the_others_name_it():
    code = "import ctypes\nif not first: ctypes.CDLL(None).abort()\ntime.sleep(100)"
    with Processes(code, 2) as processes:
        ends = processes.ends(30)
    assert ends[1][0] == -signal.SIGABRT
    assert ends[0][0] == 1 and last_line(ends[0][2]).startswith("stopped: process 1 of 2 "), ends[0][2]


def test_an_end_without_a_word_is_noticed():
    with Processes("if not first: os._exit(0)\nprocesses.barrier()\ntime.sleep(100)", 2) as processes:
        status, _, err = processes.ends()[0]
    assert status == 1 and last_line(err).startswith("stopped: process 1 of 2 ")


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_process_that_fails_says_why_once_and_the_others_name_it(culprit):
    code = f"if {culprit} == int(sys.argv[3]): raise OSError('the disk is full')\ntime.sleep(100)"
    with Processes(code, 3) as processes:
        ends = processes.ends()
    for i, (status, _, err) in ends.items():
        assert status == 1
        assert err.count("Traceback") == (1 if i == culprit else 0)
        if i == culprit:
            assert last_line(err) == "error: OSError: the disk is full"
        elif i == 0:
            assert re.fullmatch(rf"stopped: process {culprit} of 3 .*: OSError: the disk is full", last_line(err))
        else:
            assert re.fullmatch(rf"stopped: process {culprit} of 3 .*: its own output says why", last_line(err))


def test_what_all_find_wrong_is_said_by_process_0_alone():
    code = "time.sleep(0.3 * first)\nraise UserError('config.yaml:3: no such key')"
    with Processes(code, 3) as processes:
        ends = processes.ends()
    assert (ends[0][0], ends[0][2]) == (2, "error: config.yaml:3: no such key\n")
    for i in (1, 2):
        status, _, err = ends[i]
        assert status == 2 and re.fullmatch(r"stopped: process 0 of 3 .* failed: its own output says why\n", err)


def test_other_settings_are_refused():
    code = "processes.check_alike('settings', {'ppo': {'epochs': 1 if first else 2}, 'seed': 0}, 'start all alike')"
    with Processes(code, 2) as processes:
        ends = processes.ends()
    assert [status for status, _, _ in ends.values()] == [2, 2]
    assert re.search(r"process 1 \(host .*\) has other settings .*: ppo.epochs is 2, there 1; start all", ends[1][2])
    assert "ppo.epochs is 2, there 1" in last_line(ends[0][2])


def test_processes_that_do_not_come_are_named():
    began = time.monotonic()
    with Processes("pass", 5, absent=(1, 3, 4), timeout=3.0) as processes:
        ends = processes.ends()
    assert time.monotonic() - began < 30
    for status, out, err in ends.values():
        assert status == 2 and not out
        assert re.search(r"error: processes 1, 3-4 of 5 did not come within 3 s; here: 0 \(\S+\), 2 \(\S+\);", err), err


def test_a_coordinator_that_does_not_come_is_named():
    with Processes("pass", 2, absent=(0,), timeout=2.0) as processes:
        status, _, err = processes.ends()[1]
    assert status == 2
    assert re.fullmatch(r"error: process 1 of 2: process 0 did not answer at localhost:\d+ within 2 s .*\n", err), err


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"coordinator localhost:{port}: .*(use|permitted)"):
            roll_call.open_hub("localhost", port, 2, {})


def test_processes_that_were_started_unalike_do_not_wait_for_each_other():
    """As one of four and one of three; a stranger on the port does no harm."""
    hub = roll_call.open_hub("localhost", 0, 3, {"jax": "1"})
    port = hub._listener.getsockname()[1]
    with socket.create_connection(("localhost", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100)
        for number, processes, software, message in (
            (1, 4, {"jax": "1"}, "process 1 .* as one of 4, process 0 as one of 3"),
            (2, 3, {"jax": "2"}, "process 2 .* runs jax 2, process 0 runs jax 1"),
            (3, 3, {"jax": "1"}, "process 3 .* 1 to 2"),
            (0, 3, {"jax": "1"}, "process 0 .*"),
        ):
            with pytest.raises(UserError, match=message):
                roll_call.join_hub("localhost", port, number, processes, software, 5.0)
    with pytest.raises(UserError, match="start all processes alike"):
        hub.gather(30.0, dict)


CLUSTERS = {
    "SLURM": (
        {
            "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "node[003-004]", "SLURM_NTASKS": "16", "SLURM_PROCID": "9",
            "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2",
        },
        ("node003", 16, 9, (1,)),
    ),
    "a single task of SLURM": (
        {
            "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "node003", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
        },
        None,
    ),
    "Open MPI 4": (
        {
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_VERSION": "4.1.6",
        },
        ("10.96.0.1", 2, 1, (0,)),
    ),
    "a Kubernetes pod that is no indexed job": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    "nothing": ({}, None),
}  # fmt: skip


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_clusters_tell_the_processes_apart(cluster, monkeypatch):
    variables, wanted = CLUSTERS[cluster]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = find_place(environment={})
    assert (found and (found.coordinator[0], found.processes, found.process, found.local_devices)) == wanted
    if wanted:
        assert 1024 < found.coordinator[1] < 65536
        assert find_place(environment={}, processes=1) is None, "a flag that says so goes before the cluster"
        assert find_place("here:1", environment={}).coordinator == ("here", 1)


def test_flags_go_before_the_environment():
    environment = {"JAXRLHF_COORDINATOR": "node:1234", "JAXRLHF_PROCESSES": "4", "JAXRLHF_PROCESS": "3"}
    assert find_place(environment=environment) == Place(("node", 1234), 4, 3)
    assert find_place("[::1]:99", 5, 0, environment) == Place(("::1", 99), 5, 0)
    assert find_place(processes=1, process=0, environment=environment) is None


UNUSABLE = {
    "part of it": (("node:1", None, None), "--coordinator: given without --processes .* and --process"),
    "no port": (("node", 2, 0), "--coordinator: must be HOST:PORT"),
    "no such process": (("node:1", 2, 2), "--process: 2, but 2 processes are numbered 0 to 1"),
    "a negative process": (("node:1", 2, -1), "--process: must be a whole number of at least 0"),
    "no process": (("node:1", 0, 0), "--processes: must be .* at least 1"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_makes_no_whole_is_refused(case):
    given, message = UNUSABLE[case]
    with pytest.raises(UserError, match=message):
        find_place(*given, environment={})
    with pytest.raises(UserError, match="JAXRLHF_PROCESSES: must be a whole number of at least 1, given 'two'"):
        find_place(environment={"JAXRLHF_PROCESSES": "two"})


def test_a_process_alone_does_everything_itself():
    with processes.joined(None):
        assert processes.from_first(lambda: b"word") == b"word"
        processes.barrier()
        processes.check_alike("settings", {"a": 1}, "")
        assert processes.alone() and processes.is_first()
        processes.failed(OSError())
    assert processes.ended(1) == 1
    with pytest.raises(IndexError):
        processes.from_first(lambda: [][1], (IndexError,))


CACHE = """
from jaxrlhf.checkpoint.compilation_cache import kept_programs
import jax, numpy as np
from jaxrlhf.config import MeshConfig
from jaxrlhf.distributed.mesh import make_mesh, place_batch
rows = place_batch(make_mesh(MeshConfig()), np.arange(4, dtype=np.float32))
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
setting = os.environ["FOLDERS"].split(":")[0 if first else -1]
with kept_programs(setting, lambda text: print("said", text)) as folder:
    print("folder", folder)
    del found[:]
    jax.jit(lambda x: (x * 11.5).sum())(rows)
print("hits", "/jax/compilation_cache/cache_hits" in found)
"""


@pytest.mark.parametrize("shared", [True, False], ids=["one", "two"])
def test_programs_are_kept_in_a_folder_of_all_hosts_or_nowhere(tmp_path, shared):
    folders = [str(tmp_path / "a")] if shared else [str(tmp_path / "a"), str(tmp_path / "b")]
    for start in ("cold", "warm"):
        with Processes(CACHE, 2, FOLDERS=":".join(folders)) as processes:
            ends = processes.ends()
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
