"""One table places each parameter: by its name, in modules, adapters and optimizer states."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxrlhf.config import MeshConfig
from jaxrlhf.distributed.mesh import AXES, make_mesh
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import abstract_decoder, named_parameters
from jaxrlhf.models.sharding import PARAMETER_AXES, leaf_name, parameter_sharding, shard, tree_shardings


def _abstract(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, 1, tensor), AXES, axis_types=(AxisType.Auto,) * 4)


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
    with pytest.raises(ValueError, match=f"parameter '{name}' matches no row of PARAMETER_AXES"):
        parameter_sharding(_abstract(1, 1, 1), name, (4, 4))


def test_shape_with_too_few_dimensions_is_an_error():
    with pytest.raises(ValueError, match=r"at least 2 dimensions, not the shape \(4,\)"):
        parameter_sharding(_abstract(1, 1, 1), "lm_head/kernel", (4,))


def test_no_row_hides_another():
    for name, _, _ in TABLE[:-1]:
        rows = [p for p, _ in PARAMETER_AXES if re.search(rf"(^|[./]){p}$", name)]
        assert len(rows) == 1, (name, rows)


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
    placed = shard(one, state)
    assert all(leaf.committed for leaf in jax.tree.leaves(placed))


def test_every_parameter_of_the_decoder_has_a_row():
    config = DecoderConfig(
        vocab_size=32, hidden_size=16, layers=2, heads=4, kv_heads=2, head_dim=4, intermediate_size=32, max_positions=64
    )
    abstract = abstract_decoder(config)
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract)]
    assert sorted(names) == sorted(named_parameters(abstract))
    shardings = jax.tree.leaves(tree_shardings(_abstract(1, 2, 2), abstract))
    split = {name for name, s in zip(names, shardings) if s.spec != PartitionSpec()}
    assert split == {name for name in names if not name.endswith("scale")}
