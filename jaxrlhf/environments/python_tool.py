"""Python as a tool for language models, in the sandbox of the code rewards (see `jaxrlhf/rewards/sandbox/pool.py`)."""

import sys
import threading
from collections.abc import Callable
from functools import cache

from pydantic import ValidationError

from jaxrlhf.config import CodeTestsRewardConfig
from jaxrlhf.errors import Fault, UserError
from jaxrlhf.rewards.sandbox.running import PATIENCE, SandboxPool

_CUT_ROOM = 40  # characters of the line that says how much is cut
_lock = threading.RLock()  # environments in threads make their tools at the same time

# What the program writes to the standard error, such as a traceback, is part of the output. Each line is written at
# once, so that the lines before a timeout are not lost.
_PROGRAM = """import sys
sys.stdout.reconfigure(line_buffering=True, write_through=True)
sys.stderr = sys.stdout
del sys
exec(compile({code!r}, "program.py", "exec"), {{"__name__": "__main__"}})
"""


def python_tool(
    seconds: float = 5.0, memory_mb: int = 512, max_chars: int = 2000, sandbox: str = "auto"
) -> Callable[[str], str]:
    """Returns the tool `python`. Raises `UserError` if no sandbox works here.

    Programs run in the strongest sandbox that works. If that is a weaker one than bubblewrap, a line on the standard
    error says what programs can read or change, once in a process.

    Args:
      seconds: longest time of a program.
      memory_mb: largest address space of its processes, in MiB.
      max_chars: longest output; a longer one keeps its start and its end.
      sandbox: as in the settings of code tests; "auto" takes the strongest one that works, "bubblewrap" only that one.
    """
    with _lock:
        pool = _sandbox(seconds, memory_mb, sandbox)

    def python(code: str) -> str:
        """
        Runs a Python program and returns what it prints.

        Args:
            code: The program. It has the standard library, no network and no files. Print what you want to see.
        """
        request = {"jobs": [{"program": _PROGRAM.format(code=code)}], "workers": 1, "batch_seconds": 2 * seconds}
        # There is no result if the machine was too slow to start the program.
        result = next(iter(pool.run(request, 2 * seconds + PATIENCE)), {"output": "", "status": None})
        if "error" in result:  # for example if no user id is free
            raise Fault(f"the sandbox failed: {result['error']}")
        output, note = result["output"].rstrip(), ""
        if result["status"] is None:
            note = f"\nthe program did not end within {seconds:g} s, or printed too much"
        if len(output) + len(note) > max_chars:
            half = max(max_chars - len(note) - _CUT_ROOM, 0) // 2
            cut = len(output) - 2 * half
            output = f"{output[:half]}\n... ({cut} characters cut)\n{output[half + cut :]}"
        return (output + note).strip("\n") or "(the program printed nothing)"

    return python


@cache
def _sandbox(seconds: float, memory_mb: int, sandbox: str) -> SandboxPool:
    try:
        config = CodeTestsRewardConfig.model_validate(
            {"seconds": seconds, "memory_mb": memory_mb, "sandbox": sandbox}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"python_tool: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return SandboxPool(config, "python_tool", _say)


@cache
def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@cache
def _make_default() -> Callable[[str], str]:
    return python_tool()


def _default() -> Callable[[str], str]:
    with _lock:
        return _make_default()


def python(code: str) -> str:
    """
    Runs a Python program and returns what it prints.

    Args:
        code: The program. It has the standard library, no network and no files. Print what you want to see.
    """
    return _default()(code)


python.prepare = _default  # so that a machine without a sandbox is found at the start of a run
