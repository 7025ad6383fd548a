"""The device mesh, and the sharding of batches on it. `models.sharding` has the sharding of parameters.

The axis `data` holds copies of the base. `fsdp` splits weights by rows, which are gathered layer by layer. `tensor`
splits layers by attention heads and MLP width. A batch is split over `data` and `fsdp`. All axes are `AxisType.Auto`:
XLA inserts the collectives that the shardings of the arguments require.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrlhf.config import MeshConfig
from jaxrlhf.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh [data, fsdp, tensor] over `devices`, by default those of all processes.

    Raises `UserError` as `mesh_sizes` does.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_sizes(config, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_sizes(config: MeshConfig, count: int) -> tuple[int, ...]:
    """Returns the sizes of the axes data, fsdp and tensor; `UserError` if their product is not `count`, the devices.

    An axis of size -1 gets the devices that the other axes leave.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = next((axis for axis in AXES if sizes[axis] == -1), "data")
    others = math.prod(size for axis, size in sizes.items() if axis != free)
    filled = sizes | {free: count // others} if sizes[free] == -1 else sizes
    if math.prod(filled.values()) != count:
        divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(
            f"{' x '.join(f'mesh.{axis}={size}' for axis, size in sizes.items())} does not fit {count} "
            f"device{'s' * (count != 1)}: with mesh.{free}=-1, which takes what the others leave, "
            f"{' x '.join(f'mesh.{axis}' for axis in AXES if axis != free)} is {others} and must be one of {divisors}"
        )
    return tuple(filled.values())


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts a full copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that splits rows (the first dimension) over `data` and `fsdp`, and replicates over `tensor`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Returns x with each dimension split over the given mesh axes; for use inside a `Program` on a mesh.

    Without this constraint activations would follow the sharding of the weights, and each device would compute every
    row. Dimensions without axes are not split. Axes that do not divide a dimension are dropped, the last ones first.
    Without a mesh, or on a mesh whose axes are not `AxisType.Auto`, x is returned unchanged.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or set(mesh.axis_types) != {AxisType.Auto}:
        return x

    def dividing(size: int, names: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        names = (names,) if isinstance(names, str) else names or ()
        while names and size % math.prod(mesh.shape.get(axis, 1) for axis in names):
            names = names[:-1]
        return tuple(axis for axis in names if axis in mesh.shape) or None

    spec = PartitionSpec(*(dividing(size, names) for size, names in zip(x.shape, axes)))
    return jax.lax.with_sharding_constraint(x, spec)


def split_rows(batch: Any, parts: int) -> Any:
    """Reshapes each leaf [B, ...] of a tree to [parts, B / parts, ...]; ValueError if `parts` does not divide B."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % parts:
        raise ValueError(f"{rows} rows cannot be split into {parts} equal parts")
    return jax.tree.map(lambda x: constrain(x.reshape(parts, rows // parts, *x.shape[1:]), None, BATCH_AXES), batch)


def check_batch(mesh: Mesh, rows: int, key_path: str) -> None:
    """Raises `UserError` if `rows`, the setting at `key_path`, cannot be split evenly over `data` and `fsdp`."""
    shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows % shares:
        below = rows - rows % shares
        sizes = f"{below} or {below + shares}" if below else f"{shares} or a multiple of it"
        raise UserError(
            f"{key_path}: {rows} rows cannot be split over {shares} devices (mesh.data {mesh.shape['data']} x "
            f"mesh.fsdp {mesh.shape['fsdp']}); {sizes} would fit"
        )


def shard_batch(mesh: Mesh, tree: Any) -> Any:
    """Returns the tree with the rows of each leaf split over the mesh, and scalars replicated.

    Every process passes the full batch.
    """
    rows, scalar = batch_sharding(mesh), replicated(mesh)
    return jax.tree.map(lambda leaf: put(leaf, rows if getattr(leaf, "ndim", 0) else scalar), tree)


def fetch(tree: Any) -> Any:
    """Returns the tree with full numpy arrays on every process; leaves that are split over processes are gathered."""

    def full(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if leaf.is_fully_replicated:
                return np.asarray(leaf.addressable_data(0))
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(full, tree)


def finite_leaves(tree: Any) -> Any:
    """Returns a tree of bools, the same on every process: whether all values of each leaf are finite."""
    # One program at a time: on a CPU, programs of several devices that run beside each other may deadlock.
    return jax.tree.map(lambda leaf: bool(fetch(_is_finite(leaf))), tree)


@jax.jit
def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.floating) else jnp.bool_(True)


def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Places a leaf with this sharding; every process passes the full leaf."""
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    # With several processes, device_put would send the leaf to all of them to compare it.
    full = np.asarray(leaf)
    return jax.make_array_from_callback(full.shape, sharding, lambda index: full[index])
