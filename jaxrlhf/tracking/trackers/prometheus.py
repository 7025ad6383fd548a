"""Serves the latest metrics of each stage in Prometheus' text format, at http://HOST:PORT/metrics."""

import http.server
import re
import socket
import threading
from pathlib import Path

from jaxrlhf.tracking.trackers.feed import LogReader

TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Latest:
    """The last line of each stage in metrics.jsonl, as text."""

    def __init__(self, path: Path):
        self._log, self._lines, self._lock = LogReader(path), {}, threading.Lock()

    def text(self) -> str:
        """Returns a gauge for each metric, such as `jaxrlhf_reward_score{stage="ppo"} 0.5`. Null becomes NaN."""
        gauges: dict[str, list[str]] = {}
        with self._lock:
            for _, record in self._log.new():
                self._lines[record["stage"]] = record
            for stage, record in self._lines.items():
                for name, value in record.items():
                    if name != "stage" and (value is None or isinstance(value, int | float)):
                        gauge = "jaxrlhf_" + re.sub("[^a-zA-Z0-9_]", "_", name)
                        number = "NaN" if value is None else repr(float(value))
                        gauges.setdefault(gauge, []).append(f'{gauge}{{stage="{stage}"}} {number}\n')
        return "".join(f"# TYPE {gauge} gauge\n{''.join(lines)}" for gauge, lines in gauges.items())


def serve(listener: socket.socket, folder: Path) -> None:
    """Answers requests on a listening socket. Never returns."""
    latest = Latest(folder / "metrics.jsonl")

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            found = self.path.split("?")[0] == "/metrics"
            body = latest.text().encode() if found else b"see /metrics\n"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", TYPE if found else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(listener.getsockname(), Handler, bind_and_activate=False)
    server.daemon_threads = True
    server.socket.close()
    server.socket = listener
    server.serve_forever()
