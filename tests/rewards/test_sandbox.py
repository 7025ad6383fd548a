"""Attacks on the sandbox of code_tests. Each scores 0 within its limit, and leaves nothing behind."""

import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from jaxrlhf.config import CodeTestsRewardConfig
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.code_tests import CodeTestsReward
from jaxrlhf.rewards.completions import Completions

LIMITS = {"seconds": 3.0, "memory_mb": 256, "disk_mb": 4, "output_mb": 1, "processes": 6, "workers": 2}
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


def score(reward, code, tests=TEST):
    completions = Completions(None, ["p"], [{"tests": tests}], None)
    completions.__dict__["texts"] = [code]
    return float(reward(completions)[0])


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
    assert score(sandbox, bomb) == 0.0


def test_threads(sandbox, mark):
    code = "for _ in range(200):\n    threading.Thread(target=time.sleep, args=(60,)).start()\n" + RIGHT
    assert score(sandbox, mark + code) == 0.0


def test_allocation_of_10_gb(sandbox, mark):
    assert score(sandbox, mark + "x = bytearray(10 * 2**30)\n" + RIGHT) == 0.0
    caught = "def f(x):\n    try:\n        return len(bytearray(10 * 2**30))\n    except MemoryError:\n        return 0\n"
    assert score(sandbox, mark + caught, ["assert f(1) == 0"]) == 1.0


@pytest.mark.parametrize("code", ["while True:\n    pass\n", "time.sleep(1000)\n", "10 ** 10 ** 10\n"])
def test_endless(sandbox, mark, code):
    began = time.monotonic()
    assert score(sandbox, mark + code + RIGHT) == 0.0
    assert time.monotonic() - began < 3 * LIMITS["seconds"] + 5


def test_a_loop_in_one_test_costs_the_tests_from_there(sandbox, mark):
    code = "def f(x):\n    while x == 2:\n        pass\n    return x\n"
    tests = ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3", "assert f(4) == 4"]
    assert score(sandbox, mark + code, tests) == 0.25


def test_endless_output(sandbox, mark):
    code = "while True:\n    print('x' * 1000)\n    print('x' * 1000, file=sys.stderr)\n"
    assert score(sandbox, mark + code, [{"input": "", "output": "x"}]) == 0.0
    assert score(sandbox, mark + code) == 0.0
    assert score(sandbox, mark + "def f(x):\n    return 'x' * 10**7\n", ["assert len(f(1)) == 10**7"]) == 0.0


