"""Runs a batch of jobs in sandboxes. This file is a program of its own that imports only the standard library.

The training process starts the pool once per batch and writes one JSON object to its input. The pool writes one JSON
line per job. It is small, so that starting many processes does not copy the page tables of a training process. It
starts each sandboxed process, kills it and all that it left, and is itself killed if the training process ends.

A sandbox is the first of these that works:

bubblewrap  no network; a read-only root folder that holds only the interpreter and libraries; namespaces of its own for
            processes, IPC and host name; a tmpfs of bounded size at /tmp
namespaces  as `process`, and by `unshare` also no network, and namespaces of its own for processes and IPC
process     a process with limits, in an empty folder. It cannot write to files.

Each tested code and each judge has a user id of its own if the pool runs as root. Else they have the user id of the
pool, and without namespaces nothing protects the files and processes of this user.
"""

import concurrent.futures
import contextlib
import ctypes
import json
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# The program of a sandboxed process as texts, because the process may not be able to read these files.
FILES = dict.fromkeys(("jaxrlhf", "jaxrlhf.rewards", "jaxrlhf.rewards.sandbox"), "")
for _name in ("remote_objects", "small_pytest", "unit_tests", "inside"):
    FILES[f"jaxrlhf.rewards.sandbox.{_name}"] = Path(__file__).with_name(f"{_name}.py").read_text()
