"""Runs of several processes on one or many hosts. Finds process numbers, starts jax, and makes processes agree.

The number of a process and the address of the coordinator come from flags. If flags are missing, the environment is
read (JAXRLHF_COORDINATOR, JAXRLHF_PROCESSES, JAXRLHF_PROCESS). Without these variables, jax detects the cluster (SLURM,
Open MPI, TPU hosts, indexed Kubernetes jobs). In a run of one process, no function here communicates.

A process that fails ends immediately. Its launcher then ends the other processes. Without a launcher, jax's
coordination service ends them, because the failed process sends no heartbeats. Data from a disk, a clock or a server
may differ between processes, so process 0 reads such data and sends it to all processes. All processes must call the
functions that communicate, in the same order.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxrlhf.config.differences import differences
from jaxrlhf.errors import UserError, reported_elsewhere

START_TIMEOUT = 300.0  # seconds; a cluster may start one task of a job minutes after another
HEARTBEAT = 30  # seconds; a process without a heartbeat for this time counts as dead, and all end within a minute
EXIT_DELAY = 1.0  # seconds between a failure of process 0 and its exit
SHUTDOWN = 60  # seconds that jax waits for the other processes at the end of a run
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")  # set by srun for each task

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ProcessSpec:
    """The number of this process and the address of process 0. jax detects the values that are None."""

    coordinator: str | None  # HOST:PORT of process 0
    processes: int | None  # number of processes
    process: int | None  # number of this process, from 0


def find_process_spec(
    coordinator: str | None, processes: int | None, process: int | None, environment: Mapping[str, str] = os.environ
) -> ProcessSpec | None:
    """Returns the `ProcessSpec` of this process. In a run of one process, returns None.

    Raises `UserError` if the flags are incomplete or invalid.
    """
    if processes == 1 and not process:
        return None
    flags = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in flags.items() if value is None]
    if missing and not _in_cluster(environment):
        if len(missing) == len(flags):
            return None
        absent = " and ".join(f"--{name} (or JAXRLHF_{name.upper()})" for name in missing)
        present = " and ".join(f"--{name}" for name in flags if name not in missing)
        raise UserError(
            f"{present}: {absent} must be given too; give all three flags, or no flag for a run of one process"
        )
    if processes is not None and processes < 1:
        raise UserError(f"--processes: must be at least 1, not {processes}")
    if process is not None and not 0 <= process < (processes or process + 1):
        allowed = f"between 0 and {processes - 1}" if processes else "at least 0"
        raise UserError(f"--process: must be {allowed}, not {process}; processes are numbered from 0")
    if coordinator is not None:
        _address(coordinator)
    return ProcessSpec(**flags)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator: must be HOST:PORT of process 0, such as node001:12345, not {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has started this process as one of several. Only launchers that jax detects are found."""

    def several(name: str) -> bool:
        count = environment.get(name, "")
        return count.isdecimal() and int(count) > 1

    if several("OMPI_COMM_WORLD_SIZE") or (several("SLURM_NTASKS") and all(name in environment for name in _SLURM)):
        return True
    # A pod outside an indexed job, such as a notebook, is a run of one process.
    if "JOB_COMPLETION_INDEX" in environment and "KUBERNETES_SERVICE_HOST" in environment:
        return importlib.util.find_spec("kubernetes") is not None
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    return "," in hosts or (importlib.util.find_spec("libtpu") is not None and any(Path("/dev").glob("accel*")))


@contextlib.contextmanager
def joined(spec: ProcessSpec | None, timeout: float = START_TIMEOUT) -> Iterator[None]:
    """Starts jax on all processes, runs the block, and then waits for all processes.

    The block must start before any jax computation. After an exception, the caller must exit with `exit_status`. Raises
    `UserError` if the processes were started with different settings. If a process does not connect within `timeout`
    seconds, this process prints an error and exits with status 2.
    """
    if spec is None:
        yield
        return
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    options: dict[str, Any] = {}
    if None not in dataclasses.astuple(spec):
        options["cluster_detection_method"] = "deactivate"
        host, port = _address(spec.coordinator)
        if host in _LOOPBACK:
            options["coordinator_bind_address"] = spec.coordinator
        if spec.process == 0:
            _check_free(host, port)
    # If processes are missing, jax prints a C++ trace and aborts. Before this, the timer prints one line and exits.
    timer = threading.Timer(timeout, _give_up, (spec, timeout))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            spec.coordinator,
            spec.processes,
            spec.process,
            initialization_timeout=int(timeout) + 60,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
            **options,
        )
    except (ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"jax cannot start several processes here ({reason}); give --coordinator, --processes and --process, or "
            "--processes 1 for a run of one process"
        ) from error
    finally:
        timer.cancel()
    own = {"number of processes": spec.processes or jax.process_count(), "version of jax": jax.__version__}
    check_alike("start", own, "start all processes with the same flags and the same version of jax")
    yield
    barrier()
    jax.distributed.shutdown()


