"""The program of a sandboxed process. `pool` passes its text to `python -c`. It uses the standard library only.

There are three roles. "script" runs the code as a program with standard input and output. "code" and "judge" are two
processes that run unit tests: "code" holds the tested code, "judge" holds the tests. The judge calls the tested code
through a socket, see `Remote`. Arguments and results are plain data, and the judge compares them. So the tested code
never has an expected value, and no object of it takes part in a comparison with one. Only the judge can write verdicts.
"""

import ast
import builtins
import contextlib
import decimal
import fractions
import importlib
import inspect
import json
import operator
import os
import resource
import signal
import socket
import sys
import types

DATA = (bool, int, float, str, type(None))
OPERATORS = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift"]
COMPARISONS = {"eq": False, "ne": True, "lt": None, "le": None, "gt": None, "ge": None}
BUILTINS = ["len", "iter", "next", "str", "repr", "bool", "hash", "int", "float", "reversed", "abs"]
FORWARDED = [*BUILTINS, "getitem", "setitem", "delitem", "neg", "pos", "invert", "enter", "exit", "instancecheck"]



# ---------------------------------------------------------------- limits


def confine(task):
    """Gives up root and applies the limits. After this, nothing that the process starts can get more."""
    import ctypes

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
    if 0 in (*os.getresuid(), *os.getresgid(), *os.getgroups()):
        raise SystemExit("the sandbox still has the rights of root")
    os.stat(os.__file__)  # fails if the user id cannot read the interpreter
    os.listdir(os.path.dirname(os.__file__))


# ---------------------------------------------------------------- messages between judge and code


class Peer:
    """One end of the socket. Each end can call the other while it waits for a result."""

    def __init__(self, fd, limit):
        self.socket, self.limit, self.buffer = socket.socket(fileno=fd), limit, bytearray()
        self.objects = {}  # number -> object of this end that the other end refers to

    def send(self, message):
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self):
        while b"\n" not in self.buffer:
            part = self.socket.recv(65536)
            self.buffer += part
            if not part or len(self.buffer) > self.limit:
                raise ConnectionError("the tested code ended or sent too much")
        line, _, rest = self.buffer.partition(b"\n")
        self.buffer = rest
        return json.loads(line)

    def call(self, *request):
        """Sends a request, serves requests of the other end, and returns the reply."""
        self.send(["request", *request])
        while True:
            kind, *parts = self.receive()
            if kind == "reply":
                return parts
            self.serve(parts)

    def serve(self, request):
        try:
            self.send(["reply", None, *self.answer(*request)])
        except ConnectionError:
            raise
        except BaseException as error:
            names = [cls.__name__ for cls in type(error).__mro__]
            self.send(["reply", names, str(error)[:1000], []])

    def write(self, value):
        """Returns the value as JSON. What is no plain data stays here, and the other end gets its number."""
        if type(value) in DATA:
            return value if type(value) is not int or abs(value) < 2**53 else {"int": hex(value)}
        for cls, name in ((list, "list"), (tuple, "tuple"), (set, "set"), (frozenset, "frozenset")):
            if type(value) is cls or (type(value).__module__ == "collections" and isinstance(value, cls)):
                return {name: [self.write(item) for item in value]}
        if type(value) is dict or (type(value).__module__ == "collections" and isinstance(value, dict)):
            return {"dict": [[self.write(key), self.write(item)] for key, item in value.items()]}
        if type(value).__module__ == "collections" and type(value).__name__ == "deque":
            return {"list": [self.write(item) for item in value]}
        if type(value) is bytes:
            return {"bytes": value.hex()}
        if type(value) is complex:
            return {"complex": [value.real, value.imag]}
        if type(value) in (fractions.Fraction, decimal.Decimal):
            return {type(value).__name__: str(value)}
        if isinstance(value, Remote) and object.__getattribute__(value, "_peer") is self:
            return {"yours": object.__getattribute__(value, "_key")}
        self.objects[id(value)] = value
        return {"mine": id(value)}

    def read(self, value):
        if not isinstance(value, dict):
            return value
        ((name, content),) = value.items()
        if name in ("list", "tuple", "set", "frozenset"):
            return getattr(builtins, name)([self.read(item) for item in content])
        if name == "dict":
            return {self.read(key): self.read(item) for key, item in content}
        if name == "int":
            return int(content, 16)
        if name == "bytes":
            return bytes.fromhex(content)
        if name == "complex":
            return complex(*content)
        if name in ("Fraction", "Decimal"):
            return (fractions.Fraction if name == "Fraction" else decimal.Decimal)(content)
        if name == "yours":
            return self.named(content)
        return Remote(self, content)

    def named(self, key):
        return self.objects[key]

    def answer(self, key, method, args, kwargs):
        """Calls an object of this end. Returns [result, lists, dicts and sets among the arguments after the call]."""
        args = [self.read(arg) for arg in args]
        kwargs = {name: self.read(arg) for name, arg in kwargs.items()}
        result = self.apply(self.named(key), method, args, kwargs)
        changed = [self.write(arg) if type(arg) in (list, dict, set) else None for arg in args]
        return self.write(result), changed

    def apply(self, target, method, args, kwargs):
        """Applies a method to an object of this end. This end is the judge, so only the tests' own objects can be used.

        Attributes of a function or a generator would lead to the names of the judge.
        """
        own = type(target).__module__ == "tests" and isinstance(args[0] if args else None, str)
        if method == "call":
            return target(*args, **kwargs)
        if method in ("get", "set") and own and not args[0].startswith("_"):
            return (getattr if method == "get" else setattr)(target, *args)
        raise TypeError("the tested code can only call functions of the tests, and use attributes of their objects")


