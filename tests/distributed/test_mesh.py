"""Where parameters and batches lie, on 8 devices that the host plays in one process of its own."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxrlhf.config import MeshConfig
from jaxrlhf.distributed import mesh as module
from jaxrlhf.distributed.mesh import check_batch, leaf_name, make_mesh, parameter_sharding, place, tree_shardings
from jaxrlhf.errors import UserError


def _abstract(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), module.AXES, axis_types=(AxisType.Auto,) * 3)


class _Device:
    """Stands for a device where only their number counts."""


def _misfit(count: int, **sizes: int) -> str:
    with pytest.raises(UserError) as error:
        make_mesh(MeshConfig(**sizes), [_Device() for _ in range(count)])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_one_device():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_sizes_that_do_not_fit_say_which_would():
    assert _misfit(8, fsdp=3) == (
        "mesh.data=-1 x mesh.fsdp=3 x mesh.tensor=1 does not fit 8 devices: mesh.fsdp x mesh.tensor is 3 and must be "
        "one of 1, 2, 4, 8"
    )
    assert _misfit(8, data=2, tensor=2) == (
        "mesh.data=2 x mesh.fsdp=1 x mesh.tensor=2 is 4, but there are 8 devices: mesh.data=4 or mesh.fsdp=2 or "
        "mesh.tensor=4 would fit, and so would mesh.data=-1 with mesh.fsdp x mesh.tensor one of 1, 2, 4, 8"
    )
    assert "there is 1 device:" in _misfit(1, data=2)


# name, shape, axes on data=2 x fsdp=2 x tensor=2
TABLE = [
    ("embed_tokens/embedding", (96, 64), ("tensor", "fsdp")),
    ("lm_head/kernel", (64, 96), ("fsdp", "tensor")),
    ("layers.0.attention.q_proj/kernel", (64, 64), ("fsdp", "tensor")),
    ("layers.11.attention.k_proj/kernel", (64, 32), ("fsdp", "tensor")),
    ("layers.11.attention.v_proj/kernel", (64, 32), ("fsdp", "tensor")),
    ("layers.0.attention.o_proj/kernel", (64, 64), ("tensor", "fsdp")),
    ("layers.0.mlp.gate_proj/kernel", (64, 128), ("fsdp", "tensor")),
    ("layers.0.mlp.up_proj/kernel", (64, 128), ("fsdp", "tensor")),
    ("layers.0.mlp.down_proj/kernel", (128, 64), ("tensor", "fsdp")),
    ("layers.0.mlp.up_proj/kernel_int8", (64, 128), ("fsdp", "tensor")),
    ("layers.0.mlp.down_proj/kernel_nf4", (64, 64), ("tensor", "fsdp")),
    ("layers.0.mlp.down_proj/kernel_scale", (3, 64), (None, "fsdp")),
    ("layers.0.attention.q_proj/bias", (64,), ()),
    ("layers.0.attention_norm/scale", (64,), ()),
    ("layers.0.attention.q_norm/scale", (16,), ()),
    ("final_norm/scale", (64,), ()),
    ("score/kernel", (64, 1), ()),
    ("layers.0.attention.q_proj/lora_a", (64, 8), ("fsdp",)),
    ("layers.0.attention.q_proj/lora_b", (8, 64), (None, "tensor")),
    ("layers.0.mlp.down_proj/lora_a", (64, 8), ("tensor",)),
    ("layers.0.mlp.down_proj/lora_b", (8, 64), (None, "fsdp")),
    ("layers.0.mlp.down_proj/lora_scale", (), ()),
    ("1.0.mu.layers.0.mlp.down_proj/kernel", (128, 64), ("tensor", "fsdp")),  # in an optimizer state
    ("policy_optimizer.count", (), ()),
]


@pytest.mark.parametrize(("name", "shape", "axes"), TABLE)
def test_table(name, shape, axes):
    assert parameter_sharding(_abstract(2, 2, 2), name, shape).spec == PartitionSpec(*axes)


def test_axis_that_does_not_divide_is_left_out():
    mesh = _abstract(1, 2, 4)
    assert parameter_sharding(mesh, "lm_head/kernel", (64, 97)).spec == PartitionSpec("fsdp", None)
    assert parameter_sharding(mesh, "lm_head/kernel", (63, 96)).spec == PartitionSpec(None, "tensor")


@pytest.mark.parametrize("name", ["layers.0.attention.qkv_proj/kernel", "layers.0.conv/kernel", "myscore/kernel", "x"])
def test_name_that_no_row_covers_is_an_error(name):
    with pytest.raises(ValueError, match=f"no row of PARAMETER_AXES covers the parameter '{name}'"):
        parameter_sharding(_abstract(1, 1, 1), name, (4, 4))


def test_shape_with_too_few_dimensions_is_an_error():
    with pytest.raises(ValueError, match=r"has shape \(4,\), but its axes are"):
        parameter_sharding(_abstract(1, 1, 1), "lm_head/kernel", (4,))


def test_no_row_hides_another():
    for name, _, _ in TABLE[:-1]:
        rows = [p for p, _ in module.PARAMETER_AXES if module.re.search(rf"(^|[./]){p}$", name)]
        assert len(rows) == 1, (name, rows)


def test_batch_that_does_not_split_says_what_would():
    mesh = _abstract(2, 2, 2)
    check_batch(mesh, 8, "ppo.batch_size")
    with pytest.raises(UserError, match=r"^ppo\.batch_size: 6 rows cannot .* 4 devices .*; 4 or 8 would fit$"):
        check_batch(mesh, 6, "ppo.batch_size")
    with pytest.raises(UserError, match="4 or a multiple of it would fit"):
        check_batch(mesh, 3, "ppo.batch_size")


def test_trees_are_named_by_their_paths():
    adapter = {"layers.0.mlp.up_proj": {"kernel": jnp.ones((4, 4))}, "score": {"kernel": jnp.ones((4, 1))}}
    state = optax.adamw(1e-3).init(adapter)
    both = {"policy": adapter, "optimizer": state}
    names = {leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(both)}
    assert {name for name in names if "up_proj" in name} == {
        "policy.layers.0.mlp.up_proj/kernel",
        "optimizer.0.mu.layers.0.mlp.up_proj/kernel",
        "optimizer.0.nu.layers.0.mlp.up_proj/kernel",
    }
    mesh = _abstract(1, 2, 2)
    specs = {leaf_name(p): s.spec for p, s in jax.tree_util.tree_leaves_with_path(tree_shardings(mesh, state))}
    assert specs["0.nu.layers.0.mlp.up_proj/kernel"] == PartitionSpec("fsdp", "tensor")
    assert specs["0/count"] == PartitionSpec()
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    placed = place(one, state)
    assert all(leaf.committed for leaf in jax.tree.leaves(placed))


def test_every_parameter_of_the_decoder_has_a_row():
    decoder = pytest.importorskip("jaxrlhf.models.decoder", exc_type=ImportError)
    config = decoder.DecoderConfig(
        vocab_size=32, hidden_size=16, layers=2, heads=4, kv_heads=2, head_dim=4, intermediate_size=32, max_positions=64
    )
    abstract = decoder.abstract_decoder(config)
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract)]
    assert sorted(names) == sorted(decoder.named_parameters(abstract))
    shardings = jax.tree.leaves(tree_shardings(_abstract(1, 2, 2), abstract))
    split = {name for name, s in zip(names, shardings) if s.spec != PartitionSpec()}
    assert split == {name for name in names if not name.endswith("scale")}


EIGHT = """
import jax, jax.numpy as jnp, numpy as np, sys
from jaxrlhf.config import MeshConfig
from jaxrlhf.checkpoint.checkpoints import Checkpoints
from jaxrlhf.distributed.mesh import *
assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
assert dict(make_mesh(MeshConfig(data=1, tensor=-1)).shape) == {"data": 1, "fsdp": 1, "tensor": 8}

up, down = jax.random.normal(jax.random.key(0), (2, 16, 32))
tree = {"layers.0.mlp.up_proj": {"kernel": up, "lora_scale": jnp.float32(2)},
        "layers.0.mlp.down_proj": {"kernel": down.T}}
tree = jax.tree.map(np.array, tree)  # a placed tree may share buffers with the one it comes from
placed = place(mesh, tree)
up = placed["layers.0.mlp.up_proj"]["kernel"]
assert up.addressable_shards[0].data.shape == (8, 16)
assert up.sharding == parameter_sharding(mesh, "layers.0.mlp.up_proj/kernel", up.shape)
rows = place_batch(mesh, {"x": np.arange(128.0, dtype=np.float32).reshape(8, 16), "n": np.float32(3)})
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


def test_on_eight_devices(tmp_path):
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", EIGHT, str(tmp_path)], capture_output=True, text=True, env=env)
    assert (result.stdout, result.stderr) == ("ok\n", "")