def _check_free(host: str, port: int) -> None:
    """Raises `UserError` if process 0 cannot listen on the port, because jax would crash."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host if host in _LOOPBACK else "", port), family=family).close()
    except OSError as error:
        raise UserError(
            f"coordinator {host}:{port}: process 0 cannot use this port: {error.strerror or error}; give another port, "
            f"such as {host}:{20000 + os.getpid() % 10000}, to all processes"
        ) from None


def _give_up(spec: ProcessSpec, timeout: float) -> None:
    who = "this process" if spec.process is None else f"process {spec.process} of {spec.processes or 'several'}"
    where, why = "", ""
    if spec.coordinator:
        where = f" at {spec.coordinator}"
        try:
            socket.create_connection(_address(spec.coordinator), timeout=5).close()
        except OSError as error:
            why = f" (no connection: {error.strerror or error}; process 0 has not started, or cannot be reached)"
    print(
        f"error: {who}: not all processes connected{where} within {timeout:g} s{why}; start all processes with the "
        "same number of processes and the same coordinator; the coordinator is the address of process 0",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def exit_status(status: int) -> int:
    """Returns the exit status. In a run of several processes, a failed process exits here and does not return."""
    if status == 0 or alone():
        return status
    # jax's shutdown would wait for the other processes, which may be waiting for this process.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    if is_first():
        time.sleep(EXIT_DELAY)  # the other processes print their errors before the exit of process 0 aborts them
    os._exit(status)


def alone() -> bool:
    """Whether this run has only one process."""
    jax = sys.modules.get("jax")  # jax is not imported here, because some commands do not need it
    return jax is None or not jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this is process 0, which writes files and prints messages."""
    return alone() or sys.modules["jax"].process_index() == 0


def largest(value: int) -> int:
    """Returns the largest `value` of all processes."""
    from jax.experimental.multihost_utils import process_allgather

    return int(process_allgather(np.int32(value)).max())


def barrier() -> None:
    """Returns when all processes have called `barrier`. Files that process 0 wrote before are then visible to all."""
    largest(0)


def _broadcast(data: bytes, source: int = 0) -> bytes:
    """Returns the `data` of process `source` on every process."""
    import jax
    from jax.experimental.multihost_utils import broadcast_one_to_all

    own = jax.process_index() == source
    size = int(broadcast_one_to_all(np.int32(len(data)), is_source=own))
    # The length is rounded up to a power of two, because jax compiles a program for each length.
    padded = np.zeros(max(1024, 1 << (size - 1).bit_length()), np.uint8)
    if own:
        padded[:size] = np.frombuffer(data, np.uint8)
    return np.asarray(broadcast_one_to_all(padded, is_source=own))[:size].tobytes()


def agreed(make: Callable[[], T], error: type[Exception] = UserError) -> T:
    """Returns `make()` of this process. If `make` raises `error` on one process, all processes raise `error`.

    `make` must not communicate. If several processes fail, the error of the failed process with the lowest number
    counts. That process raises its own exception, and the others raise a copy that names that process. If `make` raises
    an exception of another type on a process, only this process raises it, and the run ends.
    """
    if alone():
        return make()
    import jax

    result = fault = None
    try:
        result = make()
    except error as raised:
        fault = raised
    count, own = jax.process_count(), jax.process_index()
    first = count - largest(0 if fault is None else count - own)
    if first == count:
        return result
    who = f"process {first} of {count} (host {socket.gethostname()}, pid {os.getpid()})"
    who, why = json.loads(_broadcast(json.dumps([who, str(fault)]).encode(), first))
    if first == own:
        raise fault
    # The terminal shows the output of process 0, so process 0 repeats the error of another process.
    raise reported_elsewhere(error(why), f"{who} failed: {why if is_first() else 'its output has the error'}")


def from_first(make: Callable[[], bytes], error: type[Exception] = UserError) -> bytes:
    """Returns `make()` of process 0 on every process. Only process 0 calls `make`.

    If `make` raises `error`, all processes raise `error`, see `agreed`.
    """
    made = agreed(make if is_first() else bytes, error)
    return made if alone() else _broadcast(made)


def check_alike(what: str, own: Mapping[str, Any], remedy: str) -> None:
    """Raises `UserError` if `own` differs between this process and process 0. The values of `own` must be JSON values.

    The error says that the processes differ in `what`, and ends with `remedy`.
    """
    text = json.dumps(own)
    first = from_first(text.encode).decode()

    def compare() -> None:
        for key, there, here in differences(json.loads(first), json.loads(text))[:1]:
            process = sys.modules["jax"].process_index()
            raise UserError(
                f"process {process} (host {socket.gethostname()}) and process 0 differ in {what}: {key} is {here}, but "
                f"{there} on process 0; {remedy}"
            )

    agreed(compare)
