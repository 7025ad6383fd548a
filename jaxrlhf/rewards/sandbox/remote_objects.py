"""Calls between two sandboxed processes: one holds unit tests, the other holds the tested code.

Arguments and results are plain data. Other objects stay in their process, and the other process gets a `Remote` of
them. The process of the tests is called the judge. It trusts nothing that the tested code sends.
"""

import builtins
import decimal
import fractions
import inspect
import json
import operator
import socket

DATA = (bool, int, float, str, type(None))
OPERATORS = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift"]
COMPARISONS = {"eq": False, "ne": True, "lt": None, "le": None, "gt": None, "ge": None}
BUILTINS = ["len", "iter", "next", "str", "repr", "bool", "hash", "int", "float", "reversed", "abs"]
HARMLESS = ["len", "iter", "next", "str", "repr", "bool", "hash"]  # of BUILTINS; they lead to no other object
FORWARDED = [*BUILTINS, "getitem", "setitem", "delitem", "neg", "pos", "invert", "enter", "exit", "instancecheck"]


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
        """Returns the value as JSON. An object that is not plain data stays here, and the other end gets its number."""
        if type(value) in DATA:
            return value if type(value) is not int or abs(value) < 2**53 else {"int": hex(value)}
        for cls, name in ((list, "list"), (tuple, "tuple"), (set, "set"), (frozenset, "frozenset")):
            if type(value) is cls or (type(value).__module__ == "collections" and isinstance(value, cls)):
                return {name: [self.write(item) for item in value]}
        if type(value) is dict or (type(value).__module__ == "collections" and isinstance(value, dict)):
            return {"dict": [[self.write(key), self.write(item)] for key, item in value.items()]}
        if type(value).__module__ == "collections" and type(value).__name__ == "deque":
            return {"list": [self.write(item) for item in value]}
        if type(value) is range:
            return {"range": [value.start, value.stop, value.step]}
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
        if name in ("complex", "range"):
            return getattr(builtins, name)(*content)
        if name in ("Fraction", "Decimal"):
            return (fractions.Fraction if name == "Fraction" else decimal.Decimal)(content)
        if name == "yours":
            return self.named(content)
        return Remote(self, content)

    def named(self, key):
        return self.objects[key]

    def answer(self, key, method, args, kwargs):
        """Calls an object of this end. Returns (result, positional arguments after the call).

        Arguments that are not lists, dicts or sets are None in the result.
        """
        args = [self.read(arg) for arg in args]
        kwargs = {name: self.read(arg) for name, arg in kwargs.items()}
        result = self.apply(self.named(key), method, args, kwargs)
        changed = [self.write(arg) if type(arg) in (list, dict, set) else None for arg in args]
        return self.write(result), changed

    def apply(self, target, method, args, kwargs):
        """Applies a method to an object of this end, which is the judge.

        Attributes can be used only on objects whose class the tests define. Attributes of a function or a generator
        would give access to the judge's own names.
        """
        own = type(target).__module__ == "tests" and isinstance(args[0] if args else None, str)
        if method == "call":
            return target(*args, **kwargs)
        if method in ("get", "set") and own and not args[0].startswith("_"):
            return (getattr if method == "get" else setattr)(target, *args)
        if method in HARMLESS:
            return getattr(builtins, method)(target)
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
    """Returns an exception like that of the other process. Its class is the first builtin exception in `names`."""
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
    """The end of the tested code. The judge can also use an object by its name in the code's module."""

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
