"""Sizes of the mesh, and where trees lie on 8 devices that the host plays in one process of its own."""


import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxrlhf.config import MeshConfig
from jaxrlhf.distributed.mesh import AXES, check_batch, make_mesh, make_meshes
from jaxrlhf.errors import UserError


def _abstract(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, 1, tensor), AXES, axis_types=(AxisType.Auto,) * 4)


class _Device:
    """Stands for a device where only their number counts."""


def _misfit(count: int, **sizes: int) -> str:
    with pytest.raises(UserError) as error:
        make_mesh(MeshConfig(**sizes), [_Device() for _ in range(count)])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_one_device():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_sizes_that_do_not_fit_say_which_would():
    assert _misfit(8, fsdp=3) == (
        "mesh.data=-1 x mesh.fsdp=3 x mesh.context=1 x mesh.tensor=1 does not fit 8 devices; the product mesh.fsdp x "
        "mesh.context x mesh.tensor must be one of 1, 2, 4, 8 (now 3); set mesh.data=-1 for the remaining devices"
    )
    assert _misfit(8, data=2, tensor=2) == (
        "mesh.data=2 x mesh.fsdp=1 x mesh.context=1 x mesh.tensor=2 does not fit 8 devices; the product mesh.fsdp x "
        "mesh.context x mesh.tensor must be one of 1, 2, 4, 8 (now 2); set mesh.data=-1 for the remaining devices"
    )
    assert "set mesh.tensor=-1 for" in _misfit(8, data=3, tensor=-1)
    assert "does not fit 1 device; " in _misfit(1, data=2)


def test_two_meshes_must_have_all_devices(monkeypatch):
    parts = {"rollout": {"data": 2, "tensor": 2}, "update": {"fsdp": 3}}
    with pytest.raises(UserError) as error:
        make_meshes(MeshConfig.model_validate(parts), [_Device() for _ in range(8)])
    assert str(error.value) == (
        "mesh.rollout has 4 devices and mesh.update 3, but together they must have all 8 devices; give sizes whose sum "
        "is 8"
    )
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"^mesh\.rollout: needs all devices in one process; leave mesh\.rollout and"):
        make_meshes(MeshConfig.model_validate(parts), [_Device() for _ in range(7)])


def test_batch_that_does_not_split_says_what_would():
    mesh = _abstract(2, 2, 2)
    check_batch(mesh, 8, "ppo.batch_size")
    with pytest.raises(UserError, match=r"^ppo\.batch_size: 6 rows cannot .* 4 devices .*; use 4 or 8 rows$"):
        check_batch(mesh, 6, "ppo.batch_size")
    with pytest.raises(UserError, match="use 4 or a multiple of 4 rows"):
        check_batch(mesh, 3, "ppo.batch_size")


EIGHT = """
import jax, jax.numpy as jnp, numpy as np, sys
from jaxrlhf.config import MeshConfig
from jaxrlhf.checkpoint.checkpoints import Checkpoints
from jaxrlhf.distributed.mesh import batch_sharding, make_mesh, shard_batch
from jaxrlhf.models.sharding import parameter_sharding, shard, tree_shardings
assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "context": 1, "tensor": 1}
mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
assert dict(make_mesh(MeshConfig(data=1, tensor=-1)).shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 8}
assert dict(make_mesh(MeshConfig(data=1, context=-1)).shape) == {"data": 1, "fsdp": 1, "context": 8, "tensor": 1}

up, down = jax.random.normal(jax.random.key(0), (2, 16, 32))
tree = {"layers.0.mlp.up_proj": {"kernel": up, "lora_scale": jnp.float32(2)},
        "layers.0.mlp.down_proj": {"kernel": down.T}}
tree = jax.tree.map(np.array, tree)  # a placed tree may share buffers with the one it comes from
placed = shard(mesh, tree)
up = placed["layers.0.mlp.up_proj"]["kernel"]
assert up.addressable_shards[0].data.shape == (8, 16)
assert up.sharding == parameter_sharding(mesh, "layers.0.mlp.up_proj/kernel", up.shape)
rows = shard_batch(mesh, {"x": np.arange(128.0, dtype=np.float32).reshape(8, 16), "n": np.float32(3)})
assert rows["x"].sharding == batch_sharding(mesh) and rows["x"].addressable_shards[0].data.shape == (2, 16)

def f(t, b):
    h = jnp.tanh(b["x"] @ t["layers.0.mlp.up_proj"]["kernel"]) * t["layers.0.mlp.up_proj"]["lora_scale"]
    return (h @ t["layers.0.mlp.down_proj"]["kernel"]).sum(-1) + b["n"]
np.testing.assert_allclose(jax.jit(f)(placed, rows), f(tree, jax.tree.map(np.asarray, rows)), rtol=1e-5)

# a checkpoint of 8 devices restores there, on another mesh, and after its buffers were given away
step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, placed)
    moved = step(placed)
    for target in (mesh, make_mesh(MeshConfig(data=1, fsdp=8))):
        shardings = tree_shardings(target, tree)
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
        found = checkpoints.restore(1, like)
        jax.tree.map(np.testing.assert_array_equal, found, tree)
        assert [x.sharding for x in jax.tree.leaves(found)] == [x.sharding for x in jax.tree.leaves(like)]
print("ok")
"""


def test_on_eight_devices(processes, tmp_path):
    result = processes.run("-c", EIGHT, tmp_path, devices=8)
    assert (result.output, result.errors) == ("ok\n", "")
