"""Rotary position embeddings (rope). A rope type gives the frequency (radians per position) of each dimension pair.

The frequencies of longrope depend on the sequence length. This package uses the length of the padded row of prompt and
completion. This length is the same in sampling, scoring and update, so all three rotate a token by the same angle.
transformers uses the length of the longest row of the batch instead.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary position embedding of a layer (2104.09864). `numbers` holds the entries that the rope type reads."""

    theta: float = 10000.0
    share: float = 1.0  # fraction of a head's dimensions that is rotated: the first ones
    kind: str = "default"
    numbers: tuple[tuple[str, Any], ...] = ()


def frequencies(rope: Rope, head_dim: int, slots: int) -> tuple[np.ndarray, float]:
    """Returns (frequencies f32[F], factor). The frequencies are in radians per position, for rows of `slots` tokens.

    The factor multiplies cosine and sine. The first 2F <= head_dim dimensions of a head are rotated. Dimensions i and
    i + F are a pair.
    """
    rotated = int(head_dim * rope.share)
    exponent = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    plain = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    scaled, factor = SCALINGS[rope.kind].apply(plain, rope.theta, rotated, dict(rope.numbers), slots)
    return scaled.astype(np.float32), factor


def read_rope(entry: dict[str, Any], defaults: dict[str, Any], kind: str) -> Rope:
    """Reads a rope of type `kind` from a rope object of `config.json`.

    Raises `ValueError` if an entry is missing or wrong.
    `defaults` holds the values of absent entries: rope_theta, partial_rotary_factor, original_max_position_embeddings.
    It also holds max_position_embeddings, from which the default factor of longrope is computed.
    """
    scaling = SCALINGS[kind]
    present = {name: value for name, value in entry.items() if value is not None}
    values = defaults | present
    numbers = {name: values.get(name) for name in scaling.numbers}
    missing = [name for name in scaling.required if numbers[name] is None]
    if missing:
        raise ValueError(f"the entries {', '.join(missing)} are missing, but rope_type {kind!r} needs them")
    theta = _positive("rope_theta", values["rope_theta"])
    if kind == "yarn" and theta <= 1:
        raise ValueError(f"rope_theta must be above 1 for rope_type 'yarn', not {theta:g}")
    share = _positive("partial_rotary_factor", values["partial_rotary_factor"])
    if share > 1:
        raise ValueError(f"partial_rotary_factor must be at most 1, not {share}")
    checked = {name: _number(name, value) for name, value in numbers.items() if value is not None}
    if kind == "longrope":
        length = checked["original_max_position_embeddings"]
        if length < 2:
            raise ValueError(
                f"original_max_position_embeddings must be at least 2 for rope_type 'longrope', not {length:g}"
            )
        checked.setdefault("factor", defaults["max_position_embeddings"] / length)
    low, high = checked.get("low_freq_factor"), checked.get("high_freq_factor")
    if low is not None and low >= high:
        raise ValueError(f"low_freq_factor ({low:g}) must be below high_freq_factor ({high:g})")
    return Rope(theta, share, kind, tuple(sorted(checked.items())))


def rope_kind(entry: dict[str, Any], aliases: Mapping[str, str]) -> str:
    """Returns the rope type in a rope object of `config.json`. Raises `ValueError` if the type is unknown.

    `aliases` maps the older names of types to the current names. The result is a current name.
    """
    kind = entry.get("rope_type", entry.get("type", "default"))
    kind = aliases.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(f"rope_type {kind!r} is not supported; the supported types are {', '.join(sorted(SCALINGS))}")
    return kind


def unused_entries(entry: dict[str, Any], kind: str) -> list[str]:
    """Returns the names of entries that the rope type `kind` ignores. `entry` is a rope object of `config.json`."""
    known = {"rope_theta", "partial_rotary_factor", "rope_type", "type", *IGNORED, *SCALINGS[kind].numbers}
    return sorted(name for name, value in entry.items() if value is not None and name not in known)


def rope_entry(rope: Rope) -> dict[str, Any]:
    """Returns the rope object for `config.json`. `read_rope` reads this object."""
    partial = {} if rope.share == 1 else {"partial_rotary_factor": rope.share}
    numbers = {name: list(value) if isinstance(value, tuple) else value for name, value in rope.numbers}
    return {"rope_type": rope.kind, "rope_theta": rope.theta, **partial, **numbers}


