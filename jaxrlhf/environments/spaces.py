"""Spaces of observations and actions. Gymnasium's spaces work too, because the name of the class decides the kind.

The classes here have Gymnasium's arguments, for environments that are written without Gymnasium.
"""

from typing import Any

import numpy as np

from jaxrlhf.errors import UserError, short

KINDS = ("Box", "Discrete", "MultiDiscrete", "MultiBinary", "Text")
NUMERIC = KINDS[:4]


class Space:
    """Base class of the spaces here."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def sample(self) -> Any:
        """Returns a random element."""
        return sample(self, self._generator)

    def contains(self, value: Any) -> bool:
        return not misfit(self, value)

    def seed(self, seed: int | None = None) -> None:
        """Seeds `sample`."""
        self._random = np.random.default_rng(seed)

    @property
    def _generator(self) -> np.random.Generator:
        if not hasattr(self, "_random"):
            self.seed()
        return self._random

    def __repr__(self) -> str:
        return describe(self)

    def __eq__(self, other: object) -> bool:
        return describe(self) == describe(other) and to_json(self) == to_json(other)

    __hash__ = None


class Box(Space):
    """Arrays with bounds per element."""

    def __init__(self, low: Any, high: Any, shape: tuple[int, ...] | None = None, dtype: Any = np.float32) -> None:
        self.dtype = np.dtype(dtype)
        self.shape = tuple(shape) if shape is not None else np.broadcast(np.asarray(low), np.asarray(high)).shape
        self.low, self.high = (np.full(self.shape, bound).astype(self.dtype) for bound in (low, high))


class Discrete(Space):
    """The integers start, start + 1, ..., start + n - 1."""

    def __init__(self, n: int, start: int = 0) -> None:
        self.n, self.start, self.shape, self.dtype = int(n), int(start), (), np.dtype(np.int64)


class MultiDiscrete(Space):
    """Vectors of integers; element i is in [0, nvec[i])."""

    def __init__(self, nvec: Any) -> None:
        self.nvec, self.dtype = np.asarray(nvec, np.int64), np.dtype(np.int64)
        self.shape = self.nvec.shape


class MultiBinary(Space):
    """Vectors of n bits."""

    def __init__(self, n: int) -> None:
        self.n, self.shape, self.dtype = int(n), (int(n),), np.dtype(np.int8)


def kind(space: Any) -> str:
    """Returns the name of the space's kind, one of `KINDS`, or "" for any other object."""
    return next((base.__name__ for base in type(space).__mro__ if base.__name__ in KINDS), "")


def describe(space: Any) -> str:
    """Returns the space in one line, such as "Box(shape [3], float32)"."""
    name = kind(space)
    if name == "Box":
        return f"Box(shape {list(space.shape)}, {np.dtype(space.dtype).name})"
    if name == "Discrete":
        return f"Discrete({int(space.n)})"
    if name == "MultiDiscrete":
        return f"MultiDiscrete({np.asarray(space.nvec).tolist()})"
    if name == "MultiBinary":
        return f"MultiBinary({int(np.prod(space.shape))})"
    return type(space).__name__


def sample(space: Any, random: np.random.Generator) -> Any:
    """Returns a random element of a numeric space. Numbers of a Box without two bounds have a normal distribution."""
    name = kind(space)
    if name == "Discrete":
        return np.int64(random.integers(space.n) + getattr(space, "start", 0))
    if name == "MultiDiscrete":
        return random.integers(np.asarray(space.nvec))
    if name == "MultiBinary":
        return random.integers(2, size=space.shape, dtype=np.int8)
    if np.issubdtype(space.dtype, np.integer):
        return random.integers(space.low, space.high, endpoint=True, dtype=space.dtype)
    low, high = np.asarray(space.low, np.float64), np.asarray(space.high, np.float64)
    bounded = np.isfinite(low) & np.isfinite(high)
    low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
    normal = np.clip(random.normal(size=space.shape), space.low, space.high)
    return np.where(bounded, random.uniform(low, high), normal).astype(space.dtype)


