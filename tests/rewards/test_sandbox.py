"""Attacks on the sandbox of code_tests. Each scores 0 within its limit, and leaves nothing behind."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxrlhf.config import CodeTestsRewardConfig
from jaxrlhf.errors import UserError
from jaxrlhf.rewards.code_tests import CodeTestsReward
from jaxrlhf.rewards.completions import Completions
from jaxrlhf.rewards.sandbox.running import POOL

LIMITS = {"memory_mb": 256, "disk_mb": 4, "output_mb": 1, "processes": 6, "workers": 4}
KINDS = ["bubblewrap", "namespaces", "process"]
ROOT = os.geteuid() == 0
RIGHT = "def f(x):\n    return x + 1\n"
TEST = ["assert f(1) == 2"]
WAIT = "time.sleep(1000)\n"


def sandbox_of(kind):
    """A reward with this kind of sandbox, or skips with the reason why it does not work here."""
    config = CodeTestsRewardConfig(sandbox="bubblewrap" if kind == "bubblewrap" else "process", **LIMITS)
    try:
        reward = CodeTestsReward(config, "ppo.reward")
    except UserError as error:
        pytest.skip(str(error))
    if KINDS.index(reward.sandbox.kind) > KINDS.index(kind):
        pytest.skip(f"{kind} does not work here")
    reward.sandbox.task["kind"] = reward.sandbox.kind = kind
    return reward


def scores(reward, codes, tests, seconds):
    reward.sandbox.task["limits"]["seconds"] = seconds
    completions = Completions(None, ["p"] * len(codes), [{"tests": one} for one in tests], None)
    completions.__dict__["texts"] = codes
    return reward(completions).tolist()


def named(mark):
    """The running processes with this name. Children have the name of their parent."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == mark and ") Z " not in path.with_name("stat").read_text():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def gone(mark):
    deadline = time.monotonic() + 10
    while named(mark) and time.monotonic() < deadline:  # a killed process takes a moment to disappear
        time.sleep(0.05)
    return named(mark) == []


def marked(mark):
    """Code that gives its process a name."""
    return f"import ctypes, os, sys, time, threading\nctypes.CDLL(None).prctl(15, b'{mark}', 0, 0, 0)\n"


# Each attack: code, and tests that a successful attack would pass. {secret}, {pid}, {port}: of this test.
ATTACKS = {
    "fork bomb": (
        """
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
""",
        ["assert f(1) >= 20"],
    ),
    "10 GB": ("x = bytearray(10 * 2**30)\n" + RIGHT, TEST),
    "10 GB in a function": ("def f(x):\n    return len(bytearray(10 * 2**30))\n", ["assert f(1) == 10 * 2**30"]),
    "endless output of a program": (
        "while True:\n    print('x' * 1000)\n    print('x' * 1000, file=sys.stderr)\n",
        [{"input": "", "output": "x"}],
    ),
    "a long result": ("def f(x):\n    return 'x' * 10**7\n", ["assert len(f(1)) == 10**7"]),
    "writes outside": (
        """
def f(x):
    for place in ("{secret}", "{secret}-new", "/etc/new", "/usr/new", "/var/tmp/new-of-test", "/dev/shm/new-of-test"):
        try:
            with open(place, "w") as file:
                file.write("x")
            return True
        except OSError:
            pass
""",
        ["assert f(1)"],
    ),
    "a full disk": (
        """
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
""",
        ["assert f(1) > 4 * 2**20"],
    ),
    "sockets": ("import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)\n" + RIGHT, TEST),
    "home folder": ("def f(x):\n    return open('{secret}').read()\n", ["assert f(1) == 'key'"]),
    "environment": ("def f(x):\n    return sorted(os.environ)\n", ["assert {'HOME', 'SECRET_OF_RUN'} & set(f(1))"]),
    "environment of the run": (
        "def f(x):\n    return open('/proc/{pid}/environ').read()\n",
        ["assert 'SECRET_OF_RUN' in f(1)"],
    ),
    "kills its parent and the run": (
        "for pid in (os.getppid(), {pid}, -1):\n    try:\n        os.kill(pid, 9)\n    except OSError:\n        pass\n",
        TEST,
    ),
    "traces its parent and the run": (
        """
def f(x):
    trace = ctypes.CDLL(None).ptrace
    trace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    return [trace(16, pid, None, None) for pid in (os.getppid(), {pid})]
""",
        ["assert 0 in f(1)"],
    ),
    "memory of the run": ("def f(x):\n    return open('/proc/{pid}/mem', 'rb').read(0)\n", ["assert f(1) == b''"]),
    "daemon": (
        """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.environ.clear()
        time.sleep(60)
    os._exit(0)
""",
        TEST,
    ),
    "root again": (
        "try:\n    os.setuid(0)\nexcept OSError:\n    pass\ndef f(x):\n    return [*os.getresuid(), *os.getgroups()]\n",
        ["assert 0 in f(1)"],
    ),
}
ENDLESS = {
    "endless loop": "while True:\n    pass\n" + RIGHT,
    "sleep": WAIT + RIGHT,
    "long computation": "10 ** 10 ** 10\n" + RIGHT,
    "output without a reader": "while True:\n    print('x' * 1000)\n" + RIGHT,
    "threads": "for _ in range(200):\n    threading.Thread(target=time.sleep, args=(60,)).start()\n" + RIGHT,
    "exponential forks": "for _ in range(7):\n    try:\n        os.fork()\n    except OSError:\n        pass\n" + WAIT,
}
FAKES = dict(part.split("\n", 1) for part in Path(__file__).with_name("fakes.txt").read_text().split("=== ") if part)
FAKE_TESTS = ["assert f(1) == 2", "assert abs(f(1) - 2) < 1e-6", "assert f(1) in {2}", "assert math.isclose(f(1), 2)"]
NO_NAMESPACES = {"sockets"}
SAME_USER = NO_NAMESPACES | {"home folder", "environment of the run", "kills its parent and the run"}
SAME_USER |= {"traces its parent and the run", "memory of the run", "writes outside", "a full disk"}


