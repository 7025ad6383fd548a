"""How each parameter lies on the mesh: one table from names to axes, and what places trees by it.

A name is "module.path/leaf", such as "layers.0.attention.q_proj/kernel". One that no row covers is an error.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrlhf.distributed.mesh import put, replicated

_REPLICATED = PartitionSpec()
_COLUMN = PartitionSpec("fsdp", "tensor")  # [in, out]: each device computes some of the outputs
_ROW = PartitionSpec("tensor", "fsdp")  # [in, out]: takes the outputs of a column-split layer as they lie

# (pattern on "module.path/leaf", axes of its dimensions); the first row that matches the end of a name counts.
# A name may have more in front: optimizer states repeat the names of what they optimize. kernel_int8, kernel_nf4 and
# kernel_scale of a quantised layer have the kernel's dimensions, some of them shorter, and lie as it would.
PARAMETER_AXES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed_tokens/embedding", PartitionSpec("tensor", "fsdp")),  # [V, D]; tied, its transpose is the lm_head
    (r"embed_positions/embedding", PartitionSpec("tensor", "fsdp")),  # [positions, D]
    (r"lm_head/kernel", _COLUMN),  # [D, V]
    (r"attention\.[qkv]_proj/kernel(_\w+)?", _COLUMN),  # [D, heads x head size]
    (r"attention\.o_proj/kernel(_\w+)?", _ROW),  # [heads x head size, D]
    (r"mlp\.(gate|up)_proj/kernel(_\w+)?", _COLUMN),  # [D, F]
    (r"mlp\.down_proj/kernel(_\w+)?", _ROW),  # [F, D]
    (r"score/(kernel|bias)", _REPLICATED),  # [D, 1], [1]
    (r"\w*norm/(scale|bias)", _REPLICATED),  # [D]
    (r"(\w+_proj|lm_head)/bias", _REPLICATED),  # [out]
    # A LoRA pair lies as its kernel does: lora_a [in, rank] like the inputs, lora_b [rank, out] like the outputs.
    (r"(attention\.[qkv]_proj|mlp\.(gate|up)_proj|lm_head)/lora_a", PartitionSpec("fsdp")),
    (r"(attention\.[qkv]_proj|mlp\.(gate|up)_proj|lm_head)/lora_b", PartitionSpec(None, "tensor")),
    (r"(attention\.o_proj|mlp\.down_proj)/lora_a", PartitionSpec("tensor")),
    (r"(attention\.o_proj|mlp\.down_proj)/lora_b", PartitionSpec(None, "fsdp")),
    (r"(\w+_proj|lm_head)/lora_scale", _REPLICATED),  # []
)


@functools.cache
def _axes_of(name: str) -> PartitionSpec:
    for pattern, axes in PARAMETER_AXES:
        if re.search(rf"(^|[./]){pattern}$", name):
            return axes
    raise ValueError(f"no row of PARAMETER_AXES covers the parameter {name!r}")


def parameter_sharding(mesh: Mesh, name: str, shape: Sequence[int]) -> NamedSharding:
    """How the parameter "module.path/leaf" of this shape lies on the mesh.

    A dimension that its axis does not divide is replicated along it; scalars are replicated. Raises `ValueError`
    for a name that no row of `PARAMETER_AXES` covers, or one whose row has more axes than it has dimensions.
    """
    if not shape:
        return replicated(mesh)
    axes = _axes_of(name)
    if len(axes) > len(shape):
        raise ValueError(f"parameter {name!r} has shape {tuple(shape)}, but its axes are {axes}")
    fitted = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape)]
    return NamedSharding(mesh, PartitionSpec(*fitted))


def leaf_name(path: Sequence[Any]) -> str:
    """A leaf's name "module.path/leaf" from its path in a pytree of modules, dicts, lists and named tuples."""
    parts = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path]
    if len(parts) > 1 and parts[-1] == "value":  # the inside of an nnx.Param
        parts.pop()
    return "/".join(part for part in (".".join(parts[:-1]), parts[-1]) if part)


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of each leaf of a module, an adapter or an optimizer state (arrays or shapes), by its name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: parameter_sharding(mesh, leaf_name(path), leaf.shape), tree
    )


def shard(mesh: Mesh, tree: Any) -> Any:
    """The same tree with each leaf where `tree_shardings` puts it, committed: its placement is part of a program.

    A leaf that lies there already is not copied: donating the result gives away the given tree's buffers too.
    """
    return jax.tree.map(put, tree, tree_shardings(mesh, tree))