def misfit(space: Any, value: Any) -> str:
    """Returns why a value is not an element of the space, such as "has NaN"; "" if it is one."""
    name = kind(space)
    if name == "Text":
        return "" if isinstance(value, str) else f"must be a str, not {short(value)}"
    try:
        array = np.asarray(value)
    except ValueError:
        return "must be an array, not nested lists of unequal lengths"
    if array.dtype.kind not in "biuf":
        return f"must be numbers, not {short(value)}"
    if array.shape != tuple(space.shape):
        return f"must have shape {list(space.shape)}, not {list(array.shape)}"
    if array.dtype.kind == "f" and np.isnan(array).any():
        return "has NaN"
    if name == "Box":
        if not np.can_cast(array.dtype, space.dtype, "same_kind"):
            return f"must have dtype {np.dtype(space.dtype).name}, not {array.dtype.name}"
        low, high = np.asarray(space.low), np.asarray(space.high)
    else:
        if array.dtype.kind == "f":
            return f"must have an integer dtype, not {array.dtype.name}"
        low = getattr(space, "start", 0) if name == "Discrete" else 0
        high = {"Discrete": lambda: low + space.n, "MultiDiscrete": lambda: space.nvec, "MultiBinary": lambda: 2}
        high = np.asarray(high[name]()) - 1
    if (array < low).any() or (array > high).any():
        lowest, highest = float(np.min(array)), float(np.max(array))
        return f"is out of bounds: its least number is {lowest:g} and its greatest {highest:g}"
    return ""


def fault(space: Any, use: str) -> str:
    """Returns what makes a space unusable, in one line; "" if it can be used. `use` names the attribute."""
    name = kind(space)
    if name not in NUMERIC:
        return f"{use} is {type(space).__name__}, which is not supported; use one of {', '.join(NUMERIC)}"
    if name == "Box":
        low, high = np.asarray(space.low), np.asarray(space.high)
        if low.shape != tuple(space.shape) or high.shape != tuple(space.shape):
            return f"{use}: low and high must have the shape {list(space.shape)}"
        if np.isnan(low.astype(float)).any() or np.isnan(high.astype(float)).any():
            return f"{use}: low or high is NaN"
        if not (low < high).all():
            return f"{use}: low must be below high in every element"
    if name == "Discrete" and not int(space.n) >= 1:
        return f"{use}: n must be at least 1, not {space.n}"
    if name == "MultiDiscrete" and np.asarray(space.nvec).ndim != 1:
        return f"{use}: nvec must be a vector"
    if name == "MultiBinary" and len(space.shape) != 1:
        return f"{use}: n must be one number"
    return ""


def to_json(space: Any) -> dict[str, Any]:
    """Returns the arguments of a numeric space as JSON."""
    name = kind(space)
    if name == "Box":
        bounds = {n: np.asarray(getattr(space, n)).astype(float).ravel().tolist() for n in ("low", "high")}
        bounds = {n: [str(x) if np.isinf(x) else x for x in values] for n, values in bounds.items()}
        return {"kind": name, "shape": list(space.shape), "dtype": np.dtype(space.dtype).name, **bounds}
    if name == "Discrete":
        return {"kind": name, "n": int(space.n), "start": int(getattr(space, "start", 0))}
    if name == "MultiDiscrete":
        return {"kind": name, "nvec": np.asarray(space.nvec).tolist()}
    return {"kind": name, "n": int(np.prod(space.shape))}


def from_json(stored: dict[str, Any]) -> Space:
    """Returns the space that `to_json` described. Raises `UserError` if the description is damaged."""
    try:
        arguments = {key: value for key, value in stored.items() if key != "kind"}
        if stored["kind"] == "Box":
            shape, dtype = tuple(arguments["shape"]), arguments["dtype"]
            low, high = (np.array([float(x) for x in arguments[n]]).reshape(shape) for n in ("low", "high"))
            return Box(low, high, shape, dtype)
        return {"Discrete": Discrete, "MultiDiscrete": MultiDiscrete, "MultiBinary": MultiBinary}[stored["kind"]](
            **arguments
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{short(stored)}: not the description of a space: {error}") from None