def factor_count(rope: Rope) -> int | None:
    """Returns the length of longrope's factor lists, or None for other rope types.

    Raises `ValueError` if the lengths of the lists differ.
    """
    counts = {len(value) for _, value in rope.numbers if isinstance(value, tuple)}
    if len(counts) > 1:
        raise ValueError(f"short_factor and long_factor must have the same length, not {min(counts)} and {max(counts)}")
    return next(iter(counts), None)


def _number(name: str, value: Any) -> Any:
    """Checks an entry of a rope object, and returns its value. The lists of longrope become tuples."""
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, list | tuple) or not value:
            raise ValueError(f"{name} must be a list of numbers, not {value!r}")
        return tuple(_positive(name, item) for item in value)
    return value if isinstance(value, bool) and name == "truncate" else _positive(name, value)


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a number above 0, not {value!r}")
    return value if isinstance(value, int) and name.startswith("original") else float(value)


def _default(plain: np.ndarray, theta: float, rotated: int, numbers: dict, slots: int) -> tuple[np.ndarray, float]:
    return plain, 1.0


def _linear(plain: np.ndarray, theta: float, rotated: int, numbers: dict, slots: int) -> tuple[np.ndarray, float]:
    """Position interpolation (2306.15595): divides all frequencies by `factor`."""
    return plain / np.float32(numbers["factor"]), 1.0


def _llama3(plain: np.ndarray, theta: float, rotated: int, numbers: dict, slots: int) -> tuple[np.ndarray, float]:
    """Llama 3.1 (2407.21783): stretches long wavelengths, keeps short wavelengths, and interpolates in between."""
    # Number of turns of each pair over the trained length.
    turns = numbers["original_max_position_embeddings"] * plain / np.float32(2 * math.pi)
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 - kept) * plain / np.float32(numbers["factor"]) + kept * plain, 1.0


def _yarn(plain: np.ndarray, theta: float, rotated: int, numbers: dict, slots: int) -> tuple[np.ndarray, float]:
    """YaRN (2309.00071): keeps high frequencies, divides low frequencies by `factor`, and interpolates in between.

    Cosine and sine are multiplied by the attention factor.
    """
    length = numbers["original_max_position_embeddings"]
    factor = numbers["factor"]

    def dimension(turns: float) -> float:
        """Returns the (fractional) index of the pair that makes this many turns over the trained length."""
        return rotated * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(numbers.get("beta_fast", 32.0)), dimension(numbers.get("beta_slow", 1.0))
    if numbers.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    high += 0.001 if low == high else 0.0
    kept = 1.0 - np.clip((np.arange(len(plain), dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    scaled = plain / np.float32(factor) * (1.0 - kept) + plain * kept
    attention = numbers.get("attention_factor")
    if attention is None:
        scale, scale_all = numbers.get("mscale"), numbers.get("mscale_all_dim")
        both = scale is not None and scale_all is not None
        attention = _yarn_scale(factor, scale) / _yarn_scale(factor, scale_all) if both else _yarn_scale(factor)
    return scaled, attention


def _longrope(plain: np.ndarray, theta: float, rotated: int, numbers: dict, slots: int) -> tuple[np.ndarray, float]:
    """LongRoPE (2402.13753): divides each frequency by its own factor.

    For rows of more than original_max_position_embeddings tokens, the factors are those of `long_factor`. For shorter
    rows, the factors are those of `short_factor`.
    """
    length, factor = numbers["original_max_position_embeddings"], numbers["factor"]
    stretch = numbers["long_factor" if slots > length else "short_factor"]
    attention = numbers.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return plain / np.asarray(stretch, np.float32), attention


def _yarn_scale(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A rope type: the function that scales the frequencies, and the entries of `config.json` that it reads."""

    apply: Callable[[np.ndarray, float, int, dict, int], tuple[np.ndarray, float]]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @property
    def numbers(self) -> tuple[str, ...]:
        return self.required + self.optional


SCALINGS: dict[str, Scaling] = {
    "default": Scaling(_default),
    "linear": Scaling(_linear, ("factor",)),
    # "dynamic" changes only rows longer than max_position_embeddings. Such rows are not allowed in this package.
    "dynamic": Scaling(_default, ("factor",)),
    "llama3": Scaling(_llama3, ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    "yarn": Scaling(
        _yarn,
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": Scaling(
        _longrope,
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
}
# Entries without effect on text. "finetuned" is a remark in Yarn-Llama-2. "mrope_section" splits the axes of images.
IGNORED = ("finetuned", "mrope_section")
