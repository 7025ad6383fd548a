"""Finds the tests of a text, and runs them in a sandboxed process that calls the tested code in another process."""

import ast
import builtins
import contextlib
import importlib
import os
import sys
import types

import jaxrlhf.rewards.sandbox.small_pytest as small_pytest
from jaxrlhf.rewards.sandbox.remote_objects import Peer, Remote


def run_tests(task, tests):
    """Runs the tests and writes one line per test, "1" or "0", after a line with the number of tests."""
    verdicts = os.fdopen(task["verdicts"], "w", buffering=1)
    sys.modules["pytest"] = small_pytest
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

    Builtins stay those of Python, so the tested code cannot replace `abs`. The name of a module of the standard
    library is bound to this module if the tests use an attribute of it, as in `math.isclose`.
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
