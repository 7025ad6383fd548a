"""The module `pytest` of sandboxed tests: raises, approx, fail and mark.parametrize."""

import contextlib
import re
import types

from jaxrlhf.rewards.sandbox.remote_objects import Remote


@contextlib.contextmanager
def raises(expected, match=None):
    """Passes if the block raises one of the exceptions, which may be classes of the tested code."""
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
    """An object that equals numbers, lists and dicts within a tolerance."""

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
    """Returns a decorator that gives a test function its arguments, see `unit_tests`."""
    listed = [n.strip() for n in argnames.split(",")] if isinstance(argnames, str) else list(argnames)

    def mark(test):
        rows = [dict(zip(listed, row if len(listed) > 1 else [row])) for row in values]
        test.cases = [{**case, **row} for row in rows for case in getattr(test, "cases", [{}])]
        return test

    return mark


mark = types.SimpleNamespace(parametrize=parametrize)
