"""Starts the program `pool` with the limits of a run's settings, and reads what it says."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxrlhf.config import CodeTestsRewardConfig
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.functions import RewardFault

POOL = Path(__file__).with_name("pool.py")
LIMITS = ("seconds", "memory_mb", "disk_mb", "output_mb", "processes")
PATIENCE = 60.0  # seconds that the pool may take in addition to its limit
WEAKER = "{}: code runs in the weaker sandbox: {}; bubblewrap is stronger, because it hides all files ({})"
WEAK = {  # by kind and by whether the run has the rights of root
    ("namespaces", True): "another user id, no network, its own processes; but it reads what every user can read",
    ("namespaces", False): "no network, its own processes; but it reads the files of your user",
    ("process", True): "another user id; but it reads what every user can read",
    ("process", False): "your user id, so it reads and changes your files and can end your processes",
}


class SandboxPool:
    """The strongest sandbox that works here and that the settings allow.

    Raises `UserError` if no sandbox works. `say` receives a line if the sandbox is not bubblewrap. `key_path` names the
    settings in messages.
    """

    def __init__(self, config: CodeTestsRewardConfig, key_path: str, say: Callable[[str], None] | None = None):
        if not sys.platform.startswith("linux"):
            raise UserError(f"{key_path}: the sandbox needs Linux, but this system is {sys.platform}")
        self.task = {"limits": {name: getattr(config, name) for name in LIMITS}}
        request = {"kind": None, "sandbox": config.sandbox, "python": config.python}
        (found,) = self.run(request, 10 * PATIENCE)
        if "error" in found:
            raise UserError(f"{key_path}.sandbox: no sandbox works: {found['error']}; install bubblewrap")
        self.task |= {"kind": found["kind"], "python": found["python"]}
        self.kind = found["kind"]
        if self.kind != "bubblewrap" and say is not None:
            why = found["problems"][0] if found["problems"] else "set sandbox: bubblewrap"
            say(WEAKER.format(key_path, WEAK[self.kind, found["root"]], why))

    def run(self, request: Mapping[str, Any], seconds: float) -> list[dict[str, Any]]:
        """Runs the pool once. Returns the lines of its output. Raises `RewardFault` if it fails or takes too long."""
        pool = subprocess.Popen(
            [sys.executable, "-I", "-S", str(POOL)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            output, errors = pool.communicate(json.dumps(self.task | request).encode(), timeout=seconds)
        except BaseException as error:  # also Ctrl-C
            pool.terminate()  # the pool then ends what it started
            with contextlib.suppress(subprocess.TimeoutExpired):
                pool.wait(PATIENCE)
            pool.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise RewardFault(f"reward code_tests: the tests did not end within {seconds:g} s") from None
            raise
        if pool.returncode != 0:
            last = errors.decode(errors="replace").strip().splitlines() or ["no message"]
            what = f"the sandbox ended with status {pool.returncode}: {last[-1]}"
            raise RewardFault(f"reward code_tests: {what}")
        return [json.loads(line) for line in output.splitlines()]