def weak(kind, attack):
    """Whether this kind of sandbox is documented not to stop the attack."""
    if kind == "process":
        return attack in (NO_NAMESPACES if ROOT else SAME_USER)
    return kind == "namespaces" and not ROOT and attack in ("home folder", "writes outside", "a full disk")


@pytest.fixture(scope="module", params=KINDS)
def outcome(request, tmp_path_factory):
    """The scores of all attacks by name. They run in two batches, after that nothing of them may be left."""
    kind = request.param
    reward = sandbox_of(kind)
    folder, mark = tmp_path_factory.mktemp("home"), f"a{os.getpid()}{KINDS.index(kind)}"
    secret = folder / "secret"
    secret.write_text("key")
    secret.chmod(0o600)
    result = {"kind": kind, "mark": mark, "secret": secret}
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as server:
        patch.setenv("SECRET_OF_RUN", "key")
        patch.setenv("HOME", str(folder))
        places = {"{secret}": str(secret), "{pid}": str(os.getpid()), "{port}": str(server.getsockname()[1])}
        codes, tests = {}, {}
        for name, (code, test) in ATTACKS.items():
            if weak(kind, name):
                continue
            for word, place in places.items():
                code = code.replace(word, place)
            codes[name], tests[name] = marked(mark) + code, test
        for name, code in FAKES.items():
            codes[f"fake: {name}"], tests[f"fake: {name}"] = marked(mark) + code, FAKE_TESTS
            codes[f"program: {name}"], tests[f"program: {name}"] = marked(mark) + code + "\nf(1)\n", [
                {"input": "", "output": "2"}
            ]
        codes["right"], tests["right"] = marked(mark) + RIGHT, TEST
        codes["half right"], tests["half right"] = marked(mark) + RIGHT, [*TEST, "assert f(1) == 3"]
        codes["right, with a daemon"], tests["right, with a daemon"] = codes["daemon"] + RIGHT, TEST
        result["scores"] = dict(zip(codes, scores(reward, list(codes.values()), list(tests.values()), 60.0)))
        began = time.monotonic()
        endless = [marked(mark) + code for code in ENDLESS.values()]
        result["endless"] = dict(zip(ENDLESS, scores(reward, endless, [TEST] * len(endless), 1.5)))
        result["seconds"] = time.monotonic() - began
        server.settimeout(0.1)
        try:
            server.accept()
            result["connected"] = True
        except TimeoutError:
            result["connected"] = False
    return result


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_fails(outcome, attack):
    if weak(outcome["kind"], attack):
        pytest.skip("the documentation says that this sandbox does not stop it")
    assert outcome["scores"][attack] == 0.0


@pytest.mark.parametrize("fake", FAKES)
def test_a_fake_pass_scores_0(outcome, fake):
    assert (outcome["scores"][f"fake: {fake}"], outcome["scores"][f"program: {fake}"]) == (0.0, 0.0)


def test_right_code_passes_beside_the_attacks(outcome):
    names = ("right", "half right", "right, with a daemon")
    assert [outcome["scores"][name] for name in names] == [1.0, 0.5, 1.0]


@pytest.mark.parametrize("attack", ENDLESS)
def test_what_never_ends_is_ended(outcome, attack):
    assert outcome["endless"][attack] == 0.0
    assert outcome["seconds"] < 30  # two rounds of 1.5 s; this machine may be busy


def test_nothing_is_left(outcome):
    assert gone(outcome["mark"])
    assert outcome["secret"].read_text() == "key" and not Path(f"{outcome['secret']}-new").exists()
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        assert not list(Path(folder).glob("jaxrlhf-fill-*")) and not list(Path(folder).glob("new-of-test"))
    assert not outcome["connected"]


def test_a_killed_run_leaves_nothing(outcome):
    """The pool ends what it started when the process that started it is killed."""
    reward, mark = sandbox_of(outcome["kind"]), f"b{os.getpid()}{KINDS.index(outcome['kind'])}"
    reward.sandbox.task["limits"]["seconds"] = 100.0
    job = {"code": marked(mark) + WAIT, "sources": TEST, "entry_point": None}
    request = reward.sandbox.task | {"jobs": [job], "workers": 1, "batch_seconds": 200.0}
    program = "import subprocess as s, sys; s.run([sys.executable, '-IS', sys.argv[1]], input=sys.argv[2].encode())"
    run = subprocess.Popen([sys.executable, "-S", "-c", program, str(POOL), json.dumps(request)])
    deadline = time.monotonic() + 60
    while not named(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert named(mark)
    run.kill()
    run.wait()
    assert gone(mark)
