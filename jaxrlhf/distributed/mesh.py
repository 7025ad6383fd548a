"""The device mesh, and the sharding of batches on this mesh. `models.sharding` has the sharding of parameters.

The mesh has four axes. Along the axis `data`, each device has a copy of the base. The axis `fsdp` splits the rows of
weights, and each layer gathers its weights when it runs. The axis `context` splits the positions of long sequences. The
axis `tensor` splits attention heads and the MLP width. A batch is split over `data` and `fsdp`. All axes are
`AxisType.Auto`, so XLA inserts the collectives that the shardings of the arguments require.

`context` splits positions in scoring and training. Inside attention it splits heads, because each query needs all keys
(Ulysses, 2309.14509). Decoding has one position per row, so there `context` splits rows, as `data` does.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrlhf.config import MeshConfig
from jaxrlhf.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
POSITION_AXIS = "context"
HEAD_AXES = ("tensor", POSITION_AXIS)  # the heads inside attention over whole sequences

_rows_take_context = contextvars.ContextVar("rows_take_context", default=False)  # see `rows_over_context`


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh [data, fsdp, context, tensor] over `devices`. The default is the devices of all processes.

    Raises `UserError` if the mesh does not fit the number of devices, see `mesh_sizes`.
    """
    devices = list(jax.devices() if devices is None else devices)
    return _mesh_of(mesh_sizes(config, len(devices)), devices)


