"""Attacks on the sandbox of code_tests. Each scores 0 within its limit, and leaves nothing behind."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxrlhf.config import CodeTestsRewardConfig
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.code_tests import POOL, CodeTestsReward
from jaxrlhf.rewards.completions import Completions

LIMITS = {"memory_mb": 256, "disk_mb": 4, "output_mb": 1, "processes": 6, "workers": 4}
KINDS = ["bubblewrap", "namespaces", "process"]
RIGHT = "def f(x):\n    return x + 1\n"
TEST = ["assert f(1) == 2"]


@pytest.fixture(scope="module", params=KINDS)
def sandbox(request):
    """A reward with this kind of sandbox, or skips with the reason why it does not work here."""
    config = CodeTestsRewardConfig(sandbox="bubblewrap" if request.param == "bubblewrap" else "process", **LIMITS)
    try:
        reward = CodeTestsReward(config, "ppo.reward")
    except UserError as error:
        pytest.skip(str(error))
    if reward.kind != request.param:
        if KINDS.index(reward.kind) > KINDS.index(request.param):
            pytest.skip(f"{request.param} does not work here")
        reward._task["kind"] = reward.kind = request.param
    return reward


def scores(reward, codes, tests=TEST, seconds=30.0):
    """The scores of several codes. A test that ends by itself has a long limit, because this machine may be busy."""
    reward._task["limits"]["seconds"] = seconds
    completions = Completions(None, ["p"] * len(codes), [{"tests": tests}] * len(codes), None)
    completions.__dict__["texts"] = codes
    return reward(completions).tolist()


def score(reward, code, tests=TEST, seconds=30.0):
    return scores(reward, [code], tests, seconds)[0]


def named(mark):
    """The running processes with this name. Children have the name of their parent."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == mark and " Z " not in path.with_name("stat").read_text():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.fixture
def mark():
    """Code that gives its process a name; after the test, no process with this name runs."""
    name = f"a{os.getpid()}x{time.monotonic_ns() % 10**6}"[:15]
    yield f"import ctypes, os, sys, time, threading\nctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"
    deadline = time.monotonic() + 5
    while named(name) and time.monotonic() < deadline:  # a killed process takes a moment to disappear
        time.sleep(0.05)
    assert named(name) == []


def test_right_code_passes(sandbox, mark):
    assert score(sandbox, mark + RIGHT) == 1.0
    assert score(sandbox, mark + RIGHT, [*TEST, "assert f(1) == 3"]) == 0.5
    assert score(sandbox, mark + "print(int(input()) * 2)", [{"input": "3\n", "output": "6\n"}]) == 1.0


def test_fork_bomb(sandbox, mark):
    bomb = """
def f(x):
    started = 0
    for _ in range(200):  # bounded, if the sandbox does not hold it
        try:
            pid = os.fork()
        except OSError:
            continue
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        started += 1
    return started
"""
    assert score(sandbox, mark + bomb, ["assert f(1) >= 20"]) == 0.0
    assert score(sandbox, mark + bomb, ["assert f(1) < 20"]) == 1.0


def test_bomb_that_forks_before_anything_else(sandbox, mark):
    bomb = mark + "for _ in range(6):\n    try:\n        os.fork()\n    except OSError:\n        pass\ntime.sleep(60)\n"
    assert score(sandbox, bomb, seconds=1.5) == 0.0


def test_threads(sandbox, mark):
    code = "for _ in range(200):\n    threading.Thread(target=time.sleep, args=(60,)).start()\n" + RIGHT
    assert score(sandbox, mark + code) == 0.0


def test_allocation_of_10_gb(sandbox, mark):
    assert score(sandbox, mark + "x = bytearray(10 * 2**30)\n" + RIGHT) == 0.0
    code = "def f(x):\n    return len(bytearray(10 * 2**30))\n"
    tests = ["import pytest\nwith pytest.raises(MemoryError):\n    f(1)", "assert f(1) == 10 * 2**30"]
    assert score(sandbox, mark + code, tests) == 0.5


def test_endless(sandbox, mark):
    codes = [mark + code + RIGHT for code in ("while True:\n    pass\n", "time.sleep(1000)\n", "10 ** 10 ** 10\n")]
    began = time.monotonic()
    assert scores(sandbox, codes, seconds=1.5) == [0.0] * 3
    assert time.monotonic() - began < 15


def test_endless_output(sandbox, mark):
    code = "while True:\n    print('x' * 1000)\n    print('x' * 1000, file=sys.stderr)\n"
    assert score(sandbox, mark + code, [{"input": "", "output": "x"}]) == 0.0  # ends at output_mb
    assert score(sandbox, mark + code, seconds=1.5) == 0.0
    assert score(sandbox, mark + "def f(x):\n    return 'x' * 10**7\n", ["assert len(f(1)) == 10**7"]) == 0.0