class Remote:
    """An object of the other process. Calls, attributes and operators are sent there.

    Comparisons and operators are sent only if both sides are objects of the other process. Otherwise the other process
    would get an expected value, as in `abs(f(2) - 1.5) < 1e-6`. For the same reason `in` is not sent: Python compares
    the items here.
    """

    def __init__(self, peer, key):
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_key", key)

    def __call__(self, *args, **kwargs):
        return _send(self, "call", args, kwargs)

    def __getattr__(self, name):
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)
        return _send(self, "get", [name])

    def __setattr__(self, name, value):
        _send(self, "set", [name, value])


def _send(remote, method, args=(), kwargs=None):
    peer, key = object.__getattribute__(remote, "_peer"), object.__getattribute__(remote, "_key")
    written = [peer.write(arg) for arg in args]
    error, result, changed = peer.call(
        key, method, written, {name: peer.write(arg) for name, arg in (kwargs or {}).items()}
    )
    if error is not None:
        raise _error(error, str(result))
    for arg, before, after in zip(args, written, changed):  # a function may sort its argument in place
        if after is not None and after != before and type(arg) in (list, dict, set):
            new = peer.read(after)
            arg.clear()
            arg.extend(new) if type(arg) is list else arg.update(new)
    return peer.read(result)


def _error(names, message):
    """Returns an exception like that of the other process. Its class is the first builtin one of the names."""
    known = [getattr(builtins, name, None) for name in names if isinstance(name, str)]
    known = [cls for cls in known if inspect.isclass(cls) and issubclass(cls, Exception)]
    cls = known[0] if known else RuntimeError
    try:
        error = cls(message)
    except TypeError:  # such as UnicodeDecodeError
        error = RuntimeError(message)
    error.names = names
    return error


def _forward(name):
    def method(self, *args):
        return _send(self, name, () if name == "exit" else args)

    return method


def _between(name, otherwise):
    """Returns a method for an operator. It returns `otherwise` unless both sides are objects of the other process."""

    def method(self, other):
        if not isinstance(other, Remote):
            return otherwise
        return _send(self, name, [other])

    return method