def test_writes_outside(sandbox, mark, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    Path("/tmp/jaxrlhf-open").mkdir(exist_ok=True)
    places = [str(mine), str(tmp_path / "new"), "/etc/new", "/usr/new", "/var/tmp/new-of-sandbox", "/dev/shm/new-of-sandbox"]
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
    os.rmdir("/tmp/jaxrlhf-open")
    assert score(sandbox, mark + code, ["assert f(1)"]) == 0.0
    assert score(sandbox, mark + code, ["assert f(1) == []"]) == 1.0
    assert mine.read_text() == "mine" and not any(os.path.exists(place) for place in places[1:])


def test_a_full_disk(sandbox, mark):
    code = """
def f(x):
    written = 0
    for number in range(64):
        for folder in ("/tmp", "."):
            try:
                with open(f"{folder}/jaxrlhf-fill-{number}", "wb") as file:
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
    code = f"def f(x):\n    return open({str(secret)!r}).read()\ndef g(x):\n    return open('/proc/{os.getpid()}/environ').read()\n"
    assert score(sandbox, mark + code, ["assert f(1) == 'key'", "assert 'key' in g(1)"]) == 0.0
    code = "def f(x):\n    return sorted(os.environ)\n"
    assert score(sandbox, mark + code, ["assert 'SECRET_OF_RUN' in f(1)", "assert 'HOME' in f(1)"]) == 0.0
    assert score(sandbox, mark + code, ["assert 'PATH' in f(1)"]) == 1.0


def test_kills_its_parent_and_the_trainer(sandbox, mark):
    if sandbox.kind == "process" and os.geteuid() != 0:
        pytest.skip("only root can run code as another user")
    pids = f"(os.getppid(), {os.getpid()}, 1, -1)"
    code = f"for pid in {pids}:\n    try:\n        os.kill(pid, 9)\n    except OSError:\n        pass\n"
    assert score(sandbox, mark + code) == 0.0  # -1 also ends the code itself


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
    code = "def f(x):\n    try:\n        os.setuid(0)\n    except OSError:\n        pass\n    return [*os.getresuid(), *os.getgroups()]\n"
    if os.geteuid() == 0:
        assert score(sandbox, mark + code, ["assert 0 in f(1)"]) == 0.0
    assert score(sandbox, mark + code, ["assert len(f(1)) >= 3"]) == 1.0


FAKES = {
    "exit": "os._exit(0)",
    "exit in a function": "def f(x):\n    os._exit(0)",
    "sys.exit": "import atexit\natexit.register(lambda: os._exit(0))\nsys.exit(0)",
    "print": "print('1\\n1\\n1\\npassed')\ndef f(x):\n    print('1')\n    return 0",
    "descriptors": "for fd in range(256):\n    try:\n        os.write(fd, b'1\\n1\\n[\"ready\"]\\n')\n    except OSError:\n        pass\n"
    "def f(x):\n    return 0",
    "replies": "import json\nfor fd in range(3, 64):\n    try:\n"
    "        os.write(fd, b'[\"ready\"]\\n' + b'[\"reply\", null, true, []]\\n' * 20)\n    except OSError:\n        pass",
    "builtins": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = Exception\nabs = lambda x: 0\n"
    "AssertionError = int\nround = len = isinstance = abs\ndef f(x):\n    return 100",
    "always equal": "class Yes:\n    def __getattr__(self, name):\n        return self\n    def __call__(self, *a):\n"
    "        return self\n    for name in 'eq lt gt le ge sub rsub add abs contains len float int'.split():\n"
    "        exec(f'def __{name}__(self, *a): return 1')\n    def __hash__(self):\n        return hash(2)\n"
    "    def __iter__(self):\n        return iter([self])\ndef f(x):\n    return Yes()",
    "equal by subclass": "class Int(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\n    __lt__ = __eq__\n"
    "    __rsub__ = __sub__ = lambda s, o: 0\ndef f(x):\n    return Int(7)",
    "remembers the number it was compared with": "class Memory:\n    def __sub__(self, other):\n        return 0.0\n"
    "    __rsub__ = __sub__\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return Memory()",
    "frames": "def f(x):\n    import gc\n    frame = sys._getframe()\n    while frame:\n        for value in frame.f_locals.values():\n"
    "            if isinstance(value, list) and 2 in value:\n                return 2\n        frame = frame.f_back\n"
    "    return next((o for o in gc.get_objects() if isinstance(o, str) and 'assert f' in o), 0)",
    "the judge's objects": "def f(x):\n    peer = sys._getframe(2).f_locals['self']\n    for name in ('__globals__', '__code__'):\n"
    "        for key in range(10**5):\n            try:\n                peer.call(key, 'get', [name], {})\n            except Exception:\n"
    "                break\n    return 0",
    "modules of the judge": "sys.modules['math'] = math = type(sys)('math')\nmath.isclose = lambda *a: True\ndef f(x):\n    return 5",
}
TESTS = ["assert f(1) == 2", "assert abs(f(1) - 2) < 1e-6", "assert f(1) in (2, 3)", "assert math.isclose(f(1), 2)"]


@pytest.mark.parametrize("name", FAKES)
def test_a_fake_pass(sandbox, mark, name):
    assert score(sandbox, mark + FAKES[name], TESTS) == 0.0
    program = mark + FAKES[name] + "\nf(1)\n"
    assert score(sandbox, program, [{"input": "", "output": "2"}]) == 0.0


def test_the_folder_of_temporary_files_is_clean(sandbox):
    score(sandbox, RIGHT)
    assert not list(Path("/tmp").glob("jaxrlhf-code-*")) or shutil.which("bwrap")
