"""Python as a tool for language models, in the sandbox of the code rewards (see `jaxrlhf/rewards/sandbox/pool.py`)."""

from collections.abc import Callable
from functools import cache

from jaxrlhf.config import CodeTestsRewardConfig
from jaxrlhf.rewards.sandbox.running import PATIENCE, SandboxPool

# What the program writes to the standard error, such as a traceback, is part of the output.
_PROGRAM = """import sys
sys.stderr = sys.stdout
del sys
exec(compile({code!r}, "program.py", "exec"), {{"__name__": "__main__"}})
"""


def python_tool(seconds: float = 5.0, memory_mb: int = 512, max_chars: int = 2000) -> Callable[[str], str]:
    """Returns the tool `python`. Raises `UserError` if no sandbox works here.

    Args:
      seconds: longest time of a program.
      memory_mb: largest address space of its processes, in MiB.
      max_chars: longest output; a longer one keeps its start and its end.
    """
    config = CodeTestsRewardConfig(seconds=seconds, memory_mb=memory_mb)
    sandbox = SandboxPool(config, "python_tool")

    def python(code: str) -> str:
        """
        Runs a Python program and returns what it prints.

        Args:
            code: The program. It has the standard library, no network and no files. Print what you want to see.
        """
        request = {"jobs": [{"program": _PROGRAM.format(code=code)}], "workers": 1, "batch_seconds": 2 * seconds}
        (result,) = sandbox.run(request, 2 * seconds + PATIENCE)
        output = result["output"].rstrip()
        if len(output) > max_chars:
            half = max_chars // 2
            output = f"{output[:half]}\n... ({len(output) - 2 * half} characters cut)\n{output[-half:]}"
        if result["status"] is None:
            return f"{output}\nthe program did not end within {seconds:g} s, or printed too much".strip()
        return output or "(the program printed nothing)"

    return python


@cache
def _default() -> Callable[[str], str]:
    return python_tool()


def python(code: str) -> str:
    """
    Runs a Python program and returns what it prints.

    Args:
        code: The program. It has the standard library, no network and no files. Print what you want to see.
    """
    return _default()(code)
