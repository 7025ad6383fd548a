"""The program of a sandboxed process. `pool` passes it as text, with a JSON argument. It needs no installed package.

There are three roles. "script" runs the code as a program with standard input and output. "code" and "judge" are two
processes that run unit tests: "code" holds the tested code, "judge" holds the tests. The judge calls the tested code
through a socket and compares the results, see `remote_objects`. So the tested code never gets an expected value, and
none of its objects decides a comparison with one. Only the judge can write verdicts.
"""

import json
import os
import signal
import sys
import types

from jaxrlhf.rewards.sandbox.remote_objects import CodeEnd
from jaxrlhf.rewards.sandbox.unit_tests import run_tests


def confine(task):
    """Gives up root and applies the limits. After this, the process and its children cannot get more rights."""
    import ctypes
    import resource

    prctl = ctypes.CDLL(None).prctl
    MiB = 2**20
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (task["cpu_s"], task["cpu_s"]))
    resource.setrlimit(resource.RLIMIT_AS, (task["memory_mb"] * MiB,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (task["disk_mb"] * MiB,) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_NPROC, (task["processes"],) * 2)
    os.nice(5)
    if task["uid"] is not None:
        os.setgroups([])
        os.setresgid(task["uid"], task["uid"], task["uid"])
        os.setresuid(task["uid"], task["uid"], task["uid"])
    prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG; a change of user id clears it
    prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: no setuid program works
    if task["role"] == "judge":
        prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: processes of the same user cannot trace the judge or open its files
    groups = () if task["uid"] is None else (*os.getresgid(), *os.getgroups())  # a user may be in the group of root
    if 0 in (*os.getresuid(), *groups):
        raise SystemExit("the sandbox still has the rights of root")
    os.stat(os.__file__)  # fails if the user id cannot read the interpreter
    os.listdir(os.path.dirname(os.__file__))


def run_code(task, code):
    """Runs the tested code as the module `solution`, and then serves the judge."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    peer = CodeEnd(task["socket"], task["limit"], module.__dict__)
    # A code whose module fails has no names that are right, so the judge gets a closed socket.
    exec(compile(code, "solution.py", "exec"), module.__dict__)
    peer.send(["ready"])
    while True:
        kind, *request = peer.receive()
        if kind == "request":
            peer.serve(request)


def main():
    task = json.loads(sys.argv[1])
    with os.fdopen(task["input"], "rb") as file:
        text = file.read().decode()
    confine(task)
    if task["role"] == "probe":
        print(json.dumps({"uid": os.getuid(), "pid": os.getpid()}))
    elif task["role"] == "judge":
        run_tests(task, json.loads(text))
    elif task["role"] == "code":
        run_code(task, text)
    else:
        sys.argv[1:] = []
        exec(compile(text, "solution.py", "exec"), {"__name__": "__main__"})
