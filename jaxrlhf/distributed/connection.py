"""Frames over TCP between two processes of a run: a header in JSON, and raw bytes."""

import contextlib
import json
import socket
import struct
import threading

PROBE_IDLE, PROBE_EVERY, PROBES = 10, 5, 4  # TCP keepalive, seconds: a lost host is noticed after 30
_SIZES = struct.Struct(">II")  # of a frame: bytes of its JSON header, bytes of its payload
_LARGEST = 1 << 30


class Connection:
    """One end of a TCP connection that carries frames; any thread may send."""

    def __init__(self, sock: socket.socket):
        self._socket, self._lock = sock, threading.Lock()
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": PROBE_IDLE, "TCP_KEEPINTVL": PROBE_EVERY, "TCP_KEEPCNT": PROBES}
        options["TCP_USER_TIMEOUT"] = 1000 * (PROBE_IDLE + PROBE_EVERY * PROBES)
        for name, value in options.items():
            if hasattr(socket, name):  # not every system has each
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, kind: str, payload: bytes = b"", **header: object) -> None:
        """Sends a frame; raises `OSError` where the other end is gone."""
        head = json.dumps({"kind": kind, **header}).encode()
        with self._lock:
            self._socket.sendall(_SIZES.pack(len(head), len(payload)) + head + payload)

    def receive(self, timeout: float | None = None) -> tuple[dict, bytes]:
        """(header, payload) of the next frame; `OSError` where the other end is gone, silent or no end of ours."""
        self._socket.settimeout(timeout)
        head, payload = _SIZES.unpack(self._exactly(_SIZES.size))
        if head > 1 << 20 or payload > _LARGEST:
            raise ConnectionError("not a frame")
        try:
            header = json.loads(self._exactly(head))
            return {"kind": None, **header}, self._exactly(payload)
        except (ValueError, TypeError):
            raise ConnectionError("not a frame") from None

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(min(size - len(data), 1 << 20))
            if not part:
                raise ConnectionError("closed")
            data += part
        return bytes(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
