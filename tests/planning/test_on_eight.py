"""Collectives and shares on 8 devices that the host plays in one process of its own."""

import os
import subprocess
import sys

EIGHT = """
import jax, jax.numpy as jnp, math
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxrlhf.config import AdapterConfig, RunConfig
from jaxrlhf.models.adapters import init_adapter
from jaxrlhf.models.decoder import Decoder, DecoderConfig
from jaxrlhf.planning.compiling import _compile
from jaxrlhf.planning.count import Layout, count
from jaxrlhf.planning.hlo import parse
from jaxrlhf.planning.shapes import Shapes, bytes_per_device
from jaxrlhf.records import PPOState
from jaxrlhf.distributed.mesh import make_mesh, place
from jaxrlhf.steps.ppo import init_ppo

config = RunConfig.model_validate({
    "run_dir": "runs/x", "stages": ["ppo"], "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    "model": {"new": {"hidden_size": 32}}, "ppo": {"data": {"path": "x"}},
})
mesh = make_mesh(config.mesh)
layout = Layout(dict(mesh.shape), per_host=4)

def of(function, *given, out):
    args = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, p)) for s, p in given]
    lowered = jax.jit(function, out_shardings=NamedSharding(mesh, out)).lower(*args)
    return count(parse(_compile(lowered)[1]), layout)

def only(found, kind):
    (c,) = found.collectives
    assert c.kind == kind, c
    return c

# an all-gather of [256, 64] over fsdp: each sends its half once; the groups lie on one host
c = only(of(lambda x: x * 2, ((256, 64), P("fsdp")), out=P()), "all-gather")
assert (c.axes, c.size, c.hosts, c.count) == ("fsdp", 2, 1, 1), c
assert (c.bytes, c.wire) == (256 * 64 * 4, 256 * 64 * 4 / 2), c

# a product summed over tensor, an all-reduce: twice (n - 1) / n of the result
found = of(lambda x, y: x @ y, ((64, 128), P(None, "tensor")), ((128, 32), P("tensor")), out=P())
c = only(found, "all-reduce")
assert (c.axes, c.bytes, c.wire) == ("tensor", 64 * 32 * 4, 64 * 32 * 4), c
assert found.flops == 2 * 64 * 32 * 128 / 2

# the same over all 8, across two hosts, nine times in a loop
def loop(x, y):
    return jax.lax.fori_loop(0, 9, lambda i, a: a + jnp.tanh(a) @ (x @ y), jnp.eye(64))
every = ("data", "fsdp", "tensor")
c = only(of(lambda x, y: x @ y, ((64, 128), P(None, every)), ((128, 64), P(every)), out=P()), "all-reduce")
assert (c.size, c.hosts, c.wire) == (8, 2, 2 * 64 * 64 * 4 * 7 / 8), c
def gathered(x, y):
    return jax.lax.scan(lambda a, k: (jnp.tanh(a @ k), None), x, y)[0]
found = of(gathered, ((64, 128), P()), ((9, 128, 128), P(None, "fsdp")), out=P())
assert 9 * 2 * 64 * 128 * 128 / found.flops in (1, 2, 4, 8), found.flops
assert 9 in {c.count for c in found.collectives} <= {1, 9}, found.collectives

# the shares that are summed are those of arrays that are placed
shape = DecoderConfig(vocab_size=96, hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=2, head_dim=8,
                      max_positions=64)
shapes = Shapes(config, mesh, shape)
def real(tree):
    first = mesh.devices.flat[0]
    leaves = [x for x in jax.tree.leaves(tree)]
    return sum(s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == first)
base = place(mesh, Decoder(shape, jax.random.key(0)))
assert bytes_per_device(shapes.base()) == real(base)
lora = AdapterConfig(rank=4)
policy, value = init_adapter(base, lora, jax.random.key(1)), init_adapter(base, lora, jax.random.key(2), "value")
state = place(mesh, init_ppo(policy, value, config.ppo.update))
planned = shapes.placed(jax.eval_shape(lambda p, v: init_ppo(p, v, config.ppo.update),
                                       shapes.adapter(lora), shapes.adapter(lora, "value")))
assert bytes_per_device(planned) == real(state)
assert jax.tree.map(jnp.shape, planned) == jax.tree.map(jnp.shape, state)
whole = sum(x.nbytes for x in jax.tree.leaves(base))
assert whole / 4 <= real(base) < whole / 3
print("ok")
"""


def test_collectives_and_shares():
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", EIGHT], capture_output=True, text=True, env=env)
    assert (result.stdout, result.stderr) == ("ok\n", "")
