"""The leaves of a tree by path, and their descriptions in a checkpoint's record."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.errors import UserError


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path, in the order of the tree."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(named) != len(pairs):
        raise ValueError("two leaves of the tree have the same path")
    for name, leaf in named.items():
        if not (is_array(leaf) or isinstance(leaf, bool | int | float | str)):
            raise ValueError(f"leaf {name} must be an array, a number or text, not a {type(leaf).__name__}")
    return named


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def describe(leaf: Any) -> str:
    """Returns the dtype and shape of an array, such as "float32[64,8]".

    For another leaf, returns the type, such as "int".
    """
    if not is_array(leaf):
        return type(leaf).__name__
    return f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def parse(text: str) -> jax.ShapeDtypeStruct:
    """Returns the dtype and shape of an array from the text that `describe` returned."""
    dtype, _, sizes = text.removesuffix("]").partition("[")
    return jax.ShapeDtypeStruct(tuple(int(size) for size in sizes.split(",") if size), jnp.dtype(dtype))


def abstract(leaf: Any) -> Any:
    """Returns a template of the leaf for orbax.

    orbax then loads a numpy array, or a jax array with the leaf's sharding.
    """
    if isinstance(leaf, np.ndarray | np.generic):
        return np.empty(leaf.shape, leaf.dtype)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def compare(folder: Path, stored: dict[str, str], needed: dict[str, str]) -> None:
    """Raises `UserError` with the name of the first leaf that has different descriptions in `stored` and `needed`."""
    for name in {**needed, **stored}:
        if stored.get(name) != needed.get(name):
            raise UserError(
                f"{folder}: leaf {name} is {stored.get(name, 'absent')} in the checkpoint, but must be "
                f"{needed.get(name, 'absent')} for this run; use the settings of the run that saved the checkpoint, or "
                "another run_dir"
            )
