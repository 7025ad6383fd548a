"""A run as several processes, on one host or on many: who they are, starting jax on them, and ending together.

The number and place of a process come from flags, else from the environment (JAXRLHF_COORDINATOR, JAXRLHF_PROCESSES,
JAXRLHF_PROCESS), else from what jax itself detects: SLURM, Open MPI, TPU hosts, indexed Kubernetes jobs. A run of one
process starts nothing, and every function here then does the obvious thing alone.

Arrays go through the mesh (`mesh.place`, `mesh.fetch`); the host's own decisions go through here. What a process
reads from a disk, a clock or a server may differ from what the others read: process 0 reads it and gives it to all.
"""

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxrlhf.config.differences import differences
from jaxrlhf.distributed import roll_call
from jaxrlhf.distributed.lifeline import Lifeline, flush, hold_up_aborts
from jaxrlhf.errors import UserError

START_TIMEOUT = 300.0  # seconds; clusters start their tasks minutes apart
HEARTBEAT = 40  # seconds without a sign of a process before jax's coordination service ends all: a frozen process
SHUTDOWN = 20  # seconds that jax waits for the others at the end
VARIABLES = {"coordinator": "JAXRLHF_COORDINATOR", "processes": "JAXRLHF_PROCESSES", "process": "JAXRLHF_PROCESS"}

_lifeline: Lifeline | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among those of a run; `coordinator` is where process 0 listens."""

    coordinator: tuple[str, int]
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None  # numbers of this process's accelerators; None: all of the host


# ---------------------------------------------------------------- who am I


def find_place(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Place | None:
    """This process's place, or None where it is the only one; `UserError` where what is given makes no whole."""
    given: dict[str, Any] = {"coordinator": coordinator, "processes": processes, "process": process}
    named = {name: f"--{name}" for name, value in given.items() if value is not None}
    for name, variable in VARIABLES.items():
        if given[name] is None and environment.get(variable):
            given[name], named[name] = environment[variable], variable
    devices = None
    for name in ("processes", "process"):
        given[name] = _number(given[name], named.get(name), least=1 if name == "processes" else 0)
    if given["processes"] == 1 and not given["process"]:
        return None
    if None in given.values():
        detected = _detect()
        if not named and (detected is None or detected["processes"] <= 1):
            return None
        devices = (detected or {}).get("devices")
        given |= {name: (detected or {}).get(name) for name, value in given.items() if value is None}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        wanted = " and ".join(f"--{name} (or {VARIABLES[name]})" for name in missing)
        raise UserError(f"{', '.join(named.values())}: given without {wanted}; give all three, or none for one process")
    if given["process"] >= given["processes"]:
        raise UserError(
            f"{named.get('process', 'process')}: {given['process']}, but {given['processes']} processes are numbered "
            f"0 to {given['processes'] - 1}"
        )
    address = _address(given["coordinator"], named.get("coordinator", "coordinator"))
    return Place(address, given["processes"], given["process"], devices)