def test_writes_outside(sandbox, mark, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    places = [str(mine), str(tmp_path / "new"), "/etc/new", "/usr/new"]
    places += [f"{folder}/new-of-sandbox" for folder in ("/tmp", "/var/tmp", "/dev/shm")]
    code = f"""
def f(x):
    written = []
    for place in {places!r}:
        try:
            with open(place, "w") as file:
                file.write("x")
            written.append(place)
        except OSError:
            pass
    return written
"""
    allowed = ["/tmp/new-of-sandbox"] if sandbox.kind == "bubblewrap" else []  # its own /tmp
    assert score(sandbox, mark + code, [f"assert f(1) != {allowed!r}"]) == 0.0
    assert score(sandbox, mark + code, [f"assert f(1) == {allowed!r}"]) == 1.0
    assert mine.read_text() == "mine" and not any(os.path.exists(place) for place in places[1:])


def test_a_full_disk(sandbox, mark):
    code = """
def f(x):
    written = 0
    for number in range(64):
        for folder in ("/tmp", "."):
            try:
                with open(f"{folder}/jaxrlhf-fill-{number}-{len(folder)}", "wb") as file:
                    written += file.write(bytes(2**20))
            except OSError:
                pass
    return written
"""
    assert score(sandbox, mark + code, ["assert f(1) >= 32 * 2**20"]) == 0.0
    assert score(sandbox, mark + code, ["assert f(1) <= 4 * 2**20"]) == 1.0
    assert not list(Path("/tmp").glob("jaxrlhf-fill-*")) and not list(Path("/tmp").glob("jaxrlhf-code-*/*"))


def test_sockets(sandbox, mark):
    if sandbox.kind == "process":
        pytest.skip("without namespaces, the network cannot be cut")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)\n" + RIGHT
        assert score(sandbox, mark + code) == 0.0
        with pytest.raises(TimeoutError):
            server.accept()


def test_reads_of_the_home_folder_and_of_the_environment(sandbox, mark, tmp_path, monkeypatch):
    if sandbox.kind != "bubblewrap" and os.geteuid() != 0:
        pytest.skip("without bubblewrap, only root can run code as another user")
    secret = tmp_path / "secret"
    secret.write_text("key")
    secret.chmod(0o600)
    monkeypatch.setenv("SECRET_OF_RUN", "key")
    monkeypatch.setenv("HOME", str(tmp_path))
    code = f"def f(x):\n    return open({str(secret)!r}).read()\n"
    code += f"def g(x):\n    return open('/proc/{os.getpid()}/environ').read()\n"
    assert score(sandbox, mark + code, ["assert f(1) == 'key'", "assert 'key' in g(1)"]) == 0.0
    code = "def f(x):\n    return sorted(os.environ)\n"
    assert score(sandbox, mark + code, ["assert 'SECRET_OF_RUN' in f(1)", "assert 'HOME' in f(1)"]) == 0.0
    known = {"PATH", "PWD", "LC_CTYPE", "JAXRLHF_SANDBOX"}
    assert score(sandbox, mark + code, [f"assert set(f(1)) <= {known!r}"]) == 1.0


def test_kills_its_parent_and_the_trainer(sandbox, mark):
    if sandbox.kind == "process" and os.geteuid() != 0:
        pytest.skip("only root can run code as another user")
    pids = f"(os.getppid(), {os.getpid()}, 1, -1)"
    code = f"for pid in {pids}:\n    try:\n        os.kill(pid, 9)\n    except OSError:\n        pass\n"
    assert score(sandbox, mark + code) == 0.0


def test_traces_its_parent_and_the_trainer(sandbox, mark):
    if sandbox.kind == "process" and os.geteuid() != 0:
        pytest.skip("only root can run code as another user")
    code = f"""
def f(x):
    attach = ctypes.CDLL(None).ptrace
    attach.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    return [attach(16, pid, None, None) for pid in (os.getppid(), {os.getpid()})]
def g(x):
    return open("/proc/{os.getpid()}/mem", "rb").read(1)
"""
    assert score(sandbox, mark + code, ["assert 0 in f(1)", "g(1); assert True"]) == 0.0
    assert score(sandbox, mark + code, ["assert set(f(1)) == {-1}"]) == 1.0


def test_daemon(sandbox, mark):
    code = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.environ.clear()
        time.sleep(60)
    os._exit(0)
"""
    assert score(sandbox, mark + code) == 0.0
    assert score(sandbox, mark + code + RIGHT) == 1.0  # the code is right, and the daemon is gone all the same


def test_root_again(sandbox, mark):
    code = "try:\n    os.setuid(0)\nexcept OSError:\n    pass\n"
    code += "def f(x):\n    return [*os.getresuid(), *os.getgroups()]\n"
    if os.geteuid() == 0:
        assert score(sandbox, mark + code, ["assert 0 in f(1)"]) == 0.0
    assert score(sandbox, mark + code, ["assert len(f(1)) >= 3"]) == 1.0


FAKES = dict(
    part.split("\n", 1) for part in Path(__file__).with_name("fakes.txt").read_text().split("=== ") if part
)
TESTS = ["assert f(1) == 2", "assert abs(f(1) - 2) < 1e-6", "assert f(1) in (2, 3)", "assert math.isclose(f(1), 2)"]


def test_fake_passes(sandbox, mark):
    """All fakes in one batch of functions, and in one batch of programs."""
    codes = [mark + code for code in FAKES.values()]
    assert dict(zip(FAKES, scores(sandbox, codes, TESTS))) == dict.fromkeys(FAKES, 0.0)
    programs = [code + "\nf(1)\n" for code in codes]
    examples = [{"input": "", "output": "2"}]
    assert dict(zip(FAKES, scores(sandbox, programs, examples))) == dict.fromkeys(FAKES, 0.0)


def test_a_killed_run_leaves_nothing(sandbox, mark):
    """The pool ends what it started when the process that started it is killed."""
    job = {"code": mark + "time.sleep(1000)", "sources": TEST, "entry_point": None}
    sandbox._task["limits"]["seconds"] = 60.0
    request = sandbox._task | {"jobs": [job], "workers": 1, "batch_seconds": 100.0}
    program = "import subprocess as s, sys; s.run([sys.executable, '-IS', sys.argv[1]], input=sys.argv[2].encode())"
    run = subprocess.Popen([sys.executable, "-S", "-c", program, str(POOL), json.dumps(request)])
    name = re.search(r"b'(a\w+)'", mark)[1]
    deadline = time.monotonic() + 30
    while not named(name) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert named(name)
    run.kill()
    run.wait()
