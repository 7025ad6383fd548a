"""The sharding of parameters: one table maps parameter names to mesh axes. `distributed.mesh` shards batches.

A name is "module.path/leaf", for example "layers.0.attention.q_proj/kernel". Every name must match a row of the table.
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
_ROW = PartitionSpec("tensor", "fsdp")  # [in, out]: each device reads some of the inputs

# Rows of (pattern for the end of "module.path/leaf", mesh axes of the dimensions). The first row that matches applies.
# Only the end must match, because optimizer states put a prefix before the names of parameters. In a quantised layer,
# kernel_int8, kernel_nf4 and kernel_scale have the same axes as the kernel, but may be shorter.
PARAMETER_AXES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed_tokens/embedding", PartitionSpec("tensor", "fsdp")),  # [V, D]; if tied, its transpose is the lm_head
    (r"embed_positions/embedding", PartitionSpec("tensor", "fsdp")),  # [positions, D]
    (r"lm_head/kernel", _COLUMN),  # [D, V]
    (r"attention\.[qkv]_proj/kernel(_\w+)?", _COLUMN),  # [D, heads x head size]
    (r"attention\.o_proj/kernel(_\w+)?", _ROW),  # [heads x head size, D]
    (r"mlp\.(gate|up)_proj/kernel(_\w+)?", _COLUMN),  # [D, F]
    (r"mlp\.down_proj/kernel(_\w+)?", _ROW),  # [F, D]
    (r"score/(kernel|bias)", _REPLICATED),  # [D, 1], [1]
    (r"\w*norm/(scale|bias)", _REPLICATED),  # [D]
    (r"(\w+_proj|lm_head)/bias", _REPLICATED),  # [out]
    # A LoRA pair is split like its kernel: lora_a [in, rank] along the inputs, lora_b [rank, out] along the outputs.
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
    raise ValueError(f"parameter {name!r} matches no row of PARAMETER_AXES; add a row")


def parameter_sharding(mesh: Mesh, name: str, shape: Sequence[int]) -> NamedSharding:
    """Returns the sharding of a parameter on the mesh. The name of the parameter is "module.path/leaf".

    If the size of a mesh axis does not divide a dimension, the dimension is replicated along this axis. Scalars are
    replicated. Raises `ValueError` if the name matches no row of `PARAMETER_AXES`, or if the row has more axes than the
    parameter has dimensions.
    """
    if not shape:
        return replicated(mesh)
    axes = _axes_of(name)
    if len(axes) > len(shape):
        raise ValueError(f"parameter {name!r} must have at least {len(axes)} dimensions, not the shape {tuple(shape)}")
    fitted = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape)]
    return NamedSharding(mesh, PartitionSpec(*fitted))


def leaf_name(path: Sequence[Any]) -> str:
    """Returns the name "module.path/leaf" of a leaf. `path` is the leaf's path from `tree_map_with_path`."""
    parts = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path]
    if len(parts) > 1 and parts[-1] == "value":  # the array inside an nnx.Param
        parts.pop()
    return "/".join(part for part in (".".join(parts[:-1]), parts[-1]) if part)


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """Returns a tree with the sharding of each leaf. `tree` is a module, an adapter or an optimizer state.

    The leaves may be arrays or shapes. The name of a leaf decides its sharding.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: parameter_sharding(mesh, leaf_name(path), x.shape), tree)


def shard(mesh: Mesh, tree: Any) -> Any:
    """Places each leaf of the tree on the mesh, and returns the new tree. `tree_shardings` gives the shardings.

    The leaves are committed to their devices, so jax compiles programs for this placement. A leaf that already has its
    sharding is not copied. If a program donates the result, this leaf of the argument becomes invalid too.
    """
    return jax.tree.map(put, tree, tree_shardings(mesh, tree))
