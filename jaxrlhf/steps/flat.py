"""Joins the small arrays of trainable trees into a few large arrays. The optimizer then launches fewer GPU kernels.

An optimizer launches a few kernels for each array. An adapter has hundreds of small arrays, so the launches would take
most of a step. Only the loop of optimizer steps inside a PPO update uses joined arrays: `joined` comes before the loop,
`by_leaf` after it. States between updates and in checkpoints have one leaf per parameter. SFT and the reward model have
one optimizer step per program, and do not join arrays. The kernels for joining and splitting would cost as much as
joined arrays save.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxrlhf.models.sharding import leaf_name, parameter_sharding

LARGEST = 2**20  # numbers in a leaf; larger leaves are not joined: their launches cost little, a copy takes memory


@struct.dataclass
class Flat:
    """A dict of arrays in which the small leaves are joined.

    For each dtype, matrices are joined to one array [1, N], and vectors and scalars to another array [N]. Matrices are
    separate because weight decay applies to matrices only.
    """

    arrays: dict[str, jax.Array]
    structure: jax.tree_util.PyTreeDef = struct.field(pytree_node=False)
    leaves: tuple[tuple[str, tuple[int, ...]], ...] = struct.field(pytree_node=False)  # (name of its array, shape)

    def tree(self) -> dict[str, Any]:
        """Returns the dict with one leaf per parameter."""
        shapes: dict[str, list[tuple[int, ...]]] = {}
        for name, shape in self.leaves:
            shapes.setdefault(name, []).append(shape)
        parts = {name: iter(_split(self.arrays[name], of_array)) for name, of_array in shapes.items()}
        return jax.tree.unflatten(self.structure, [next(parts[name]) for name, _ in self.leaves])


def joined(state: Any) -> Any:
    """Returns the state with a `Flat` in place of each dict. The dicts are adapters and their optimizer moments.

    Leaves that are sharded over the mesh are not joined, because every device would hold the whole joined array. So on
    a mesh with `fsdp` or `tensor`, only replicated leaves are joined. In a full fine-tune these are norms and biases.
    """
    return jax.tree.map(_join, state, is_leaf=_is_dict)


def by_leaf(state: Any) -> Any:
    """Returns the state with a dict in place of each `Flat`. This is the inverse of `joined`."""
    return jax.tree.map(lambda part: part.tree() if isinstance(part, Flat) else part, state, is_leaf=_is_flat)


def _join(part: Any) -> Any:
    """Converts a non-empty dict to a `Flat`. Returns all other parts of a state unchanged."""
    if not _is_dict(part) or not part:
        return part
    pairs, structure = jax.tree_util.tree_flatten_with_path(part)
    arrays: dict[str, list[jax.Array]] = {}
    leaves = []
    for path, leaf in pairs:
        name = leaf_name(path)
        if _may_join(name, leaf):
            name = f"{jnp.dtype(leaf.dtype).name} {'matrices' if leaf.ndim > 1 else 'vectors'}"
        arrays.setdefault(name, []).append(leaf)
        leaves.append((name, leaf.shape))
    return Flat({name: _concatenated(of_array) for name, of_array in arrays.items()}, structure, tuple(leaves))


def _may_join(name: str, leaf: jax.Array) -> bool:
    if leaf.size > LARGEST:
        return False
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1 or parameter_sharding(mesh, name, leaf.shape).is_fully_replicated


def _concatenated(leaves: list[jax.Array]) -> jax.Array:
    if len(leaves) == 1:
        return leaves[0]
    vector = jnp.concatenate([leaf.ravel() for leaf in leaves])
    return vector[None] if leaves[0].ndim > 1 else vector


def _split(array: jax.Array, shapes: list[tuple[int, ...]]) -> list[jax.Array]:
    if len(shapes) == 1:
        return [array]
    # The gradient of `split` is one concatenation.
    vectors = jax.lax.split(array.ravel(), [math.prod(shape) for shape in shapes])
    return [vector.reshape(shape) for vector, shape in zip(vectors, shapes)]


def _is_dict(part: Any) -> bool:
    return isinstance(part, dict)


def _is_flat(part: Any) -> bool:
    return isinstance(part, Flat)