def _number(value: int | str | None, name: str | None, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or value < least:
        raise UserError(f"{name}: must be a whole number of at least {least}, given {value!r}")
    return value


def _address(text: str, name: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{name}: must be HOST:PORT of process 0, such as node001:12345, given {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _detect() -> dict[str, Any] | None:
    """What jax finds out about the cluster that started this process: coordinator, processes, process, devices."""
    try:
        from jax._src.clusters import ClusterEnv

        kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
    except (ImportError, AttributeError):  # no public part of jax: absent one day, flags still work
        return None
    for kind in kinds:
        # A pod that is no indexed job, such as a notebook, is a single process, and jax would raise.
        if kind.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ:
            continue
        try:
            if not kind.is_env_present():
                continue
            found: dict[str, Any] = {"processes": kind.get_process_count()}
            if found["processes"] > 1:
                port = os.environ.get("JAX_COORDINATOR_PORT")
                found |= {"process": kind.get_process_id(), "coordinator": kind.get_coordinator_address(60, port)}
                local = kind.get_local_process_id()  # None: jax gives the process all devices of its host
                found["devices"] = None if local is None else (local,)
            return found
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{kind.__name__}: this looks like a cluster's job, but jax cannot tell its processes apart ({reason});"
                " give --coordinator, --processes and --process, or --processes 1"
            ) from error
    return None


# ---------------------------------------------------------------- starting and ending together


@contextlib.contextmanager
def joined(place: Place | None, timeout: float = START_TIMEOUT) -> Iterator[None]:
    """The block runs on all processes of the run, as one run: it ends well on all of them, or on none.

    Starts jax on all processes, which must come before any jax computation. Where the block raises, the others are
    told and end with the same status; where another process is the one to say why, as process 0 is where all find the
    same wrong, this one ends here and the exception does not come out. Afterwards a process leaves with `ended`. Raises
    `UserError` where the processes do not find each other within `timeout` seconds.
    """
    if place is None:
        yield
        return
    try:
        _start(place, timeout)
        yield
        barrier()
    except BaseException as error:
        if _lifeline is not None:
            failed(error)
        raise
    import jax

    jax.distributed.shutdown()
    _lifeline.leave()


def ended(status: int) -> int:
    """The status that the program ends with; after a fault of a run of several processes, does not return."""
    if _lifeline is None or status == 0:
        return status
    # An orderly end would wait for the others, who are gone.
    flush()
    _lifeline.leave()
    os._exit(status)


def failed(error: BaseException) -> None:
    """Tells the other processes of this one's exception, before anything that would wait for them.

    Returns where this process is the one to say so; ends it here where another one is.
    """
    if _lifeline is None:
        return
    verdict = _lifeline.report(_lifeline.failure(*_described(error)))
    if verdict.process != _lifeline.process:
        _lifeline.exit(verdict)


def _described(error: BaseException) -> tuple[str, int, bool]:
    """An exception as one line, its exit status, and whether it may be the echo of another process's end."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text, 2, False
    if isinstance(getattr(error, "status", None), int):  # an exception that knows it, such as of a run asked to stop
        return text, error.status, False
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130, False
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return f"exited with status {error.code}", error.code or 1, False
    echo = "JaxRuntimeError" in type(error).__name__ or any(word in text for word in ("Gloo", "gloo", "NCCL"))
    return f"{type(error).__name__}: {text}", 1, echo


def _start(place: Place, timeout: float) -> None:
    """Finds the other processes, then starts jax on all of them."""
    global _lifeline
    import jax

    host, port = place.coordinator
    software = {"jax": jax.__version__}
    if place.process == 0:
        hub = roll_call.open_hub(host, port, place.processes, software)
        # jax's own service gets a port that is free now: the one that was given is taken by the roll call.
        free = _free_port()
        hub.gather(timeout, lambda: {"port": free, "host": hub.host, "pid": os.getpid()})
        _lifeline = hub
    else:
        _lifeline, welcome = roll_call.join_hub(host, port, place.process, place.processes, software, timeout)
        free = int(welcome["port"])
    hold_up_aborts()
    address = f"[{host}]:{free}" if ":" in host else f"{host}:{free}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself, so that a process asked to stop would not.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address,
        place.processes,
        place.process,
        place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(timeout), 10),
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
        coordinator_bind_address=address if host in ("localhost", "127.0.0.1", "::1") else None,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


# ---------------------------------------------------------------- what hosts tell each other


def alone() -> bool:
    """Whether this run is one process."""
    return _lifeline is None


def is_first() -> bool:
    """Whether this is process 0: the one that writes files and speaks to people."""
    return _lifeline is None or _lifeline.process == 0


def barrier() -> None:
    """Returns when every process has called it: what process 0 wrote before is there for all."""
    if _lifeline is not None:
        _lifeline.barrier()


def from_first(make: Callable[[], bytes], errors: tuple[type[Exception], ...] = ()) -> bytes:
    """What process 0 makes, on every process; all must call it in the same order.

    An exception of one of the types `errors` is raised on all, as type(text), so that all can do the same about it;
    any other ends the run from process 0.
    """
    if _lifeline is None:
        return make()
    if _lifeline.process == 0:
        try:
            made = b"\0" + make()
        except errors as error:
            number = next(i for i, kind in enumerate(errors) if isinstance(error, kind))
            _lifeline.share(bytes([1 + number]) + str(error).encode())
            raise
        return _lifeline.share(made)[1:]
    given = _lifeline.share()
    if given[0]:
        raise errors[given[0] - 1](given[1:].decode())
    return given[1:]


def check_started() -> None:
    """`UserError` where jax runs on several processes that do not know each other here."""
    import jax

    if _lifeline is None and jax.process_count() > 1:
        raise UserError("jax runs on several processes, not started by processes.joined of jaxrlhf: let it start them")


def check_alike(what: str, own: Mapping[str, Any], remedy: str) -> None:
    """`UserError` where this process has something else than process 0: `own` is plain data, as JSON has it."""
    if _lifeline is None:
        return
    text = json.dumps(own)
    changed = differences(json.loads(from_first(text.encode)), json.loads(text))
    if changed:
        key, there, here = changed[0]
        raise UserError(
            f"process {_lifeline.process} (host {_lifeline.host}) has other {what} than process 0: {key} is {here}, "
            f"there {there}; {remedy}"
        )


def check_shared(path: str | os.PathLike, what: str) -> None:
    """`UserError` where a file that process 0 has written is not there for this process; all call it."""
    barrier()
    if not is_first() and not os.path.exists(path):
        raise UserError(
            f"{what}: {path} is not there on host {_lifeline.host}, though process 0 has written it; give a folder on "
            "a file system that all hosts share"
        )


__all__ = [
    "Place",
    "alone",
    "barrier",
    "check_alike",
    "check_shared",
    "check_started",
    "ended",
    "failed",
    "find_place",
    "from_first",
    "is_first",
    "joined",
]
