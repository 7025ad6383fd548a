"""A calculator for language models: arithmetic without `eval`, with bounds on the length and the size of numbers."""

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

MAX_CHARS = 200  # of an expression
MAX_BITS = 1024  # of a whole number
MAX_DIGITS = 400  # of round; whole numbers and floats have fewer
_ALLOWED = re.compile(r"[\d\s.,()+\-*/%^×÷eEa-z]*")
# Python's parser warns about a letter right after a number (`1and 2`), which is no arithmetic.
_JOINED = re.compile(r"\d(?![eE][+-]?\d)[A-Za-z]")
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _round(value: int | float, digits: int | None = None) -> int | float:
    if isinstance(digits, int) and abs(digits) > MAX_DIGITS:  # Python computes 10**-digits to round a whole number
        raise ValueError(f"round takes at most {MAX_DIGITS} digits")
    return round(value, digits)


_FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {  # name -> (function, largest number of arguments)
    "abs": (abs, 1),
    "sqrt": (math.sqrt, 1),
    "round": (_round, 2),
    "min": (min, 100),
    "max": (max, 100),
}


def calculator(expression: str) -> str:
    """
    Computes an arithmetic expression.

    Args:
        expression: The expression, with + - * / // % ** and parentheses, and abs, sqrt, round, min and max, such as
            (3 + 4) * 12.
    """
    return show(evaluate(expression))


def evaluate(expression: str) -> int | float:
    """Returns the value of an expression, as Python computes it. `^` is a power, `×` and `÷` are `*` and `/`.

    Raises ValueError for anything else than arithmetic, for more than 200 characters, for whole numbers of more than
    1024 bits, and for results that are not finite.
    """
    if len(expression) > MAX_CHARS:
        raise ValueError(f"the expression has {len(expression)} characters; at most {MAX_CHARS} are allowed")
    if not _ALLOWED.fullmatch(expression) or _JOINED.search(expression):
        raise ValueError("the expression must have only numbers, + - * / // % **, parentheses and known functions")
    text = expression.replace("^", "**").replace("×", "*").replace("÷", "/").strip()
    try:
        tree = ast.parse(text, mode="eval")
        value = _value(tree.body)
    except SyntaxError:
        raise ValueError(f"{expression.strip()!r} is not an arithmetic expression") from None
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (OverflowError, MemoryError, RecursionError):
        raise ValueError("a number is too large") from None
    return value


def show(value: int | float) -> str:
    """Returns a number as text: whole numbers exactly, others to 12 significant digits."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _bounded(_power(left, right))
        if type(node.op) in _OPERATORS:
            return _bounded(_OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        function, most = _FUNCTIONS[node.func.id]
        if node.keywords or not 1 <= len(node.args) <= most or any(isinstance(a, ast.Starred) for a in node.args):
            raise ValueError(f"{node.func.id} takes 1 to {most} numbers")
        try:
            return _bounded(function(*map(_value, node.args)))
        except TypeError:
            raise ValueError(f"{node.func.id} cannot take these numbers") from None
    raise ValueError(f"{ast.unparse(node)[:40]!r} is not arithmetic")


def _power(base: int | float, exponent: int | float) -> int | float:
    whole = isinstance(base, int) and isinstance(exponent, int)
    # The size is known before the result is computed. Powers of 0, 1 and -1 are small, and negative ones are floats.
    if whole and exponent > 0 and abs(base) > 1 and exponent * base.bit_length() > 2 * MAX_BITS:
        raise ValueError(f"a number has more than {MAX_BITS} bits")
    value = base**exponent
    if isinstance(value, complex):
        raise ValueError("a power of a negative number is not real")
    return value


def _bounded(value: int | float) -> int | float:
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError(f"a number has more than {MAX_BITS} bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large")
    return value
