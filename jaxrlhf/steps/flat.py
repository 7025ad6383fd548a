"""Trainable trees with their small arrays joined into a few.

An optimizer works on each array in a few kernels, and an adapter has hundreds of small arrays: on a GPU their launches,
not their numbers, would take the time of a step. Only the loop of optimizer steps inside of a compiled update uses this
form: it begins with `joined` and ends with `by_leaf`. States between updates, and so checkpoints, have one leaf per
parameter. A program of a single optimizer step (SFT, reward model) keeps its leaves: to join and part them in each step
launches about as many kernels.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxrlhf.models.sharding import leaf_name, parameter_sharding

LARGEST = 2**20  # numbers; a larger leaf stays alone: its kernel is worth a launch, and a copy of it takes memory


@struct.dataclass
class Flat:
    """A dict of arrays, of which small ones are joined: matrices as [1, N], vectors and scalars as [N], by dtype.

    A joined array keeps that much of its parts' shapes because weight decay spares vectors and scalars.
    """

    arrays: dict[str, jax.Array]
    structure: jax.tree_util.PyTreeDef = struct.field(pytree_node=False)
    places: tuple[tuple[str, tuple[int, ...]], ...] = struct.field(pytree_node=False)  # of each leaf: array and shape

    def tree(self) -> dict[str, Any]:
        """The dict with its own leaves."""
        shapes: dict[str, list[tuple[int, ...]]] = {}
        for name, shape in self.places:
            shapes.setdefault(name, []).append(shape)
        leaves = {name: iter(_split(self.arrays[name], parts)) for name, parts in shapes.items()}
        return jax.tree.unflatten(self.structure, [next(leaves[name]) for name, _ in self.places])


def joined(state: Any) -> Any:
    """The state with each dict in it (adapters and their moments) as a `Flat`.

    A leaf that the mesh splits stays alone, as a large one does: joined, every device would hold all of it. So of a
    whole model only norms and biases are joined, and on a mesh with `fsdp` or `tensor` only what is replicated.
    """
    return jax.tree.map(lambda part: _join(part) if isinstance(part, dict) else part, state, is_leaf=_is_dict)


def by_leaf(state: Any) -> Any:
    """The state as it was before `joined`."""
    return jax.tree.map(lambda part: part.tree() if isinstance(part, Flat) else part, state, is_leaf=_is_flat)


def _join(tree: dict[str, Any]) -> Flat | dict[str, Any]:
    if not tree:
        return tree
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree)
    parts: dict[str, list[jax.Array]] = {}
    places = []
    for path, leaf in pairs:
        name = leaf_name(path)
        if _may_join(name, leaf):
            name = f"{jnp.dtype(leaf.dtype).name} {'matrices' if leaf.ndim > 1 else 'vectors'}"
        parts.setdefault(name, []).append(leaf)
        places.append((name, leaf.shape))
    return Flat({name: _concatenated(leaves) for name, leaves in parts.items()}, structure, tuple(places))


def _may_join(name: str, leaf: jax.Array) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    if leaf.size > LARGEST:
        return False
    return mesh.empty or mesh.size == 1 or parameter_sharding(mesh, name, leaf.shape).is_fully_replicated


def _concatenated(leaves: list[jax.Array]) -> jax.Array:
    if len(leaves) == 1:
        return leaves[0]
    vector = jnp.concatenate([leaf.ravel() for leaf in leaves])
    return vector[None] if leaves[0].ndim > 1 else vector


def _split(array: jax.Array, shapes: list[tuple[int, ...]]) -> list[jax.Array]:
    if len(shapes) == 1:
        return [array]
    vectors = jax.lax.split(array.ravel(), [math.prod(shape) for shape in shapes])  # its gradient is one concatenation
    return [vector.reshape(shape) for vector, shape in zip(vectors, shapes)]


def _is_dict(part: Any) -> bool:
    return isinstance(part, dict)


def _is_flat(part: Any) -> bool:
    return isinstance(part, Flat)
