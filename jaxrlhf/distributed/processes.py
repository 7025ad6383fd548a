"""A run as several processes, on one host or on many: who they are, starting jax on them, and what they agree on.

The number and place of a process come from flags, else from the environment (JAXRLHF_COORDINATOR, JAXRLHF_PROCESSES,
JAXRLHF_PROCESS), else from what jax itself detects: SLURM, Open MPI, TPU hosts, indexed Kubernetes jobs. A run of one
process starts nothing, and every function here then does the obvious thing alone.

jax does the rest: its coordination service ends all processes when one sends no heartbeats, and `multihost_utils`
carries what they agree on. A process that fails ends at once; launchers end the others, and heartbeats do where none
does. What a process reads from a disk, a clock or a server may differ from what the others read: process 0 reads it
and gives it to all.
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

START_TIMEOUT = 300.0  # seconds; clusters start their tasks minutes apart
HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as dead: a minute in all, with its echoes
PARTING = 1.0  # seconds that process 0 outlives its fault
SHUTDOWN = 60  # seconds that jax waits for the others at the end
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")  # what srun sets for each task

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ProcessSpec:
    """Where a process stands among those of a run; `coordinator` is HOST:PORT of process 0. None: jax detects it."""

    coordinator: str | None
    processes: int | None
    process: int | None


# ---------------------------------------------------------------- who am I


def find_process_spec(
    coordinator: str | None, processes: int | None, process: int | None, environment: Mapping[str, str] = os.environ
) -> ProcessSpec | None:
    """This process's spec, or None where it is the only one; `UserError` where what is given makes no whole."""
    if processes == 1 and not process:
        return None
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if missing and not _in_cluster(environment):
        if len(missing) == len(given):
            return None
        wanted = " and ".join(f"--{name} (or JAXRLHF_{name.upper()})" for name in missing)
        named = " and ".join(f"--{name}" for name in given if name not in missing)
        raise UserError(f"{named}: given without {wanted}; give all three, or none for one process")
    if processes is not None and processes < 1:
        raise UserError(f"--processes: must be at least 1, given {processes}")
    if process is not None and not 0 <= process < (processes or process + 1):
        raise UserError(f"--process: {process}, but {processes or 'the'} processes are numbered from 0 on")
    if coordinator is not None:
        _address(coordinator)
    return ProcessSpec(**given)


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator: must be HOST:PORT of process 0, such as node001:12345, given {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that jax knows has started this process as one of several: jax then finds its spec."""

    def several(name: str) -> bool:
        count = environment.get(name, "")
        return count.isdecimal() and int(count) > 1

    if several("OMPI_COMM_WORLD_SIZE") or (several("SLURM_NTASKS") and all(name in environment for name in _SLURM)):
        return True
    # A pod that is no indexed job, such as a notebook, is a single process.
    if "JOB_COMPLETION_INDEX" in environment and "KUBERNETES_SERVICE_HOST" in environment:
        return importlib.util.find_spec("kubernetes") is not None
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    return "," in hosts or (importlib.util.find_spec("libtpu") is not None and any(Path("/dev").glob("accel*")))


# ---------------------------------------------------------------- starting and ending together


@contextlib.contextmanager
def joined(spec: ProcessSpec | None, timeout: float = START_TIMEOUT) -> Iterator[None]:
    """The block runs on all processes of the run, with jax started on all, and ends when it has ended on all.

    To enter before any jax computation. After an exception a process leaves with `ended`. Raises `UserError` where the
    processes were not started alike; where they do not find each other within `timeout` seconds, says so and ends.
    """
    if spec is None:
        yield
        return
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _start(spec, timeout)
    own = {"number of processes": spec.processes or jax.process_count(), "version of jax": jax.__version__}
    check_alike("start", own, "start all processes alike")
    yield
    barrier()
    jax.distributed.shutdown()


def _start(spec: ProcessSpec, timeout: float) -> None:
    import jax

    options: dict[str, Any] = {}
    if None not in dataclasses.astuple(spec):
        options["cluster_detection_method"] = "deactivate"
        host, port = _address(spec.coordinator)
        if host in _LOOPBACK:
            options["coordinator_bind_address"] = spec.coordinator
        if spec.process == 0:
            _check_free(host, port)
    # jax aborts with a C++ trace where processes are missing. One line, a little earlier, is for people.
    missing = threading.Timer(timeout, _give_up, (spec, timeout))
    missing.daemon = True
    missing.start()
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
        missing.cancel()


def _check_free(host: str, port: int) -> None:
    """`UserError` where process 0 cannot listen: jax would crash."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host if host in _LOOPBACK else "", port), family=family).close()
    except OSError as error:
        raise UserError(
            f"coordinator {host}:{port}: process 0 cannot listen there: {error.strerror or error}; give another port, "
            f"such as {host}:{20000 + os.getpid() % 10000}, to all processes"
        ) from None


def _give_up(spec: ProcessSpec, timeout: float) -> None:
    who = "this process" if spec.process is None else f"process {spec.process} of {spec.processes or 'several'}"
    where = f" at {spec.coordinator}" if spec.coordinator else ""
    silent = ""
    try:
        if spec.coordinator:
            socket.create_connection(_address(spec.coordinator), timeout=5).close()
    except OSError as error:
        silent = f" (nothing answers there: {error.strerror or error}; process 0 has not come, or cannot be reached)"
    print(
        f"error: {who}: not all processes came together{where} within {timeout:g} s{silent}; start all of them, with "
        "the same number of processes and the same coordinator, where process 0 is",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def ended(status: int) -> int:
    """The status that the program ends with; after a fault of a run of several processes, does not return."""
    if status == 0 or alone():
        return status
    # jax's orderly end would wait for the others, who may wait for this one.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    if is_first():
        time.sleep(PARTING)  # its end aborts the others, who may have a last word, or a status, of their own
    os._exit(status)


# ---------------------------------------------------------------- what processes agree on; all call these alike


def alone() -> bool:
    """Whether this run is one process."""
    jax = sys.modules.get("jax")  # a command that has no use for it need not load it
    return jax is None or not jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this is process 0: the one that writes files and speaks to people."""
    if alone():
        return True
    import jax

    return jax.process_index() == 0


def largest(value: int) -> int:
    """The largest of what the processes give."""
    from jax.experimental.multihost_utils import process_allgather

    return int(process_allgather(np.int32(value)).max())


def of_first(value: int) -> int:
    """What process 0 gives."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return int(broadcast_one_to_all(np.int32(value)))


def barrier() -> None:
    """Returns when every process has called it: what process 0 wrote before is there for all."""
    largest(0)


def _from(source: int, data: bytes) -> bytes:
    """The bytes that process `source` gives, on every process."""
    import jax
    from jax.experimental.multihost_utils import broadcast_one_to_all

    own = jax.process_index() == source
    size = int(broadcast_one_to_all(np.int32(len(data)), is_source=own))
    padded = np.zeros(max(1024, 1 << (size - 1).bit_length()), np.uint8)  # few sizes: each is a program
    if own:
        padded[:size] = np.frombuffer(data, np.uint8)
    return np.asarray(broadcast_one_to_all(padded, is_source=own))[:size].tobytes()


def agreed(make: Callable[[], T], error: type[Exception] = UserError) -> T:
    """What `make` returns on this process, where it has succeeded on all of them.

    `make` works on its own: it exchanges nothing with the other processes. An `error` of any process is raised on all,
    so that all can do the same about it: in its own words by the first that has one, and as told elsewhere by the
    others. Any other exception ends the run from the process that has it.
    """
    if alone():
        return make()
    import jax

    made = fault = None
    try:
        made = make()
    except error as raised:
        fault = raised
    first = jax.process_count() - largest(0 if fault is None else jax.process_count() - jax.process_index())
    if first == jax.process_count():
        return made
    who = f"process {first} of {jax.process_count()} (host {socket.gethostname()}, pid {os.getpid()})"
    who, why = json.loads(_from(first, json.dumps([who, str(fault)]).encode()))
    if first == jax.process_index():
        raise fault
    # Process 0 has the terminal.
    raise reported_elsewhere(error(why), f"{who} failed: {why if is_first() else 'its own output says why'}")


def from_first(make: Callable[[], bytes], error: type[Exception] = UserError) -> bytes:
    """What process 0 makes, on every process; an `error` of its is raised on all, as `agreed` does."""
    made = agreed(make if is_first() else bytes, error)
    return made if alone() else _from(0, made)


def check_alike(what: str, own: Mapping[str, Any], remedy: str) -> None:
    """`UserError` where a process has something else than process 0: `own` is plain data, as JSON has it."""
    text = json.dumps(own)
    theirs = from_first(text.encode).decode()

    def compare() -> None:
        for key, there, here in differences(json.loads(theirs), json.loads(text))[:1]:
            import jax

            raise UserError(
                f"process {jax.process_index()} (host {socket.gethostname()}) has other {what} than process 0: {key} "
                f"is {here}, there {there}; {remedy}"
            )

    agreed(compare)
