"""How the processes of a run find each other: process 0 listens, the others come to it."""

import os
import socket
import time

from jaxrlhf.distributed.connection import Connection
from jaxrlhf.distributed.lifeline import HELLO, Hub, Member
from jaxrlhf.errors import UserError


def open_hub(host: str, port: int, processes: int, software: dict[str, str]) -> Hub:
    """Process 0's end, listening; on the loopback alone where `host` is this machine's own name for itself."""
    local = host in ("localhost", "127.0.0.1", "::1")
    try:
        if not local and socket.has_dualstack_ipv6():
            listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        else:
            family = socket.AF_INET6 if host == "::1" else socket.AF_INET
            listener = socket.create_server((host if local else "", port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"coordinator {host}:{port}: process 0 cannot listen there: {reason}; give another port, such as "
            f"{host}:{20000 + os.getpid() % 10000}, to all processes"
        ) from None
    return Hub(listener, processes, software)


def join_hub(
    host: str, port: int, process: int, processes: int, software: dict[str, str], timeout: float
) -> tuple[Member, dict]:
    """(member, what process 0 sent as welcome); `UserError` where it does not answer, or the roll call fails."""
    deadline = time.monotonic() + timeout
    reason: object = "nothing was tried"
    while time.monotonic() < deadline:
        try:
            connection = Connection(socket.create_connection((host, port), timeout=5))
            own = {"process": process, "processes": processes, "host": socket.gethostname(), "pid": os.getpid()}
            connection.send(HELLO, **own, software=software)
            # Process 0 began to wait earlier or later than this one: it is the one that says who is missing.
            header, _ = connection.receive(timeout=2 * timeout + 10)
        except OSError as error:
            reason = getattr(error, "strerror", None) or error
            time.sleep(0.3)
            continue
        if header["kind"] == "refused":
            raise UserError(header["text"])
        first = (header["host"], header["pid"])
        return Member(connection, process, processes, first), header
    raise UserError(
        f"process {process} of {processes}: process 0 did not answer at {host}:{port} within {timeout:g} s ({reason}); "
        "start process 0 there, or correct the coordinator's address"
    )