for _name in FORWARDED:
    setattr(Remote, f"__{_name}__", _forward(_name))
for _name in OPERATORS:
    setattr(Remote, f"__{_name}__", _between(_name, NotImplemented))
for _name, _otherwise in COMPARISONS.items():
    setattr(Remote, f"__{_name}__", _between(_name, NotImplemented if _otherwise is None else _otherwise))


class CodeEnd(Peer):
    """The end of the tested code. The judge also refers to the names of the code's module."""

    def __init__(self, fd, limit, names):
        super().__init__(fd, limit)
        self.names = names

    def named(self, key):
        if not isinstance(key, str):
            return self.objects[key]
        if key not in self.names:
            raise NameError(f"name {key!r} is not defined")
        return self.names[key]

    def apply(self, target, method, args, kwargs):
        if method == "call":
            return target(*args, **kwargs)
        if method in ("get", "set"):
            return (getattr if method == "get" else setattr)(target, *args)
        if method in ("enter", "exit"):
            return target.__enter__() if method == "enter" else target.__exit__(None, None, None)
        if method == "instancecheck":
            return isinstance(args[0], target)
        if method in BUILTINS:
            return getattr(builtins, method)(target)
        return getattr(operator, f"__{method}__")(target, *args)


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


# ---------------------------------------------------------------- tests


def run_tests(task, tests):
    """Runs the tests and writes one line per test, "1" or "0", after a line with the number of tests."""
    verdicts = os.fdopen(task["verdicts"], "w", buffering=1)
    sys.modules["pytest"] = _pytest()
    names = {"__name__": "tests"}
    units = _units(tests["sources"], tests["entry_point"])
    peer = Peer(task["socket"], task["limit"])
    _bind(names, [node for node, _ in units], peer, tests["entry_point"])
    verdicts.write(f"{count_tests(tests['sources'], tests['entry_point'])}\n")
    if peer.receive() != ["ready"]:
        raise ConnectionError("the tested code ended")
    broken = False
    for node, counts in units:
        passed = not broken and _passes(lambda: exec(compile(node, "tests.py", "exec"), names))  # noqa: B023
        broken = broken or not (passed or counts)  # the tests after a failed import or definition fail
        if counts:
            verdicts.write(f"{passed:d}\n")
    for owner, name in _names_of_tests(units):
        verdicts.write(f"{not broken and _passes(lambda: _call_test(names, owner, name)):d}\n")  # noqa: B023


def _units(sources, entry_point):
    units = [unit for text in sources for unit in split(text, whole=len(sources) > 1)]
    if entry_point and "check" in _defined(units) and not any(counts for _, counts in units):
        units.append((ast.parse(f"check({entry_point})"), True))
    return units


def count_tests(sources, entry_point=None):
    """Returns the number of tests. Raises SyntaxError if a text is not Python."""
    units = _units(sources, entry_point)
    return sum(counts for _, counts in units) + len(list(_names_of_tests(units)))


def split(text, whole=False):
    """Returns the statements of a test file as (module, whether it counts as a test).

    A statement counts if it has an assert, or if it calls a function of the file that has one. If `whole` is set, the
    text is one test, unless it defines functions. Test functions and methods are run later, see `_names_of_tests`.
    """
    tree = ast.parse(text)
    if whole and not any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body):
        return [(tree, True)]
    checks = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and _asserts(node)}
    checks = {name for name in checks if not name.startswith("test")}
    units = []
    for node in tree.body:
        defines = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        calls = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
        units.append((ast.Module([node], []), not defines and (_asserts(node) or bool(checks & calls))))
    return units


def _asserts(node):
    return any(isinstance(part, ast.Assert) for part in ast.walk(node))


def _defined(units):
    return {node.body[0].name for node, _ in units if node.body and hasattr(node.body[0], "name")}


def _names_of_tests(units):
    """Yields (None, function) and (class, method) for each test function, as pytest and unittest find them."""
    for node in (node.body[0] for node, counts in units if node.body and not counts):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            yield None, node.name
        elif isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name.startswith("test"):
                    yield node.name, part.name


