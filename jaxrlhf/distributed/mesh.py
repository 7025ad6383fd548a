"""The device mesh, and how batches lie on it. The parameters' table is in `models.sharding`.

Axes: `data` holds copies of the base, `fsdp` splits weights by rows (gathered layer by layer), `tensor` splits
layers by heads and MLP width. A batch is split over `data` and `fsdp`. All axes are `AxisType.Auto`: XLA places
the collectives, the shardings of the arguments say the rest.
"""

import math
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


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh [data, fsdp, tensor] over `devices`, by default all of every process; `UserError` as in `mesh_sizes`."""
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_sizes(config, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_sizes(config: MeshConfig, count: int) -> tuple[int, ...]:
    """Sizes of the axes data, fsdp and tensor over so many devices.

    An axis of -1 takes the devices that the others leave. Raises `UserError` where the product is not their number.
    """
    given = {axis: getattr(config, axis) for axis in AXES}
    filler = next((axis for axis in AXES if given[axis] == -1), "data")
    others = math.prod(size for axis, size in given.items() if axis != filler)
    sizes = given | {filler: count // others} if given[filler] == -1 else given
    if math.prod(sizes.values()) != count:
        fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(
            f"{' x '.join(f'mesh.{axis}={size}' for axis, size in given.items())} does not fit {count} "
            f"device{'s' * (count != 1)}: with mesh.{filler}=-1, which takes what the others leave, "
            f"{' x '.join(f'mesh.{axis}' for axis in AXES if axis != filler)} is {others} and must be one of {fitting}"
        )
    return tuple(sizes.values())


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the first dimension) split over `data` and `fsdp`, whole along `tensor`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
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
    return jax.tree.map(lambda x: constrain(x.reshape(parts, rows // parts, *x.shape[1:]), None, BATCH_AXES), batch)


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


def shard_batch(mesh: Mesh, tree: Any) -> Any:
    """The same tree with the rows of each leaf split over the mesh; scalars are replicated.

    Every process gives the whole batch and keeps its own share.
    """
    rows, whole = batch_sharding(mesh), replicated(mesh)
    return jax.tree.map(lambda leaf: put(leaf, rows if getattr(leaf, "ndim", 0) else whole), tree)


def fetch(tree: Any) -> Any:
    """The tree as whole numpy arrays, on every process; those that are split over processes are gathered."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if leaf.is_fully_replicated:
                return np.asarray(leaf.addressable_data(0))
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """The leaf as it shall lie; every process gives all of it."""
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    # Every process has the whole leaf: it takes its share. device_put would send it round to compare it first.
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
