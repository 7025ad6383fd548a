"""Collectives and shares on 8 devices that the host plays in one process of its own; groups in each spelling."""


import pytest

from jaxrlhf.plan.collectives import first_group

EIGHT = """
import jax, jax.numpy as jnp, math
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxrlhf.config import AdapterConfig, RunConfig
from jaxrlhf.models.adapters import init_adapter
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.decoder import Decoder
from jaxrlhf.plan.collectives import collectives_of
from jaxrlhf.distributed.mesh import make_mesh
from jaxrlhf.models.sharding import shard
from jaxrlhf.stages.shapes import Shapes, bytes_per_device
from jaxrlhf.steps.ppo import init_ppo

config = RunConfig.model_validate({
    "run_dir": "runs/x", "stages": ["ppo"], "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    "model": {"new": {"hidden_size": 32}}, "ppo": {"data": {"path": "x"}},
})
mesh = make_mesh(config.mesh)

def of(function, *given, out):
    args = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, p)) for s, p in given]
    lowered = jax.jit(function, out_shardings=NamedSharding(mesh, out)).lower(*args)
    return collectives_of(lowered.compile().as_text(), mesh.shape, unknown_trips=(5,))

def only(found, kind):
    (exchange,) = found.values()
    assert list(found) == [kind], found
    return exchange.count, exchange.sent

def reduced(found):
    return sum(exchange.count for kind, exchange in found.items() if kind.startswith("all-reduce"))

# an all-gather of [256, 64] over fsdp: each sends its half once
assert only(of(lambda x: x * 2, ((256, 64), P("fsdp")), out=P()), "all-gather over fsdp") == (1, 256 * 64 * 4 / 2)

# a product summed over tensor, an all-reduce: twice (n - 1) / n of the result
found = of(lambda x, y: x @ y, ((64, 128), P(None, "tensor")), ((128, 32), P("tensor")), out=P())
assert only(found, "all-reduce over tensor") == (1, 64 * 32 * 4)

# the same over all 8
every = ("data", "fsdp", "tensor")
found = of(lambda x, y: x @ y, ((64, 128), P(None, every)), ((128, 64), P(every)), out=P())
assert only(found, "all-reduce over data+fsdp+tensor") == (1, 2 * 64 * 64 * 4 * 7 / 8)

# nine times in a loop, and as often as is said in one of unknown length
def inner(a, x, y):
    s = jax.lax.with_sharding_constraint(jnp.tanh(x + a[0, 0]) @ y, NamedSharding(mesh, P()))
    return jnp.tanh(a + s)
halves = ((64, 128), P(None, "tensor")), ((128, 64), P("tensor"))
nine = lambda x, y: jax.lax.fori_loop(0, 9, lambda i, a: inner(a, x, y), jnp.zeros((64, 64)))
assert 9 <= reduced(of(nine, *halves, out=P())) <= 10
late = lambda x, y: jax.lax.while_loop(lambda a: a[0, 0] < 0.5, lambda a: inner(a, x, y), jnp.zeros((64, 64)))
assert 5 <= reduced(of(late, *halves, out=P())) <= 6

# the shares that are summed are those of arrays that are placed
shape = DecoderConfig(vocab_size=96, hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=2, head_dim=8,
                      max_positions=64)
shapes = Shapes(config, mesh, shape)
def real(tree):
    first = mesh.devices.flat[0]
    leaves = [x for x in jax.tree.leaves(tree)]
    return sum(s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == first)
base = shard(mesh, Decoder(shape, jax.random.key(0)))
assert bytes_per_device(shapes.base) == real(base)
lora = AdapterConfig(rank=4)
policy, value = init_adapter(base, lora, jax.random.key(1)), init_adapter(base, lora, jax.random.key(2), "value")
state = shard(mesh, init_ppo(policy, value, config.ppo.update))
planned = shapes.sharded(jax.eval_shape(lambda p, v: init_ppo(p, v, config.ppo.update),
                                       shapes.adapter(lora), shapes.adapter(lora, "value")))
assert bytes_per_device(planned) == real(state)
assert jax.tree.map(jnp.shape, planned) == jax.tree.map(jnp.shape, state)
whole = sum(x.nbytes for x in jax.tree.leaves(base))
assert whole / 4 <= real(base) < whole / 3
print("ok")
"""


def test_collectives_and_shares(processes):
    result = processes.run("-c", EIGHT, devices=8)
    assert (result.output, result.errors) == ("ok\n", "")


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,1},{2,3}}", [0, 1]),
        ("replica_groups=[2,2]<=[4]", [0, 1]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [0, 2]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", [0, 2]),
        ("replica_groups=mesh['data'=2,'tensor'=2] {'tensor'}", [0, 1]),
        ("replica_groups=mesh['data'=2,'tensor'=2], device_ids=([2,2]T(1,0)) {'data'}", [0, 1]),
        ("replica_groups=mesh['data'=4] {'data':(2)2}", [0, 1]),
        ("replica_groups=mesh['data'=4] {'data':(1)2}", [0, 2]),
        ("replica_groups={}", [0, 1, 2, 3]),
        ("channel_id=1", [0, 1, 2, 3]),
        ("source_target_pairs={{2,2},{0,1},{1,0}}", [0, 1]),
    ],
    ids=["listed", "iota", "transposed", "first-axis", "named", "renumbered", "inner-part", "outer-part", "empty",
         "none", "pairs"],
)  # fmt: skip
def test_groups_in_each_spelling(text, group):
    assert first_group(text, 4) == group


def test_groups_in_an_unknown_spelling_are_no_guess():
    with pytest.raises(ValueError, match="unknown notation"):
        first_group("replica_groups=@everyone", 4)
