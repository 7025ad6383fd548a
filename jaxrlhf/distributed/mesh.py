"""The device mesh, and one table that says how each parameter lies on it.

Axes: `data` holds copies of the base, `fsdp` splits weights by rows (gathered layer by layer), `tensor` splits
layers by heads and MLP width. A batch is split over `data` and `fsdp`. All axes are `AxisType.Auto`: XLA places
the collectives, the shardings of the arguments say the rest.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrlhf.config import MeshConfig
from jaxrlhf.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

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


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh [data, fsdp, tensor] over `devices`, by default all of every process; `UserError` as in `mesh_sizes`."""
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_sizes(config, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_sizes(config: MeshConfig, count: int) -> tuple[int, ...]:
    """Sizes of the axes data, fsdp and tensor over so many devices.

    An axis of -1 takes the devices that the others leave. Raises `UserError` where the product is not their number.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    filler = next((axis for axis, size in sizes.items() if size == -1), None)
    if filler is not None and count % fixed == 0:
        sizes[filler] = count // fixed
    if math.prod(sizes.values()) != count:
        raise UserError(_misfit(sizes, fixed, filler, count))
    return tuple(sizes.values())


def _misfit(sizes: dict[str, int], fixed: int, filler: str | None, count: int) -> str:
    """One line: which sizes do not fit the devices, and which do."""
    given = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    some = f"{count} device" + ("s" if count != 1 else "")
    if filler is not None:
        fitting = [n for n in range(1, count + 1) if count % n == 0]
        others = " x ".join(f"mesh.{axis}" for axis in AXES if axis != filler)
        return f"{given} does not fit {some}: {others} is {fixed} and must be one of {_list(fitting)}"
    fits = [f"mesh.{a}={count * s // fixed}" for a, s in sizes.items() if count * s % fixed == 0]
    right = f"{' or '.join(fits)} would fit, and so would" if fits else "what fits is"
    return f"{given} is {fixed}, but there {'are' if count != 1 else 'is'} {some}: {right} mesh.data=-1 " + (
        f"with mesh.fsdp x mesh.tensor one of {_list([n for n in range(1, count + 1) if count % n == 0])}"
    )


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


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


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, _REPLICATED)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the first dimension) split over `data` and `fsdp`, whole along `tensor`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def laid_out(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Inside a `Program` on a mesh (or under `jax.set_mesh`): x with each dimension split over these of its axes.

    What flows between layers would else follow the weights that it meets, and each device would compute every row.
    Dimensions without axes are whole. Axes that do not divide a dimension are left out, the last ones first. Without a
    mesh, or on one whose axes are not `AxisType.Auto`, x is returned as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or set(mesh.axis_types) != {AxisType.Auto}:
        return x

    def fitted(size: int, wanted: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        wanted = (wanted,) if isinstance(wanted, str) else wanted or ()
        while wanted and size % math.prod(mesh.shape.get(axis, 1) for axis in wanted):
            wanted = wanted[:-1]
        return tuple(axis for axis in wanted if axis in mesh.shape) or None

    spec = PartitionSpec(*(fitted(size, wanted) for size, wanted in zip(x.shape, axes)))
    return jax.lax.with_sharding_constraint(x, spec)


def split_rows(batch: Any, parts: int) -> Any:
    """A tree of [B, ...] as a tree of [parts, B / parts, ...]; raises ValueError where B does not divide."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % parts:
        raise ValueError(f"{rows} rows cannot be split into {parts} equal parts")
    return jax.tree.map(lambda x: laid_out(x.reshape(parts, rows // parts, *x.shape[1:]), None, BATCH_AXES), batch)


def uneven_rows(mesh: Mesh, rows: int, key_path: str) -> str | None:
    """What to know where `rows` that go through at a time cannot be shared by all devices; None where they can."""
    shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows % shares == 0:
        return None
    return (
        f"{key_path}: {rows} rows go through at a time, which {shares} groups of devices cannot share evenly: some "
        f"compute the same; {shares * max(rows // shares, 1)} rows at a time would be shared"
    )


def check_batch(mesh: Mesh, rows: int, key_path: str) -> None:
    """Raises `UserError` where `rows`, set by `key_path`, cannot be split evenly over `data` and `fsdp`."""
    shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows % shares:
        below = rows - rows % shares
        fitting = f"{below} or {below + shares}" if below else f"{shares} or a multiple of it"
        raise UserError(
            f"{key_path}: {rows} rows cannot be split over {shares} devices (mesh.data {mesh.shape['data']} x "
            f"mesh.fsdp {mesh.shape['fsdp']}); {fitting} would fit"
        )


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


def place(mesh: Mesh, tree: Any) -> Any:
    """The same tree with each leaf where `tree_shardings` puts it, committed: its placement is part of a program.

    A leaf that lies there already is not copied: donating the result gives away the given tree's buffers too.
    """
    return jax.tree.map(_put, tree, tree_shardings(mesh, tree))


def place_batch(mesh: Mesh, tree: Any) -> Any:
    """The same tree with the rows of each leaf split over the mesh; scalars are replicated.

    Every process gives the whole batch and keeps its own share.
    """
    rows, whole = batch_sharding(mesh), replicated(mesh)
    return jax.tree.map(lambda leaf: _put(leaf, rows if getattr(leaf, "ndim", 0) else whole), tree)


def fetch(tree: Any) -> Any:
    """The tree as whole numpy arrays, on every process; those that are split over processes are gathered."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if leaf.is_fully_replicated:
                return np.asarray(leaf.addressable_data(0))
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    # Every process has the whole leaf: it takes its share. device_put would send it round to compare it first.
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