def _call_test(names, owner, name):
    if owner is None:
        test = names[name]
        for arguments in getattr(test, "cases", [{}]):
            test(**arguments)
        return
    cls = names[owner]
    if hasattr(cls, "assertEqual"):
        result = cls(name).run()
        if not result.wasSuccessful() or result.testsRun != 1:
            raise AssertionError(name)
    else:
        instance = cls()
        getattr(instance, "setup_method", lambda: None)()
        getattr(instance, name)()


def _passes(test):
    try:
        test()
    except BaseException:
        return False
    return True


def _bind(names, trees, peer, entry_point):
    """Binds the names that the tests use and do not define to objects of the tested code.

    Builtins stay those of Python, so the tested code cannot replace `abs`. A name of a module of the standard library
    is this module where an attribute of it is used, as in `math.isclose`.
    """
    module = types.ModuleType("solution")
    module.__getattr__ = lambda name: Remote(peer, name) if not name.startswith("__") else _missing(name)
    sys.modules["solution"] = module
    for tree in trees:
        owners = {n.value.id for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Name) or node.id.startswith("__"):
                continue
            if hasattr(builtins, node.id) and node.id != entry_point:
                continue
            if node.id in owners and node.id in sys.stdlib_module_names:
                with contextlib.suppress(ImportError):
                    names[node.id] = importlib.import_module(node.id)
                    continue
            names.setdefault(node.id, Remote(peer, node.id))
    if entry_point:
        names[entry_point] = Remote(peer, entry_point)


def _missing(name):
    raise AttributeError(name)


def _pytest():
    """Returns a small module `pytest` with raises, approx, fail and mark.parametrize."""
    pytest = types.ModuleType("pytest")

    @contextlib.contextmanager
    def raises(expected, match=None):
        import re

        info = types.SimpleNamespace(value=None)
        expected = expected if isinstance(expected, tuple) else (expected,)
        wanted = {cls.__name__ for cls in expected}
        own = tuple(cls for cls in expected if not isinstance(cls, Remote))
        try:
            yield info
        except Exception as error:
            info.value = error
            names = {name for name in getattr(error, "names", []) if isinstance(name, str)}
            if not isinstance(error, own) and not wanted & names:
                raise
            if match is not None and not re.search(match, str(error)):
                raise AssertionError(f"{error} does not match {match}") from error
        else:
            raise AssertionError("no exception was raised")

    class approx:
        def __init__(self, expected, rel=1e-6, abs=1e-12):
            self.expected, self.rel, self.abs = expected, rel, abs

        def __eq__(self, value):
            return self._near(self.expected, value)

        def _near(self, expected, value):
            if isinstance(expected, dict):
                same = isinstance(value, dict) and expected.keys() == value.keys()
                return same and all(self._near(expected[key], value[key]) for key in expected)
            if isinstance(expected, (list, tuple)):
                same = isinstance(value, (list, tuple)) and len(value) == len(expected)
                return same and all(map(self._near, expected, value))
            if isinstance(expected, (int, float)) and type(value) in (int, float, bool):
                return value == expected or abs(value - expected) <= max(self.rel * abs(expected), self.abs)
            return value == expected

    def fail(reason=""):
        raise AssertionError(reason)

    def parametrize(argnames, values, **_):
        listed = [n.strip() for n in argnames.split(",")] if isinstance(argnames, str) else list(argnames)

        def mark(test):
            rows = [dict(zip(listed, row if len(listed) > 1 else [row])) for row in values]
            test.cases = [{**case, **row} for row in rows for case in getattr(test, "cases", [{}])]
            return test

        return mark

    pytest.raises, pytest.approx, pytest.fail = raises, approx, fail
    pytest.mark = types.SimpleNamespace(parametrize=parametrize)
    return pytest


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


if __name__ == "__main__":
    main()