def make_meshes(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> tuple[Mesh, Mesh]:
    """Returns the meshes of `rollout` and `update`. The first devices sample, and the others learn.

    Raises `UserError` if the sizes of the two meshes do not add up to the number of devices, or if there are several
    processes, because arrays are sent from one mesh to the other.
    """
    devices = list(jax.devices() if devices is None else devices)
    shapes = [tuple(getattr(part, axis) for axis in AXES) for part in (config.rollout, config.update)]
    sizes = [math.prod(shape) for shape in shapes]
    if sum(sizes) != len(devices):
        raise UserError(
            f"mesh.rollout has {sizes[0]} devices and mesh.update {sizes[1]}, but together they must have all "
            f"{len(devices)} devices; give sizes whose sum is {len(devices)}"
        )
    if jax.process_count() > 1:
        raise UserError("mesh.rollout: needs all devices in one process; leave mesh.rollout and mesh.update out")
    return _mesh_of(shapes[0], devices[: sizes[0]]), _mesh_of(shapes[1], devices[sizes[0] :])


def _mesh_of(shape: Sequence[int], devices: Sequence[jax.Device]) -> Mesh:
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_sizes(config: MeshConfig, count: int) -> tuple[int, ...]:
    """Returns the sizes of the axes data, fsdp, context and tensor for `count` devices.

    If the config sets an axis to -1, the size of this axis is `count` divided by the other sizes. Raises `UserError` if
    the product of the sizes is not `count`.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = next((axis for axis in AXES if sizes[axis] == -1), "data")
    others = math.prod(size for axis, size in sizes.items() if axis != free)
    filled = sizes | {free: count // others} if sizes[free] == -1 else sizes
    if math.prod(filled.values()) != count:
        divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(
            f"{' x '.join(f'mesh.{axis}={size}' for axis, size in sizes.items())} does not fit {count} "
            f"device{'s' * (count != 1)}; the product "
            f"{' x '.join(f'mesh.{axis}' for axis in AXES if axis != free)} must be one of {divisors} (now {others}); "
            f"set mesh.{free}=-1 for the remaining devices"
        )
    return tuple(filled.values())


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts a full copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits rows (the first dimension) over `data` and `fsdp`.

    Devices along `context` and `tensor` have copies of the same rows.
    """
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


@contextlib.contextmanager
def rows_over_context() -> Iterator[None]:
    """Makes `context` split rows instead of positions in the code that is traced inside the block.

    If the rows cannot be split evenly, `context` copies them.
    """
    token = _rows_take_context.set(True)
    try:
        yield
    finally:
        _rows_take_context.reset(token)


def sampling_axes(sizes: Mapping[str, int], *counts: int) -> tuple[str, ...]:
    """Returns the mesh axes that split the rows of a rollout: `BATCH_AXES` and, if possible, `context`.

    `context` is among them if each of `counts` is a multiple of the number of devices along all these axes.
    """
    axes = (*BATCH_AXES, POSITION_AXIS)
    shares = math.prod(sizes.get(axis, 1) for axis in axes)
    return BATCH_AXES if any(count % shares for count in counts) else axes


def position_parts() -> int:
    """Returns the number of parts into which the function that is traced now splits the positions of a sequence."""
    return 1 if _rows_take_context.get() else traced_sizes().get(POSITION_AXIS, 1)


def traced_sizes() -> dict[str, int]:
    """Returns the sizes of the mesh axes over which `constrain` may split arrays, or {} if it splits no array."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or set(mesh.axis_types) != {AxisType.Auto}:
        return {}
    return dict(mesh.shape)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Returns x with each dimension split over the given mesh axes. Used in the functions of a `Program` with a mesh.

    Without this constraint, activations would have the sharding of the weights, and each device would compute every
    row. A dimension without axes is not split. If the axes of a dimension do not divide it, the last axes are dropped.
    If there is no mesh, or if the mesh has axes that are not `AxisType.Auto`, x is returned unchanged.
    """
    sizes = traced_sizes()
    if not sizes:
        return x

    spec = PartitionSpec(*(_dividing(sizes, size, names) or None for size, names in zip(x.shape, axes)))
    return jax.lax.with_sharding_constraint(x, spec)


def _dividing(sizes: Mapping[str, int], size: int, names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes among `names`. The last ones are left out until the product of the sizes divides `size`."""
    names = (names,) if isinstance(names, str) else names or ()
    if _rows_take_context.get():
        names = tuple(axis for axis in names if axis != POSITION_AXIS)
        names += (POSITION_AXIS,) * ("data" in names)
    while names and size % math.prod(sizes.get(axis, 1) for axis in names):
        names = names[:-1]
    return tuple(axis for axis in names if axis in sizes)


def batch_groups(rows: int) -> int:
    """Returns the number of groups of devices over which `constrain` splits `rows` rows along `BATCH_AXES`."""
    sizes = traced_sizes()
    return math.prod(sizes[axis] for axis in _dividing(sizes, rows, BATCH_AXES))


def take_positions(x: jax.Array, first: int, end: int | None) -> jax.Array:
    """Returns x[:, first:end] of an array [B,T,D] whose positions are split over `context`.

    To cut positions, D is split over `context` for a moment, so that no device holds the whole [T,D] of a row.
    """
    if position_parts() == 1:
        return x[:, first:end]
    taken = constrain(x, BATCH_AXES, None, POSITION_AXIS)[:, first:end]
    return constrain(constrain(taken, BATCH_AXES, None, POSITION_AXIS), BATCH_AXES, POSITION_AXIS)


def automatic_axes() -> dict[str, int]:
    """Returns the sizes of the mesh axes that have more than one device and over which XLA splits the program.

    Inside `jax.shard_map` there are no such axes: each device runs the traced code on its own part of the arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: size for axis, size in mesh.shape.items() if size > 1 and axis not in mesh.manual_axes}


def split_rows(batch: Any, parts: int) -> Any:
    """Reshapes each leaf [B, ...] of a tree to [parts, B / parts, ...].

    Raises ValueError if `parts` does not divide B.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % parts:
        raise ValueError(f"{rows} rows cannot be split into {parts} equal parts")
    return jax.tree.map(lambda x: constrain(x.reshape(parts, rows // parts, *x.shape[1:]), None, BATCH_AXES), batch)


def check_batch(mesh: Mesh, rows: int, key_path: str, section: str = "mesh") -> None:
    """Raises `UserError` if `rows` cannot be split evenly over `data` and `fsdp`.

    `rows` is the value of the setting `key_path`. `section` has the sizes of the mesh.
    """
    shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows % shares:
        below = rows - rows % shares
        sizes = f"{below} or {below + shares}" if below else f"{shares} or a multiple of {shares}"
        raise UserError(
            f"{key_path}: {rows} rows cannot be split over {shares} devices ({section}.data {mesh.shape['data']} x "
            f"{section}.fsdp {mesh.shape['fsdp']}); use {sizes} rows"
        )


def shard_batch(mesh: Mesh, tree: Any) -> Any:
    """Returns the tree on the mesh. The rows of each leaf are split over the mesh. Each device gets a copy of scalars.

    Every process passes the full batch.
    """
    rows, scalar = batch_sharding(mesh), replicated(mesh)
    return jax.tree.map(lambda leaf: put(leaf, rows if getattr(leaf, "ndim", 0) else scalar), tree)


def fetch(tree: Any) -> Any:
    """Returns the tree with full numpy arrays on every process. A leaf that is split over processes is gathered."""

    def full(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if leaf.is_fully_replicated:
                return np.asarray(leaf.addressable_data(0))
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(full, tree)


def finite_leaves(tree: Any) -> Any:
    """Returns a tree of bools: for each leaf, whether all its values are finite. All processes get the same result."""
    # One program runs at a time, because concurrent programs on several CPU devices may deadlock.
    return jax.tree.map(lambda leaf: bool(fetch(_is_finite(leaf))), tree)


@jax.jit
def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.floating) else jnp.bool_(True)


def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Puts the leaf on the devices with this sharding and returns it. Every process passes the full leaf."""
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    # With several processes, device_put would send the leaf to all processes for a comparison.
    full = np.asarray(leaf)
    return jax.make_array_from_callback(full.shape, sharding, lambda index: full[index])