LOADER = """import json, sys, types
for name, text in json.loads(sys.argv.pop()).items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)
module.main()
"""
LIBRARIES = ("/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
WRITABLE = ("/tmp", "/var/tmp", "/dev/shm")
START = 20.0  # longest time of the start of a sandbox when it is chosen, in seconds


class Sandbox:
    """A way to start a confined process. `kind` is "bubblewrap", "namespaces" or "process"."""

    def __init__(self, kind, python, limits, root):
        self.kind, self.python, self.limits, self.root = kind, python, limits, root
        self.running = {}  # process -> (user id, folder)
        self.stopped = False

    def start(self, role, text, uid, folder, fds=(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **task):
        """Starts `inside` in a role, with the text as its input. Returns the process."""
        if self.stopped:
            raise RuntimeError("the run has ended")
        with tempfile.TemporaryFile() as file:  # not in the argument list, which other processes can read
            file.write(text.encode(errors="replace"))
            file.seek(0)
            task |= {"role": role, "input": file.fileno(), "uid": uid if self.root else None, "cpu_s": self._cpu()}
            task |= {"memory_mb": self.limits["memory_mb"], "limit": self.limits["output_mb"] * 2**20}
            # Without a private folder, nothing bounds the number of files. So no file can be longer than 0 bytes.
            task["disk_mb"] = self.limits["disk_mb"] if self.kind == "bubblewrap" else 0
            task["processes"] = self.limits["processes"] + 1 + self._others()
            inside = [self.python, "-I", "-S", "-B", "-c", LOADER, json.dumps(task), json.dumps(FILES)]
            process = subprocess.Popen(
                [*self._prefix(), *inside],
                stdin=stdin, stdout=stdout, stderr=subprocess.PIPE if role == "probe" else subprocess.DEVNULL,
                cwd=folder, env={"PATH": "/usr/bin:/bin", "JAXRLHF_SANDBOX": os.path.basename(folder)},
                pass_fds=(file.fileno(), *fds), start_new_session=True,
            )  # fmt: skip
            self.running[process] = (uid, folder)
            return process

    def _cpu(self):
        return int(self.limits["seconds"]) + 2

    def _others(self):
        """Returns how many processes and threads count towards the limit besides those of the tested code."""
        if self.root or self.kind != "process":
            return 1
        return sum(_threads(pid) for pid in _processes(os.getuid()))

    def _prefix(self):
        if self.kind == "bubblewrap":
            return ["bwrap", *self._mounts()]
        if self.kind == "namespaces":
            user = [] if self.root else ["--user", "--map-current-user"]
            spaces = ["--net", "--ipc", "--pid", "--mount-proc", "--fork", "--kill-child=KILL", "--"]
            return ["setpriv", "--pdeathsig", "KILL", "unshare", *user, *spaces]
        return []

    def _mounts(self):
        python = os.path.realpath(self.python)
        prefix = os.path.dirname(os.path.dirname(python))
        own = [python] if prefix in ("/usr", "/") else [os.path.join(prefix, "lib"), python]
        places = [place for place in dict.fromkeys([*LIBRARIES, *own, self.python]) if os.path.exists(place)]
        # As root, bubblewrap mounts with the rights of root, and `inside` then gives up root. So an interpreter in a
        # folder of root works.
        user = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if self.root else ["--unshare-user"]
        parents = dict.fromkeys(str(p) for place in places for p in reversed(Path(place).parents) if str(p) != "/")
        spaces = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        return [
            *user, *spaces, "--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox",
            *(word for parent in parents for word in ("--perms", "0755", "--dir", parent)),
            *(word for place in places for word in ("--ro-bind", place, place)),
            "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev",
            "--perms", "1777", "--size", str(self.limits["disk_mb"] * 2**20), "--tmpfs", "/tmp",
            "--remount-ro", "/", "--chdir", "/tmp",
        ]  # fmt: skip

    def end(self, process):
        """Kills the process and all that it started, and removes their files."""
        if process not in self.running:
            return
        uid, folder = self.running[process]
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if self.root:
            _kill_user(uid)
            _remove_files(uid)
        else:
            _kill_marked(os.path.basename(folder))
        shutil.rmtree(folder, ignore_errors=True)
        self.running.pop(process, None)


def _kill_user(uid):
    """Kills all processes of a user id.

    Only a signal to all of them at once ends a fork bomb. Killing the processes of a list could also miss a daemon: its
    parent may fork after the list is read, and end by itself. The signal reaches this daemon too.
    """
    while True:
        pid = os.fork()
        if pid == 0:
            try:
                os.setresuid(uid, uid, uid)
                os.kill(-1, signal.SIGKILL)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        if not any(_processes(uid)):
            return
        time.sleep(0.01)


def _kill_marked(mark):
    """Kills the processes of this user that have the mark in their environment, such as daemons in other sessions."""
    empty = 0
    while empty < 3:  # one list may miss a process, see `_kill_user`
        found = [pid for pid in _processes(os.getuid()) if f"JAXRLHF_SANDBOX={mark}".encode() in _read(pid, "environ")]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        empty = 0 if found else empty + 1


def _remove_files(uid):
    for folder in WRITABLE:
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(folder)):
                if entry.stat(follow_symlinks=False).st_uid == uid:
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        os.unlink(entry.path)


def _processes(uid):
    """Yields the ids of the running processes of a user id."""
    return (pid for pid, owner in _owners() if owner == uid)


def _owners():
    """Yields (process id, user id) of each running process."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            status = dict(line.split(b":", 1) for line in _read(name, "status").splitlines() if b":" in line)
            if b"Uid" in status and b"Z" not in status.get(b"State", b""):
                yield int(name), int(status[b"Uid"].split()[0])


def _threads(pid):
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/task"))
    return 0


def _read(pid, name):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


# ---------------------------------------------------------------- which sandbox works


def choose(wanted, python, limits):
    """Returns (first sandbox that works, problems of those tried before). Raises RuntimeError if none works."""
    root, problems = os.geteuid() == 0, []
    pythons = [python] if python else [sys.executable, "/usr/bin/python3"]
    kinds = ["bubblewrap", "namespaces", "process"]
    for kind in {"auto": kinds, "process": kinds[1:]}.get(wanted, [wanted]):
        for path in dict.fromkeys(map(os.path.realpath, pythons)):
            sandbox = Sandbox(kind, path, limits, root)
            problem = _probe(sandbox)
            if problem is None:
                return sandbox, problems
            problems.append(f"{kind}: {problem}")
    raise RuntimeError("; ".join(dict.fromkeys(problems)))


def _probe(sandbox):
    """Returns None if the sandbox runs a program without root's rights, else the reason."""
    uid, folder = free_uids(1)[0], new_folder()
    try:
        process = sandbox.start("probe", "", uid, folder, stdout=subprocess.PIPE)
    except OSError as error:
        os.rmdir(folder)
        return str(error)[:200]
    try:
        output, errors = process.communicate(timeout=START)
        if process.returncode == 0 and json.loads(output)["uid"] == (uid if sandbox.root else os.getuid()):
            return None
        lines = errors.decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else f"it ended with status {process.returncode}"
    except subprocess.TimeoutExpired:
        return "it did not start in time"
    except ValueError as error:
        return str(error)[:200]
    finally:
        sandbox.end(process)


def new_folder():
    """Returns a new, empty folder that others can enter but not write to."""
    folder = tempfile.mkdtemp(prefix="jaxrlhf-code-")
    os.chmod(folder, 0o555)
    return folder


def free_uids(count):
    """Returns user ids without an account and without processes. Other pools on this machine choose other ids."""
    if os.geteuid() != 0:
        return [os.getuid()] * count
    mapped = map(str.split, Path("/proc/self/uid_map").read_text().splitlines())
    ends = [int(start) + int(size) for start, _, size in mapped]
    low, high = (2**20, 2**31) if max(ends) >= 2**31 else (min(20_000, max(ends) // 2), min(max(ends), 65_000))
    uid, found = low + (os.getpid() * 1024) % max(high - low - 2 * count, 1), []
    taken = {owner for _, owner in _owners()}
    while len(found) < count and uid < high:
        if uid not in taken and not _has_account(uid):
            found.append(uid)
        uid += 1
    if len(found) < count:
        raise RuntimeError("there are no free user ids to run code with other rights than root's")
    return found


def _has_account(uid):
    try:
        return pwd.getpwuid(uid) is not None
    except KeyError:
        return False


# ---------------------------------------------------------------- jobs


def run_job(sandbox, job, uids):
    """Returns {"passed", "total"} of one completion, or {"output", "status"} of a job with a `program`."""
    deadline = time.monotonic() + sandbox.limits["seconds"]
    if job.get("program") is not None:
        output, status = run_program(sandbox, job["program"], "", uids[0], deadline)
        return {"output": output.decode(errors="replace"), "status": status}
    if job.get("examples") is None:
        passed, total = _run_tests(sandbox, job, uids, deadline)
        return {"passed": passed, "total": total}
    passed = 0
    for example in job["examples"]:
        if time.monotonic() >= deadline:
            break
        passed += _run_example(sandbox, job["code"], example, uids[0], deadline)
    return {"passed": passed, "total": len(job["examples"])}


def _run_tests(sandbox, job, uids, deadline):
    """Runs the code and the judge as two processes with a socket between them. Only the judge has the verdict pipe."""
    verdicts, theirs = os.pipe()
    code_end, judge_end = socket.socketpair()
    tests = json.dumps({"sources": job["sources"], "entry_point": job.get("entry_point")})
    started = []
    try:
        with os.fdopen(theirs, "wb"), code_end, judge_end:
            fd = code_end.fileno()
            started.append(sandbox.start("code", job["code"], uids[0], new_folder(), [fd], socket=fd))
            fds = {"socket": judge_end.fileno(), "verdicts": theirs}
            started.append(sandbox.start("judge", tests, uids[1], new_folder(), list(fds.values()), **fds))
        total, *lines = _read_until(verdicts, deadline, 2**20)[0].decode().split() or ["0"]
        return sum(line == "1" for line in lines[: int(total)]), int(total)
    finally:
        os.close(verdicts)
        for process in started:
            sandbox.end(process)


def _run_example(sandbox, code, example, uid, deadline):
    """Whether the code, run as a program, ends with status 0 and writes the expected output."""
    written, status = run_program(sandbox, code, example["input"], uid, deadline)
    if status != 0:
        return False
    texts = written.decode(errors="replace"), example["output"]
    found, wanted = ([line.rstrip() for line in text.rstrip().splitlines()] for text in texts)
    return found == wanted


def run_program(sandbox, code, text, uid, deadline):
    """Runs the code as a program with the text as its input. Returns (output, exit status).

    The status is None if the program did not end before the deadline, or wrote more than the limit.
    """
    output, theirs = os.pipe()
    with os.fdopen(theirs, "wb"), tempfile.TemporaryFile() as given:
        given.write(text.encode(errors="replace"))
        given.seek(0)
        process = sandbox.start("script", code, uid, new_folder(), stdin=given, stdout=theirs)
    try:
        written, ended = _read_until(output, deadline, sandbox.limits["output_mb"] * 2**20)
        return written, process.wait(max(deadline - time.monotonic(), 0.01)) if ended else None
    except subprocess.TimeoutExpired:
        return written, None
    finally:
        os.close(output)
        sandbox.end(process)


def _read_until(fd, deadline, limit):
    """Returns (bytes, whether the writers closed the pipe before the deadline and within `limit` bytes)."""
    data = bytearray()
    while (left := deadline - time.monotonic()) > 0 and len(data) <= limit:
        if select.select([fd], [], [], left)[0]:
            part = os.read(fd, 65536)
            if not part:
                return bytes(data), True
            data += part
    return bytes(data), False


def run_batch(sandbox, jobs, workers, seconds, write):
    """Runs the jobs with several workers. A job that does not end before the batch's time has no result."""
    stop = time.monotonic() + seconds
    uids = free_uids(2 * workers)
    pairs = [uids[2 * i : 2 * i + 2] for i in range(workers)]
    lock = threading.Lock()

    def work(number):
        with lock:
            pair = pairs.pop()
        try:
            if time.monotonic() + sandbox.limits["seconds"] <= stop:
                result = run_job(sandbox, jobs[number], pair)
                with lock:
                    write({"job": number} | result)
        finally:
            with lock:
                pairs.append(pair)

    with concurrent.futures.ThreadPoolExecutor(workers) as executor:
        list(executor.map(work, range(len(jobs))))


def main():
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG: ends with the training process
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: a process of the same user cannot open its pipes
    os.umask(0o022)
    task = json.loads(sys.stdin.buffer.read())
    sandbox = None

    def stop(*_):
        if sandbox is not None:
            sandbox.stopped = True
            for process in list(sandbox.running):
                sandbox.end(process)
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)

    def write(line):
        print(json.dumps(line), flush=True)

    try:
        if task["kind"] is None:
            chosen, problems = choose(task["sandbox"], task["python"], task["limits"])
            write({"kind": chosen.kind, "python": chosen.python, "root": chosen.root, "problems": problems})
        else:
            sandbox = Sandbox(task["kind"], task["python"], task["limits"], os.geteuid() == 0)
            run_batch(sandbox, task["jobs"], task["workers"], task["batch_seconds"], write)
    except RuntimeError as error:
        write({"error": str(error)})


if __name__ == "__main__":
    main()
