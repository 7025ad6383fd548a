"""XLA's options for single programs, by the programs' names, for as long as a run or a measurement goes on."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxrlhf.errors import UserError

ALL = "all"  # what stands under this name is for every program
Options = Mapping[str, Mapping[str, Any]]  # program -> option -> value

_given: Options = {}


@contextlib.contextmanager
def compiled_with(options: Options) -> Iterator[None]:
    """Programs that are made inside the block are compiled with their options; `UserError` as from `check_options`.

    Of the whole process, as what compiles at the same time belongs to one run.
    """
    global _given
    check_options(options)
    before, _given = _given, options
    try:
        yield
    finally:
        _given = before


def options_of(program: str, own: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """What the program of this name is compiled with: its `own` options, unless the given ones say otherwise.

    None: nothing is said.
    """
    return {**(own or {}), **_given.get(ALL, {}), **_given.get(program, {})} or None


def check_options(options: Options) -> None:
    """`UserError` where this XLA knows an option not at all, or not with that value: it is asked, with a sum."""
    for program, named in options.items():
        for option, value in named.items():
            try:
                jax.jit(_probe, compiler_options={option: value})(np.float32(0))
            except Exception as error:  # jax or XLA, and in the words of either
                raise UserError(f"compiler_options.{program}.{option}: {_reason(error)}") from None


def _probe(x: jax.Array) -> jax.Array:
    return x + 1


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "No such compile option" in text:
        return f"the XLA of jax {jax.__version__} knows no such option; leave it out, or look up how it is called there"
    text = re.sub(r"^[A-Z_]+: (While setting option \w+, )?", "", text)
    return f"XLA does not take it: {text[:200]}"
