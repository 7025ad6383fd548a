"""Two processes that play two hosts: a batch is shared out, a checkpoint of both is one, one of them writes."""

import os
import socket
import subprocess
import sys

HOST = """
import sys, jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
from jaxrlhf.config import MeshConfig
from jaxrlhf.runtime.checkpoints import Checkpoints
from jaxrlhf.runtime.mesh import make_mesh, place, place_batch

mesh = make_mesh(MeshConfig(data=-1, fsdp=2))
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}
up = {"kernel": np.arange(64, dtype=np.float32).reshape(8, 8), "bias": np.arange(8, dtype=np.float32)}
placed = place(mesh, {"layers.0.mlp.up_proj": up})
rows = place_batch(mesh, np.arange(16, dtype=np.float32).reshape(8, 2))
assert [shard.data.shape for shard in rows.addressable_shards] == [(2, 2), (2, 2)]
assert float(jax.jit(lambda x: x.sum())(rows)) == 120
with Checkpoints(sys.argv[3]) as checkpoints:
    assert checkpoints.latest_step() is None
    for step in (1, 2):
        checkpoints.save(step, {"up": placed, "position": step})
    assert checkpoints.latest_step() == 2
    found = checkpoints.restore(2, {"up": placed, "position": 0})
    assert found["position"] == 2
    for leaf, whole in zip(jax.tree.leaves(found["up"]), (up["bias"], up["kernel"])):
        assert not leaf.is_fully_addressable
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
print("ok")
"""


def test_two_hosts(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(rank), address, str(tmp_path)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for host in hosts:
            stdout, stderr = host.communicate(timeout=120)
            assert host.returncode == 0 and stdout.endswith("ok\n"), stderr
    finally:
        for host in hosts:
            host.kill()
